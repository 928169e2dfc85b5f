"""What was learnt and what was kept: cells with intervals, and the retention matrix.

R[i, j] is the score on column j after stage i of S, b[j] the score before the first stage. Stage j
trains task j. The columns are the tasks in their order of training, then the prior suites.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

METRICS = ("acc", "bwt", "fwt", "forgetting")
_T95_SMALL = {1: 12.706, 2: 4.303}  # where the expansion in `t95` is not yet good
_Z95 = 1.96


def wilson_interval(successes: float, n: int, z: float = _Z95) -> tuple[float, float]:
    """Wilson's score interval for a share (Wilson 1927), 95 % by default.

    Args:
        successes: Successes among `n` trials. A sum of scores in [0, 1] is allowed: the interval
            then is wider than it need be, as no such scores vary more than 0/1 scores do.
        n: Number of trials, at least 1.
        z: Two-sided normal quantile.

    Returns:
        The lower and the upper end, within [0, 1].

    Raises:
        ValueError: No trials, or successes outside [0, n].
    """
    if n < 1:
        raise ValueError(f"an interval needs at least one score, found n = {n}")
    if not 0 <= successes <= n:
        raise ValueError(f"successes must lie in [0, {n}], found {successes}")
    share, spread = successes / n, z * z / n
    centre = (share + spread / 2) / (1 + spread)
    half = math.sqrt(share * (1 - share) * spread + spread * spread / 4) / (1 + spread)
    # At the ends the formula gives exactly 0 and 1, rounding does not.
    return (centre - half if successes > 0 else 0.0), (centre + half if successes < n else 1.0)


def score_interval(scores: Sequence[float]) -> tuple[float, float]:
    """The 95 % interval of the mean of scores in [0, 1].

    Wilson's interval when all scores are 0 or 1. Otherwise Student's t interval of the mean, cut to
    [0, 1]. When the spread cannot be estimated (a single score, or all scores equal), Wilson's
    interval on their sum, which is never too narrow.

    Raises:
        ValueError: No scores, or one that is not a number in [0, 1].
    """
    for score in scores:
        if not 0 <= score <= 1:
            raise ValueError(f"a score must be a number in [0, 1], found {score}")
    n, total = len(scores), math.fsum(scores)
    if len(set(scores)) <= 1 or set(scores) <= {0, 1}:
        return wilson_interval(total, n)
    mean = total / n
    variance = math.fsum((score - mean) ** 2 for score in scores) / (n - 1)
    half = t95(n - 1) * math.sqrt(variance / n)
    return max(0.0, mean - half), min(1.0, mean + half)


def t95(freedom: int) -> float:
    """Student's t quantile at .975, within .1 % (Abramowitz & Stegun 26.7.5)."""
    if freedom in _T95_SMALL:
        return _T95_SMALL[freedom]
    z: float = _Z95
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / float(freedom) ** power for power, term in enumerate(terms, 1))


@dataclass(frozen=True)
class Estimate:
    """A mean score in [0, 1] and its 95 % interval."""

    score: float
    ci95: tuple[float, float]

    @classmethod
    def from_scores(cls, scores: Sequence[float]) -> Estimate:
        """The mean of at least one score.

        Raises:
            ValueError: No scores, or one that is not a number in [0, 1].
        """
        interval = score_interval(scores)
        return cls(math.fsum(scores) / len(scores), interval)


@dataclass(frozen=True)
class Cell:
    """One evaluation: a task or suite after a stage.

    Attributes:
        score: Mean score in [0, 1]; None when it is undefined, and `error` says why.
        n: Number of examples scored.
        ci95: The 95 % interval of the score.
        mean_length: Mean response length in tokens.
        truncated: Share of responses that reached the length limit.
        artifact: Share of responses that carry an artifact of the demonstration.
        error: Why there is no score.
        kl_base: KL(base ‖ student) per token along the base's own responses (`sdft.base_kl`).
        pass_at: pass@k by k, written as text (`sdft.pass_at`); None where it was not measured.
        details: Other scores that the scorer knows, by name (a judge's); None without any.
        thought_length: Mean length of the thoughts in tokens (`sdft.thinking`); None where they
            are not told from answers.
        unfinished: Share of responses whose thoughts have no end.
    """

    score: float | None
    n: int
    ci95: tuple[float, float] | None = None
    mean_length: float | None = None
    truncated: float | None = None
    artifact: float | None = None
    error: str | None = None
    kl_base: float | None = None
    pass_at: dict[str, Estimate] | None = None
    details: dict[str, Estimate] | None = None
    thought_length: float | None = None
    unfinished: float | None = None

    @classmethod
    def from_scores(
        cls,
        scores: Sequence[float],
        mean_length: float | None = None,
        truncated: float | None = None,
        artifact: float | None = None,
    ) -> Cell:
        """The cell of at least one score, with its interval.

        Raises:
            ValueError: No scores, or one that is not a number in [0, 1].
        """
        mean = Estimate.from_scores(scores)
        return cls(mean.score, len(scores), mean.ci95, mean_length, truncated, artifact)

    def to_dict(self) -> dict[str, Any]:
        """All attributes, ready for JSON; intervals as lists of two."""
        values = asdict(self)
        for key in ("details", "thought_length", "unfinished"):  # only some columns have them
            if values[key] is None:
                del values[key]
        for group in (values["pass_at"], values.get("details"), {"": values}):
            for holder in (group or {}).values():
                holder["ci95"] = None if holder["ci95"] is None else list(holder["ci95"])
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Cell:
        """The inverse of `to_dict`; all but `score` and `n` may be absent."""
        interval = values.get("ci95")
        pair = None if interval is None else (interval[0], interval[1])
        named = {key: _estimates(values.get(key)) for key in ("pass_at", "details")}
        return cls(**{**values, "ci95": pair, **named})


