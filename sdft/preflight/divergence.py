"""How far the teacher is from the student on the student's own tokens: the loss at its start."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sdft.batch import pad
from sdft.encoded import Encoded
from sdft.evaluation import Response
from sdft.head_losses import head_divergence
from sdft.losses import token_divergence
from sdft.packing import unpack
from sdft.preflight.gap import Mean
from sdft.rollout import Rollout, evaluation_mode
from sdft.states import heads_known, states
from sdft.student import StudentModule


@torch.no_grad()
def rollout_divergence(
    module: StudentModule, items: Sequence[Encoded], answers: Sequence[Response], rows: int
) -> Mean | None:
    """Divergence per token between the model's two views, averaged over answers, in nats.

    The model before training is both student and teacher, so what is measured is what the
    demonstration changes. Direction, temperature and the tokens left out are the method's.

    Args:
        module: Holds the model.
        items: The examples.
        answers: A rollout of each.
        rows: How many go through the model at once.

    Returns:
        None where no answer is long enough to have a token that counts.
    """
    order = sorted(range(len(items)), key=lambda i: len(items[i].teacher_ids) + answers[i].tokens)
    values: list[float] = []
    with evaluation_mode(module.model), module.forward_precision():
        for start in range(0, len(order), rows):
            places = order[start : start + rows]
            values += _means(module, [items[i] for i in places], [answers[i] for i in places])
    return Mean.of(values) if values else None


def _means(
    module: StudentModule, items: Sequence[Encoded], answers: Sequence[Response]
) -> list[float]:
    ids_BT, mask_BT = pad([a.ids for a in answers], module.pad_id, "right", module.device)
    completion = Rollout(ids_BT, mask_BT, torch.tensor([a.truncated for a in answers]))
    per_token_BT = _divergence(module, items, completion)
    skipped = int(getattr(module, "skip_first_tokens", 0))
    counts_BT = mask_BT.clone()
    counts_BT[:, :skipped] = False
    sums_B, counts_B = (per_token_BT * counts_BT).sum(-1), counts_BT.sum(-1)
    pairs = zip(sums_B.tolist(), counts_B.tolist(), strict=True)
    return [max(total / count, 0.0) for total, count in pairs if count]


def _divergence(module: StudentModule, items: Sequence[Encoded], completion: Rollout) -> Tensor:
    """`[B, T]`, 0 at padding."""
    model, alpha = module.model, float(getattr(module, "alpha", 0.0))
    temperature = float(getattr(module, "sampling", module.greedy).temperature) or 1.0
    views = [[item.student_ids for item in items], [item.teacher_ids for item in items]]
    if heads_known(model):
        student, teacher = (states(module, model, prompts, completion) for prompts in views)
        found_N = head_divergence(*student, *teacher, alpha=alpha, temperature=temperature)
        return unpack(found_N, completion.mask_BT)
    logits = [module.logits(model, prompts, completion).float() / temperature for prompts in views]
    return token_divergence(logits[0], logits[1], alpha).masked_fill(~completion.mask_BT, 0.0)
