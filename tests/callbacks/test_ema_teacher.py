"""The teacher: an exact fp32 average of the student, and nothing else moves it."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_data, make_model, make_module
from lightning.pytorch import Callback, LightningModule, Trainer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from sdft.callbacks import EMATeacher, Retention, Samples
from sdft.callbacks.ema_teacher import teacher_moved, update_average, update_rounded
from sdft.weights import frozen_copy

pytestmark = pytest.mark.usefixtures("no_plots")

Fit = Callable[..., Any]
State = dict[str, Tensor]


def copied(model: torch.nn.Module) -> State:
    return {name: value.detach().clone().float() for name, value in model.state_dict().items()}


class Recorder(Callback):
    """Student and teacher before training and after every batch."""

    def __init__(self) -> None:
        self.students: list[State] = []
        self.teachers: list[State] = []
        self.steps: list[int] = []

    def record(self, trainer: Trainer, module: Any) -> None:
        self.students.append(copied(module.student))
        self.teachers.append(copied(module.teacher))
        self.steps.append(trainer.global_step)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.record(trainer, pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
        self.record(trainer, pl_module)


def assert_equal(found: State, expected: State) -> None:
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []


# ---------------------------------------------------------------- the closed form


@pytest.mark.parametrize(("accumulate", "every"), [(1, 1), (2, 1), (1, 3), (2, 2)])
def test_the_teacher_is_the_closed_form_of_its_students(
    fit: Fit, accumulate: int, every: int
) -> None:
    recorder = Recorder()
    rate = 0.2
    fit(
        data=make_data(steps=4),
        teacher=EMATeacher(rate=rate, every_n_steps=every),
        callbacks=[recorder],
        accumulate_grad_batches=accumulate,
    )
    assert recorder.steps[-1] == 8
    assert len(recorder.steps) == 1 + 8 * accumulate
    after = {step: i for i, step in enumerate(recorder.steps)}  # the last batch of each step
    updates = [after[step] for step in range(1, 9) if step % every == 0]
    n = len(updates)
    for name, base in recorder.teachers[0].items():
        # φ_n = (1 − r)^n θ_0 + Σ r (1 − r)^(n − i) θ_i
        expected = (1 - rate) ** n * base.double()
        for i, place in enumerate(updates, 1):
            student = recorder.students[place][name].double()
            expected += rate * (1 - rate) ** (n - i) * student
        found = recorder.teachers[-1][name].double()
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
        assert (found - base).abs().max() > 1e-3, "the teacher stood still"


def test_the_teacher_waits_for_the_optimizer(fit: Fit) -> None:
    recorder = Recorder()
    fit(callbacks=[recorder], teacher=EMATeacher(rate=0.5), accumulate_grad_batches=2)
    for i in range(1, len(recorder.steps)):
        stepped = recorder.steps[i] != recorder.steps[i - 1]
        before, after = recorder.teachers[i - 1 : i + 1]
        assert any(not torch.equal(before[name], after[name]) for name in before) == stepped


# ---------------------------------------------------------------- the three kinds


@pytest.mark.parametrize("teacher", [EMATeacher("frozen"), EMATeacher("ema", rate=0.0)])
def test_a_frozen_teacher_stays_the_base_bit_for_bit(
    fit: Fit, model_dir: Path, teacher: EMATeacher
) -> None:
    base = copied(make_module(model_dir).model)
    _, module = fit(teacher=teacher)
    assert_equal(copied(module.teacher), base)
    assert any(not torch.equal(copied(module.student)[name], base[name]) for name in base)


@pytest.mark.parametrize("teacher", [EMATeacher("live"), EMATeacher("ema", rate=1.0)])
def test_a_live_teacher_is_the_student_after_every_step(fit: Fit, teacher: EMATeacher) -> None:
    recorder = Recorder()
    fit(teacher=teacher, callbacks=[recorder])
    for student, found in zip(recorder.students, recorder.teachers, strict=True):
        assert_equal(found, student)


def test_a_live_teacher_ignores_the_rate() -> None:
    assert EMATeacher("live", rate=0.01).rate == 1.0
    assert EMATeacher("frozen", rate=0.5).rate == 0.0
    assert EMATeacher().rate == 0.01


# ---------------------------------------------------------------- precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_average_of_a_half_precision_student_is_exact(dtype: torch.dtype) -> None:
    student = make_model().to(dtype)
    teacher = frozen_copy(student)
    start = copied(teacher)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.mul_(1.02)
    for _ in range(100):
        update_average(teacher, student, 0.01)
    share = 1 - 0.99**100  # of the way, after 100 updates
    for name, target in copied(student).items():
        expected = start[name] + share * (target - start[name])
        torch.testing.assert_close(teacher.state_dict()[name], expected, rtol=1e-5, atol=1e-7)
    # The same in bf16 hardly moves: this is what fp32 is for.
    value, target = torch.tensor(1.0, dtype=torch.bfloat16), torch.tensor(1.02).bfloat16()
    for _ in range(100):
        value = value + 0.01 * (target - value)
    assert value == 1.0


@pytest.mark.parametrize(
    ("options", "precision"),
    [({"dtype": "bfloat16"}, "32-true"), ({}, "bf16-true"), ({}, "bf16-mixed")],
    ids=["bf16 weights", "bf16-true", "bf16-mixed"],
)
def test_the_teacher_of_a_run_is_fp32(
    fit: Fit, model_dir: Path, options: dict[str, Any], precision: str
) -> None:
    recorder = Recorder()
    _, module = fit(
        module=make_module(model_dir, **options),
        teacher=EMATeacher(rate=0.25),
        callbacks=[recorder],
        precision=precision,
    )
    assert {p.dtype for p in module.teacher.parameters()} == {torch.float32}
    for i in range(1, len(recorder.steps)):
        for name, before in recorder.teachers[i - 1].items():
            expected = torch.lerp(before, recorder.students[i][name], 0.25)
            assert torch.equal(recorder.teachers[i][name], expected)


def test_update_average_copies_buffers() -> None:
    student, teacher = make_model(), frozen_copy(make_model())
    student.register_buffer("count", torch.tensor([3.0]))
    teacher.register_buffer("count", torch.tensor([0.0]))
    update_average(teacher, student, 0.5)
    assert teacher.get_buffer("count").item() == 3.0


# ---------------------------------------------------------------- only the student learns


# ---------------------------------------------------------------- storage in bfloat16


def motion(teacher: Any, base: State, target: Any) -> float:
    """The share of the way from base to target that the teacher has gone."""
    parts = [
        ((own.float() - base[name]) @ (aim - base[name]), (aim - base[name]).square().sum())
        for name, own, aim in (
            (
                name,
                own.detach().flatten().double(),
                target.get_parameter(name).detach().flatten().double(),
            )
            for name, own in teacher.named_parameters()
        )
    ]
    return sum(a.item() for a, _ in parts) / sum(b.item() for _, b in parts)


def test_a_bfloat16_teacher_keeps_the_motion_of_the_fp32_one() -> None:
    student = make_model().bfloat16().float()
    teachers = {dtype: frozen_copy(student).to(dtype) for dtype in (torch.float32, torch.bfloat16)}
    base = {name: p.detach().flatten().double() for name, p in student.named_parameters()}
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.mul_(1.01)  # a gap of 1 %, two steps of bfloat16 at most
    for step in range(250):
        for teacher in teachers.values():
            update_average(teacher, student, 0.01, seed=step)
    exact = motion(teachers[torch.float32], base, student)
    assert exact == pytest.approx(1 - 0.99**250, abs=1e-4)
    assert motion(teachers[torch.bfloat16], base, student) >= 0.98 * exact


def test_a_teacher_rounded_to_nearest_all_but_stands_still() -> None:
    """The trap of plain bfloat16, with the figure that the option's help gives."""
    student = make_model().bfloat16().float()
    teacher = frozen_copy(student).bfloat16()
    base = {name: p.detach().flatten().double() for name, p in student.named_parameters()}
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.mul_(1.01)
    for _ in range(250):
        update_rounded(teacher, student, 0.01)
    assert 0.0 < motion(teacher, base, student) < 0.04


