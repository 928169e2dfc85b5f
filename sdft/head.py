"""The LM head of a model, as the parts that a loss on hidden states needs.

Some architectures do more between hidden states and logits than one matrix product: they scale
(Cohere, Granite) or cap (Gemma). What is known is read from the configuration, and the first use
checks on a few tokens that the parts give the model's own logits.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import PreTrainedModel

from sdft.packable import backbone, close, why_not_packable
from sdft.rollout import evaluation_mode
from sdft.sharding import gathered, is_shard, is_sharded, whole

log = logging.getLogger(__name__)

SCALES: dict[str, Callable[[float], float]] = {
    "logit_scale": lambda scale: scale,  # Cohere
    "logits_scaling": lambda divisor: 1 / divisor,  # Granite
    "lm_head_multiplier": lambda scale: scale,  # Falcon-H1
}
"""Configuration keys that scale the logits, and the factor that they mean."""
SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
"""Configuration keys that cap the logits: Gemma, RecurrentGemma, xLSTM."""
_VERIFIED: WeakKeyDictionary[PreTrainedModel, bool] = WeakKeyDictionary()
_TRIAL = (5, 6, 7, 8, 4, 9)  # token ids


@dataclass(frozen=True, eq=False)
class Head:
    """What makes logits of hidden states: first the product, then the scale, then the cap.

    Attributes:
        weight_VD: May be tied to the embedding.
        bias_V: None where the head has none.
        scale: Factor of the product, its bias included.
        softcap: Logits become softcap·tanh(logits / softcap).
    """

    weight_VD: Tensor
    bias_V: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits of hidden states, `[…, D]` → `[…, V]`."""
        logits = linear(hidden, self.weight_VD, self.bias_V)
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.softcap is None else self.softcap * (logits / self.softcap).tanh()

    def gathered(self, dtype: torch.dtype | None = None) -> Head:
        """The same with whole weights, without a gradient, where these are shards.

        Args:
            dtype: Gather shards in this type: a collective call.
        """
        if not is_shard(self.weight_VD):
            return self
        weight_VD = gathered(self.weight_VD.detach().to(dtype))
        bias_V = None if self.bias_V is None else gathered(self.bias_V.detach().to(dtype))
        return replace(self, weight_VD=weight_VD, bias_V=bias_V)


def head(model: PreTrainedModel) -> Head | None:
    """The parts of the model's LM head; None where they do not give the model's logits.

    Whoever gets None takes the model's own logits (`sdft.scoring`); a warning says so, once per
    model. The check runs once per model and draws no random numbers. Of a sharded model the parts
    are whole inside `forwarded` and `whole` alone; the first use is a collective call, outside
    both.
    """
    if model not in _VERIFIED:
        with whole(model):
            found = _parts(model)
            _VERIFIED[model] = found is not None and _gives_the_logits(model, found)
            if is_sharded(model):  # asked here, for later not every process may need to know
                why_not_packable(model)
        if not _VERIFIED[model]:
            log.warning(
                "the LM head of %s is of no known form: its whole logits are computed",
                type(model).__name__,
            )
    return _parts(model) if _VERIFIED[model] else None


def gathered_head(model: PreTrainedModel, dtype: torch.dtype | None = None) -> Head | None:
    """The parts of a model's head without a gradient, whole wherever they are asked for.

    Args:
        model: Its head may be sharded: a collective call then.
        dtype: Gather a sharded head in this type.
    """
    found = head(model)
    return None if found is None else found.gathered(dtype)


def _parts(model: PreTrainedModel) -> Head | None:
    """As the configuration has them; None for a head that is no plain matrix."""
    layer: Any = model.get_output_embeddings()
    if backbone(model) is None or not isinstance(layer, nn.Linear):
        return None
    config = model.config.get_text_config()
    scale = 1.0
    for key, factor in SCALES.items():
        if (value := getattr(config, key, None)) is not None:
            scale *= factor(float(value))
    caps = (getattr(config, key, None) for key in SOFTCAPS)
    softcap = next((float(cap) for cap in caps if cap is not None), None)
    return Head(layer.weight, layer.bias, scale, softcap)


@torch.no_grad()
def _gives_the_logits(model: PreTrainedModel, parts: Head) -> bool:
    body = backbone(model)
    assert body is not None
    vocabulary = parts.weight_VD.shape[0]
    ids = torch.tensor([[token % vocabulary for token in _TRIAL]], device=parts.weight_VD.device)
    try:
        with evaluation_mode(model):
            expected = model(input_ids=ids, use_cache=False).logits
            found = parts.logits(body(input_ids=ids, use_cache=False).last_hidden_state)
        return expected.shape == found.shape and close(found, expected)
    except (RuntimeError, ValueError, TypeError, AttributeError):
        return False
