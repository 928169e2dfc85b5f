"""Scorers: what counts as the answer, and what does not."""

import pytest

from sdft.examples import Example, as_messages
from sdft.scorers import ExactMatch, JSONMatch, NumericMatch, RegexMatch, Scorer


def score(scorer: Scorer, response: str, answer: str) -> float:
    return scorer(response, Example(as_messages("prompt"), answer))


@pytest.mark.parametrize(
    ("scorer", "response", "answer", "expected"),
    [
        (ExactMatch(), "  A  b\n", "a B", 1.0),
        (ExactMatch(), "a b c", "a b", 0.0),
        (ExactMatch(), "ab", "a b", 0.0),
        (ExactMatch(), "STRASSE", "straße", 1.0),
        (ExactMatch(), "", "a", 0.0),
        (ExactMatch(ignore_case=False), "A", "a", 0.0),
        (ExactMatch(), "yes.", "yes", 0.0),
        (ExactMatch(strip_punctuation=True), "«Yes!» $", "yes", 1.0),
        (ExactMatch(strip_punctuation=True), "no", "yes", 0.0),
    ],
)
def test_exact_match(scorer: Scorer, response: str, answer: str, expected: float) -> None:
    assert score(scorer, response, answer) == expected


CALL = '{"name": "f", "args": {"city": "x", "n": [1, 2]}}'


@pytest.mark.parametrize(
    ("response", "answer", "expected"),
    [
        (CALL, CALL, 1.0),
        ('{"args": {"n": [1, 2], "city": "x"}, "name": "f"}', CALL, 1.0),
        (f"Sure, here are 2 of {{them}}:\n```json\n{CALL}\n```\nDone.", CALL, 1.0),
        (CALL.replace("[1, 2]", "[2, 1]"), CALL, 0.0),
        (CALL.replace('"n"', '"m"'), CALL, 0.0),
        (f'{{"other": 1}} {CALL}', CALL, 0.0),  # only the first value counts
        (f"[{CALL}]", CALL, 0.0),
        (CALL[:-1], CALL, 0.0),
        (CALL[:-1], '{"city": "x", "n": [1, 2]}', 0.0),  # a part of a broken value is no value
        ("[[1], [2", "[1]", 0.0),
        ("I cannot do that", CALL, 0.0),
        ("", CALL, 0.0),
        ('{"a": 1.0}', '{"a": 1}', 1.0),
        ('{"a": true}', '{"a": 1}', 0.0),
        ('{"a": null}', "{}", 0.0),
        ('{"a": "}"}', '{"a": "}"}', 1.0),
        ("9007199254740993", "9007199254740992", 0.0),  # equal as floats
        ("the answer is true", "true", 1.0),
        ("the answer is 5", "true", 0.0),
        ('say "hi"', '"hi"', 1.0),
        ("untrue 5", "5", 1.0),
        ("null", "null", 1.0),
        ("nothing", "null", 0.0),
        ("[" * 100_000, CALL, 0.0),
        ("[" + "9" * 10_000 + "]", CALL, 0.0),
    ],
)
def test_json_match(response: str, answer: str, expected: float) -> None:
    assert score(JSONMatch(), response, answer) == expected


def test_json_match_names_an_answer_that_is_not_json() -> None:
    with pytest.raises(ValueError, match=r"JSONMatch: the answer 'f\(x\)' is not JSON"):
        score(JSONMatch(), "{}", "f(x)")


@pytest.mark.parametrize(
    ("response", "answer", "expected"),
    [
        ("It costs 3 + 4 = 7.", "#### 7", 1.0),
        ("7 and then 8", "7", 0.0),
        ("$1,234.50", "1234.5", 1.0),
        ("1,234", "234", 0.0),
        ("1, 2,3", "3", 1.0),
        ("12345678", "12,345,678", 1.0),
        ("-5", "5", 0.0),
        ("-$5", "-5", 1.0),
        ("−5", "-5", 1.0),
        ("+5", "5", 1.0),
        ("10-5", "5", 1.0),  # a dash between numbers is no sign
        (".5", "0.50", 1.0),
        ("1.5e3", "1500", 1.0),
        ("0.3333", "0.33", 0.0),
        ("<<9*2=18>>18 dollars", "9 * 2 = $<<9*2=18>>18\n#### 18", 1.0),
        ("water is H2O", "2", 0.0),  # a digit in a word is no number
        ("so it is...5", "5", 1.0),
        ("see 1.2.3", "1.2", 1.0),
        ("no idea", "0", 0.0),
        ("", "0", 0.0),
        ("9007199254740993", "9007199254740992", 0.0),  # equal as floats
        ("1e99999999999999999999", "1", 0.0),
    ],
)
def test_numeric_match(response: str, answer: str, expected: float) -> None:
    assert score(NumericMatch(), response, answer) == expected


def test_numeric_match_names_an_answer_without_a_number() -> None:
    with pytest.raises(ValueError, match="NumericMatch: the answer 'many' has no number"):
        score(NumericMatch(), "3", "many")


@pytest.mark.parametrize(
    ("pattern", "response", "answer", "expected"),
    [
        (r"<answer>\s*(\w)\s*</answer>", "<answer>A</answer> no: <answer>\nB\n</answer>", "B", 1.0),
        (r"<answer>\s*(\w)\s*</answer>", "<answer>A</answer> no: <answer>B</answer>", "A", 0.0),
        (r"[A-D]", "B", "B", 1.0),
        (r"[A-D]", "B", "b", 0.0),
        (r"[A-D]", "none", "B", 0.0),
        (r"(x)|y", "x y", "x", 0.0),  # the last match has no group 1
        (r"(.*)", "abc", "abc", 1.0),  # the empty match at the end is no match
        (r"a(b)(c)", "abc", "b", 1.0),
    ],
)
def test_regex_match(pattern: str, response: str, answer: str, expected: float) -> None:
    assert score(RegexMatch(pattern), response, answer) == expected


@pytest.mark.parametrize(
    ("pattern", "message"),
    [("", "the pattern is empty"), ("(a", r"the pattern '\(a' is not a regular expression")],
)
def test_regex_match_rejects_a_bad_pattern(pattern: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RegexMatch(pattern)
