"""Go, weak or no: what the measurements mean, by thresholds that docs/preflight.md explains."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

from sdft.preflight.facts import TaskFacts

Grade = Literal["go", "weak", "no"]

SOLVED = 0.95  # accuracy without the demonstration: what is left is hardly measurable
SOLVED_FOR_SURE = 0.85  # the least that its interval's lower end must be for a no
NEARLY_SOLVED = 0.90
SMALL_GAP = 0.05  # a gap below it is within what a test set of some hundred can show
SMALL_GAP_AT_MOST = 0.15  # the most that a small gap's upper end may be for a no
POOR_TEACHER = 0.50  # accuracy with the demonstration in view: the authors' model reaches 1.0
DROPPED_WEAK, DROPPED_NO = 0.05, 0.50
TRUNCATED_WEAK, TRUNCATED_NO = 0.10, 0.50
NO_DIVERGENCE = 1e-3  # nats per token: the loss's noise in bf16 is of this size
DEMONSTRATIONS_PASS = 0.90
GROWTH = 2.0  # answers with the demonstration against answers without
MISALIGNED = 0.05  # share of examples
ARTIFACTS = 0.10


@dataclass(frozen=True)
class Reason:
    """Why a task is not a plain go.

    Attributes:
        grade: How bad it is.
        why: What was measured.
        change: What to do about it.
    """

    grade: Grade
    why: str
    change: str = ""

    def __str__(self) -> str:
        return f"{self.why}: {self.change}" if self.change else self.why

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Verdict:
    """Whether a task is worth the run.

    Attributes:
        reasons: Against it, the worst first.
    """

    reasons: list[Reason]

    @property
    def grade(self) -> Grade:
        """The worst of the reasons' grades; go without any."""
        return self.reasons[0].grade if self.reasons else "go"

    @classmethod
    def of(cls, facts: TaskFacts) -> Verdict:
        """Judge a task."""
        if facts.problem:
            return cls([Reason("no", facts.problem, _remedy(facts))])
        reasons = [reason for rule in RULES for reason in rule(facts)]
        return cls(sorted(reasons, key=lambda reason: reason.grade != "no"))


def _remedy(facts: TaskFacts) -> str:
    fit = facts.fitting
    if fit is None or not fit.total:
        return "correct the task's data, or leave the task out"
    return _raise_limits(facts)


def _raise_limits(facts: TaskFacts) -> str:
    fit, advice = facts.fitting, []
    assert fit is not None
    room = facts.room
    if room is not None and max(fit.longest) > room:
        advice.append(
            f"the model's context leaves {room} tokens for a prompt, so lower "
            "model.max_new_tokens, shorten the prompts, or take a model with a longer context"
        )
    for name, limit, longest in zip(("student", "teacher"), fit.limits, fit.longest, strict=True):
        if longest > limit and limit != room:
            advice.append(f"raise data.max_{name}_tokens to {longest} (now {limit}) to keep all")
    return "; ".join(advice)


# ---------------------------------------------------------------- rules


def _dropped(facts: TaskFacts) -> Iterator[Reason]:
    """The longest examples go first, so what is left is another task."""
    fit = facts.fitting
    assert fit is not None
    if fit.dropped_share > DROPPED_WEAK:
        yield Reason(
            "no" if fit.dropped_share > DROPPED_NO else "weak",
            f"the length limits drop {fit.dropped} of {fit.total} training examples "
            f"({fit.dropped_student} student prompts, {fit.dropped_teacher} teacher prompts)",
            _raise_limits(facts),
        )


def _misaligned(facts: TaskFacts) -> Iterator[Reason]:
    for problem in facts.alignment.problems if facts.alignment else ():
        mild = problem.harmless or problem.count <= MISALIGNED * problem.of
        where = f" ({problem.count} of {problem.of} examples)"
        yield Reason("weak" if mild else "no", problem.text + where, problem.change)


def _unscored(facts: TaskFacts) -> Iterator[Reason]:
    missing = facts.missing.get("accuracy_without")
    if missing is None and not _untaught(facts):
        missing = facts.missing.get("accuracy_with")
    if missing is not None:
        yield Reason("no", missing, "correct the scorer or the answers")


def _untaught(facts: TaskFacts) -> bool:
    """Whether the method has no teacher."""
    return "alignment" in facts.missing


def _scorer(facts: TaskFacts) -> Iterator[Reason]:
    share = facts.demonstrations
    if share is not None and share < DEMONSTRATIONS_PASS:
        yield Reason(
            "weak",
            f"only {share:.0%} of the demonstrations would pass the task's own scorer",
            "see whether demonstrations and answers agree, and whether the scorer reads them; a "
            "demonstration may also be no answer at all, such as a passage",
        )


