"""How far the student has moved from the base, told by what the base itself would say.

KL(base ‖ student) on the prompts of a task predicts how much of it is forgotten (Shenfeld et al.
2025, "RL's Razor", arXiv 2509.04259). It is measured along the base's own greedy responses to the
evaluation prompts: the same prefixes for every method and stage, so that the numbers compare.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sdft.batch import pad
from sdft.encoded import Encoded
from sdft.evaluation import Response
from sdft.head_losses import head_divergence
from sdft.losses import token_divergence
from sdft.packing import unpack
from sdft.ranks import gathered, rank, ranks
from sdft.rollout import Rollout, evaluation_mode
from sdft.sharding import whole
from sdft.states import heads_known, keeps, states
from sdft.student import StudentModule

log = logging.getLogger(__name__)

LOGITS = 2**26
"""Logits that are held at once per model, where whole ones are needed: 256 MB in fp32."""


class BaseResponses:
    """The base's greedy responses to a few prompts per column, drawn once and kept.

    Args:
        limit: Prompts per column, at most.

    Attributes:
        ids: Tokens of the responses to the first prompts, by the column's name.

    Raises:
        ValueError: A limit below 1.
    """

    def __init__(self, limit: int) -> None:
        if limit < 1:
            raise ValueError(f"retention.kl_limit must be at least 1, found {limit}")
        self.limit = limit
        self.ids: dict[str, list[list[int]]] = {}

    def keep(self, name: str, responses: Sequence[Response]) -> None:
        """Take the responses of a student that is still the base."""
        self.ids[name] = [list(response.ids) for response in responses[: self.limit]]

    def divergence(
        self, module: StudentModule, name: str, encoded: Sequence[Encoded], batch_size: int
    ) -> float | None:
        """KL(base ‖ student) in nats: the mean over each response's tokens, then over responses.

        Args:
            module: Holds the student and the base.
            name: The column.
            encoded: Its examples, in their order.
            batch_size: Prompts at once, at most.

        Returns:
            None without a base, without examples, or where it is no finite number.
        """
        chosen = encoded[: self.limit]
        if module.base is None or not chosen:
            return None
        prompts = [item.student_ids for item in chosen]
        if len(self.ids.get(name, ())) != len(chosen):
            self.ids[name] = base_responses(module, prompts, batch_size)
        value = mean_divergence(module, prompts, self.ids[name], batch_size)
        if not math.isfinite(value):
            log.warning("KL(base ‖ student) on %r is %s: left out", name, value)
            return None
        return value

    def state_dict(self) -> dict[str, Any]:
        """The responses as lists of numbers."""
        return {"ids": {name: [list(ids) for ids in rows] for name, rows in self.ids.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with the responses of a checkpoint."""
        self.ids = {name: [list(ids) for ids in rows] for name, rows in state["ids"].items()}


@torch.no_grad()
def base_responses(
    module: StudentModule, prompts: Sequence[Sequence[int]], batch_size: int
) -> list[list[int]]:
    """The base's greedy responses, as token ids."""
    assert module.base is not None
    own: dict[int, list[int]] = {}
    with module.forward_precision(), whole(module.base):
        for start in range(0, len(prompts), batch_size):
            places = range(start, min(start + batch_size, len(prompts)))[rank() :: ranks()]
            if places:
                batch = [prompts[place] for place in places]
                found = module.sample(module.base, batch, module.greedy).completions()
                own |= dict(zip(places, found, strict=True))
    responses = {place: ids for part in gathered(own) for place, ids in part.items()}
    return [responses[place] for place in range(len(prompts))]


@torch.no_grad()
def mean_divergence(
    module: StudentModule,
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    batch_size: int,
) -> float:
    """KL(base ‖ student) along given responses, in nats.

    Args:
        module: Holds the student and the base.
        prompts: Token ids of B prompts.
        responses: Token ids of a response to each, none of them empty.
        batch_size: Rows at once, at most; fewer where whole logits are needed and too many.
    """
    rows = batch_size if _from_states(module) else _rows(module, responses, batch_size)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]) + len(responses[i]))
    total = 0.0
    with module.forward_precision(), evaluation_mode(module.model):
        for start in range(0, len(order), rows):
            chosen = order[start : start + rows]
            # Without a row of its own a process takes one that it does not count: all pass alike.
            own = chosen[rank() :: ranks()] or chosen[:1]
            means_B = _divergences(module, [prompts[i] for i in own], [responses[i] for i in own])
            total += float(means_B.sum()) if rank() < len(chosen) else 0.0
    return sum(gathered(total)) / len(order)


def _from_states(module: StudentModule) -> bool:
    return keeps(module, StudentModule, "logits") and heads_known(module.model, module.base)


def _rows(module: StudentModule, responses: Sequence[Sequence[int]], batch_size: int) -> int:
    """Rows whose whole logits may be held at once."""
    vocabulary = int(module.model.config.get_text_config().vocab_size)
    return max(1, min(batch_size, LOGITS // (max(map(len, responses)) * vocabulary)))


def _divergences(
    module: StudentModule, prompts: list[Sequence[int]], responses: list[Sequence[int]]
) -> Tensor:
    """The mean over the tokens of each response, `[B]`."""
    assert module.base is not None
    ids_BT, mask_BT = pad(responses, module.pad_id, "right", module.device)
    completion = Rollout(ids_BT, mask_BT, torch.zeros(len(responses), dtype=torch.bool))
    if _from_states(module):
        student = states(module, module.model, prompts, completion)
        base = states(module, module.base, prompts, completion)
        per_token_BT = unpack(head_divergence(*student, *base), mask_BT)
    else:
        student_BTV = module.logits(module.model, prompts, completion)
        base_BTV = module.logits(module.base, prompts, completion)
        per_token_BT = token_divergence(student_BTV, base_BTV).masked_fill(~mask_BT, 0.0)
    return per_token_BT.sum(-1) / mask_BT.sum(-1).clamp(min=1)
