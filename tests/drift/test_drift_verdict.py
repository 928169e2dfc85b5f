"""When a column counts as fallen, and how CI servers read it."""

from __future__ import annotations

from xml.etree import ElementTree as ET

import pytest

from sdft.drift.junit import junit
from sdft.drift.verdict import Verdict, table
from sdft.metrics import Cell


def cell(right: int, n: int = 20) -> Cell:
    return Cell.from_scores([1.0] * right + [0.0] * (n - right), 3.0, 0.0, 0.0)


def verdict(then: Cell, now: Cell, allowed: float = 0.0, name: str = "old") -> Verdict:
    return Verdict(name, True, then, now, allowed)


@pytest.mark.parametrize("then", [1, 10, 19, 20])
def test_it_fell_below_the_interval_and_not_within(then: int) -> None:
    low, _ = cell(then).ci95 or (0.0, 0.0)
    outcomes = {right: verdict(cell(then), cell(right)).outcome for right in range(21)}
    assert outcomes == {r: "fell" if r / 20 < low else "kept" for r in range(21)}
    assert outcomes[then] == "kept"


def test_more_may_be_allowed() -> None:
    assert verdict(cell(20), cell(16)).outcome == "fell"  # .80 below .84
    assert verdict(cell(20), cell(16), allowed=0.05).outcome == "kept"
    assert verdict(cell(20), cell(15), allowed=0.05).outcome == "fell"
    assert verdict(cell(2), cell(0), allowed=1.0).floor == 0.0


def test_a_score_at_the_floor_is_kept() -> None:
    then = Cell(0.7, 10, ci95=(0.1 + 0.2, 1.0))  # .30000000000000004
    assert verdict(then, Cell(0.3, 10)).outcome == "kept"


@pytest.mark.parametrize(
    ("then", "now"),
    [(cell(20), Cell(None, 0, error="no such file")), (Cell(None, 0, error="raised"), cell(20))],
)
def test_what_has_no_score_is_never_kept(then: Cell, now: Cell) -> None:
    found = verdict(then, now)
    assert found.outcome == "unscored"
    assert (then.error or now.error or "?") in found.reason


def test_other_examples_are_remarked_on() -> None:
    assert verdict(cell(20), cell(20)).remarks == []
    (remark,) = verdict(cell(20), cell(10, 10)).remarks
    assert remark == "old: measured on 10 examples, the baseline on 20"


def test_the_table_says_what_fell() -> None:
    rows = table([verdict(cell(20), cell(20)), verdict(cell(20), cell(1), name="new")]).splitlines()
    assert len(rows) == 3
    assert rows[2].split()[-1] == "FELL"
    assert "FELL" not in rows[1]


def test_junit_counts_failures_and_errors() -> None:
    bad = "a\x00b <&> ü"
    verdicts = [
        verdict(cell(20), cell(20)),
        verdict(cell(20), cell(0), name="new"),
        verdict(cell(20), Cell(None, 0, error=bad), name="broken"),
    ]
    root = ET.fromstring(junit(verdicts, {"model": bad}).encode())
    (suite,) = root
    for element in (root, suite):
        found = [element.get(key) for key in ("tests", "failures", "errors")]
        assert found == ["3", "1", "1"]
    cases = suite.findall("testcase")
    assert [case.get("name") for case in cases] == ["old", "new", "broken"]
    assert [[child.tag for child in case] for case in cases] == [
        ["system-out"],
        ["failure", "system-out"],
        ["error", "system-out"],
    ]
    assert "0.000, was 1.000" in str(cases[1][0].get("message"))
    assert "a\ufffdb <&> ü" in str(cases[2][0].text)
    (fact,) = suite.findall("properties/property")
    assert fact.get("value") == "a\ufffdb <&> ü"
