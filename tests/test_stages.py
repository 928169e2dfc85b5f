"""The order of batches: a pure function of seed and stage, and a loader that can continue."""

from __future__ import annotations

from collections import Counter
from itertools import islice

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sdft.seeding import derive_seed, run_seed
from sdft.stages import StageLoader, batches_in_stage, stage_batches, steps_of_parts


@given(
    rows=st.integers(1, 30),
    size=st.integers(1, 12),
    batches=st.integers(1, 20),
    seed=st.integers(0, 2**31),
    shuffle=st.booleans(),
)
def test_every_pass_uses_every_row_once_the_last_batch_included(
    rows: int, size: int, batches: int, seed: int, shuffle: bool
) -> None:
    found = stage_batches(rows, size, seed, 0, batches, shuffle)
    assert len(found) == batches
    per_pass = -(-rows // size)
    for start in range(0, batches, per_pass):
        one_pass = found[start : start + per_pass]
        counts = Counter(row for batch in one_pass for row in batch)
        assert max(counts.values()) == 1
        if len(one_pass) == per_pass:
            assert sorted(counts) == list(range(rows))
            assert len(one_pass[-1]) == rows - size * (per_pass - 1)
        assert all(len(batch) == min(size, rows) for batch in one_pass[: per_pass - 1])


def test_the_order_depends_on_seed_stage_and_pass_and_nothing_else() -> None:
    one = stage_batches(20, 4, 0, 0, 10)
    torch.manual_seed(123)
    torch.rand(7)
    assert stage_batches(20, 4, 0, 0, 10) == one
    assert stage_batches(20, 4, 0, 0, 7) == one[:7]  # a longer stage begins the same
    assert stage_batches(20, 4, 1, 0, 10) != one
    assert stage_batches(20, 4, 0, 1, 10) != one
    assert one[:5] != one[5:]


def test_looking_at_the_order_draws_nothing() -> None:
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    stage_batches(20, 4, 5, 0, 10)
    assert torch.equal(torch.rand(1), expected)


def test_unshuffled_keeps_the_given_order() -> None:
    assert stage_batches(5, 2, 9, 3, 4, shuffle=False) == [[0, 1], [2, 3], [4], [0, 1]]


@pytest.mark.parametrize(
    ("rows", "size", "steps", "epochs", "accumulate", "expected"),
    [
        (10, 4, 5, None, 1, 5),
        (10, 4, 5, None, 3, 15),
        (10, 4, None, 1, 1, 3),
        (10, 4, None, 2, 1, 6),
        (10, 4, None, 2, 4, 6),  # epochs are passes whatever the accumulation
        (3, 8, None, 2, 1, 2),
    ],
)
def test_how_many_batches(
    rows: int, size: int, steps: int | None, epochs: int | None, accumulate: int, expected: int
) -> None:
    assert batches_in_stage(rows, size, steps, epochs, accumulate) == expected


@given(st.lists(st.integers(1, 9), min_size=1, max_size=4), st.integers(1, 5))
def test_parts_take_the_steps_of_their_whole(parts: list[int], accumulate: int) -> None:
    """Whole parts or not: a step that spans two parts is counted once."""
    found = steps_of_parts(parts, accumulate)
    assert len(found) == len(parts)
    for count in range(1, len(parts) + 1):
        assert sum(found[:count]) == -(-sum(parts[:count]) // accumulate)


# ---------------------------------------------------------------- the loader


def loader(stage: int = 0) -> StageLoader[str, str]:
    return StageLoader(["ab", "c", "de", "f"], "".join, stage)


@given(st.integers(0, 4))
def test_a_restored_loader_yields_the_rest(stop: int) -> None:
    first = loader()
    before = list(islice(first, stop))
    second = loader()
    second.load_state_dict(first.state_dict())
    assert before + list(second) == ["ab", "c", "de", "f"]
    assert len(second) == 4  # a loader's length is the stage's, also when it continues


def test_the_pass_after_a_restored_one_is_whole() -> None:
    second = loader()
    second.load_state_dict({"stage": 0, "yielded": 3})
    assert list(second) == ["f"]
    assert list(second) == ["ab", "c", "de", "f"]


def test_a_state_of_another_stage_is_ignored() -> None:
    second = loader(stage=1)
    second.load_state_dict({"stage": 0, "yielded": 3, "ended": True})
    assert list(second) == ["ab", "c", "de", "f"]


@given(st.integers(0, 4))
def test_an_ended_loader_yields_nothing_more(stop: int) -> None:
    """Neither does one that is restored from it, however often it is asked."""
    collated: list[list[str]] = []
    first = StageLoader(["ab", "c", "de", "f"], lambda items: collated.append([*items]), 0)
    batches = iter(first)
    for _ in range(stop):
        next(batches)
    first.end()
    first.end()
    assert list(batches) == list(first) == []
    assert len(collated) == stop, "no batch was made that is not handed out"
    assert len(first) == 4
    state = first.state_dict()
    assert state == {"stage": 0, "yielded": stop, "ended": True, "batches": 4}
    second = loader()
    second.load_state_dict(state)
    assert second.state_dict() == state
    assert list(second) == list(second) == []


def test_a_state_from_before_stages_could_end_early() -> None:
    second = loader()
    second.load_state_dict({"stage": 0, "yielded": 2})
    assert list(second) == ["de", "f"]


# ---------------------------------------------------------------- seeds


def test_a_derived_seed_depends_on_every_part_and_their_order() -> None:
    seeds = [derive_seed(*parts) for parts in [(0, 1), (1, 0), (0, 1, 0), (0, "1"), (0, 12), (12,)]]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert derive_seed(0, 1) == derive_seed(0, 1)


def test_the_runs_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", "41")
    assert run_seed() == 41
    monkeypatch.delenv("PL_GLOBAL_SEED")
    assert run_seed() == 0


# ---------------------------------------------------------------- parts of a stage


@given(parts=st.lists(st.integers(1, 12), min_size=1, max_size=4), accumulate=st.integers(1, 5))
def test_the_steps_of_the_parts_are_the_stages(parts: list[int], accumulate: int) -> None:
    found = steps_of_parts(parts, accumulate)
    assert len(found) == len(parts)
    owners = [part for part, batches in enumerate(parts) for _ in range(batches)]
    firsts = owners[::accumulate]  # the part in which each optimizer step begins
    assert found == [firsts.count(part) for part in range(len(parts))]


def test_a_step_that_reaches_into_the_next_part_counts_for_the_first() -> None:
    assert steps_of_parts([5, 3], 2) == [3, 1]
    assert steps_of_parts([5, 3], 1) == [5, 3]
    assert steps_of_parts([1, 1], 2) == [1, 0]
