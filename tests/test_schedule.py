"""Learning rates within stages."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sdft.schedule import StageSchedule


def rates(steps: list[int], lr: float = 1.0, **options: Any) -> list[float]:
    """The learning rate of every optimizer step."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)
    schedule = StageSchedule(optimizer, **options)
    schedule.plan(steps)
    found = []
    for _ in range(sum(steps)):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


def test_linear_warm_up_then_cosine() -> None:
    found = rates([8], warmup_steps=3)
    warm = [1 / 4, 2 / 4, 3 / 4]
    cosine = [0.5 * (1 + math.cos(math.pi * i / 5)) for i in range(5)]
    assert found == pytest.approx(warm + cosine)


def test_linear_decay_to_a_floor() -> None:
    found = rates([4], lr=2.0, warmup_steps=0, decay="linear", floor=0.5)
    assert found == pytest.approx([2.0, 1.75, 1.5, 1.25])


def test_constant_after_the_warm_up() -> None:
    assert rates([4], warmup_steps=1, decay="constant") == pytest.approx([0.5, 1, 1, 1])


@given(st.lists(st.integers(1, 12), min_size=1, max_size=4), st.integers(0, 15))
def test_every_stage_starts_afresh(steps: list[int], warmup: int) -> None:
    found = rates(steps, warmup_steps=warmup)
    expected = [rate for count in steps for rate in rates([count], warmup_steps=warmup)]
    assert found == pytest.approx(expected)
    assert all(0 < rate <= 1 for rate in found), "a step with rate 0 would teach nothing"


def test_a_schedule_without_a_plan_stays_defined() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = StageSchedule(optimizer, warmup_steps=1)
    for _ in range(3):
        optimizer.step()
        schedule.step()
    assert optimizer.param_groups[0]["lr"] == 1.0


def test_a_restored_schedule_goes_on() -> None:
    whole = rates([5, 5], warmup_steps=2)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = StageSchedule(optimizer, warmup_steps=2)
    schedule.plan([5, 5])
    for _ in range(6):
        optimizer.step()
        schedule.step()
    state = schedule.state_dict()
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = StageSchedule(optimizer, warmup_steps=2)
    schedule.plan([5, 5])
    schedule.load_state_dict(state)
    assert schedule.get_lr() == pytest.approx(whole[6:7])


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"warmup_steps": -1}, "warmup_steps"),
        ({"floor": -0.1}, "floor"),
        ({"floor": 1.1}, "floor"),
        ({"floor": math.nan}, "floor"),
        ({"decay": "cosin"}, "decay"),
    ],
)
def test_a_bad_value_is_named(options: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        rates([3], **options)
