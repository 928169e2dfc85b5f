"""Scorers: what counts as the answer, and what does not."""

from __future__ import annotations

from typing import Any

import pytest

from sdft.examples import Example, as_messages
from sdft.scorers import (
    ExactMatch,
    JSONFieldMatch,
    JSONMatch,
    LetterMatch,
    NumericMatch,
    RegexMatch,
    Scorer,
)


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
        (ExactMatch(drop_articles=True), "The  Thames", "a Thames", 1.0),
        (ExactMatch(drop_articles=True), "anthem", "them", 0.0),
        (ExactMatch(), "the Thames", "Thames", 0.0),
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


@pytest.mark.parametrize(
    ("options", "response", "answer", "expected"),
    [
        ({"tolerance": 0.1}, "0.3", "0.2", 1.0),  # floats differ by more
        ({"tolerance": 0.1}, "0.31", "0.2", 0.0),
        ({"relative_tolerance": 0.01}, "1,010 m", "1000", 1.0),
        ({"relative_tolerance": 0.01}, "1,011 m", "1000", 0.0),
        ({"relative_tolerance": 0.01}, "-1000", "1000", 0.0),
        ({"relative_tolerance": 0.5}, "0.1", "0", 0.0),
        ({"tolerance": 1}, "no idea", "0", 0.0),
        ({"tolerance": 1}, "1e999999999999", "1", 0.0),
        ({"marker": "####"}, "so\n#### 72 clips, of 80", "#### 72", 1.0),
        ({"marker": "####"}, "#### 1\n#### 72\n", "72", 1.0),
        ({"marker": "####"}, "72 #### none", "72", 0.0),  # announced, and not there
        ({"marker": "####"}, "it is 72", "72", 1.0),
        ({}, "#### 72 clips, of 80", "#### 72", 0.0),
    ],
)
def test_numeric_match_with_settings(
    options: dict[str, Any], response: str, answer: str, expected: float
) -> None:
    assert score(NumericMatch(**options), response, answer) == expected


@pytest.mark.parametrize(
    "options", [{"tolerance": -1}, {"relative_tolerance": float("inf")}, {"marker": " "}]
)
def test_numeric_match_rejects_bad_settings(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="NumericMatch: "):
        NumericMatch(**options)


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


@pytest.mark.parametrize(
    ("response", "letter"),
    [
        ("<answer>\nB\n</answer>", "B"),
        ("<answer>B</answer> no: <answer>C</answer>", "C"),
        ("<reasoning>A</reasoning><answer>D", "D"),  # cut by the length limit
        ("<answer>(b)</answer>", "B"),
        ("<answer>**B**</answer>", "B"),
        ("<answer>B: 337.310</answer>", "B"),
        ("<answer>B.</answer>", "B"),
        ("<answer>B) 3</answer>", "B"),
        ("<answer>B\nbecause</answer>", "B"),
        ("<answer>A molecule</answer>", None),
        ("<answer>Both</answer>", None),
        ("<answer>E</answer>", None),
        ("<answer></answer>", None),
        ("<answer>A</answer><answer></answer>", None),
        ("B", None),
        ("the answer is B", None),
        ("", None),
    ],
)
def test_the_letter_of_the_last_answer(response: str, letter: str | None) -> None:
    assert LetterMatch().letter(response) == letter


@pytest.mark.parametrize(
    ("response", "letter"),
    [
        ("A? No. The answer is (B).", "B"),
        ("Answer: C\n", "C"),
        (r"so \boxed{D}", "D"),
        ("because of this\nB", "B"),
        ("Option A is wrong, option C right.", "C"),
        ("The answer is a molecule", None),
        ("I think A or B", None),
        ("<answer>none</answer> the answer is B", None),
        ("", None),
    ],
)
def test_the_letter_anywhere(response: str, letter: str | None) -> None:
    assert LetterMatch(anywhere=True).letter(response) == letter


def test_letter_match() -> None:
    scorer = LetterMatch("abcde", tag="final")
    assert score(scorer, "<final>e</final>", " E ") == 1.0
    assert score(scorer, "<answer>E</answer>", "E") == 0.0
    example = Example(as_messages("p"), "E")
    assert scorer.explain("<final>A</final>", example) == "chose A, not E"
    assert scorer.explain("E", example) == "no letter in <final>"
    with pytest.raises(ValueError, match="must be one of ABCDE, found 'F'"):
        score(scorer, "E", "F")
    for bad in ({"letters": "AA"}, {"letters": "1"}, {"letters": ""}, {"tag": "a b"}):
        with pytest.raises(ValueError, match="LetterMatch: "):
            LetterMatch(**bad)


ORDER = '{"order": {"items": [{"name": "Tea", "n": 2}], "paid": true}}'


@pytest.mark.parametrize(
    ("fields", "response", "answer", "expected"),
    [
        (["order.items.0.name"], ORDER, "tea", 1.0),
        (["order.items.0.n"], ORDER.replace("2", "2.0"), "2", 1.0),
        (["order.paid"], ORDER, "1", 0.0),
        (["order.paid"], ORDER, "true", 1.0),
        (["order.items.0.name", "order.paid"], f"Sure: {ORDER}", ORDER, 1.0),
        (["order.items.0.name", "order.paid"], ORDER.replace("true", "false"), ORDER, 0.0),
        (["order.items.1.name"], ORDER, "tea", 0.0),
        (["order"], '{"order": {"paid": true, "items": [{"n": 2, "name": "Tea"}]}}', ORDER, 1.0),
        (["order"], "no object", ORDER, 0.0),
        (["a"], '{"a": 1', '{"a": 1}', 0.0),
        (["a"], '{"a": null}', '{"a": null}', 1.0),
    ],
)
def test_json_field_match(fields: list[str], response: str, answer: str, expected: float) -> None:
    assert score(JSONFieldMatch(fields), response, answer) == expected


def test_json_field_match_names_what_is_wrong() -> None:
    example = Example(as_messages("p"), '{"a": 1, "b": "x"}')
    scorer = JSONFieldMatch(["a", "b"], ignore_case=False)
    assert scorer.explain('{"a": 1, "b": "X"}', example) == "field 'b' is 'X', not 'x'"
    assert scorer.explain('{"b": "x"}', example) == "no field 'a'"
    with pytest.raises(ValueError, match=r"the answer .* has no field 'c'"):
        JSONFieldMatch(["a", "c"]).explain("{}", example)
    for fields in ([], [""]):
        with pytest.raises(ValueError, match="fields must be names"):
            JSONFieldMatch(fields)
