"""Which questions train and which are kept apart: by question, as all passages are to be learnt."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from sdft.knowledge.questions import Question
from sdft.seeding import derive_seed


@dataclass(frozen=True)
class Splits:
    """Direct questions by split, each in the order of its passages."""

    train: list[Question]
    validation: list[Question]
    test: list[Question]


def split(questions: Sequence[Question], validation: float, test: float, seed: int) -> Splits:
    """Keep shares of the questions apart, as evenly over the passages as their numbers allow.

    Every passage that has a question keeps one to train on: what is never shown cannot be learnt,
    and a test of it would only measure guessing. So with few questions per passage the shares are
    not reached.

    Args:
        questions: All direct questions.
        validation: Share of the validation split, in [0, 1).
        test: Share of the test split.
        seed: Of the random numbers.

    Raises:
        ValueError: A split that has a share gets no question.
    """
    spare = _spare(questions, seed)
    sizes = {"test": round(len(questions) * test), "validation": round(len(questions) * validation)}
    held: dict[str, list[Question]] = {}
    for name, share in (("test", test), ("validation", validation)):
        size = max(1, sizes[name]) if share else 0
        held[name], spare = spare[:size], spare[size:]
        if share and not held[name]:
            raise ValueError(
                f"{len(questions)} questions about "
                f"{len({q.passages[0].number for q in questions})} passages are too few for a "
                f"{name} split: every passage keeps one to train on. Raise per_passage, or set "
                f"{name} to 0"
            )
    apart = {question.key for found in held.values() for question in found}
    train = [question for question in questions if question.key not in apart]
    return Splits(train, _ordered(held["validation"]), _ordered(held["test"]))


def _spare(questions: Sequence[Question], seed: int) -> list[Question]:
    """What may be kept apart, first one question of each passage, then a second of each …"""
    groups: dict[int, list[Question]] = defaultdict(list)
    for question in questions:
        groups[question.passages[0].number].append(question)
    ranked = []
    for number, group in sorted(groups.items()):
        rng = random.Random(derive_seed(seed, "split", number))
        rng.shuffle(group)
        ranked += [(turn, rng.random(), q) for turn, q in enumerate(group[:-1])]
    return [question for *_, question in sorted(ranked, key=lambda own: own[:2])]


def _ordered(questions: Sequence[Question]) -> list[Question]:
    return sorted(questions, key=lambda q: (q.passages[0].number, q.key))