def _solved(facts: TaskFacts) -> Iterator[Reason]:
    if facts.without is None:
        return
    score, low = facts.without.score, facts.without.ci95[0]
    change = "leave the task out, or take harder examples"
    if score >= SOLVED and low >= SOLVED_FOR_SURE:
        yield Reason("no", f"the base already solves it ({_share(facts.without)})", change)
    elif score >= NEARLY_SOLVED:
        yield Reason("weak", f"the base nearly solves it ({_share(facts.without)})", change)


def _gap(facts: TaskFacts) -> Iterator[Reason]:
    gap, without = facts.gap, facts.without
    if gap is None or without is None:
        return
    low, high = gap.ci95
    told = f"{gap.mean:+.2f} ({low:+.2f} to {high:+.2f})"
    change = (
        "reword model.teacher_template so that the model uses the demonstration, or take a larger "
        "model"
    )
    if high < 0:
        yield Reason("no", f"the demonstration hurts: {told}", change)
    elif without.score >= NEARLY_SOLVED:
        return  # `_solved` has said what there is to say
    elif gap.mean < SMALL_GAP and high < SMALL_GAP_AT_MOST:
        yield Reason("no", f"the demonstration does not help: {told}", change)
    elif low <= 0:
        more = f"measure more examples (--examples {4 * facts.examples}), or {change}"
        yield Reason("weak", f"the gap's interval includes 0: {told}", more)


def _poor_teacher(facts: TaskFacts) -> Iterator[Reason]:
    if facts.with_it is not None and facts.with_it.score < POOR_TEACHER:
        yield Reason(
            "weak",
            f"even with the demonstration before its eyes the model solves little "
            f"({_share(facts.with_it)}), and the student hardly becomes better than its teacher",
            "reword model.teacher_template, or take a larger model",
        )


def _undiverged(facts: TaskFacts) -> Iterator[Reason]:
    if "divergence" in facts.missing and not _untaught(facts):
        yield Reason("no", facts.missing["divergence"], "lower model.skip_first_tokens")
    elif facts.divergence is not None and facts.divergence.mean < NO_DIVERGENCE:
        yield Reason(
            "weak",
            f"teacher and student agree to {facts.divergence.mean:.1e} nats per token: the loss "
            "begins at next to nothing",
            "see whether the teacher's prompt shows what the student lacks",
        )


_WHOSE = {
    "with": ("no", "answers with the demonstration"),
    "demonstrations": ("no", "demonstrations"),
    "rollouts": ("weak", "rollouts"),
    "without": ("weak", "answers without the demonstration"),
}
"""Whose lengths → what most of them being cut means: the base may ramble until it has learnt."""


def _truncated(facts: TaskFacts) -> Iterator[Reason]:
    for key, (worst, whose) in _WHOSE.items():
        own = facts.lengths.get(key)
        said = key == "without" and "rollouts" in facts.lengths
        if own is None or own.truncated <= TRUNCATED_WEAK or said:
            continue
        grade: Grade = "no" if worst == "no" and own.truncated > TRUNCATED_NO else "weak"
        yield Reason(
            grade,
            f"{own.truncated:.0%} of the {whose} do not end within model.max_new_tokens "
            f"({facts.limit}; median {own.p50}, longest {own.longest})",
            "raise model.max_new_tokens" + ("" if worst == "no" else ", unless they ramble"),
        )


def _growing(facts: TaskFacts) -> Iterator[Reason]:
    """Only where the growth has a limit to run into."""
    without, with_it = facts.lengths.get("without"), facts.lengths.get("with")
    if without is None or with_it is None or without.mean == 0:
        return
    if with_it.mean > GROWTH * without.mean and with_it.mean > facts.limit / 2:
        yield Reason(
            "weak",
            f"answers with the demonstration are {with_it.mean / without.mean:.1f} × as long as "
            f"without ({with_it.mean:.0f} tokens of {facts.limit}): training makes answers grow",
            "raise model.max_new_tokens, or take from model.teacher_template what asks for length",
        )


def _artifacts(facts: TaskFacts) -> Iterator[Reason]:
    if facts.artifacts is not None and facts.artifacts > ARTIFACTS:
        yield Reason(
            "weak",
            f"{facts.artifacts:.0%} of the answers with the demonstration carry an artifact of it "
            "(retention.artifact_patterns), which the student picks up",
            "raise model.skip_first_tokens, or reword model.teacher_template",
        )


RULES: tuple[Callable[[TaskFacts], Iterator[Reason]], ...] = (
    _misaligned,
    _unscored,
    _dropped,
    _truncated,
    _solved,
    _gap,
    _poor_teacher,
    _undiverged,
    _growing,
    _artifacts,
    _scorer,
)
"""What speaks against a task, in this order."""


def _share(own: Any) -> str:
    low, high = own.ci95
    return f"{own.score:.2f}, interval {low:.2f}–{high:.2f}"
