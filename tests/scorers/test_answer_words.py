"""The answer's words, wherever in a response they stand."""

from __future__ import annotations

from typing import Any

import pytest

from sdft.examples import Example, as_messages
from sdft.scorers import AnswerWords


def example(answer: str) -> Example:
    return Example(as_messages("who?"), answer)


@pytest.mark.parametrize(
    ("response", "answer", "strict", "lenient"),
    [
        ("It was the Denver Broncos, I think.", "Denver Broncos", 1, 1),
        ("denver BRONCOS", "The Denver Broncos.", 1, 1),
        ("Denver, and not the Broncos", "Denver Broncos", 0, 1),
        ("Broncos Denver", "Denver Broncos", 0, 1),
        ("Carolina", "Denver Broncos", 0, 0),
        ("Denverish", "Denver", 0, 0),
        ("24-10", "24–10", 1, 1),
        ("Denver and 1856", "Denver; 1856", 1, 1),
        ("Denver and 1857", "Denver; 1856", 0, 1),
        ("", "Denver", 0, 0),
        ("a", "A", 1, 1),  # nothing would be left without its article
        ("one of four words", "one two three four", 0, 1),
        ("one of five words", "one two three four", 0, 0),
    ],
)
def test_strict_and_lenient(response: str, answer: str, strict: int, lenient: int) -> None:
    own = example(answer)
    assert AnswerWords()(response, own) == strict
    assert AnswerWords("lenient")(response, own) == lenient
    assert AnswerWords().details([response], [own]) == {"strict": [strict], "lenient": [lenient]}
    assert (AnswerWords().explain(response, own) is None) == (strict == 1)


def test_a_long_response_is_no_strict_answer_where_that_is_asked_for() -> None:
    brief = AnswerWords(max_words=3)
    assert brief("it is Denver", example("Denver")) == 1
    assert brief("it is not there but Denver", example("Denver")) == 0
    assert "has 6 words, 3 are allowed" in str(
        brief.explain("it is not there but Denver", example("Denver"))
    )
    assert "does not say 'denver'" in str(brief.explain("no", example("Denver")))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"score": "graded"}, "score must be one of"),
        ({"separator": " "}, "the separator is empty"),
        ({"max_words": 0}, "max_words must be at least 1"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AnswerWords(**settings)


def test_an_answer_without_words_cannot_be_compared_with() -> None:
    with pytest.raises(ValueError, match="has no word"):
        AnswerWords()("a", example(" ; ?"))
