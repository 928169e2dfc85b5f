"""Passages: nothing is lost, nothing is too long, borders are kept where they can be."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdft.knowledge.passages import spans

TEXT = (
    "# Title\n\nOne two three. Four five six seven.\n\n## Head\nEight nine.\n\n## Other\n\n"
    "ten eleven twelve thirteen fourteen fifteen sixteen."
)


def words(text: str) -> int:
    return len(text.split())


def cut(text: str, size: int) -> list[str]:
    return [text[start:end] for start, end in spans(text, size, words)]


@given(st.text(alphabet="ab #.\n\t!。é", max_size=80), st.integers(1, 6))
def test_passages_hold_every_character_once_and_fit(text: str, size: int) -> None:
    found = spans(text, size, words)
    assert "".join("".join(text[a:b].split()) for a, b in found) == "".join(text.split())
    following = [start for start, _ in found[1:]] + [len(text)] * bool(found)
    for (start, end), after in zip(found, following, strict=True):
        assert start < end <= after
        assert text[start:end] == text[start:end].strip()
        assert 1 <= words(text[start:end]) <= size


@given(st.text(alphabet="ab \n。", max_size=60), st.integers(1, 5))
def test_a_unit_smaller_than_a_word_cuts_words(text: str, size: int) -> None:
    found = spans(text, size, len)
    assert "".join("".join(text[a:b].split()) for a, b in found) == "".join(text.split())
    assert all(1 <= b - a <= size for a, b in found)


def test_paragraphs_stay_whole_and_fill_a_passage() -> None:
    assert cut(TEXT, 100) == [TEXT]
    assert cut(TEXT, 12) == [
        "# Title\n\nOne two three. Four five six seven.",
        "## Head\nEight nine.",
        "## Other\n\nten eleven twelve thirteen fourteen fifteen sixteen.",
    ]


def test_long_paragraphs_are_cut_at_sentences_then_at_words() -> None:
    assert cut("One two three. Four five six seven.", 4) == [
        "One two three.",
        "Four five six seven.",
    ]
    assert cut("one two three four five", 2) == ["one two", "three four", "five"]
    assert spans("東京は首都。大阪は西。", 7, len) == [(0, 6), (6, 11)]


def test_a_heading_stands_above_its_own_text() -> None:
    text = "one two three\n\n## Head\n\nfour five six seven eight"
    assert cut(text, 7) == ["one two three", "## Head\n\nfour five six seven eight"]


@pytest.mark.parametrize("text", ["", "  \n\n "])
def test_no_text_has_no_passage(text: str) -> None:
    assert spans(text, 3, words) == []
