"""Answers that a model wrote once, before training: generated, checked, kept in a file.

`answers.jsonl` holds every answer, also those that a check dropped, with the reason.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from sdft.checks import AnyCheck, Facts, count_reasons, reason_to_drop, shown_reasons
from sdft.draws import Draws
from sdft.examples import Example
from sdft.jsonl import Record, read_jsonl
from sdft.ranks import gathered, rank, ranks
from sdft.respondent import Respondent
from sdft.rollout import Sampling
from sdft.scorers import Scorer
from sdft.seeding import derive_seed

ANSWERS = "answers.jsonl"

PromptIds = tuple[int, ...]


@dataclass(frozen=True)
class Request:
    """A prompt to be answered.

    Attributes:
        example: What it belongs to; checks see it.
        ids: The encoded prompt.
        scorer: Scores an answer against the example, for checks that ask for it.
    """

    example: Example
    ids: PromptIds
    scorer: Scorer | None = None


@dataclass(frozen=True)
class Answer:
    """What the model wrote.

    Attributes:
        ids: Token ids, the one that ends the answer included where it was drawn.
        text: The same as text, without special tokens; the answer alone where thoughts are told
            from it and not scored.
        truncated: Whether the length limit ended it.
        reason: Why a check dropped it; None when it is kept.
    """

    ids: list[int]
    text: str
    truncated: bool
    reason: str | None = None

    @property
    def kept(self) -> bool:
        """Whether every check kept it."""
        return self.reason is None


@torch.no_grad()
def generate(
    respondent: Respondent,
    model: PreTrainedModel,
    prompts: Sequence[PromptIds],
    sampling: Sampling,
    batch_size: int,
    seed: int,
) -> Iterator[list[tuple[int, Answer]]]:
    """One answer per prompt, batch by batch; prompts of like length share a batch.

    What is drawn is a function of the arguments alone: the batch size has a part in it, and what
    was drawn before has none. The caller's random numbers are left as they were. Several processes
    deal the prompts of every batch among themselves, and all get all answers.

    Args:
        respondent: Brings engine, tokenizer and precision.
        model: Answers; of the respondent's architecture.
        prompts: Unpadded.
        sampling: How answers are drawn.
        batch_size: Prompts at once.
        seed: Of the random numbers.

    Yields:
        The batch's answers, each with the place of its prompt.
    """
    order = sorted(range(len(prompts)), key=lambda place: len(prompts[place]))
    for start in range(0, len(order), batch_size):
        places = order[start : start + batch_size]
        batch_seed = derive_seed(seed, "generated", start)
        if ranks() == 1:
            own = _answered(respondent, model, prompts, places, sampling, batch_seed, None)
        else:
            rows = range(len(places))[rank() :: ranks()] or range(1)
            draws = Draws(tuple(rows), len(places), batch_seed)
            dealt = [places[row] for row in rows]
            own = _answered(respondent, model, prompts, dealt, sampling, batch_seed, draws)
        found = {place: answer for part in gathered(own) for place, answer in part.items()}
        yield [(place, found[place]) for place in places]


def _answered(
    respondent: Respondent,
    model: PreTrainedModel,
    prompts: Sequence[PromptIds],
    places: Sequence[int],
    sampling: Sampling,
    seed: int,
    draws: Draws | None,
) -> dict[int, Answer]:
    with torch.random.fork_rng(), respondent.forward_precision():
        torch.manual_seed(seed if draws is None else derive_seed(seed, rank()))
        rollout = respondent.sample(model, [prompts[place] for place in places], sampling, draws)
    ids, truncated = rollout.completions(), rollout.truncated_B.tolist()
    facts = zip(places, ids, truncated, strict=True)
    responses = {p: (i, respondent.response(prompts[p], i, cut)) for p, i, cut in facts}
    return {p: Answer(i, found.text, found.truncated) for p, (i, found) in responses.items()}


def checked(answer: Answer, request: Request, checks: Sequence[AnyCheck]) -> Answer:
    """The answer with the reason for which a check drops it, if one does.

    Raises:
        ValueError: A check raised.
    """
    tokens = len(answer.ids) - (not answer.truncated)  # the one that ends it is no part of it
    facts = Facts(tokens, answer.truncated, request.scorer)
    reason = reason_to_drop(checks, answer.text, request.example, facts)
    return Answer(answer.ids, answer.text, answer.truncated, reason)


def answer_all(
    respondent: Respondent,
    model: PreTrainedModel,
    requests: Sequence[Request],
    sampling: Sampling,
    checks: Sequence[AnyCheck],
    batch_size: int,
    seed: int,
) -> list[Answer]:
    """One checked answer per request, in their order (see `generate`).

    Raises:
        ValueError: A check raised, or not one answer is left.
    """
    answers: dict[int, Answer] = {}
    prompts = [request.ids for request in requests]
    for batch in generate(respondent, model, prompts, sampling, batch_size, seed):
        answers |= {place: checked(answer, requests[place], checks) for place, answer in batch}
    if not any(answer.kept for answer in answers.values()):
        counts = count_reasons([answer.reason for answer in answers.values()])
        raise ValueError(
            f"the checks dropped all {len(answers)} answers ({shown_reasons(counts)}): relax "
            "model.checks, or raise model.max_new_tokens where answers are truncated"
        )
    return [answers[place] for place in range(len(requests))]


def write_answers(path: Path, requests: Sequence[Request], answers: Sequence[Answer]) -> None:
    """Write one line per answer: prompt, response, tokens, truncated, kept, reason."""
    with path.open("w", encoding="utf-8") as file:
        for request, answer in zip(requests, answers, strict=True):
            record = {
                "prompt": [dict(message) for message in request.example.messages],
                "response": answer.text,
                "tokens": answer.ids,
                "truncated": answer.truncated,
                "kept": answer.kept,
                "reason": answer.reason,
            }
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


def read_answers(path: Path) -> list[Answer]:
    """The answers of a file, in their order."""

    def answer(record: Record) -> Answer:
        fields = (record[key] for key in ("tokens", "response", "truncated", "reason"))
        return Answer(*fields)

    return [answer(record) for _, record in read_jsonl(path)]


class AnswerBook:
    """The kept answers of each prompt.

    Args:
        requests: What was asked.
        answers: The answer to each request.
    """

    def __init__(self, requests: Sequence[Request], answers: Sequence[Answer]) -> None:
        self.answers = list(answers)
        self._requests = list(requests)
        self._places: dict[PromptIds, list[int]] = {}
        for place, (request, answer) in enumerate(zip(requests, answers, strict=True)):
            if answer.kept:
                self._places.setdefault(request.ids, []).append(place)

    def __contains__(self, prompt: object) -> bool:
        return prompt in self._places

    def requests_and_answers(self) -> list[tuple[Request, Answer]]:
        """Every request with its answer, kept or not."""
        return list(zip(self._requests, self.answers, strict=True))

    def choose(
        self, prompts: Sequence[Sequence[int]], seed: int, rows: Sequence[int] | None = None
    ) -> list[int | None]:
        """For each prompt the place of one of its kept answers, drawn; None where it has none.

        Args:
            prompts: B encoded prompts.
            seed: Of the draw.
            rows: Where the prompts stand in a batch that processes have dealt; 0 to B - 1 when
                None. A row draws the same whoever has it.
        """
        found = [self._places.get(tuple(prompt), []) for prompt in prompts]
        numbers = range(len(prompts)) if rows is None else rows
        return [
            random.Random(derive_seed(seed, row)).choice(places) if places else None
            for row, places in zip(numbers, found, strict=True)
        ]
