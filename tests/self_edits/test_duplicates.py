"""Duplicates: the same words, or nearly the same."""

from __future__ import annotations

import random

import pytest

from sdft.self_edits.duplicates import Duplicates, ngrams_of, similarity

TEXT = "the rhine rises in switzerland and flows to the sea"


def reason(text: str, ngram: int = 3, threshold: float = 0.6) -> str | None:
    seen = Duplicates(ngram, threshold)
    seen.add(TEXT)
    return seen.reason(text)


@pytest.mark.parametrize(
    "text", [TEXT, TEXT.upper(), f"  {TEXT}!", TEXT.replace(" and", ", and\n")]
)
def test_case_punctuation_and_white_space_make_no_difference(text: str) -> None:
    assert reason(text) == "duplicate"


def test_similarity_is_jaccard_of_ngrams() -> None:
    assert similarity(ngrams_of("a b c d", 2), ngrams_of("b c d e", 2)) == 2 / 4
    assert similarity(ngrams_of("a", 3), ngrams_of("A!", 3)) == 1.0
    assert similarity(ngrams_of("a", 3), ngrams_of("b", 3)) == 0.0


def test_near_duplicates_from_the_threshold_on() -> None:
    changed = TEXT.replace("sea", "ocean")  # 7 of 9 trigrams in common
    assert reason(changed, threshold=7 / 9) == "near-duplicate"
    assert reason(changed, threshold=7 / 9 + 1e-6) is None
    assert reason("something else entirely") is None
    assert reason("") is None


def test_looking_up_finds_what_comparing_with_all_would() -> None:
    rng = random.Random(0)
    texts = [" ".join(rng.choices("abcd", k=rng.randint(1, 9))) for _ in range(300)]
    seen = Duplicates(2, 0.5)
    kept: list[str] = []
    for text in texts:
        near = any(similarity(ngrams_of(text, 2), ngrams_of(k, 2)) >= 0.5 for k in kept)
        assert (seen.reason(text) is not None) is near, text
        if not near:
            seen.add(text)
            kept.append(text)
    assert 10 < len(kept) < 290


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ngram": 0}, "duplicate_ngram must be at least 1, found 0"),
        ({"threshold": 0.0}, r"duplicate_threshold must lie in \(0, 1\], found 0"),
        ({"threshold": float("nan")}, "duplicate_threshold"),
    ],
)
def test_bad_settings_are_named(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Duplicates(**options)  # type: ignore[arg-type]
