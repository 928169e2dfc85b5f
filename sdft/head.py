"""The LM head of a model, as the parts that a loss on hidden states needs.

Some architectures do more between hidden states and logits than one matrix product: they scale
(Cohere, Granite) or cap (Gemma). What is known is read from the configuration, and the first use
checks on a few tokens that the parts give the model's own logits.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import PreTrainedModel

from sdft.packable import backbone, close
from sdft.rollout import evaluation_mode

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


def head(model: PreTrainedModel) -> Head | None:
    """The parts of the model's LM head; None where they do not give the model's logits.

    Whoever gets None takes the model's own logits (`sdft.scoring`); a warning says so, once per
    model. The check runs once per model and draws no random numbers.
    """
    found = _parts(model)
    if model not in _VERIFIED:
        _VERIFIED[model] = found is not None and _gives_the_logits(model, found)
        if not _VERIFIED[model]:
            log.warning(
                "the LM head of %s is of no known form: its whole logits are computed",
                type(model).__name__,
            )
    return found if _VERIFIED[model] else None


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