def test_a_run_rounds_as_it_is_told(fit: Fit, caplog: pytest.LogCaptureFixture) -> None:
    teacher = EMATeacher(rate=0.1, storage="bfloat16", rounding="nearest")
    assert "all but stand still" in caplog.text
    recorder = Recorder()
    fit(data=make_data(["only"], steps=2), teacher=teacher, callbacks=[recorder])
    for before, after, student in zip(
        recorder.teachers, recorder.teachers[1:], recorder.students[1:], strict=False
    ):
        for name, value in before.items():
            start, own = value.bfloat16(), student[name].bfloat16()
            expected = start.mul(1 - 0.1).add(own, alpha=0.1)
            assert torch.equal(after[name].bfloat16(), expected), name


def test_the_storage_of_a_run_resumes_bit_for_bit(fit: Fit) -> None:
    def run(root: str, **options: Any) -> Any:
        teacher = EMATeacher(rate=0.1, storage="bfloat16")
        return fit(root=root, teacher=teacher, **options)

    trainer, whole = run("whole")
    assert {p.dtype for p in whole.teacher.parameters()} == {torch.bfloat16}
    stage = Path(trainer.log_dir) / "checkpoints" / "stage-1-first.ckpt"
    _, resumed = run("resumed", ckpt_path=stage)
    assert {p.dtype for p in resumed.teacher.parameters()} == {torch.bfloat16}
    assert_equal(copied(resumed.teacher), copied(whole.teacher))
    assert_equal(copied(resumed.student), copied(whole.student))


