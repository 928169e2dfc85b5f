"""The verdict in plain words: who won, by how much, and where the difference is noise."""

from __future__ import annotations

from sdft.comparison.estimate import Difference, Estimate
from sdft.comparison.summary import Pair, Summary

PAPER_COST = {"seconds": "4", "flops": "2.5"}
"""SDFT's cost as a multiple of SFT's in the paper (arXiv 2601.19897)."""
_WHAT = {
    "mean": "in the mean of all columns",
    "acc": "on the new tasks (ACC)",
    "prior": "on the prior suites",
}


def number(value: float | None, signed: bool = False) -> str:
    """Two decimals; `n/a` where undefined, and no negative zero."""
    if value is None:
        return "n/a"
    rounded = round(value, 2) + 0.0
    return f"{rounded:+.2f}".replace("-", "−") if signed else f"{rounded:.2f}".replace("-", "−")


def interval(found: tuple[float, float] | None, signed: bool = False) -> str:
    """`0.91 to 0.97`; nothing where there is none."""
    return "" if found is None else f"{number(found[0], signed)} to {number(found[1], signed)}"


def with_interval(own: Estimate, signed: bool = False) -> str:
    """`0.94 (0.91 to 0.97)`."""
    around = interval(own.ci95, signed)
    return number(own.mean, signed) + (f" ({around})" if around else "")


def headline(summary: Summary) -> str:
    """The result in a sentence or two."""
    winner = summary.winner
    if winner is None:
        return "No run of a contestant is finished, so there is nothing to compare yet."
    own, columns = winner.estimates["mean"], len(summary.tasks) + len(summary.suites)
    around = f", 95 % interval {interval(own.ci95)}" if own.ci95 else ""
    seeds = f"{len(winner.seeds)} seed{'s' * (len(winner.seeds) != 1)}"
    first = (
        f"{winner.method.label} has the highest mean score over all {columns} columns: "
        f"{number(own.mean)} ({seeds}{around})."
    )
    return f"{first} {_standing_out(summary)}".strip()


def _standing_out(summary: Summary) -> str:
    """Whether that lead is more than noise."""
    verdicts: dict[str | None, list[str]] = {}
    for pair in _contests(summary):
        label = summary.standing[pair.other].method.label
        verdicts.setdefault(pair.difference.verdict, []).append(label)
    sentences = []
    if beaten := verdicts.get("better"):
        every = len(beaten) == sum(map(len, verdicts.values())) > 1
        bounds = any(standing.method.upper_bound for standing in summary.standings)
        others = "every other contestant" if bounds else "every other method"
        whom = others if every else listed(beaten)
        sentences.append(f"It beats {whom} by more than noise.")
    if ahead := verdicts.get("worse"):
        sentences.append(
            f"On the seeds that both finished, {listed(ahead)} scored more, beyond noise."
        )
    if level := verdicts.get("noise"):
        sentences.append(f"Against {listed(level)} the difference is noise.")
    if unknown := verdicts.get(None):
        sentences.append(f"Against {listed(unknown)} there are too few seeds to tell.")
    return " ".join(sentences)


def _contests(summary: Summary) -> list[Pair]:
    bounds = {s.method.name for s in summary.standings if s.method.upper_bound}
    return [p for p in summary.pairs if p.quality == "mean" and p.other not in bounds]


def against_baseline(summary: Summary) -> list[str]:
    """The winner beside the baseline, one sentence; none when they are the same."""
    name = summary.plan.values.baseline
    own = {pair.quality: pair.difference for pair in summary.pairs if pair.other == name}
    parts = [_phrase(what, own[quality]) for quality, what in _WHAT.items() if quality in own]
    return [f"Against {summary.standing[name].method.label} it is {listed(parts)}."] if own else []


def _phrase(what: str, found: Difference) -> str:
    own = found.estimate
    if own.mean is None:
        return f"not comparable {what} ({own.note})"
    text = f"{number(abs(own.mean))} {'ahead' if own.mean >= 0 else 'behind'} {what}"
    around = interval(own.ci95, signed=True)
    noise = "; noise" if found.verdict == "noise" else ""
    return f"{text} ({around}{noise})" if around else f"{text} ({own.note})"


def cost_sentences(summary: Summary) -> list[str]:
    """What the winner costs beside the baseline."""
    winner, baseline = summary.winner, summary.standing[summary.plan.values.baseline]
    if winner is None or winner is baseline:
        return []
    seconds = summary.cost_factor(winner, "seconds")
    flops = summary.cost_factor(winner, "flops")
    if seconds is None:
        return [f"What {winner.method.label} costs beside {baseline.method.label} is not known."]
    text = (
        f"Training {winner.method.label} took {seconds:.1f} × the time of {baseline.method.label}"
    )
    return [text + ("." if flops is None else f" and {flops:.1f} × its FLOPs.")]


def listed(names: list[str]) -> str:
    """`A`, `A and B`, `A, B and C`."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
