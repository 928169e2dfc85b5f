"""Shares of a batch: every row once, every origin everywhere."""

from __future__ import annotations

from itertools import chain

import torch
from conftest import echo_examples
from hypothesis import given
from hypothesis import strategies as st

from sdft.batch import Batch, Origin
from sdft.encoded import Encoded, collate, collate_share
from sdft.share import Share, deal

ORIGINS: list[Origin] = ["new", "new", "past", "new", "general", "new", "past"]


@given(
    st.lists(st.sampled_from(["new", "past", "general"]), min_size=1, max_size=20),
    st.integers(1, 5),
)
def test_each_row_counts_once_and_each_origin_is_everywhere(
    origins: list[Origin], ranks: int
) -> None:
    shares = [deal(origins, rank, ranks) for rank in range(ranks)]
    counted = [p for s in shares for p, real in zip(s.places, s.real, strict=True) if real]
    assert sorted(counted) == list(range(len(origins)))
    for share in shares:
        assert list(share.places) == sorted(share.places)
        assert {origins[place] for place in share.places} == set(origins)
        assert share.total == len(origins)


def test_shares_differ_by_a_row_per_origin_at_most() -> None:
    shares = [deal(["new"] * 10, rank, 4) for rank in range(4)]
    assert [len(share.places) for share in shares] == [3, 3, 2, 2]


def encoded(origins: list[Origin]) -> list[Encoded]:
    examples = echo_examples(len(origins))
    return [
        Encoded(e, [i], [i, i], o) for i, (e, o) in enumerate(zip(examples, origins, strict=True))
    ]


def test_alone_a_batch_is_no_share() -> None:
    batch = collate_share(encoded(ORIGINS), 0, 1)
    assert batch.share is None
    assert batch.student_ids == collate(encoded(ORIGINS)).student_ids
    assert (batch.count, batch.total, batch.real) == (7, 7, [True] * 7)
    mask_BT = torch.ones(7, 2, dtype=torch.bool)
    assert batch.counted(mask_BT) is mask_BT


def batches(ranks: int) -> list[Batch]:
    return [collate_share(encoded(ORIGINS), rank, ranks) for rank in range(ranks)]


def test_a_process_has_the_rows_of_its_share() -> None:
    first, second = batches(2)
    assert first.student_ids == [[0], [2], [3], [4]]
    assert second.student_ids == [[1], [4], [5], [6]]
    assert second.real == [True, False, True, True]
    assert (second.count, second.total) == (3, 7)
    mask_BT = second.counted(torch.ones(4, 2, dtype=torch.bool))
    assert mask_BT.tolist() == [[True] * 2, [False] * 2, [True] * 2, [True] * 2]
    assert second.mean(torch.tensor([1, 100, 2, 3])) == 2.0
    # The general row is nobody's here but in the first.
    general = second.of("general")
    assert (general.count, general.total, general.share) == (
        0,
        1,
        Share((0,), (False,), ("general",)),
    )


def test_what_is_done_to_all_is_done_to_shares() -> None:
    """Repeating and choosing a batch and dealing it, or dealing first: the same rows."""
    whole = collate(encoded(ORIGINS))
    for done in (
        lambda batch: batch.repeat(3),
        lambda batch: batch.of("new", "past"),
        lambda batch: batch.of("past").repeat(2),
    ):
        expected = done(whole)
        parts = [done(batch) for batch in batches(3)]
        found = {
            place: ids
            for part in parts
            for place, real, ids in zip(
                part.share.places, part.share.real, part.student_ids, strict=True
            )
            if real
        }
        assert [found[place] for place in sorted(found)] == expected.student_ids
        for part in parts:
            assert part.share.total == len(expected)
            assert list(part.share.origins) == expected.origins
            for place, ids in zip(part.share.places, part.student_ids, strict=True):
                assert expected.student_ids[place] == ids  # fillers, too


def test_joined_shares_stand_one_behind_the_other() -> None:
    first, second = deal(ORIGINS, 1, 2), deal(["new"], 1, 2)
    joined = Share.joined([first, second])
    assert joined.places == (*first.places, 7)
    assert joined.real == (*first.real, False)
    assert joined.origins == tuple(chain(ORIGINS, ["new"]))
