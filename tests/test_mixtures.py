"""What else a stage trains on: exact ratios, the right tasks, never another number of batches."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_data, make_method, make_module, make_task
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch import Callback, Trainer

from sdft import ContinualDataModule, Example, PythonTask
from sdft.batch import Batch
from sdft.encoded import Encoded
from sdft.methods import CPTModule, DFTModule, ReinvokeModule, SFTModule
from sdft.mixtures import (
    Batches,
    GeneralPrompts,
    Joint,
    Mixture,
    PastReplay,
    Reinvoke,
    shares,
)
from sdft.stages import stage_batches
from sdft.tasks import Split, Task

pytestmark = pytest.mark.usefixtures("no_plots")

Fit = Callable[..., Any]


class Stream:
    """A task stream outside a trainer: rows are told apart by their prompts, `<task>-<number>`."""

    def __init__(
        self, sizes: list[int], batch_size: int = 4, batches: int = 5, general: int = 7
    ) -> None:
        self.rows = {f"t{i}": _rows(f"t{i}", size) for i, size in enumerate(sizes)}
        self.tasks: list[Task] = [PythonTask(name) for name in self.rows]
        self.general: list[Task] = []
        self.batch_size = batch_size
        self.batches = batches
        self.prompts = _rows("general", general)

    def encoded(self, task: Task, split: Split) -> list[Encoded]:
        assert split == "train"
        return self.rows[task.name]

    def general_prompts(self) -> list[Encoded]:
        return self.prompts

    def own_batches(self, stage: int) -> Batches:
        items = self.rows[f"t{stage}"]
        rows = stage_batches(len(items), self.batch_size, 0, stage, self.batches + stage)
        return [[items[row] for row in batch] for batch in rows]

    def mixed(self, mixture: Mixture, stage: int, seed: int = 0) -> Batches:
        return mixture.mix(self, stage, self.own_batches(stage), seed)


def _rows(name: str, count: int) -> list[Encoded]:
    examples = [
        Example(({"role": "user", "content": f"{name}-{i}"},), "a", "a") for i in range(count)
    ]
    return [Encoded(example, [i], [i]) for i, example in enumerate(examples)]


def names(batch: list[Encoded], origin: str | None = None) -> list[str]:
    return [item.example.prompt for item in batch if origin in (None, item.origin)]


def owners(batches: Batches, origin: str) -> Counter[str]:
    return Counter(name.split("-")[0] for batch in batches for name in names(batch, origin))


def total(batches: Batches) -> int:
    return sum(map(len, batches))


MIXTURES: dict[str, Callable[[], Mixture]] = {
    "replay": PastReplay,
    "replay from a memory": lambda: PastReplay(0.5, memory=2),
    "general": GeneralPrompts,
    "reinvoke": Reinvoke,
    "joint": Joint,
}
SIZES = st.lists(st.integers(1, 9), min_size=1, max_size=4)
RATIOS = st.fractions(min_value=Fraction(1, 20), max_value=3, max_denominator=20)


# ---------------------------------------------------------------- all of them


@given(
    kind=st.sampled_from(sorted(MIXTURES)),
    sizes=SIZES,
    batch_size=st.integers(1, 6),
    batches=st.integers(1, 8),
    seed=st.integers(0, 2**31),
)
def test_the_number_of_batches_stays_and_none_is_empty(
    kind: str, sizes: list[int], batch_size: int, batches: int, seed: int
) -> None:
    stream = Stream(sizes, batch_size, batches)
    for stage in range(len(sizes)):
        mixture = MIXTURES[kind]()
        found = stream.mixed(mixture, stage, seed)
        assert len(found) == batches + stage
        assert all(found)
        assert sum(mixture.segments(len(found))) == len(found)


@pytest.mark.parametrize("kind", MIXTURES)
def test_what_is_drawn_is_a_function_of_seed_and_stage(kind: str) -> None:
    stream = Stream([9, 9, 9])
    before = torch.random.get_rng_state()
    one = stream.mixed(MIXTURES[kind](), 1, seed=3)
    again = Stream([9, 9, 9]).mixed(MIXTURES[kind](), 1, seed=3)
    assert one == again
    mixture = MIXTURES[kind]()
    stream.mixed(mixture, 2, seed=3)
    assert stream.mixed(mixture, 1, seed=3) == one, "nothing is carried from one stage to the next"
    assert stream.mixed(mixture, 1, seed=4) != one
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("kind", MIXTURES)
def test_the_given_batches_are_not_changed(kind: str) -> None:
    stream = Stream([5, 5])
    own = stream.own_batches(1)
    kept = [list(batch) for batch in own]
    MIXTURES[kind]().mix(stream, 1, own, 0)
    assert own == kept


@pytest.mark.parametrize("mixture", [PastReplay(0.7), GeneralPrompts(0.7)], ids=["past", "general"])
def test_the_new_rows_stay_as_they_are_and_first(mixture: Mixture) -> None:
    stream = Stream([6, 6, 6])
    own = stream.own_batches(2)
    for before, after in zip(own, stream.mixed(mixture, 2), strict=True):
        assert after[: len(before)] == before
        assert {item.origin for item in after[len(before) :]} <= {mixture.origin}


# ---------------------------------------------------------------- shares


@given(sizes=st.lists(st.integers(1, 40), max_size=40), ratio=RATIOS)
def test_shares_add_up_exactly_and_are_spread_evenly(sizes: list[int], ratio: Fraction) -> None:
    found = shares(sizes, float(ratio))
    assert sum(found) == math.floor(sum(sizes) * ratio)
    for place in range(len(sizes)):
        until = sum(sizes[: place + 1]) * ratio
        assert 0 <= until - sum(found[: place + 1]) < 1
        assert abs(found[place] - sizes[place] * ratio) < 1 + 1e-6


@pytest.mark.parametrize("ratio", [0.0, -0.5, math.nan, math.inf])
@pytest.mark.parametrize("kind", [PastReplay, GeneralPrompts])
def test_a_bad_ratio_is_named(kind: Any, ratio: float) -> None:
    with pytest.raises(ValueError, match=f"ratio must be a number above 0, found {ratio}"):
        kind(ratio)


# ---------------------------------------------------------------- replay


@given(
    sizes=st.lists(st.integers(1, 9), min_size=2, max_size=4),
    batch_size=st.integers(1, 6),
    batches=st.integers(1, 8),
    ratio=RATIOS,
    seed=st.integers(0, 2**31),
)
def test_replay_draws_exactly_its_ratio_and_only_earlier_tasks(
    sizes: list[int], batch_size: int, batches: int, ratio: Fraction, seed: int
) -> None:
    stream = Stream(sizes, batch_size, batches)
    for stage in range(1, len(sizes)):
        found = stream.mixed(PastReplay(float(ratio)), stage, seed)
        past = owners(found, "past")
        new = total(stream.own_batches(stage))
        assert sum(past.values()) == math.floor(new * ratio)
        assert set(past) <= {f"t{i}" for i in range(stage)}
        assert set(owners(found, "new")) == {f"t{stage}"}


def test_the_first_stage_has_no_past() -> None:
    stream = Stream([5, 5])
    assert stream.mixed(PastReplay(2.0), 0) == stream.own_batches(0)


def test_every_earlier_task_has_the_same_chance_whatever_its_size() -> None:
    stream = Stream([100, 2, 30, 5], batch_size=10, batches=100)
    past = owners(stream.mixed(PastReplay(3.0), 3), "past")
    assert sum(past.values()) == 3 * total(stream.own_batches(3))
    for task in ("t0", "t1", "t2"):
        assert past[task] / sum(past.values()) == pytest.approx(1 / 3, abs=0.05)


def test_a_memory_keeps_the_same_examples_in_every_stage() -> None:
    stream = Stream([20, 20, 20, 3], batch_size=8, batches=30)
    kept = [
        {n for batch in stream.mixed(PastReplay(2.0, memory=3), s) for n in names(batch, "past")}
        for s in (1, 2, 3)
    ]
    assert [len(pool) for pool in kept] == [3, 6, 9]
    assert kept[0] < kept[1] < kept[2]
    other = stream.mixed(PastReplay(2.0, memory=3), 1, seed=1)
    assert {n for batch in other for n in names(batch, "past")} != kept[0]


def test_a_memory_as_large_as_the_task_keeps_all() -> None:
    stream = Stream([4, 4], batch_size=4, batches=30)
    found = stream.mixed(PastReplay(1.0, memory=4), 1)
    assert found == stream.mixed(PastReplay(1.0), 1)
    assert {n for batch in found for n in names(batch, "past")} == {f"t0-{i}" for i in range(4)}


def test_a_bad_memory_is_named() -> None:
    with pytest.raises(ValueError, match="PastReplay: memory must be at least 1, found 0"):
        PastReplay(memory=0)


# ---------------------------------------------------------------- general prompts


@given(
    prompts=st.integers(1, 12),
    batch_size=st.integers(1, 6),
    batches=st.integers(1, 8),
    ratio=RATIOS,
    seed=st.integers(0, 2**31),
)
def test_general_prompts_join_by_their_ratio_and_all_about_equally(
    prompts: int, batch_size: int, batches: int, ratio: Fraction, seed: int
) -> None:
    stream = Stream([5, 5], batch_size, batches, prompts)
    for stage in (0, 1):
        found = stream.mixed(GeneralPrompts(float(ratio)), stage, seed)
        drawn = [name for batch in found for name in names(batch, "general")]
        assert len(drawn) == math.floor(total(stream.own_batches(stage)) * ratio)
        uses = Counter({f"general-{i}": 0 for i in range(prompts)})
        uses.update(drawn)
        assert len(uses) == prompts
        assert max(uses.values()) - min(uses.values()) <= 1
        assert set(owners(found, "new")) == {f"t{stage}"}


# ---------------------------------------------------------------- re-invoke


@given(
    batches=st.integers(1, 40),
    share=st.floats(0.01, 0.99),
    batch_size=st.integers(1, 6),
    seed=st.integers(0, 2**31),
)
def test_reinvoke_ends_the_stage_with_general_prompts_alone(
    batches: int, share: float, batch_size: int, seed: int
) -> None:
    stream = Stream([5], batch_size, batches)
    mixture = Reinvoke(share)
    supervised, general = mixture.segments(batches)
    own, found = stream.own_batches(0), stream.mixed(mixture, 0, seed)
    assert found[:supervised] == own[:supervised]
    assert all(len(batch) == batch_size for batch in found[supervised:])
    assert set(owners(found[supervised:], "general")) <= {"general"}
    assert {item.origin for batch in found[supervised:] for item in batch} <= {"general"}
    assert supervised >= 1, "a stage always learns its task"
    if batches > 1:
        assert general >= 1
        assert general == pytest.approx(share * batches, abs=0.5 + 1e-9) or general in (
            1,
            batches - 1,
        )
    uses = Counter(name for batch in found[supervised:] for name in names(batch))
    spread = [uses[f"general-{i}"] for i in range(7)]
    assert max(spread) - min(spread) <= 1


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1, math.nan])
def test_a_bad_share_is_named(share: float) -> None:
    with pytest.raises(ValueError, match=f"Reinvoke: share must lie between 0 and 1, .*{share}"):
        Reinvoke(share)


# ---------------------------------------------------------------- all tasks at once


@given(
    sizes=SIZES, batch_size=st.integers(1, 6), batches=st.integers(1, 8), seed=st.integers(0, 99)
)
def test_the_joint_run_sees_what_the_sequential_run_sees(
    sizes: list[int], batch_size: int, batches: int, seed: int
) -> None:
    stream = Stream(sizes, batch_size, batches)
    stages = range(len(sizes))
    sequential = Counter(n for s in stages for batch in stream.own_batches(s) for n in names(batch))
    joint = [stream.mixed(Joint(), stage, seed) for stage in stages]
    assert Counter(n for found in joint for batch in found for n in names(batch)) == sequential
    for stage, found in zip(stages, joint, strict=True):
        assert [*map(len, found)] == [*map(len, stream.own_batches(stage))]


def test_every_stage_of_the_joint_run_mixes_all_tasks() -> None:
    stream = Stream([50, 50, 50], batch_size=10, batches=20)
    for stage in range(3):
        seen = owners(stream.mixed(Joint(), stage), "new")
        for task in ("t0", "t1", "t2"):
            assert seen[task] / sum(seen.values()) == pytest.approx(1 / 3, abs=0.1)


# ---------------------------------------------------------------- in a run


class Seen(Callback):
    """Every training batch, by stage, as its prompts and origins."""

    def __init__(self) -> None:
        self.batches: list[tuple[int, list[tuple[str, str]]]] = []

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: Any, batch: Batch, batch_idx: int
    ) -> None:
        rows = [(e.prompt, o) for e, o in zip(batch.examples, batch.origins, strict=True)]
        self.batches.append((trainer.current_epoch, rows))

    def origins(self, stage: int) -> Counter[str]:
        return Counter(o for s, rows in self.batches if s == stage for _, o in rows)


def general(**options: Any) -> dict[str, Any]:
    return {"general": [make_task("any", train=5)], **options}


def test_mixtures_are_applied_in_their_order(fit: Fit, model_dir: Path) -> None:
    seen = Seen()
    mixtures = [PastReplay(0.5), GeneralPrompts(0.25), Reinvoke(0.4)]
    data = make_data(**general(mixtures=mixtures, steps=5, batch_size=6))
    trainer, _ = fit(module=make_method(ReinvokeModule, model_dir), data=data, callbacks=[seen])
    assert trainer.global_step == 10
    # 3 batches of 6 new rows, with 1 or 2 general prompts each; 2 batches of 6 general prompts.
    assert seen.origins(0) == {"new": 18, "general": math.floor(0.25 * 18) + 2 * 6}
    assert seen.origins(1)["past"] == 9
    assert [len({o for _, o in rows}) for _, rows in seen.batches] == [2, 2, 2, 1, 1, 3, 3, 3, 1, 1]


@pytest.mark.parametrize("past_first", [True, False])
def test_ratios_count_new_rows_in_whatever_order(past_first: bool) -> None:
    joining: list[Mixture] = [PastReplay(0.5), GeneralPrompts(0.5)]
    mixtures = [*joining, Reinvoke(0.5)] if past_first else [Reinvoke(0.5), *joining[::-1]]
    stream = Stream([9, 9], batch_size=4, batches=9)
    found = own = stream.own_batches(1)
    for mixture in mixtures:
        found = mixture.mix(stream, 1, found, 0)
    assert len(found) == len(own) == 10
    new = total(own[:5])
    assert owners(found[:5], "new") == {"t1": new}
    assert owners(found[:5], "past") == {"t0": new // 2}
    assert owners(found[:5], "general") == {"general": new // 2}
    assert {item.origin for batch in found[5:] for item in batch} == {"general"}


@pytest.mark.parametrize("accumulate", [1, 2, 3])
@pytest.mark.parametrize("schedule", [{"steps": 5}, {"steps": None, "epochs": 4}], ids=str)
def test_the_schedule_has_as_many_steps_as_the_run(
    fit: Fit, model_dir: Path, accumulate: int, schedule: dict[str, Any]
) -> None:
    """Also where an optimizer step reaches from the supervised part into the general one."""
    data = make_data(**general(mixtures=[Reinvoke(0.4)], **schedule))
    module = make_method(ReinvokeModule, model_dir)
    trainer, _ = fit(module=module, data=data, accumulate_grad_batches=accumulate)
    assert trainer.global_step == sum(data.schedule_steps())
    assert [len(parts) for parts in data.schedule_parts()] == [2, 2]


@pytest.mark.parametrize("method", [SFTModule, DFTModule, CPTModule])
@pytest.mark.parametrize("mixture", [GeneralPrompts(), Reinvoke()], ids=["general", "reinvoke"])
def test_a_method_that_cannot_learn_from_the_rows_says_so(
    fit: Fit, model_dir: Path, method: Any, mixture: Mixture
) -> None:
    named = f"data.mixtures: {type(mixture).__name__} adds 'general' rows.*method {method.method!r}"
    with pytest.raises(ValueError, match=named):
        fit(
            module=make_method(method, model_dir),
            data=make_data(**general(mixtures=[mixture])),
        )


def test_sdft_learns_from_past_rows_but_not_from_general_ones(fit: Fit, model_dir: Path) -> None:
    seen = Seen()
    fit(data=make_data(mixtures=[PastReplay(1.0)], batch_size=3), callbacks=[seen])
    assert seen.origins(0) == {"new": 9}
    assert seen.origins(1) == {"new": 9, "past": 9}
    with pytest.raises(ValueError, match="method 'sdft'"):
        fit(module=make_module(model_dir), data=make_data(**general(mixtures=[Reinvoke()])))


@pytest.mark.parametrize("mixture", [GeneralPrompts(), Reinvoke()], ids=["general", "reinvoke"])
@pytest.mark.parametrize(
    ("tasks", "found"),
    [([], "found no task"), ([PythonTask("bare")], "found 'bare': no training examples")],
    ids=["none", "bare"],
)
def test_missing_general_prompts_are_named(
    fit: Fit, model_dir: Path, mixture: Mixture, tasks: list[Task], found: str
) -> None:
    with pytest.raises(ValueError, match=f"data.general: .*{found}"):
        fit(
            module=make_method(ReinvokeModule, model_dir),
            data=make_data(mixtures=[mixture], general=tasks),
        )


def test_general_prompts_need_no_demonstration_and_come_from_all_tasks(
    fit: Fit, model_dir: Path
) -> None:
    class Bare(PythonTask):
        def examples(self, split: Split) -> list[Example]:
            return [replace(example, demonstration=None) for example in super().examples(split)]

    seen = Seen()
    one, other = ({"role": "user", "content": content} for content in ("g h", "h g"))
    tasks = [Bare(m["content"][0], train=[Example((m,), "a", "a")]) for m in (one, other)]
    data = make_data(general=tasks, mixtures=[GeneralPrompts(1.0)])
    fit(module=make_method(ReinvokeModule, model_dir), data=data, callbacks=[seen])
    asked = {prompt for _, rows in seen.batches for prompt, origin in rows if origin == "general"}
    assert asked == {"g h", "h g"}


def test_the_report_names_the_mixtures(fit: Fit, model_dir: Path) -> None:
    trainer, _ = fit(data=make_data(mixtures=[PastReplay()]))
    assert '"sdft+replay"' in (Path(trainer.log_dir) / "retention.json").read_text()


def test_a_joint_run_evaluates_after_every_stage(fit: Fit) -> None:
    data: ContinualDataModule = make_data(mixtures=[Joint()])
    seen = Seen()
    trainer, _ = fit(data=data, callbacks=[seen])
    assert trainer.global_step == 6
    rows = Counter(prompt for _, batch in seen.batches for prompt, _ in batch)
    own = Counter(i.example.prompt for s in (0, 1) for b in data.own_batches(s) for i in b)
    assert rows == own
