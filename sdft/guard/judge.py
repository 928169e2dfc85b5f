"""Which signals of a step are out of order, and since when."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sdft.guard.baseline import Baseline
from sdft.guard.rules import Action, Rule


@dataclass(frozen=True)
class Alarm:
    """A signal that has been out of order long enough.

    Attributes:
        signal: Its name.
        value: What was measured.
        reason: Why that is out of order.
        lasted: Measurements in a row that were.
        actions: What follows.
        new: Whether everything follows, or only what holds for every step that is out of order:
            skipping it. An alarm that lasts is new again after every `again` measurements.
    """

    signal: str
    value: float
    reason: str
    lasted: int
    actions: tuple[Action, ...]
    new: bool = True

    def __str__(self) -> str:
        since = f" for {self.lasted} measurements" if self.lasted > 1 else ""
        return f"{self.signal} {self.value:.4g} is {self.reason}{since}"


class Judge:
    """Rules with the baselines that they go by.

    What is out of order does not enter a baseline, so that a runaway never becomes normal, unless
    it stays for as long as the window is.

    Args:
        rules: By signal; those without actions are left out.
        window: Measurements in a baseline.
        needed: How many of them there must be.
        first: Measurements at a stage's beginning that ratios are taken to.
        again: Measurements after which an alarm that lasts is new again.
    """

    def __init__(
        self, rules: Mapping[str, Rule], window: int, needed: int, first: int, again: int
    ) -> None:
        self.rules = {name: rule for name, rule in rules.items() if rule.actions}
        self.window, self.again = window, again
        self.stage = -1
        self._baselines = {name: Baseline(window, needed, first) for name in self.rules}
        self._streaks = dict.fromkeys(self.rules, 0)

    def begin(self, stage: int) -> None:
        """Forget an earlier stage: another task has other lengths and divergences."""
        if stage != self.stage:
            self.stage = stage
            for name, baseline in self._baselines.items():
                baseline.clear()
                self._streaks[name] = 0

    def judge(self, values: Mapping[str, float]) -> list[Alarm]:
        """What is out of order.

        Args:
            values: The signals that were measured in a step; NaN is none.
        """
        known = {name: values[name] for name in self.rules if name in values}
        found = [self._judge(name, v) for name, v in known.items() if not math.isnan(v)]
        return [alarm for alarm in found if alarm is not None]

    def _judge(self, name: str, value: float) -> Alarm | None:
        rule, baseline = self.rules[name], self._baselines[name]
        reason = rule.limits(baseline.reference, *baseline.spread()).broken(value)
        if reason is None:
            self._streaks[name] = 0
            baseline.add(value)
            return None
        self._streaks[name] += 1
        lasted = self._streaks[name]
        if lasted % self.window == 0:
            baseline.forget_last()
        if lasted < rule.patience:
            return None
        new = (lasted - rule.patience) % self.again == 0
        return Alarm(name, value, reason, lasted, tuple(rule.actions), new)

    # ---------------------------------------------------------------- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Plain values."""
        baselines = {name: line.state_dict() for name, line in self._baselines.items()}
        return {"stage": self.stage, "streaks": dict(self._streaks), "baselines": baselines}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """What `state_dict` gave; a signal that only one of the two watches begins anew."""
        self.stage = state["stage"]
        for name, baseline in self._baselines.items():
            if name in state["baselines"]:
                self._streaks[name] = state["streaks"][name]
                baseline.load_state_dict(state["baselines"][name])
