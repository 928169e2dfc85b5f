"""Checks on generated text: what each drops, and bad checks."""

from __future__ import annotations

import sys
from typing import Any

import pytest
from jsonargparse import ArgumentParser

from sdft import Example
from sdft.checks import (
    AnyCheck,
    Check,
    Facts,
    LanguageCheck,
    LengthCheck,
    RegexCheck,
    RepetitionCheck,
    ScoreCheck,
    count_reasons,
    reason_to_drop,
    shown_reasons,
)
from sdft.scorers import ExactMatch, Scorer

EXAMPLE = Example(({"role": "user", "content": "say b"},), "b")


def dropped(check: AnyCheck, text: str = "b", **facts: Any) -> str | None:
    known = {"tokens": 3, "truncated": False, "scorer": None} | facts
    return reason_to_drop([check], text, EXAMPLE, Facts(**known))


def no_vowels(text: str, example: Example, facts: Facts) -> str | None:
    return "has a vowel" if set(text) & set("aeiou") else None


class Polite(Check):
    def __init__(self, word: str = "please") -> None:
        self.word = word

    def __call__(self, text: str, example: Example, facts: Facts) -> str | None:
        return None if self.word in text else "is rude"


@pytest.mark.parametrize(
    ("check", "tokens", "truncated", "reason"),
    [
        (LengthCheck(), 0, False, "shorter than 1 tokens"),
        (LengthCheck(), 1, False, None),
        (LengthCheck(), 9, True, "truncated"),
        (LengthCheck(drop_truncated=False), 9, True, None),
        (LengthCheck(4), 3, False, "shorter than 4 tokens"),
        (LengthCheck(4), 4, False, None),
        (LengthCheck(max_tokens=4), 4, False, None),
        (LengthCheck(max_tokens=4), 5, False, "longer than 4 tokens"),
    ],
)
def test_length(check: LengthCheck, tokens: int, truncated: bool, reason: str | None) -> None:
    assert dropped(check, tokens=tokens, truncated=truncated) == reason


def test_patterns_are_searched_for_anywhere() -> None:
    assert dropped(RegexCheck(must_match=r"\d"), "seven 7") is None
    assert dropped(RegexCheck(must_match=r"\d"), "seven") == r"lacks '\\d'"
    assert dropped(RegexCheck(must_not_match="(?i)sorry"), "I am Sorry.") == "has '(?i)sorry'"
    assert dropped(RegexCheck(must_match="a", must_not_match="b"), "ab") == "has 'b'"


def test_repetition_is_the_share_of_ngrams_that_stood_there_before() -> None:
    text = "a b a b a b"  # bigrams ab ba ab ba ab: 3 of 5 repeat
    assert dropped(RepetitionCheck(2, max_share=0.6), text) is None
    assert dropped(RepetitionCheck(2, max_share=0.59), text) == "repeats itself"
    assert dropped(RepetitionCheck(2, max_share=0.0), "a b c d") is None
    assert dropped(RepetitionCheck(9, max_share=0.0), text) is None, "shorter than an n-gram"


def test_a_score_keeps_the_right_answers() -> None:
    check = ScoreCheck(0.5)
    assert dropped(check, "B", scorer=ExactMatch()) is None
    assert dropped(check, "c", scorer=ExactMatch()) == "scored below 0.5"
    unknown = Example(EXAMPLE.messages, "")
    assert reason_to_drop([check], "c", unknown, Facts(1, False, ExactMatch())) is None
    with pytest.raises(ValueError, match="ScoreCheck raised ValueError: there is no task here"):
        dropped(check)


def test_the_first_reason_counts() -> None:
    checks: list[AnyCheck] = [no_vowels, LengthCheck(5), Polite()]
    facts = Facts(3, False)
    assert reason_to_drop(checks, "a", EXAMPLE, facts) == "has a vowel"
    assert reason_to_drop(checks, "b", EXAMPLE, facts) == "shorter than 5 tokens"
    assert reason_to_drop([], "b", EXAMPLE, facts) is None


def test_a_check_that_raises_is_named_with_the_beginning_of_the_text() -> None:
    def broken(text: str, example: Example, facts: Facts) -> str | None:
        raise KeyError("tool")

    with pytest.raises(ValueError, match="the check broken raised KeyError: 'tool'") as error:
        dropped(broken, "x" * 500)
    assert repr("x" * 80) in str(error.value)
    assert "say b" in str(error.value)


