"""The report on the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from sdft.preflight.facts import TaskFacts
from sdft.preflight.gap import INTERVALS
from sdft.preflight.report import Report
from sdft.preflight.tokens import Block, Token
from sdft.preflight.verdict import Verdict
from sdft.preflight.wording import (
    LENGTH_HEADS,
    WHOSE,
    dropped,
    gap_text,
    length_cells,
    memory_line,
    nats,
    share,
    time_lines,
    token_line,
)

_SHOWN = 24  # tokens of a block; the page has all
_SIDES = {"both": "  both", "student": "- student", "teacher": "+ teacher"}


def text(report: Report) -> str:
    """The whole report."""
    return "\n".join(_lines(report))


def _lines(report: Report) -> Iterator[str]:
    yield f"preflight of {report.method} on {report.model}, seed {report.seed}"
    for facts, verdict in report.pairs:
        yield ""
        yield from _task(facts, verdict)
    yield ""
    yield from _estimate(report)
    yield ""
    yield "intervals: " + "; ".join(f"{name}: {told}" for name, told in INTERVALS.items())
    yield ""
    for facts, verdict in report.pairs:
        yield from _verdict(facts, verdict)


def _task(facts: TaskFacts, verdict: Verdict) -> Iterator[str]:
    yield f"== {facts.name}: {verdict.grade}"
    yield f"  dropped              {dropped(facts)}"
    if facts.problem:
        return
    yield f"  accuracy without     {share(facts.without)}   on {facts.examples} training examples"
    why = facts.missing.get("accuracy_with")
    yield f"  accuracy with        {f'n/a: {why}' if why else share(facts.with_it)}"
    if not why:
        yield f"  gap                  {gap_text(facts.gap)}"
        yield f"  teacher ‖ student    {facts.missing.get('divergence') or nats(facts.divergence)}"
    if facts.demonstrations is not None:
        yield f"  demonstrations pass  {facts.demonstrations:.2f} by the task's own scorer"
    yield from _lengths(facts)
    if facts.alignment is not None:
        found = len(facts.alignment.problems)
        yield f"  prompts              {f'{found} problems' if found else 'aligned'}"
        yield from (f"    {line}" for line in _blocks(facts.alignment.blocks))


def _lengths(facts: TaskFacts) -> Iterator[str]:
    heads = "".join(f"{head:>9}" for head in LENGTH_HEADS)
    yield f"  {f'tokens, at most {facts.limit}':<36}{heads}"
    for key, name in WHOSE.items():
        if key in facts.lengths:
            cells = "".join(f"{cell:>9}" for cell in length_cells(facts.lengths[key]))
            yield f"    {name:<34}{cells}"


def _blocks(blocks: Sequence[Block]) -> Iterator[str]:
    for block in blocks:
        yield f"{_SIDES[block.side]:<10}{_shown(block.tokens)}"


def _shown(tokens: Sequence[Token]) -> str:
    if len(tokens) <= _SHOWN:
        return "│".join(token.shown for token in tokens)
    half = _SHOWN // 2
    left, right = (_shown(part) for part in (tokens[:half], tokens[-half:]))
    return f"{left}│… {len(tokens) - 2 * half} more …│{right}"


def _estimate(report: Report) -> Iterator[str]:
    yield "== the run"
    first, *others = time_lines(report.estimate)
    yield f"  {first}"
    yield from (f"    {line}" for line in others)
    yield f"  {token_line(report.estimate)}"
    yield f"  {memory_line(report.estimate)}"
    yield from (f"  {note}" for note in report.estimate.notes)


def _verdict(facts: TaskFacts, verdict: Verdict) -> Iterator[str]:
    yield f"{facts.name}: {verdict.grade}"
    yield from (f"  {reason.grade}: {reason}" for reason in verdict.reasons)
