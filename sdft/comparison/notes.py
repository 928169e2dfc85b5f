"""What a reader has to know before believing the numbers."""

from __future__ import annotations

from collections.abc import Iterator

from sdft.comparison.results import Result
from sdft.comparison.selection import edge
from sdft.comparison.summary import Summary

_FEW = 3
_WHAT = {"acc": "ACC", "prior": "the prior suites", "mean": "the mean of all columns"}


def notes(summary: Summary) -> list[str]:
    """One sentence or two each, for the report and `compare.json`."""
    return [
        *_selection(summary),
        *_seeds(summary),
        *_alike(summary),
        *_absent(summary),
        *_changed(summary),
        *_budget(summary.results.finished),
        *_cost(summary),
    ]


def _selection(summary: Summary) -> Iterator[str]:
    if summary.selection.caution:
        yield summary.selection.caution
    ends: dict[str, list[str]] = {}
    for standing in summary.standings:
        end = edge(standing.method, standing.rate) if standing.rate else None
        if end is not None:
            ends.setdefault(end, []).append(standing.method.label)
    for end, labels in sorted(ends.items()):
        yield (
            f"The chosen rate is the {end} that was tried for {', '.join(labels)}: a better one "
            "may lie beyond."
        )


def _seeds(summary: Summary) -> Iterator[str]:
    counts = {len(standing.seeds) for standing in summary.standings if standing.results}
    if counts and min(counts) == 1:
        yield "Where a method has one seed, there is no interval and no verdict."
    if counts and 1 < min(counts) < _FEW:
        yield "Two seeds give very wide intervals (Student's t with one degree of freedom is 12.7)."


def _changed(summary: Summary) -> Iterator[str]:
    if summary.results.changed:
        titles = "; ".join(run.title for run in summary.results.changed)
        yield (
            f"Left out, as their folders hold runs of another configuration: {titles}. Run the "
            "comparison to make them."
        )


def _alike(summary: Summary) -> Iterator[str]:
    """Intervals without a width look like certainty."""
    for pair in summary.pairs:
        found = pair.difference.estimate
        if found.ci95 is not None and found.ci95[0] == found.ci95[1]:
            other = summary.standing[pair.other].method.label
            yield (
                f"The difference to {other} in {_WHAT[pair.quality]} is the same in all "
                f"{len(pair.difference.seeds)} seeds, so its interval has no width: these seeds "
                "agree, and no more can be said."
            )


def _absent(summary: Summary) -> Iterator[str]:
    for standing in summary.standings:
        expected = len(summary.plan.values.seeds)
        if standing.results and len(standing.seeds) < expected:
            yield (
                f"{standing.method.label} has {len(standing.seeds)} of {expected} seeds at its "
                "chosen rate; it is compared by those that both methods have."
            )
        elif not standing.results:
            yield f"{standing.method.label} has no finished run."


def _budget(results: list[Result]) -> Iterator[str]:
    steps = {tuple(r.steps): r.run.title for r in results if r.steps and r.run.rate is not None}
    if len(steps) > 1:
        told = "; ".join(f"{title}: {' + '.join(map(str, own))}" for own, title in steps.items())
        yield f"The runs did not all make the same number of optimizer steps ({told})."


def _cost(summary: Summary) -> Iterator[str]:
    measured = [result.cost for result in summary.results.finished if result.cost]
    if len(measured) < len(summary.results.finished):
        yield "Some runs have no cost.json: the cost of their methods is not known."
    places = {f"{cost.get('device')}, {cost.get('threads')} threads" for cost in measured}
    if len(places) > 1:
        yield f"The costs were measured in different places: {'; '.join(sorted(places))}."
    if summary.plan.values.jobs > 1 and measured:
        yield (
            f"Seconds were measured with {summary.plan.values.jobs} runs at a time on one machine; "
            "FLOPs do not depend on that."
        )


def budget_line(summary: Summary) -> str | None:
    """The budget in a sentence, where the runs tell it."""
    found = {tuple(r.steps) for r in summary.results.finished if r.steps and r.run.rate is not None}
    if len(found) != 1:
        return None
    (steps,) = found
    return f"Every run made {' + '.join(map(str, steps))} optimizer steps."
