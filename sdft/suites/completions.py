"""Greedy or sampled completions that end at given texts, by the run's own rollout engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from sdft.draws import Draws
from sdft.evaluation import Response
from sdft.ranks import gathered, rank, ranks
from sdft.respondent import Respondent
from sdft.rollout import Sampling
from sdft.seeding import derive_seed
from sdft.sharding import whole

FIRST = 64
"""Tokens of the first round where texts may end a completion; each next round takes twice as many,
so that little is written behind an end and little is read twice."""


@dataclass(frozen=True)
class Order:
    """How prompts are to be completed.

    Attributes:
        sampling: How tokens are drawn.
        until: Texts that end a completion, and are no part of it.
        seed: Of the draws.
    """

    sampling: Sampling
    until: tuple[str, ...] = ()
    seed: int = 0


@dataclass
class _Row:
    """A completion under way."""

    prompt: list[int]
    ids: list[int]
    ended: bool = False


@torch.no_grad()
def complete(
    module: Respondent, prompts: Sequence[Sequence[int]], order: Order, batch_size: int
) -> list[Response]:
    """A completion of every prompt, cut where a text ends it; a collective call.

    Args:
        module: Holds the model.
        prompts: Token ids.
        order: How.
        batch_size: Prompts at once, of all processes together.

    Returns:
        In the order of the prompts; `text` is not stripped of white space.
    """
    places = sorted(range(len(prompts)), key=lambda place: len(prompts[place]))
    own: dict[int, Response] = {}
    with whole(module.model), module.forward_precision():
        for start in range(0, len(places), batch_size):
            chosen = places[start : start + batch_size]
            dealt = range(len(chosen))[rank() :: ranks()]
            if dealt:
                rows = [_Row(list(prompts[chosen[row]]), []) for row in dealt]
                draws = Draws(tuple(dealt), len(chosen), derive_seed(order.seed, start))
                _write(module, rows, order, draws)
                pairs = zip(dealt, rows, strict=True)
                own |= {chosen[place]: _response(module, row, order) for place, row in pairs}
    found = {place: one for part in gathered(own) for place, one in part.items()}
    return [found[place] for place in range(len(prompts))]


def _write(module: Respondent, rows: Sequence[_Row], order: Order, draws: Draws) -> None:
    sampling = order.sampling
    rounds = [sampling.max_new_tokens]
    if order.until and sampling.temperature == 0:  # a sampled completion is drawn in one go
        rounds = _rounds(sampling.max_new_tokens)
    for tokens in rounds:
        open_rows = [row for row in rows if not row.ended]
        if not open_rows:
            return
        asked = [[*row.prompt, *row.ids] for row in open_rows]
        some = replace(sampling, max_new_tokens=tokens)
        with torch.random.fork_rng():
            torch.manual_seed(derive_seed(draws.seed, rank()))
            given = None if sampling.temperature == 0 else draws
            rollout = module.sample(module.model, asked, some, given)
        facts = zip(open_rows, rollout.completions(), rollout.truncated_B.tolist(), strict=True)
        for row, ids, truncated in facts:
            row.ids += ids
            row.ended = not truncated or _end(_answer(module, row)[1], order.until) is not None


def _rounds(total: int) -> list[int]:
    rounds, tokens = [], FIRST
    while total > 0:
        rounds.append(min(tokens, total))
        total, tokens = total - rounds[-1], tokens * 2
    return rounds


def _answer(module: Respondent, row: _Row) -> tuple[Response, str]:
    """The completion taken apart, and the text that is to be cut: without thoughts."""
    response = module.response(row.prompt, row.ids, not row.ended)
    found, thinking = response.thoughts, module.thinking
    if found is not None and found.tokens and thinking and thinking.scored == "answer":
        return response, found.answer
    return response, str(module.tokenizer.decode(row.ids, skip_special_tokens=True))


def _response(module: Respondent, row: _Row, order: Order) -> Response:
    response, text = _answer(module, row)
    end = _end(text, order.until)
    return replace(response, text=text if end is None else text[:end])


def _end(text: str, until: Sequence[str]) -> int | None:
    """Where the first of the texts stands; None where none does."""
    places = [place for end in until if end and (place := text.find(end)) >= 0]
    return min(places, default=None)