def _estimates(values: dict[str, Any] | None) -> dict[str, Estimate] | None:
    pairs = {name: (v["score"], tuple(v["ci95"])) for name, v in (values or {}).items()}
    return {name: Estimate(*pair) for name, pair in pairs.items()} or None


class RetentionMatrix(Metric):
    """The matrix R, row by row, and what follows from it; see `retention_metrics`.

    Rows are the same on every process of a distributed run (aggregate the scores first), so nothing
    is synchronised. The rows are part of the state dict.

    Args:
        tasks: Names of the tasks, in their order of training.
        suites: Names of the prior suites.
    """

    full_state_update = True
    rows: list[Tensor]

    def __init__(self, tasks: list[str], suites: list[str]) -> None:
        super().__init__(sync_on_compute=False, compute_with_cache=False)
        self.tasks = list(tasks)
        self.suites = list(suites)
        self.add_state("rows", default=[], dist_reduce_fx=None, persistent=True)

    def update(self, row: Tensor) -> None:
        """Append a row: first the base, then one per stage.

        Args:
            row: Scores `[columns]`, tasks then suites; NaN where undefined.

        Raises:
            ValueError: Not one score per column, or more stages than tasks.
        """
        columns = len(self.tasks) + len(self.suites)
        if row.shape != (columns,):
            raise ValueError(f"a row needs {columns} scores, found shape {tuple(row.shape)}")
        if len(self.rows) > len(self.tasks):
            raise ValueError(f"all {len(self.tasks)} stages already have their row")
        self.rows.append(row.detach().double())

    def compute(self) -> dict[str, Any]:
        """`retention_metrics` of the rows so far, and `matrix`, the rows as `[rows, columns]`."""
        columns = len(self.tasks) + len(self.suites)
        matrix = torch.stack(self.rows) if self.rows else torch.empty(0, columns).double()
        return {"matrix": matrix, **retention_metrics(matrix, self.tasks, self.suites)}


def retention_metrics(
    matrix: Tensor, tasks: Sequence[str], suites: Sequence[str]
) -> dict[str, Any]:
    """What was learnt and kept after S stages, the tasks numbered from 1 in their order.

    - `acc` = mean over j <= S of R[S, j]: over the tasks learnt so far, at the end all of them.
    - `bwt` = mean over j < S of R[S, j] - R[j, j] (Lopez-Paz & Ranzato 2017).
    - `fwt` = mean over 1 < j <= S of R[j-1, j] - b[j]: against the base, not a random model.
    - `forgetting` = mean over j < S of max_l R[l, j] - R[S, j], where l runs over all stages 1..S,
      also those before task j was trained, but not over the base: never negative. (Chaudhry et al.
      2018 leave out l = S; Avalanche takes the score just after training in place of the best.)
    - `retention` = {suite: R[S, suite] - b[suite]}, each suite by itself.
    - `undefined` = {metric: reason} for all that are None, `retention/SUITE` for a suite. What
      rests on a missing or NaN entry is undefined, never 0.

    Args:
        matrix: Scores `[1 + S, columns]`, the base row first; tasks then suites; or no rows at all.
        tasks: Names of the tasks, in their order of training.
        suites: Names of the prior suites.
    """
    entries = _Entries(matrix.tolist(), [*tasks, *suites])
    undefined: dict[str, str] = {}

    def value(name: str, formula: Callable[[], float]) -> float | None:
        try:
            return formula()
        except _Undefined as reason:
            undefined[name] = str(reason)
            return None

    values: dict[str, Any] = {name: value(name, getattr(entries, name)) for name in METRICS}
    values["retention"] = {
        suite: value(f"retention/{suite}", partial(entries.retention, column))
        for column, suite in enumerate(suites, len(tasks))
    }
    return {**values, "undefined": undefined}


class _Undefined(Exception):
    """A value rests on something that is not there; the message is the reason."""


class _Entries:
    """R[i, j] with stages from 1 (0 is the base) and columns from 0; raises where undefined."""

    def __init__(self, rows: list[list[float]], columns: list[str]) -> None:
        self.rows = rows
        self.columns = columns
        self.stages = max(len(rows) - 1, 0)

    def __call__(self, stage: int, column: int) -> float:
        score = self.rows[stage][column]
        if math.isnan(score):
            when = f"after stage {stage}" if stage else "of the base"
            raise _Undefined(f"no score {when} on {self.columns[column]!r}")
        return score

    def need(self, stages: int) -> None:
        if self.stages < stages:
            needed = "a finished stage" if stages == 1 else f"{stages} finished stages"
            raise _Undefined(f"needs {needed}, found {self.stages}")

    def acc(self) -> float:
        self.need(1)
        return _mean(self(self.stages, j) for j in range(self.stages))

    def bwt(self) -> float:
        self.need(2)
        return _mean(self(self.stages, j) - self(j + 1, j) for j in range(self.stages - 1))

    def fwt(self) -> float:
        self.need(2)
        return _mean(self(j, j) - self(0, j) for j in range(1, self.stages))

    def forgetting(self) -> float:
        self.need(2)
        stages = range(1, self.stages + 1)
        return _mean(
            max(self(stage, j) for stage in stages) - self(self.stages, j)
            for j in range(self.stages - 1)
        )

    def retention(self, column: int) -> float:
        self.need(1)
        return self(self.stages, column) - self(0, column)


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return math.fsum(listed) / len(listed)
