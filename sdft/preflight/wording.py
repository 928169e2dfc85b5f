"""Numbers in words: what text and page both say."""

from __future__ import annotations

from sdft.metrics import Estimate
from sdft.preflight.estimate import RunEstimate
from sdft.preflight.facts import TaskFacts
from sdft.preflight.gap import Gap, Mean
from sdft.preflight.lengths import Lengths

WHOSE = {
    "rollouts": "rollouts (as training draws them)",
    "without": "greedy, without the demonstration",
    "with": "greedy, with the demonstration",
    "demonstrations": "the demonstrations themselves",
}
"""Whose lengths → how they are called."""


def share(own: Estimate | None) -> str:
    """An accuracy with its interval."""
    if own is None:
        return "n/a"
    low, high = own.ci95
    return f"{own.score:.2f} ({low:.2f}–{high:.2f})"


def gap_text(gap: Gap | None) -> str:
    """The gap with its interval, and how many examples it rests on."""
    if gap is None:
        return "n/a"
    low, high = gap.ci95
    return f"{gap.mean:+.2f} ({low:+.2f} to {high:+.2f}); {gap.gained} gained, {gap.lost} lost"


def nats(mean: Mean | None) -> str:
    """A divergence with its interval."""
    if mean is None:
        return "n/a"
    if mean.ci95 is None:
        return f"{mean.mean:.3g} nats per token"
    return f"{mean.mean:.3g} ({mean.ci95[0]:.3g}–{mean.ci95[1]:.3g}) nats per token"


def length_cells(own: Lengths) -> list[str]:
    """Mean, quantiles and share cut, as `LENGTH_HEADS` names them."""
    return [
        f"{own.mean:.1f}",
        *(str(value) for value in (own.p10, own.p50, own.p90, own.longest)),
        f"{own.truncated:.0%}",
    ]


LENGTH_HEADS = ("mean", "10 %", "median", "90 %", "longest", "cut")


def dropped(facts: TaskFacts) -> str:
    """How many examples each limit drops, of all there are."""
    fit = facts.fitting
    if fit is None:
        return "n/a"
    return (
        f"{fit.dropped_student} by the student's limit ({fit.limits[0]} tokens, longest prompt "
        f"{fit.longest[0]}), {fit.dropped_teacher} by the teacher's ({fit.limits[1]}, longest "
        f"{fit.longest[1]}), of {fit.total}"
    )


def duration(seconds: float | None) -> str:
    """Seconds as one reads them."""
    if seconds is None:
        return "unknown"
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s" if seconds >= 1 else f"{seconds:.2f} s"


def size(count: float | None) -> str:
    """Bytes as one reads them."""
    if count is None:
        return "unknown"
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def time_lines(estimate: RunEstimate) -> list[str]:
    """The run's time, part by part."""
    lines = [
        f"time: {duration(estimate.seconds)} on {estimate.device} = training "
        f"{duration(estimate.training_seconds)} + evaluation "
        f"{duration(estimate.evaluation_seconds)} ({estimate.evaluated} answers)"
    ]
    if estimate.prepare_seconds:
        lines.append(f"answers before training: {duration(estimate.prepare_seconds)} of it")
    for name, task in estimate.tasks.items():
        trial = task.trial
        if trial.seconds is None:
            lines.append(f"{name}: {trial.problem}")
            continue
        parts = " + ".join(f"{phase} {duration(value)}" for phase, value in trial.phases.items())
        lines.append(
            f"{name}: {task.batches} batches of {duration(trial.seconds)} ({parts}) = "
            f"{duration(task.seconds)}"
        )
    return lines


def token_line(estimate: RunEstimate) -> str:
    """Tokens through a model, by phase."""
    found = estimate.tokens
    if not found:
        return "tokens: unknown"
    parts = ", ".join(f"{phase} {count:,}" for phase, count in found.items())
    return f"tokens through a model: {sum(found.values()):,} ({parts})"


def memory_line(estimate: RunEstimate) -> str:
    """Memory by the calculator and as measured."""
    own = estimate.footprint
    measured = ""
    if own.measured_bytes is not None:
        whole = " with the program itself" if estimate.device.startswith("cpu") else ""
        measured = f"; the timed steps took {size(own.measured_bytes)}{whole}"
    if own.peak_bytes is None:
        return f"memory: unknown to the calculator ({own.problem}){measured}"
    verdict = {True: "fits", False: "DOES NOT FIT", None: "of"}[own.fits]
    return (
        f"memory: {size(own.peak_bytes)} per device by the calculator, {verdict} "
        f"{size(own.available_bytes)}{measured}"
    )
