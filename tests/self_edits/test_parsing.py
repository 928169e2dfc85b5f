"""What is read out of the many ways in which models write lists and pairs."""

from __future__ import annotations

import pytest

from sdft.self_edits.parsing import Item, as_list, as_pairs, as_whole

FACTS = ["The Rhine is 1,230 km long.", "It rises in Switzerland."]


@pytest.mark.parametrize(
    "text",
    [
        "1. The Rhine is 1,230 km long.\n2. It rises in Switzerland.",
        "1) The Rhine is 1,230 km long.\n2) It rises in Switzerland.",
        "(1) The Rhine is 1,230 km long.\n(2) It rises in Switzerland.",
        "- The Rhine is 1,230 km long.\n\n- It rises in Switzerland.",
        "* The Rhine is 1,230 km long.\n* It rises in Switzerland.",
        "• The Rhine is 1,230 km long.\n• It rises in Switzerland.",
        "Here are two facts:\n\n1. The Rhine is 1,230 km long.\n2. It rises in Switzerland.",
        "1. The Rhine is 1,230 km long.\n2. It rises in Switzerland.\n\nI hope this helps!",
        "1. The Rhine is\n   1,230 km long.\n2. It rises in Switzerland.",
        "1. **The Rhine is 1,230 km long.**\n2. **It rises in Switzerland.**",
        "1. The Rhine is 1,230 km long. 2. It rises in Switzerland.",
        "Facts:\n(1) The Rhine is 1,230 km long.; (2) It rises in Switzerland.;",
        '1. "The Rhine is 1,230 km long."\n2. “It rises in Switzerland.”',
        "The Rhine is 1,230 km long.\nIt rises in Switzerland.",
        "Facts:\n\nThe Rhine is 1,230 km long.\n\nIt rises in Switzerland.",
        "  1. The Rhine is 1,230 km long.\n  2. It rises in Switzerland.\n  3. ",
    ],
)
def test_lists(text: str) -> None:
    assert as_list(text) == [Item(fact) for fact in FACTS]


@pytest.mark.parametrize("text", ["", " \n ", "1. ", "Here are the facts:"])
def test_an_empty_list(text: str) -> None:
    assert as_list(text) == []


def test_a_number_or_a_dash_within_a_point_is_no_bullet() -> None:
    text = "1. In 2016. The score was 24-10.\n2. 1.5 km - or so.\n-5 degrees"
    assert [item.answer for item in as_list(text)] == [
        "In 2016. The score was 24-10.",
        "1.5 km - or so. -5 degrees",
    ]


def test_a_number_that_does_not_count_on_is_no_point() -> None:
    assert as_list("1. It was 1995, 3. June. 2. No. 7. is his.") == [
        Item("It was 1995, 3. June."),
        Item("No. 7. is his."),
    ]


def test_quotes_within_a_point_stay() -> None:
    assert as_list('1. He said "no" twice.\n2. "A" and "B"') == [
        Item('He said "no" twice.'),
        Item('"A" and "B"'),
    ]


PAIRS = [Item("Denver.", "Who won?"), Item("In 2016,\nin February.", "When?")]


@pytest.mark.parametrize(
    "text",
    [
        "Q: Who won?\nA: Denver.\n\nQ: When?\nA: In 2016,\nin February.",
        "Q1: Who won?\nA1: Denver.\nQ2: When?\nA2: In 2016,\nin February.",
        "1. Q: Who won?\n   A: Denver.\n2. Q: When?\n   A: In 2016,\nin February.",
        "**Question:** Who won?\n**Answer:** Denver.\n**Question:** When?\n"
        "**Answer:** In 2016,\nin February.",
        "**Question 1**: Who won?\n**Answer 1**: Denver.\n**Question 2**: When?\n"
        "**Answer 2**: In 2016,\nin February.",
        "Question #1: Who won?\nAnswer: Denver.\nQuestion #2: When?\n"
        "Answer: In 2016,\nin February.",
        "Here are two:\n\nrequest: Who won?\nresponse: Denver.\n- Request: When?\n"
        "- Response: In 2016,\nin February.",
        "Q: Who won? A: Denver.\nQ: When? A: In 2016,\nin February.",
        "### Q: Who won?\n\nA: Denver.\n\n### Q: When?\n\nA: In 2016,\nin February.\n",
    ],
)
def test_pairs(text: str) -> None:
    assert as_pairs(text) == PAIRS


def test_one_without_the_other() -> None:
    text = "A: Nobody asked.\nQ: Unanswered?\nQ: Who?\nA: Me.\nQ: Cut off"
    assert as_pairs(text) == [
        Item("Nobody asked.", ""),
        Item("", "Unanswered?"),
        Item("Me.", "Who?"),
        Item("", "Cut off"),
    ]


@pytest.mark.parametrize("text", ["", "I cannot do that.", "Quite: so.", "Aim: high"])
def test_no_pairs(text: str) -> None:
    assert as_pairs(text) == []


@pytest.mark.parametrize(
    "text",
    [
        "One line.\n\nAnother.",
        "Here is the text in my own words:\n\nOne line.\n\nAnother.",
        "**Rewritten text:**\nOne line.\n\nAnother.\n",
        '"One line.\n\nAnother."',
    ],
)
def test_wholes(text: str) -> None:
    assert as_whole(text) == [Item("One line.\n\nAnother.")]


def test_a_whole_that_is_empty() -> None:
    assert as_whole(" \n") == []
