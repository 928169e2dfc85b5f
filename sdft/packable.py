"""Running a model's backbone over packed sequences, and whether it can: tried once, on few tokens.

Attention is ours there (`sdft.attention`), and positions are given. What mixes neighbours in
another way (recurrence, convolution), or takes positions or masks from elsewhere, cannot be packed.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Sequence
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sdft import flash
from sdft.attention import NotPackable, packed
from sdft.rollout import evaluation_mode
from sdft.segments import Segments

log = logging.getLogger(__name__)

LAYER_TYPES = {"full_attention", "sliding_attention"}
TOLERANCE, ROUGH_TOLERANCE = 1e-4, 5e-2  # relative to the largest value; of fp32, of halves, TF32
_TRIAL = ((5, 6, 7), (8, 7, 6, 5, 4), (4, 9, 5, 8, 6), (7, 5, 9, 6, 8, 4, 3))  # token ids
_REASONS: WeakKeyDictionary[PreTrainedModel, str] = WeakKeyDictionary()


def backbone(model: PreTrainedModel) -> PreTrainedModel | None:
    """The model without its LM head; None where they are one."""
    body: PreTrainedModel = model.base_model  # type: ignore[assignment]
    return None if body is model else body


def packed_hidden(model: PreTrainedModel, ids_N: Tensor, segments: Segments) -> Tensor:
    """The backbone's hidden states, `[N, D]`, each sequence by itself.

    Raises:
        NotPackable: The model attends in another way, or not through transformers' interface.
    """
    body = backbone(model)
    assert body is not None
    with packed(body, segments) as this:
        # A mask that hides nothing, for without one some models look for padding.
        output = body(
            input_ids=ids_N[None],
            attention_mask=torch.ones_like(ids_N)[None],
            position_ids=segments.positions_N[None],
            use_cache=False,
        )
    if this.calls == 0:
        raise NotPackable("its attention does not go through transformers' interface")
    hidden_ND: Tensor = output.last_hidden_state[0]
    return hidden_ND


def why_not_packable(model: PreTrainedModel) -> str | None:
    """Why the model cannot run over packed sequences; None: it can. Tried on first use.

    The trial draws no random numbers. A reason is logged as a warning, once per model.
    """
    if model not in _REASONS:
        _REASONS[model] = reason = _reason(model)
        if reason:
            log.warning("%s is scored with padding: %s", type(model).__name__, reason)
    return _REASONS[model] or None


def _reason(model: PreTrainedModel) -> str:
    body = backbone(model)
    if body is None:
        return "it has no backbone apart from its head"
    if "position_ids" not in inspect.signature(body.forward).parameters:
        return "it takes no positions"
    others = set(getattr(model.config.get_text_config(), "layer_types", None) or ()) - LAYER_TYPES
    if others or getattr(model, "_is_stateful", False):
        return f"it has layers of the type {', '.join(sorted(others)) or 'recurrent'}"
    try:
        same = _try(model, body)
    except NotPackable as error:
        return str(error)
    except (RuntimeError, ValueError, TypeError, AttributeError) as error:
        return f"trying to pack fails with {type(error).__name__}: {error}"
    return "" if same else "its hidden states depend on what else is packed"


@torch.no_grad()
def _try(model: PreTrainedModel, body: PreTrainedModel) -> bool:
    """Whether packed sequences come out as each does alone."""
    device = next(body.parameters()).device
    vocabulary = model.config.get_text_config().vocab_size
    rows = [[token % vocabulary for token in row] for row in _TRIAL]
    ids_N = torch.tensor([token for row in rows for token in row], device=device)
    with evaluation_mode(model):
        together = packed_hidden(model, ids_N, Segments.of(map(len, rows), device))
        alone = torch.cat([_alone(body, row, device) for row in rows])
    return close(together, alone)


def _alone(body: PreTrainedModel, row: Sequence[int], device: torch.device) -> Tensor:
    hidden: Tensor = body(torch.tensor([row], device=device), use_cache=False).last_hidden_state[0]
    return hidden


def close(found: Tensor, expected: Tensor) -> bool:
    """Whether two results of a model agree as far as its precision allows."""
    rough = flash.half_dtype(found.device, found.dtype) is not None or (
        found.is_cuda and torch.get_float32_matmul_precision() != "highest"
    )
    limit = (ROUGH_TOLERANCE if rough else TOLERANCE) * expected.abs().max()
    return bool((found - expected).abs().max() <= limit)
