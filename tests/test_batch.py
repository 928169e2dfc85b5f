"""Batches of encoded examples: rows keep together what belongs together."""

from __future__ import annotations

import pytest
import torch
from conftest import echo_examples
from hypothesis import given
from hypothesis import strategies as st

from sdft.batch import Batch, Origin, pad

KINDS: tuple[Origin, ...] = ("new", "past", "general")
ORIGINS: list[Origin] = ["new", "past", "new", "general"]


def batch_of(origins: list[Origin] | None = None, teacher: bool = True) -> Batch:
    count = 4 if origins is None else len(origins)
    students = [[i] * (i + 1) for i in range(count)]
    teachers = [[10 + i] for i in range(count)] if teacher else ()
    return Batch(echo_examples(count), students, teachers, origins)


def same(one: Batch, other: Batch) -> bool:
    return all(getattr(one, name) == getattr(other, name) for name in Batch.__slots__)


def test_rows_are_new_unless_a_mixture_says_otherwise() -> None:
    assert batch_of().origins == ["new"] * 4
    assert batch_of(ORIGINS).origins == ORIGINS
    assert len(batch_of(ORIGINS)) == 4


@given(rows=st.lists(st.integers(0, 3), max_size=9))
def test_rows_keep_together_what_belongs_together(rows: list[int]) -> None:
    batch = batch_of(ORIGINS)
    found = batch.rows(rows)
    assert len(found) == len(rows)
    assert found.examples == [batch.examples[row] for row in rows]
    assert found.student_ids == [[row] * (row + 1) for row in rows]
    assert found.teacher_ids == [[10 + row] for row in rows]
    assert found.origins == [ORIGINS[row] for row in rows]


def test_rows_of_a_batch_without_teacher_prompts() -> None:
    found = batch_of(ORIGINS, teacher=False).rows([2, 0])
    assert found.teacher_ids == []
    assert found.student_ids == [[2, 2, 2], [0]]


def test_rows_are_copies() -> None:
    batch = batch_of(ORIGINS)
    found = batch.rows([0, 0])
    found.student_ids[0].append(99)
    found.origins[0] = "general"
    assert same(batch, batch_of(ORIGINS))
    assert found.student_ids[1] == [0]


def test_repeat_puts_the_copies_beside_one_another() -> None:
    batch = batch_of(ORIGINS)
    assert same(batch.repeat(1), batch)
    assert same(batch.repeat(2), batch.rows([0, 0, 1, 1, 2, 2, 3, 3]))


def test_of_keeps_the_order_and_may_be_empty() -> None:
    batch = batch_of(ORIGINS)
    assert same(batch.of("new"), batch.rows([0, 2]))
    assert same(batch.of("general", "new"), batch.rows([0, 2, 3]))
    assert same(batch.of(*KINDS), batch)
    assert len(batch.of()) == len(batch_of().of("past", "general")) == 0


@given(origins=st.lists(st.sampled_from(KINDS), min_size=1, max_size=9))
def test_the_origins_part_a_batch(origins: list[Origin]) -> None:
    batch = batch_of(origins)
    assert sum(len(batch.of(kind)) for kind in KINDS) == len(batch)
    for kind in KINDS:
        assert set(batch.of(kind).origins) <= {kind}


@pytest.mark.parametrize(
    ("side", "ids", "mask"),
    [
        ("right", [[1, 2, 0], [3, 4, 5]], [[True, True, False], [True] * 3]),
        ("left", [[0, 1, 2], [3, 4, 5]], [[False, True, True], [True] * 3]),
    ],
)
def test_pad(side: str, ids: list[list[int]], mask: list[list[bool]]) -> None:
    found_BT, mask_BT = pad([[1, 2], [3, 4, 5]], 0, side, torch.device("cpu"))
    assert found_BT.tolist() == ids
    assert mask_BT.tolist() == mask


def test_pad_nothing() -> None:
    ids_BT, mask_BT = pad([], 0, "left", torch.device("cpu"))
    assert ids_BT.shape == mask_BT.shape == (0, 0)
    assert pad([[], [7]], 0, "left", torch.device("cpu"))[1].tolist() == [[False], [True]]
