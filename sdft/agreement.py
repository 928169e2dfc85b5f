"""How far the log-probabilities that a rollout was drawn with are from the student's own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from sdft.rollout import Rollout, evaluation_mode
from sdft.scoring import completion_logits

_ROWS, _TOKENS = 4, 64  # enough to tell another model by, and small for any vocabulary


@torch.no_grad()
def logp_difference(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    rollout: Rollout,
    temperature: float,
    pad_id: int,
) -> float:
    """Mean absolute difference over the first tokens of a few rows, in nats per token.

    Args:
        model: The student.
        prompts: B prompts, unpadded.
        rollout: B completions with log-probabilities, drawn from the whole vocabulary.
        temperature: What they were drawn at.
        pad_id: Fills the padding.
    """
    assert rollout.logps_BT is not None
    few = Rollout(
        rollout.ids_BT[:_ROWS, :_TOKENS],
        rollout.mask_BT[:_ROWS, :_TOKENS],
        rollout.truncated_B[:_ROWS],
    )
    with evaluation_mode(model):
        logits_BTV = completion_logits(model, prompts[:_ROWS], few, pad_id).float()
    logps_BTV = (logits_BTV / temperature).log_softmax(-1)
    logps_BT = logps_BTV.gather(-1, few.ids_BT[..., None]).squeeze(-1)
    apart_BT = (logps_BT - rollout.logps_BT[:_ROWS, :_TOKENS]).abs()
    return float(apart_BT[few.mask_BT].mean())
