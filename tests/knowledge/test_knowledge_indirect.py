"""Splits and groups of passages."""

from __future__ import annotations

from collections import Counter

import pytest

from sdft.knowledge.indirect import related_groups
from sdft.knowledge.passages import Passage
from sdft.knowledge.questions import Question
from sdft.knowledge.splits import split


def passage(number: int, text: str, subject: str = "") -> Passage:
    return Passage(number, f"d{number}", subject or f"d{number}", "", text, 0, len(text))


def test_groups_share_rare_words_and_no_subject() -> None:
    texts = ["red apple", "apple pie", "blue whale", "whale song", "grey stone"]
    passages = [passage(i, text) for i, text in enumerate(texts, 1)]
    groups = related_groups(passages, 2, 2, seed=3)
    for seed in range(5):
        pairs = [{p.number for p in g} for g in related_groups(passages, 5, 2, seed)]
        assert len(pairs) == len({frozenset(pair) for pair in pairs}) == 5
        assert {1, 2} in pairs
        assert {3, 4} in pairs
    assert len(groups) == 2
    one = [passage(1, "a", "x"), passage(2, "a", "x"), passage(3, "a", "y")]
    for group in related_groups(one, 2, 2, 0):
        assert {p.subject for p in group} == {"x", "y"}
    assert related_groups(one[:1], 2, 2, 0) == []
    assert len(related_groups(one[:2], 2, 2, 0)[0]) == 2, "one subject has to do"
    many = related_groups(passages, 99, 2, 0)
    assert 5 <= len(many) == len({frozenset(p.number for p in group) for group in many}) <= 10
    assert all(len(group) == 2 for group in many)


def questions(sizes: list[int]) -> list[Question]:
    return [
        Question(f"q{n}.{i}", f"a{i}", (passage(n, "x"),), "given")
        for n, size in enumerate(sizes, 1)
        for i in range(size)
    ]


def test_every_question_stands_in_one_split_and_every_passage_trains() -> None:
    own = questions([5, 5, 5, 1, 4])
    for seed in range(5):
        found = split(own, 0.1, 0.25, seed)
        everything = [*found.train, *found.validation, *found.test]
        assert Counter(q.key for q in everything) == Counter(q.key for q in own)
        assert {q.passages[0].number for q in found.train} == {1, 2, 3, 4, 5}
        assert (len(found.validation), len(found.test)) == (2, 5)
        tested = Counter(q.passages[0].number for q in found.test)
        assert max(tested.values()) <= 2, "spread over the passages"


def test_too_few_questions_for_a_split_are_told() -> None:
    with pytest.raises(ValueError, match="3 questions about 3 passages are too few for a test"):
        split(questions([1, 1, 1]), 0.0, 0.2, 0)
    assert len(split(questions([1, 1, 1]), 0.0, 0.0, 0).train) == 3
