"""Log-probabilities of given continuations, as multiple choice asks for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sdft.batch import pad
from sdft.ranks import gathered, rank, ranks
from sdft.respondent import Respondent
from sdft.rollout import Rollout, evaluation_mode
from sdft.sharding import whole
from sdft.states import heads_known, keeps, states

LOGITS = 2**26
"""Logits that are held at once: 256 MB in fp32."""
_ROWS = 256


class Pair(NamedTuple):
    """A context and what is to follow it, as token ids; neither is empty."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]


class Likelihood(NamedTuple):
    """Of a continuation: its log-probability in nats, and whether greedy decoding gives it."""

    log_prob: float
    greedy: bool


@torch.no_grad()
def likelihoods(module: Respondent, pairs: Sequence[Pair], batch_size: int) -> list[Likelihood]:
    """The log-probability of every continuation, given its context; a collective call.

    Pairs that differ in the last token alone share one pass. Several processes deal the rows of
    every batch among themselves, and all get all results.

    Args:
        module: Holds the model; its trainer's precision is used, the logarithms are fp32.
        pairs: In any order.
        batch_size: Rows at once, of all processes together.
    """
    shared: dict[tuple[int, tuple[int, ...]], list[int]] = {}
    for place, (context, continuation) in enumerate(pairs):
        key = (len(context), (*context, *continuation[:-1]))
        shared.setdefault(key, []).append(place)
    groups = sorted(shared.values(), key=lambda places: -_length(pairs[places[0]]))
    own: dict[int, Likelihood] = {}
    with module.forward_precision(), evaluation_mode(module.model):
        for start in range(0, len(groups), batch_size):
            chosen = groups[start : start + batch_size]
            # Without a row of its own a process takes one that it does not count: all pass alike.
            dealt = chosen[rank() :: ranks()] or chosen[:1]
            found = _batch(module, pairs, dealt)
            own |= found if rank() < len(chosen) else {}
    everything = {place: one for part in gathered(own) for place, one in part.items()}
    return [everything[place] for place in range(len(pairs))]


def _length(pair: Pair) -> int:
    return len(pair.context) + len(pair.continuation)


def _batch(
    module: Respondent, pairs: Sequence[Pair], groups: Sequence[Sequence[int]]
) -> dict[int, Likelihood]:
    """One pass for the first pair of each group, which says it all for the others."""
    if keeps(module, Respondent, "logits") and heads_known(module.model):
        firsts = [pairs[group[0]] for group in groups]
        hidden_ND, head = states(module, module.model, *_rows(module, firsts))
        parts = hidden_ND.split([len(pair.continuation) for pair in firsts])
        return _told(pairs, groups, parts, head.logits)
    found: dict[int, Likelihood] = {}
    longest = max(len(pairs[group[0]].continuation) for group in groups)
    rows = max(1, LOGITS // (int(module.model.config.get_text_config().vocab_size) * longest))
    with whole(module.model):
        for start in range(0, len(groups), rows):
            some = groups[start : start + rows]
            given = _rows(module, [pairs[group[0]] for group in some])
            logits_BTV = module.logits(module.model, *given)
            found |= _told(pairs, some, list(logits_BTV), lambda part: part)
    return found


def _rows(module: Respondent, pairs: Sequence[Pair]) -> tuple[list[list[int]], Rollout]:
    continuations = [pair.continuation for pair in pairs]
    ids_BT, mask_BT = pad(continuations, module.pad_id, "right", module.model.device)
    completion = Rollout(ids_BT, mask_BT, torch.zeros(len(pairs), dtype=torch.bool))
    return [list(pair.context) for pair in pairs], completion


def _told(
    pairs: Sequence[Pair],
    groups: Sequence[Sequence[int]],
    parts: Sequence[Tensor],
    logits: Callable[[Tensor], Tensor],
) -> dict[int, Likelihood]:
    """What each group's part, `[T, …]`, says of the group's pairs."""
    return {
        place: _likelihood(part[: len(pairs[place].continuation)], pairs[place], logits)
        for group, part in zip(groups, parts, strict=True)
        for place in group
    }


def _likelihood(part: Tensor, pair: Pair, logits: Callable[[Tensor], Tensor]) -> Likelihood:
    targets_T = torch.tensor(pair.continuation, device=part.device)
    total, greedy = 0.0, True
    for rows, ids in zip(part.split(_ROWS), targets_T.split(_ROWS), strict=True):
        logits_TV = logits(rows).float()
        log_probs_T = logits_TV.log_softmax(-1).gather(-1, ids[:, None])
        total += float(log_probs_T.double().sum())
        greedy = greedy and bool((logits_TV.argmax(-1) == ids).all())
    return Likelihood(total, greedy)