@pytest.mark.parametrize("found", [True, 0, ["no"]])
def test_a_check_answers_with_a_reason_or_nothing(found: Any) -> None:
    with pytest.raises(ValueError, match="must return a text or None, found"):
        dropped(lambda *_: found)


def test_an_empty_reason_becomes_the_name_of_the_check() -> None:
    def silent(text: str, example: Example, facts: Facts) -> str | None:
        return ""

    assert dropped(silent) == "silent"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LengthCheck(-1), "min_tokens must be 0 or more, found -1"),
        (lambda: LengthCheck(5, 4), "max_tokens must be at least 5 .* found 4"),
        (lambda: LengthCheck(0, 0), "max_tokens must be at least 1"),
        (RegexCheck, "found neither"),
        (lambda: RegexCheck("("), r"must_match '\(' is not a regular expression"),
        (lambda: RegexCheck("a", "["), "must_not_match"),
        (lambda: RepetitionCheck(0), "ngram must be at least 1, found 0"),
        (lambda: RepetitionCheck(max_share=1.0), r"max_share must lie in \[0, 1\), found 1"),
        (lambda: RepetitionCheck(max_share=float("nan")), "max_share"),
        (lambda: ScoreCheck(0), r"minimum must lie in \(0, 1\], found 0"),
        (lambda: ScoreCheck(float("nan")), "minimum"),
    ],
)
def test_bad_settings_are_named(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_reasons_are_counted_most_frequent_first() -> None:
    counts = count_reasons(["x", None, "y", "y", None])
    assert list(counts.items()) == [("y", 2), ("x", 1)]
    assert shown_reasons(counts) == "2 y, 1 x"
    assert shown_reasons(counts, most=1) == "2 y, 1 for other reasons"
    assert shown_reasons({}) == ""


def test_yaml_names_ours_by_class_and_a_users_by_import_path() -> None:
    class Holder:
        def __init__(self, checks: list[AnyCheck] | None = None) -> None:
            self.checks = checks or []

    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Holder, "it")
    given: list[Any] = [
        {"class_path": "LengthCheck", "init_args": {"min_tokens": 2}},
        {"class_path": f"{__name__}.Polite", "init_args": {"word": "kindly"}},
        f"{__name__}.no_vowels",
    ]
    checks = parser.instantiate(parser.parse_object({"it": {"checks": given}})).it.checks
    assert dropped(checks[0], tokens=1) == "shorter than 2 tokens"
    assert dropped(checks[1], "please") == "is rude"
    assert dropped(checks[2], "a") == "has a vowel"


# ---------------------------------------------------------------- language, another scorer


def test_other_languages_are_dropped_where_that_can_be_told() -> None:
    pytest.importorskip("py3langid")
    check = LanguageCheck(["en"])
    example, facts = Example(({"role": "user", "content": "?"},), ""), Facts(9, False)
    assert check("The weather is nice today, so we went out for a walk.", example, facts) is None
    german = "Das Wetter ist heute schön, deshalb gingen wir spazieren."
    assert check(german, example, facts) == "in 'de'"
    assert LanguageCheck(["en", "de"])(german, example, facts) is None
    assert check("Nein, danke.", example, facts) is None  # too short to tell
    assert check("123 456 789 " * 10, example, facts) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"languages": []}, "found none"),
        ({"languages": ["en", "klingon"]}, "found 'klingon'"),
        ({"languages": ["en"], "min_letters": 0}, "min_letters must be at least 1"),
        ({"languages": ["en"], "min_probability": 0.0}, r"must lie in \(0, 1\]"),
    ],
)
def test_bad_languages_are_named(options: dict[str, Any], message: str) -> None:
    pytest.importorskip("py3langid")
    with pytest.raises(ValueError, match=message):
        LanguageCheck(**options)


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "py3langid", None)
    with pytest.raises(ValueError, match=r"pip install 'sdft\[language\]'"):
        LanguageCheck(["en"])


def test_a_scorer_of_its_own_is_asked_in_place_of_the_tasks() -> None:
    class Short(Scorer):
        def __call__(self, response: str, example: Example) -> float:
            return float(len(response) < 3)

    check = ScoreCheck(1.0, Short())
    example = Example(({"role": "user", "content": "?"},), "")
    assert check("ab", example, Facts(1, False)) is None
    assert check("abc", example, Facts(1, False)) == "scored below 1"
