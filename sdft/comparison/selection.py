"""The choice of each method's learning rate, by one rule for all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sdft.comparison.plan import Method
from sdft.comparison.results import Result, mean_of

_DIGITS = 12  # beyond them two means are the same


@dataclass(frozen=True)
class Selection:
    """What the learning rates are chosen by.

    Attributes:
        split: `validation`, or `test` when some run has no scores of its own for the choice.
        columns: Tasks and suites that count.
        left_out: Those that have no scores on this split in every run.
    """

    split: str
    columns: tuple[str, ...]
    left_out: tuple[str, ...]

    @property
    def rule(self) -> str:
        """The rule in a sentence."""
        return (
            "Each method's learning rate is the one with the highest mean, over its finished "
            "seeds, of the mean final score over all columns (tasks and suites alike) on the "
            f"{self.split} split; of equal ones the smaller. A rate with fewer finished seeds than "
            "another of the method is not chosen."
        )

    @property
    def caution(self) -> str | None:
        """What is wrong with it; None when nothing is."""
        if self.split == "test":
            return (
                "The learning rates were chosen on the test split, as some run has no scores on a "
                "validation split: the scores of the chosen rates are somewhat too good, for every "
                "method."
            )
        if self.left_out:
            return (
                f"The choice of the learning rates leaves out {', '.join(self.left_out)}: no "
                f"scores on the {self.split} split."
            )
        return None


@dataclass(frozen=True)
class Rate:
    """One learning rate of a method.

    Attributes:
        value: The rate; None for the base's.
        results: Finished runs, one per seed.
        score: What the choice goes by; None where undefined.
    """

    value: float | None
    results: tuple[Result, ...]
    score: float | None


def selection_of(results: Sequence[Result]) -> Selection:
    """The split and the columns that every run has scores for: validation, else test."""
    if not results:
        return Selection("validation", (), ())
    names = results[0].columns
    shared = tuple(name for name in names if all(name in own.selection for own in results))
    if shared:
        split = str(results[0].retention["selection"].get("split", "validation"))
        return Selection(split, shared, tuple(name for name in names if name not in shared))
    split = "test"
    shared = tuple(name for name in names if all(name in _final(own) for own in results))
    return Selection(split, shared, tuple(name for name in names if name not in shared))


def rates_of(results: Sequence[Result], selection: Selection) -> list[Rate]:
    """A method's runs by their rate, with what the choice goes by; in the order of the rates."""
    values = sorted({result.run.rate for result in results}, key=lambda rate: rate or 0.0)
    rates = []
    for value in values:
        own = tuple(result for result in results if result.run.rate == value)
        scores = [_score(result, selection) for result in own]
        rates.append(Rate(value, own, mean_of(scores)))
    return rates


def choose_rate(rates: Sequence[Rate]) -> Rate | None:
    """The rate with the highest score, the smaller of equal ones; None when there is none.

    Among those with the most finished seeds: a rate that breaks on some seeds must not win by the
    seeds that it survived.
    """
    most = max((len(rate.results) for rate in rates), default=0)
    rates = [rate for rate in rates if len(rate.results) == most]
    defined = [rate for rate in rates if rate.score is not None]
    if not defined:
        return rates[0] if rates else None
    return max(defined, key=lambda rate: (round(rate.score or 0.0, _DIGITS), -(rate.value or 0.0)))


def edge(method: Method, chosen: Rate) -> str | None:
    """`smallest` or `largest`, when the chosen rate is at that end of the method's sweep."""
    rates = method.rates or ()
    if len(rates) < 2 or chosen.value not in (min(rates), max(rates)):
        return None
    return "smallest" if chosen.value == min(rates) else "largest"


def _score(result: Result, selection: Selection) -> float | None:
    scores = _final(result) if selection.split == "test" else result.selection
    return mean_of([scores.get(name) for name in selection.columns])


def _final(result: Result) -> dict[str, float]:
    row = dict(zip(result.columns, result.scores[-1], strict=True))
    return {name: score for name, score in row.items() if score is not None}
