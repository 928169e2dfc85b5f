"""Indirect questions: over several documents, only ever evaluated (out of distribution)."""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Sequence

from sdft.knowledge.passages import Passage
from sdft.knowledge.questions import Question
from sdft.knowledge.requests import Requests
from sdft.scorers.answer_words import answer_words
from sdft.seeding import derive_seed

_COMMON = 20  # passages: a word that more of them have, and a twentieth of all, connects nothing
_SHARE = 0.05


def related_groups(
    passages: Sequence[Passage], count: int, size: int, seed: int
) -> list[tuple[Passage, ...]]:
    """Groups of passages of different subjects that have rare words in common.

    A group begins with a passage drawn by chance, each once before one comes again; the others are
    those that share most with it, a word of n passages counting log(N/n). Where nothing is shared
    they are drawn by chance. With too few subjects, passages of one subject fill a group.

    Args:
        passages: N passages.
        count: How many groups; fewer come where groups would repeat.
        size: Passages in each.
        seed: Of the random numbers.
    """
    rng = random.Random(derive_seed(seed, "indirect"))
    if len(passages) < size:
        return []
    holders, words = _holders(passages)
    groups: dict[frozenset[int], tuple[Passage, ...]] = {}
    for _ in range(3):  # a passage may begin several groups, each with other company
        order = list(passages)
        rng.shuffle(order)
        for first in order:
            if len(groups) >= count:
                return list(groups.values())
            group = _group(first, passages, holders, words, size, rng, groups)
            if len(group) == size:
                groups[frozenset(p.number for p in group)] = group
    return list(groups.values())[:count]


def _holders(
    passages: Sequence[Passage],
) -> tuple[dict[str, list[Passage]], dict[int, set[str]]]:
    words = {p.number: {w for w in answer_words(p.text) if len(w) > 2} for p in passages}
    holders: dict[str, list[Passage]] = defaultdict(list)
    for passage in passages:
        for word in sorted(words[passage.number]):
            holders[word].append(passage)
    most = max(_COMMON, _SHARE * len(passages))
    return {w: found for w, found in holders.items() if 1 < len(found) <= most}, words


def _group(
    first: Passage,
    passages: Sequence[Passage],
    holders: dict[str, list[Passage]],
    words: dict[int, set[str]],
    size: int,
    rng: random.Random,
    taken: dict[frozenset[int], tuple[Passage, ...]],
) -> tuple[Passage, ...]:
    shared: dict[int, float] = defaultdict(float)
    for word in sorted(words[first.number] & holders.keys()):
        for other in holders[word]:
            shared[other.number] += math.log(len(passages) / len(holders[word]))
    chance = {p.number: rng.random() for p in passages}
    order = sorted(passages, key=lambda p: (-shared[p.number], chance[p.number]))
    ranked = [p for p in order if p is not first]
    group = [first]
    few = len({p.subject for p in passages}) < size
    for other_subject in (True, False) if few else (True,):
        for passage in ranked:
            if len(group) == size:
                break
            if passage in group or (
                other_subject and passage.subject in {p.subject for p in group}
            ):
                continue
            if frozenset(p.number for p in [*group, passage]) not in taken:
                group.append(passage)
    return tuple(group)


def compose(
    questions: Sequence[Question],
    groups: Sequence[Sequence[Passage]],
    requests: Requests,
    seed: int,
) -> list[Question]:
    """Pairs of direct questions asked at once, about passages that belong together.

    Args:
        questions: Direct ones.
        groups: Passages that belong together, of which the first two with questions are taken.
        requests: Has the words that join them.
        seed: Of the random numbers.
    """
    own: dict[int, list[Question]] = defaultdict(list)
    for question in questions:
        own[question.passages[0].number].append(question)
    composed = []
    for place, group in enumerate(groups):
        rng = random.Random(derive_seed(seed, "composed", place))
        parts = [rng.choice(own[p.number]) for p in group if own.get(p.number)][:2]
        if len(parts) == 2:
            composed.append(_joined(parts[0], parts[1], requests))
    return composed


def _joined(first: Question, second: Question, requests: Requests) -> Question:
    text = requests.composed(first.text, second.text)
    passages = (first.passages[0], second.passages[0])
    answer = f"{first.answer.rstrip(' .;')}; {second.answer.rstrip(' .;')}"
    return Question(text, answer, passages, "composed", parts=(first, second))