def test_the_teacher_takes_no_gradient_and_is_not_optimised(fit: Fit) -> None:
    seen: list[bool] = []

    class Watch(Callback):
        def on_before_optimizer_step(
            self, trainer: Trainer, pl_module: Any, optimizer: torch.optim.Optimizer
        ) -> None:
            optimised = {id(p) for group in optimizer.param_groups for p in group["params"]}
            assert optimised == {id(p) for p in pl_module.student.parameters()}
            assert all(p.grad is not None for p in pl_module.student.parameters())
            assert all(p.grad is None for p in pl_module.teacher.parameters())
            assert not any(p.requires_grad for p in pl_module.teacher.parameters())
            assert not any(m.training for m in pl_module.teacher.modules())
            assert all(m.training for m in pl_module.student.modules())
            seen.append(True)

    _, module = fit(callbacks=[Watch()])
    assert len(seen) == 6
    assert all(p.grad is None for p in module.base.parameters())


def test_without_the_callback_a_run_does_not_start(model_dir: Path, tmp_path: Path) -> None:
    trainer = Trainer(logger=False, default_root_dir=tmp_path, max_epochs=-1, accelerator="cpu")
    with pytest.raises(ValueError, match=r"no callback moves the teacher.*EMATeacher"):
        trainer.fit(make_module(model_dir), datamodule=make_data())


# ---------------------------------------------------------------- how far it moved


def logged(trainer: Trainer, name: str) -> dict[int, float]:
    events = EventAccumulator(str(trainer.log_dir)).Reload()
    return {event.step: event.value for event in events.Scalars(name)}


@pytest.mark.parametrize(
    ("kind", "low", "high"), [("ema", 0.01, 0.99), ("frozen", 0, 0), ("live", 1, 1)]
)
def test_how_far_the_teacher_moved_is_logged(fit: Fit, kind: Any, low: float, high: float) -> None:
    trainer, _ = fit(teacher=EMATeacher(kind, rate=0.1))
    values = logged(trainer, "teacher/moved")
    assert len(values) == 6
    assert all(low - 1e-6 <= value <= high + 1e-6 for value in values.values())


@pytest.mark.parametrize("accumulate", [1, 2])
def test_costly_metrics_are_logged_at_the_loggers_cadence(fit: Fit, accumulate: int) -> None:
    trainer, _ = fit(
        data=make_data(steps=4), log_every_n_steps=2, accumulate_grad_batches=accumulate
    )
    steps = set(logged(trainer, "train/divergence"))
    assert len(steps) == 4
    for name in ("teacher/moved", "train/entropy", "train/kl_base_student"):
        assert set(logged(trainer, name)) == steps, name


def test_a_logger_that_never_logs(fit: Fit) -> None:
    trainer, _ = fit(log_every_n_steps=0)
    assert trainer.global_step == 6


def test_moved_is_a_ratio_of_distances() -> None:
    base, student, teacher = (frozen_copy(make_model()) for _ in range(3))
    assert teacher_moved(teacher, student, base).item() == 0.0  # nobody moved: 0, not NaN
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.4)
        for parameter in teacher.parameters():
            parameter.add_(0.1)
    assert teacher_moved(teacher, student, base).item() == pytest.approx(0.25, rel=1e-4)


# ---------------------------------------------------------------- bad values


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"kind": "EMA"}, "teacher.kind must be one of ema, frozen, live, found 'EMA'"),
        ({"storage": "float16"}, "teacher.storage must be one of float32, bfloat16, found"),
        ({"rounding": "up"}, "teacher.rounding must be one of stochastic, nearest, found 'up'"),
        ({"rounding": "nearest"}, "teacher.rounding is 'nearest', which needs .* bfloat16"),
        ({"rate": -0.1}, r"teacher.rate must lie in \[0, 1\], found -0.1"),
        ({"rate": 1.1}, r"teacher.rate must lie in \[0, 1\], found 1.1"),
        ({"rate": math.nan}, "teacher.rate must lie"),
        ({"every_n_steps": 0}, "teacher.every_n_steps must be at least 1, found 0"),
    ],
)
def test_a_bad_value_is_named(options: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        EMATeacher(**options)


def test_a_method_without_teacher_is_left_alone() -> None:
    module = LightningModule()
    callback = EMATeacher()
    callback.on_fit_start(Trainer(logger=False, accelerator="cpu"), module)


def test_callback_state_holds_no_tensors() -> None:
    # It is saved by the first process only: tensors belong to the module.
    for callback in (EMATeacher(), Retention(), Samples()):
        assert all(not isinstance(value, Tensor) for value in callback.state_dict().values())
