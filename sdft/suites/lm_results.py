"""What lm-eval has found, as a cell of the retention matrix."""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sdft.metrics import Cell, Estimate, score_interval, t95

Doc = tuple[str, int]
Values = dict[str, dict[Doc, Any]]
"""Metric → example → what lm-eval has noted."""

_CLOSE = 1e-6
_RESAMPLES = 200


@dataclass(frozen=True)
class Found:
    """Results of one evaluation by lm-eval.

    Attributes:
        name: Of the task or group that was asked for.
        results: What `lm_eval.evaluator.evaluate` returned, with samples.
        aggregations: Of a single task, metric → how its values become a score.
        unfit: Examples to leave out: they did not fit into the model's context.
        unanswered: Examples that score 0: their thoughts have no end.
    """

    name: str
    results: Mapping[str, Any]
    aggregations: Mapping[str, Callable[..., Any]]
    unfit: Collection[Doc] = ()
    unanswered: Collection[Doc] = ()

    def cell(self, metric: str | None, filter_name: str | None) -> Cell:
        """The cell of a metric, and the other metrics of the same examples as details.

        Args:
            metric: The score; the only one when None.
            filter_name: Which form of the responses it is measured on; the only one when None.

        Raises:
            ValueError: No such metric, several to choose from, or one that is no score in [0, 1].
        """
        chosen = self._filter(filter_name)
        values = self._values(chosen)
        metric = _only("metric", metric, sorted(values), self.name)
        self._check_direction(metric)
        estimate, count = self._estimate(metric, chosen, values[metric])
        others = self._others(metric, chosen, values)
        return Cell(estimate.score, count, estimate.ci95, details=others or None)

    # ---------------------------------------------------------------- what there is

    def _filter(self, wanted: str | None) -> str:
        samples = [sample for own in self.results["samples"].values() for sample in own]
        return _only("filter", wanted, sorted({s["filter"] for s in samples}), self.name)

    def _values(self, chosen: str) -> Values:
        found: Values = defaultdict(dict)
        for task, samples in self.results["samples"].items():
            for sample in samples:
                if sample["filter"] == chosen:
                    doc = (task, int(sample["doc_id"]))
                    for metric in sample["metrics"]:
                        found[metric][doc] = sample[metric]
        return found

    def _check_direction(self, metric: str) -> None:
        directions = [own.get(metric) for own in self.results["higher_is_better"].values()]
        if False in directions:
            raise ValueError(
                f"{self.name!r}: the metric {metric!r} is the better the lower it is: it is no "
                "score in [0, 1]"
            )

    def _aggregate(self, metric: str, chosen: str) -> float | None:
        key = f"{metric},{chosen}"
        for part in ("groups", "results"):
            value = self.results.get(part, {}).get(self.name, {}).get(key)
            if isinstance(value, int | float):
                return float(value)
        return None

    # ---------------------------------------------------------------- the score

    def _others(self, metric: str, chosen: str, values: Values) -> dict[str, Estimate]:
        found = {}
        for other in sorted(set(values) - {metric}):
            try:
                self._check_direction(other)
                found[other] = self._estimate(other, chosen, values[other])[0]
            except ValueError:
                continue  # no score
        return found

    def _estimate(
        self, metric: str, chosen: str, values: Mapping[Doc, Any]
    ) -> tuple[Estimate, int]:
        """The score with its interval, and how many examples it is of."""
        whole = self._aggregate(metric, chosen)
        for way in (_mean, _mean_of_all, _mean_of_tasks):
            full = way(values)
            if full is not None and _is(full.score, whole):
                kept = self._kept(values)
                found = way(kept)
                assert found is not None
                return found, len(kept)
        return self._resampled(metric, whole, values), len(values)

    def _kept(self, values: Mapping[Doc, Any]) -> dict[Doc, Any]:
        kept = {doc: value for doc, value in values.items() if doc not in self.unfit}
        if not kept:
            raise ValueError(
                f"{self.name!r}: not one of {len(values)} examples fits into the model's context"
            )
        return {
            doc: _nothing(value) if doc in self.unanswered else value for doc, value in kept.items()
        }

    def _resampled(self, metric: str, whole: float | None, values: Mapping[Doc, Any]) -> Estimate:
        """A score that is no mean over examples: its interval is a percentile bootstrap."""
        aggregation = self.aggregations.get(metric)
        if self.unfit or self.unanswered:
            raise ValueError(
                f"{self.name!r}: the metric {metric!r} cannot leave out examples, and "
                f"{len({*self.unfit, *self.unanswered})} have no answer or do not fit"
            )
        if whole is None or not 0.0 <= whole <= 1.0 or aggregation is None:
            raise ValueError(f"{self.name!r}: the metric {metric!r} is {whole}, no score in [0, 1]")
        own, draws = list(values.values()), random.Random(0)
        samples = (draws.choices(own, k=len(own)) for _ in range(_RESAMPLES))
        scores = sorted(float(aggregation(sample)) for sample in samples)
        low, high = scores[_RESAMPLES // 40], scores[-1 - _RESAMPLES // 40]
        return Estimate(whole, (max(0.0, min(low, whole)), min(1.0, max(high, whole))))


def _is(score: float, whole: float | None) -> bool:
    return whole is None or math.isclose(score, whole, abs_tol=_CLOSE)


def _only(what: str, wanted: str | None, there: Sequence[str], name: str) -> str:
    if wanted in there:
        assert wanted is not None
        return wanted
    if wanted is None and len(there) == 1:
        return there[0]
    found = "must be set" if wanted is None else f"{wanted!r} is not there"
    raise ValueError(f"suite {name!r}: {what} {found}; there are {', '.join(there) or 'none'}")


def _score(value: Any) -> float | None:
    """A value that is a score in [0, 1]."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if 0.0 <= number <= 1.0 else None


def _nothing(value: Any) -> Any:
    return [0.0] * len(value) if isinstance(value, list | tuple) else 0.0


def _scores(values: Mapping[Doc, Any]) -> dict[Doc, float] | None:
    found = {doc: _score(value) for doc, value in values.items()}
    return None if None in found.values() else {d: s for d, s in found.items() if s is not None}


def _mean(values: Mapping[Doc, Any]) -> Estimate | None:
    """One score per example."""
    scores = _scores(values)
    return None if scores is None else Estimate.from_scores(list(scores.values()))


def _mean_of_all(values: Mapping[Doc, Any]) -> Estimate | None:
    """Several scores per example, all counting alike; the interval takes examples as units."""
    if not all(isinstance(value, list) and value for value in values.values()):
        return None
    rows = [[_score(one) for one in value] for value in values.values()]
    sums = [(math.fsum(s for s in row if s is not None), len(row)) for row in rows]
    if any(None in row for row in rows):
        return None
    total = sum(length for _, length in sums)
    score = math.fsum(own for own, _ in sums) / total
    if len(sums) == 1 or score in (0.0, 1.0):
        return Estimate(score, score_interval([score] * len(sums)))
    n = len(sums)
    spread = math.fsum((own - score * length) ** 2 for own, length in sums) * n / (n - 1)
    half = t95(n - 1) * math.sqrt(spread) / total
    return Estimate(score, (max(0.0, score - half), min(1.0, score + half)))


def _mean_of_tasks(values: Mapping[Doc, Any]) -> Estimate | None:
    """A group whose tasks count alike, however many examples they have."""
    scores = _scores(values)
    if scores is None:
        return None
    tasks: dict[str, list[float]] = defaultdict(list)
    for (task, _), score in scores.items():
        tasks[task].append(score)
    means = [Estimate.from_scores(own) for own in tasks.values()]
    score = math.fsum(own.score for own in means) / len(means)
    halves = [(own.ci95[1] - own.ci95[0]) / 2 for own in means]
    half = math.sqrt(math.fsum(half * half for half in halves)) / len(means)
    return Estimate(score, (max(0.0, score - half), min(1.0, score + half)))
