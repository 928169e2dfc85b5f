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


# ---------------------------------------------------------------- parts, and stages that end early


def walk(
    stages: list[list[int]], made: list[int], calls: int = 1, **options: Any
) -> tuple[list[list[float]], StageSchedule]:
    """Each stage's rates when it ends after so many steps; one that is whole ends by itself."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = StageSchedule(optimizer, **options)
    schedule.plan(stages)
    found: list[list[float]] = []
    for stage, steps in enumerate(made):
        found.append([])
        for _ in range(steps):
            found[-1].append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            schedule.step()
        for _ in range(calls if steps < sum(stages[stage]) else 0):
            schedule.end_stage(stage)
    return found, schedule


PLANS = st.lists(st.lists(st.integers(1, 6), min_size=1, max_size=3), min_size=1, max_size=4)


@given(PLANS, st.integers(0, 4))
def test_parts_have_a_schedule_each(stages: list[list[int]], warmup: int) -> None:
    found, _ = walk(stages, [sum(parts) for parts in stages], warmup_steps=warmup)
    flat = [part for parts in stages for part in parts]
    assert [rate for one in found for rate in one] == rates(flat, warmup_steps=warmup)


@given(PLANS, st.data(), st.integers(1, 2))
def test_a_stage_that_ends_early_ends_with_all_its_parts(
    stages: list[list[int]], data: st.DataObject, calls: int
) -> None:
    """Until then its rates are as planned, and the next stage has its own from its first step."""
    made = [data.draw(st.integers(0, sum(parts))) for parts in stages]
    found, schedule = walk(stages, made, calls, warmup_steps=2)
    for parts, steps, one in zip(stages, made, found, strict=True):
        whole, _ = walk([parts], [sum(parts)], warmup_steps=2)
        assert one == pytest.approx(whole[0][:steps])
    assert [sum(parts) for parts in schedule.stage_steps] == made
    assert [len(parts) for parts in schedule.stage_steps] == [len(parts) for parts in stages]


@given(PLANS, st.data())
def test_a_schedule_that_is_restored_after_an_early_end_goes_on(
    stages: list[list[int]], data: st.DataObject
) -> None:
    stages = [*stages, [3, 2]]
    made = [data.draw(st.integers(0, sum(parts))) for parts in stages[:-1]]
    _, schedule = walk(stages, made)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    restored = StageSchedule(optimizer)
    restored.plan(stages)
    restored.load_state_dict(schedule.state_dict())
    assert restored.get_lr() == schedule.get_lr() == rates([3, 2])[:1]


def test_the_edges_of_a_stage() -> None:
    """Before its first step it loses every one, after its last one none; the next is untouched."""
    plan = [[2, 2], [5]]
    for steps, left in [(0, [0, 0]), (1, [1, 0]), (2, [2, 0]), (3, [2, 1]), (4, [2, 2])]:
        _, schedule = walk(plan, [steps], calls=0)
        schedule.end_stage(0)
        assert schedule.stage_steps == [left, [5]]
        assert schedule.get_lr() == pytest.approx(rates([5])[:1])
    assert plan == [[2, 2], [5]], "the plan that was given stays as it is"


def test_the_rate_changes_where_the_stage_ends() -> None:
    """The optimizer has the next stage's first rate before it steps again."""
    _, schedule = walk([[9], [9]], [5], warmup_steps=2)
    (group,) = schedule.optimizer.param_groups
    assert group["lr"] == schedule.get_last_lr()[0] == pytest.approx(1 / 3)


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
