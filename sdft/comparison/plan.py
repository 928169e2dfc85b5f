"""What is compared: methods × learning rates × seeds, read from one YAML and checked."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from decimal import Decimal
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from sdft.messages import check_yaml
from sdft.names import name_problem

METHOD_KEYS = ("config", "learning_rates", "label", "upper_bound")


@dataclass(frozen=True)
class Comparison:
    """Methods × learning rates × seeds on one stream.

    Paths of configurations are relative to the comparison's own file; `out`, and the paths within
    those configurations, to the working directory.

    Args:
        base: What all runs share: a configuration of `fit`, or several, later ones win.
        methods: Name → `config` (overlay on the base; `methods/NAME.yaml` when left out),
            `learning_rates` (null: one run per seed, at the base's rate), `label` (in the report),
            `upper_bound` (true: shown, but never called the winner).
        seeds: Seeds that every method runs with at every rate.
        settings: Overlay on the base for every run, below the method's.
        baseline: The method whose cost counts as 1.
        out: The folder that receives the runs and the report.
        jobs: Runs at the same time.
        threads: CPU threads of a run.
        keep_checkpoints: Keep the checkpoints of finished runs.

    Raises:
        ValueError: A number out of range, a method or a file that is not there, an empty sweep, or
            seeds or rates that repeat.
    """

    base: str | list[str]
    methods: dict[str, Any]
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    settings: dict[str, Any] = field(default_factory=dict)
    baseline: str = "sft"
    out: str = "runs/compare"
    jobs: int = 1
    threads: int = 1
    keep_checkpoints: bool = False


@dataclass(frozen=True)
class Method:
    """One contestant: an overlay and the rates that it is tried at.

    Attributes:
        name: Its key in the comparison.
        overlay: The configuration that makes a run of the base a run of this method.
        rates: Learning rates; None for one run at the base's rate.
        label: What reports call it.
        upper_bound: Whether it is a bound (it may see what the others may not), no contestant.
    """

    name: str
    overlay: Path
    rates: tuple[float, ...] | None
    label: str
    upper_bound: bool = False


@dataclass(frozen=True)
class Run:
    """One training: a method at a learning rate (None: the base's) with a seed."""

    method: Method
    rate: float | None
    seed: int

    @property
    def name(self) -> str:
        """Its folder below `runs/` in the comparison's folder."""
        return f"{self.method.name}/{rate_name(self.rate)}-seed{self.seed}"

    @property
    def title(self) -> str:
        """Its name in a sentence."""
        return f"{self.method.name}, {rate_text(self.rate)}, seed {self.seed}"


class Plan:
    """A checked comparison.

    Args:
        values: The configuration.
        file: The file that it was read from; errors name it, and paths are relative to it.

    Raises:
        ValueError: See `Comparison`.
    """

    def __init__(self, values: Comparison, file: Path) -> None:
        self.values = values
        self.file = file
        self._check_numbers()
        self.base = [self._existing("base", name) for name in _listed(values.base)]
        if not self.base:
            raise self._error("base", "is empty: name a configuration of `fit`")
        if not values.methods:
            raise self._error("methods", "is empty: name at least one method")
        self.methods = [self._method(name, given) for name, given in values.methods.items()]
        if values.baseline not in values.methods:
            names = ", ".join(values.methods)
            raise self._error("baseline", f"{values.baseline!r} is none of the methods: {names}")

    @property
    def out(self) -> Path:
        """The folder that receives the runs and the report."""
        return Path(self.values.out)

    @property
    def runs(self) -> list[Run]:
        """All runs; the seeds' loop is the outermost, so that a part compares every method."""
        return [
            Run(method, rate, seed)
            for seed in self.values.seeds
            for method in self.methods
            for rate in method.rates or (None,)
        ]

    def folder(self, run: Run) -> Path:
        """Where a run leaves its files."""
        return self.out / "runs" / run.name

    def to_dict(self) -> dict[str, Any]:
        """The configuration as plain values."""
        return asdict(self.values)

    # ---------------------------------------------------------------- checks

    def _error(self, key: str, text: str) -> ValueError:
        return ValueError(f"{self.file}: {key} {text}")

    def _check_numbers(self) -> None:
        for key in ("jobs", "threads"):
            if getattr(self.values, key) < 1:
                raise self._error(key, f"must be at least 1, found {getattr(self.values, key)}")
        seeds = self.values.seeds
        if not seeds:
            raise self._error("seeds", "is empty: give at least one seed")
        for seed in seeds:
            if not 0 <= seed < 2**32:
                raise self._error("seeds", f"must be whole numbers from 0 to 2³² − 1, found {seed}")
        if repeated := _repeated(seeds):
            raise self._error("seeds", f"repeat {repeated[0]} (found {seeds}): each counts once")

    def _existing(self, key: str, name: str) -> Path:
        path = self.file.parent / name
        if not path.is_file():
            raise self._error(key, f"names {name!r}, but there is no file {path}")
        check_yaml(path)
        return path

    def _method(self, name: str, given: Any) -> Method:
        where = f"methods.{name}"
        if (problem := name_problem(name)) is not None:
            raise self._error(where, f"is no name: {problem}")
        values = self._method_values(where, given)
        overlay = values.get("config")
        path = self._existing(f"{where}.config", overlay) if overlay else self._known(name)
        rates = self._rates(f"{where}.learning_rates", values.get("learning_rates"))
        label = str(values.get("label") or name)
        return Method(name, path, rates, label, bool(values.get("upper_bound")))

    def _method_values(self, where: str, given: Any) -> dict[str, Any]:
        values = {} if given is None else given
        if not isinstance(values, dict):
            raise self._error(where, f"must hold keys and values, found {given!r}")
        for key in values:
            if key not in METHOD_KEYS:
                close = get_close_matches(str(key), METHOD_KEYS, n=1)
                hint = f" (did you mean {close[0]!r}?)" if close else ""
                allowed = ", ".join(METHOD_KEYS)
                raise self._error(where, f"has no key {key!r}{hint}; allowed are {allowed}")
        overlay, bound = values.get("config"), values.get("upper_bound")
        if overlay is not None and not isinstance(overlay, str):
            raise self._error(f"{where}.config", f"must be a path, found {overlay!r}")
        if bound is not None and not isinstance(bound, bool):
            raise self._error(f"{where}.upper_bound", f"must be true or false, found {bound!r}")
        return values

    def _known(self, name: str) -> Path:
        folder = self.file.parent / "methods"
        path = folder / f"{name}.yaml"
        if not path.is_file():
            there = ", ".join(sorted(file.stem for file in folder.glob("*.yaml"))) or "none"
            raise self._error(
                f"methods.{name}", f"is no known method; in {folder} there are: {there}"
            )
        check_yaml(path)
        return path

    def _rates(self, where: str, given: Any) -> tuple[float, ...] | None:
        if given is None:
            return None
        if not isinstance(given, list):
            raise self._error(where, f"must be a list of numbers (or null), found {given!r}")
        if not given:
            raise self._error(where, "is empty: an empty sweep has no run (null: the base's rate)")
        rates = [self._rate(where, value) for value in given]
        if repeated := _repeated(rates):
            raise self._error(where, f"repeat {rate_number(repeated[0])}: each counts once")
        return tuple(rates)

    def _rate(self, where: str, given: Any) -> float:
        try:  # YAML reads 5e-5, without a point, as a text
            rate = math.nan if isinstance(given, bool) else float(given)
        except (TypeError, ValueError):
            rate = math.nan
        if not (math.isfinite(rate) and rate > 0):
            raise self._error(where, f"must be numbers above 0, found {given!r}")
        return rate


def rate_number(rate: float) -> str:
    """The shortest text that reads back as the same rate: `5e-5`, `2.5e-4`, `0.01`."""
    if rate >= 0.01:
        return repr(rate).removesuffix(".0")
    _, digits, exponent = Decimal(repr(rate)).normalize().as_tuple()
    assert isinstance(exponent, int)
    first, *rest = map(str, digits)
    return f"{first}{'.' if rest else ''}{''.join(rest)}e{exponent + len(rest)}"


def rate_name(rate: float | None) -> str:
    """A rate in a folder's name."""
    return "base-rate" if rate is None else f"lr{rate_number(rate)}"


def rate_text(rate: float | None) -> str:
    """A rate in a sentence."""
    return "the base's rate" if rate is None else f"lr {rate_number(rate)}"


def _listed(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else list(value)


def _repeated(values: Sequence[Any]) -> list[Any]:
    return [value for place, value in enumerate(values) if value in values[:place]]
