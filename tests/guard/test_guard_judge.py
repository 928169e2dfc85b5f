"""Rules, baselines and what is judged by them."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterable
from typing import Any

import pytest

from sdft.guard import Alarm, Judge, Rule
from sdft.guard.baseline import Baseline
from sdft.guard.signals import RULES


def judge(
    window: int = 20, needed: int = 5, first: int = 3, again: int = 10, **rules: Rule
) -> Judge:
    found = Judge(rules, window, needed, first, again)
    found.begin(0)
    return found


def alarms(judge: Judge, values: Iterable[float]) -> list[tuple[int, Alarm]]:
    found = [(i, alarm) for i, v in enumerate(values) for alarm in judge.judge({"x": v})]
    return [(i, alarm) for i, alarm in found if alarm.new]


def noise(count: int, mean: float = 10.0, seed: int = 0) -> list[float]:
    rng = random.Random(seed)
    return [rng.gauss(mean, 1.0) for _ in range(count)]


# ---------------------------------------------------------------- baselines


def test_a_median_and_a_deviation_that_outliers_do_not_move() -> None:
    line = Baseline(window=5, needed=5, first=2)
    assert math.isnan(line.spread()[0])
    assert line.reference is None
    for value in (1.0, 2.0, 3.0, 4.0, 1000.0):
        line.add(value)
    assert line.spread() == (3.0, pytest.approx(1.4826))
    assert line.reference == 1.5
    line.add(5.0)  # the first one goes
    assert line.spread()[0] == 4.0
    assert line.reference == 1.5


def test_the_deviation_is_that_of_a_normal_distribution() -> None:
    line = Baseline(window=4000, needed=5, first=2)
    for value in noise(4000):
        line.add(value)
    middle, deviation = line.spread()
    assert middle == pytest.approx(10.0, abs=0.1)
    assert deviation == pytest.approx(1.0, abs=0.05)


# ---------------------------------------------------------------- rules


@pytest.mark.parametrize("seed", range(5))
def test_noise_is_no_alarm_and_a_jump_is(seed: int) -> None:
    healthy = noise(300, seed=seed)
    assert alarms(judge(x=Rule(patience=1)), healthy) == []
    (place, alarm), *_ = alarms(judge(x=Rule(patience=1)), [*healthy, 40.0])
    assert place == 300
    assert alarm.value == 40.0
    assert "the last median" in str(alarm)


def test_patience_is_for_measurements_in_a_row() -> None:
    rule = Rule(deviations=None, above=1.0, patience=3)
    assert alarms(judge(x=rule), [2, 2, 0, 2, 2, 0] * 3) == []
    found = alarms(judge(x=rule), [0, 2, 2, 2, 2, 2])
    assert [(place, alarm.lasted) for place, alarm in found] == [(3, 3)]


def test_an_alarm_that_lasts_is_raised_again() -> None:
    rule = Rule(deviations=None, above=1.0, patience=2)
    found = alarms(judge(again=4, x=rule), [2.0] * 12)
    assert [place for place, _ in found] == [1, 5, 9]
    lasting = judge(again=4, x=rule)
    everything = [alarm for _ in range(12) for alarm in lasting.judge({"x": 2.0})]
    assert len(everything) == 11, "the step is to be skipped at each of them"


@pytest.mark.parametrize(
    ("side", "high", "low"), [("above", 1, 0), ("below", 0, 1), ("both", 1, 1)]
)
def test_sides(side: Any, high: int, low: int) -> None:
    rules = (Rule(side=side, patience=1), Rule(deviations=None, ratio=2.0, side=side, patience=1))
    for rule in rules:
        normal = [10.0, 10.1, 9.9, 10.0, 10.0, 10.1]
        assert len(alarms(judge(x=rule), [*normal, 100.0])) == high
        assert len(alarms(judge(x=rule), [*normal, 1.0])) == low


def test_a_ratio_is_to_the_stages_beginning() -> None:
    rule = Rule(deviations=None, ratio=2.0, patience=1)
    slowly = [10 * 1.02**i for i in range(60)]  # every window finds it normal
    (place, alarm), *_ = alarms(judge(x=rule), slowly)
    assert slowly[place - 1] <= 2 * slowly[1] < slowly[place]
    assert "the stage began at" in alarm.reason
    assert alarms(judge(x=Rule(patience=1)), slowly) == []


def test_little_is_no_alarm_however_quiet_the_signal() -> None:
    quiet = [1.0] * 30
    assert alarms(judge(x=Rule(noise=0.5, patience=1)), [*quiet, 4.9]) == []
    assert alarms(judge(x=Rule(noise=0.5, patience=1)), [*quiet, 5.1]) != []
    assert alarms(judge(x=Rule(deviations=None, ratio=2.0, noise=1.0, patience=1)), [*quiet, 2.5])
    small = [0.001] * 30
    rule = Rule(ratio=3.0, noise=0.02, patience=1)
    assert alarms(judge(x=rule), [*small, 0.15]) == [], "thrice of nothing is nothing"


def test_limits_need_no_baseline() -> None:
    rule = Rule(above=5.0, below=-5.0, patience=1)
    assert [place for place, _ in alarms(judge(x=rule), [0, 6, 0, -6])] == [1, 3]
    assert alarms(judge(x=rule), [math.inf])[0][1].value == math.inf


def test_a_runaway_does_not_become_normal_but_a_new_level_does() -> None:
    runaway = [*noise(30), *(10 * 1.3**i for i in range(1, 15))]
    watch = judge(x=Rule(patience=1))
    last = [watch.judge({"x": value}) for value in runaway][-1]
    assert last, "the last values have not moved the median"
    found = alarms(judge(window=20, x=Rule(patience=1)), [*noise(30), *noise(100, mean=100.0)])
    assert max(place for place, _ in found) < 50
    assert min(place for place, _ in found) == 30


def test_what_was_not_measured_is_not_judged() -> None:
    watch = judge(x=Rule(above=1.0, patience=1))
    assert watch.judge({}) == []
    assert watch.judge({"x": math.nan}) == []
    assert watch.judge({"other": 5.0}) == []


def test_a_rule_without_actions_is_off() -> None:
    assert judge(x=Rule(actions=(), above=1.0, patience=1)).judge({"x": 5.0}) == []


def test_a_stage_begins_anew() -> None:
    watch = judge(x=Rule(patience=1))
    assert alarms(watch, noise(30)) == []
    watch.begin(0)
    assert alarms(watch, [100.0]) != []
    watch.begin(1)
    assert alarms(watch, noise(30, mean=100.0)) == []


def test_it_goes_on_from_its_state() -> None:
    values = [*noise(40), *([30.0] * 5), *noise(10)]
    for cut in (2, 25, 42, 44):
        whole, before = (judge(x=Rule(ratio=2.0)) for _ in range(2))
        expected = [whole.judge({"x": value}) for value in values]
        for value in values[:cut]:
            before.judge({"x": value})
        state = json.loads(json.dumps(before.state_dict()))
        after = Judge({"x": Rule(ratio=2.0), "new": Rule()}, 20, 5, 3, 10)
        after.load_state_dict(state)
        after.begin(0)
        assert [after.judge({"x": value}) for value in values[cut:]] == expected[cut:]
    assert any(expected)


# ---------------------------------------------------------------- bad rules


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"actions": ["explode"]}, "rule.actions: found 'explode', allowed are warn"),
        ({"side": "left"}, "rule.side must be one of"),
        ({"patience": 0}, "rule.patience must be at least 1"),
        ({"deviations": 0.0}, "rule.deviations must be a finite number above 0"),
        ({"ratio": 1.0}, "rule.ratio must be a finite number above 1"),
        ({"noise": -1.0}, "rule.noise must be a finite number 0 or more"),
        ({"above": math.nan}, "rule.above must be a finite number or null"),
        ({"below": math.inf}, "rule.below must be a finite number or null"),
    ],
)
def test_a_rule_that_cannot_be_followed(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        Rule(**changes).check("rule")


def test_the_defaults_can_be_followed() -> None:
    for name, rule in RULES.items():
        rule.check(name)
