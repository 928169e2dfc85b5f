"""On-policy replay: past rows are held to an anchor, taken when the stage begins."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import echo_examples, make_data, make_method, sharpen
from lightning.pytorch import Callback, Trainer
from torch import Tensor

from sdft import SDFTModule
from sdft.batch import Batch, Origin
from sdft.callbacks import EMATeacher
from sdft.methods import AnchorReplayModule
from sdft.mixtures import PastReplay
from sdft.rollout import Rollout
from sdft.scoring import completion_logits

pytestmark = pytest.mark.usefixtures("no_plots")

Fit = Callable[..., Any]
State = dict[str, Tensor]


@pytest.fixture
def silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SDFTModule, "_log_step", lambda *args: None)


def build(folder: Path, **options: Any) -> AnchorReplayModule:
    module = make_method(AnchorReplayModule, folder, **{"skip_first_tokens": 0} | options)
    module.configure_model()
    return module


def batch_of(module: AnchorReplayModule, *origins: Origin) -> Batch:
    examples = echo_examples(len(origins))
    encode = module.encoder
    students = [encode.student_ids(example) for example in examples]
    return Batch(examples, students, [encode.teacher_ids(e) for e in examples], origins)


def state(model: torch.nn.Module) -> State:
    return {name: value.detach().clone().float() for name, value in model.state_dict().items()}


def same(one: State, other: State) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


class Recorder(Callback):
    """Student, teacher and anchor before the first batch's hooks and after every batch."""

    def __init__(self) -> None:
        self.stages: list[int] = []
        self.states: dict[str, list[State]] = {"student": [], "teacher": [], "anchor": []}

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.record(trainer, pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
        self.record(trainer, pl_module)

    def record(self, trainer: Trainer, module: Any) -> None:
        self.stages.append(trainer.current_epoch)
        for name, states in self.states.items():
            states.append(state(getattr(module, name)))


# ---------------------------------------------------------------- who scores what


def test_the_anchor_scores_past_rows_on_bare_prompts_and_the_teacher_the_others(
    model_dir: Path,
) -> None:
    module = build(model_dir)
    sharpen(module.teacher, 2.0)
    sharpen(module.anchor, 3.0)
    batch = batch_of(module, "new", "past", "new", "past", "past")
    completion = module.rollout(batch)
    found = module.score(batch, completion)
    taught = completion_logits(module.teacher, batch.teacher_ids, completion, module.pad_id)
    anchored = completion_logits(module.anchor, batch.student_ids, completion, module.pad_id)
    mask = completion.mask_BT
    for row, origin in enumerate(batch.origins):
        expected = anchored if origin == "past" else taught
        torch.testing.assert_close(
            found[row][mask[row]], expected[row][mask[row]], atol=1e-4, rtol=1e-4
        )
    assert not torch.allclose(taught, anchored, atol=0.1)


class WholeLogits(AnchorReplayModule):
    def student_logits(self, batch: Batch, completion: Rollout) -> Tensor:
        return super().student_logits(batch, completion)


MIXED: tuple[Origin, ...] = ("new", "past", "new", "past", "past")


@pytest.mark.parametrize("origins", [MIXED, ("new",) * 3, ("past",) * 3])
@pytest.mark.parametrize("options", [{}, {"alpha": 0.4, "micro_batch_tokens": 40}])
def test_hidden_states_and_whole_logits_give_one_loss_and_one_gradient(
    model_dir: Path, silent: None, origins: tuple[Origin, ...], options: dict[str, Any]
) -> None:
    found = []
    for kind in (AnchorReplayModule, WholeLogits):
        module = make_method(kind, model_dir, skip_first_tokens=1, **options)
        module.configure_model()
        module.double()
        sharpen(module.teacher, 2.0)
        sharpen(module.anchor, 3.0)
        assert module.compares_hidden is (kind is AnchorReplayModule)
        torch.manual_seed(0)
        loss = module.training_step(batch_of(module, *origins), 0)
        loss.backward()
        found.append((loss.detach(), [p.grad for p in module.model.parameters()]))
    (loss, gradients), (expected, others) = found
    assert expected > 1e-3
    torch.testing.assert_close(loss, expected.double(), rtol=1e-6, atol=1e-7)
    for one, other in zip(gradients, others, strict=True):
        assert (one - other).norm() <= 1e-6 * (1 + other.norm())


@pytest.mark.parametrize("origin", ["new", "past"])
def test_batches_of_one_kind(model_dir: Path, origin: Origin) -> None:
    module = build(model_dir)
    sharpen(module.teacher, 2.0)
    batch = batch_of(module, *[origin] * 3)
    completion = module.rollout(batch)
    model, prompts = (
        (module.teacher, batch.teacher_ids)
        if origin == "new"
        else (module.anchor, batch.student_ids)
    )
    expected = completion_logits(model, prompts, completion, module.pad_id)
    assert torch.equal(module.score(batch, completion), expected)


def test_past_rows_add_nothing_where_the_student_is_the_anchor(
    model_dir: Path, silent: None
) -> None:
    module = build(model_dir)
    sharpen(module.teacher, 3.0)
    loss = module.training_step(batch_of(module, "past", "past"), 0)
    loss.backward()
    assert loss.item() == pytest.approx(0.0, abs=1e-6)
    assert max(p.grad.abs().max() for p in module.model.parameters()) < 1e-5
    assert module.training_step(batch_of(module, "new", "new"), 0).item() > 1e-3


def test_the_student_answers_bare_prompts(model_dir: Path, silent: None) -> None:
    module = build(model_dir, rollouts_per_prompt=2)
    batch = batch_of(module, "new", "past")
    seen: list[Any] = []
    engine = module.engine

    class Spy:
        def generate(self, model: Any, prompts: Any, *rest: Any) -> Any:
            seen.append((model, prompts))
            return engine.generate(model, prompts, *rest)

    module.engine = Spy()
    module.training_step(batch, 0)
    assert seen == [(module.model, [ids for ids in batch.student_ids for _ in range(2)])]


# ---------------------------------------------------------------- when the anchor is taken


def stream(**options: Any) -> Any:
    return make_data(("one", "two", "three"), mixtures=[PastReplay(0.5)], **options)


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_the_anchor_is_the_student_of_the_stages_start(
    fit: Fit, model_dir: Path, precision: str
) -> None:
    recorder = Recorder()
    _, module = fit(
        module=make_method(AnchorReplayModule, model_dir),
        data=stream(),
        teacher=EMATeacher(rate=0.3),
        callbacks=[recorder],
        precision=precision,
    )
    students, anchors = recorder.states["student"], recorder.states["anchor"]
    assert recorder.stages[1:] == [0] * 3 + [1] * 3 + [2] * 3
    for stage in range(3):
        start = students[3 * stage]
        for place in range(3 * stage + 1, 3 * stage + 4):
            assert same(anchors[place], start), (stage, place)
            assert not same(students[place], start)
    teachers = recorder.states["teacher"]
    assert all(not same(a, b) for a, b in pairwise(teachers))
    assert {p.dtype for p in module.anchor.parameters()} == {torch.float32}
    assert not any(p.requires_grad for p in module.anchor.parameters())
    assert not any(m.training for m in module.anchor.modules())


def test_the_anchor_may_stay_the_base(fit: Fit, model_dir: Path) -> None:
    recorder = Recorder()
    module = make_method(AnchorReplayModule, model_dir, anchor="base")
    fit(module=module, data=stream(), callbacks=[recorder])
    base = recorder.states["student"][0]
    assert all(same(anchor, base) for anchor in recorder.states["anchor"])


def test_it_is_neither_optimised_nor_needed_to_evaluate(
    fit: Fit, model_dir: Path, tmp_path: Path
) -> None:
    trainer, module = fit(module=make_method(AnchorReplayModule, model_dir), data=stream())
    optimised = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert optimised == {id(p) for p in module.model.parameters()}
    assert {n.split(".")[0] for n in module.state_dict()} == {"student", "teacher", "anchor"}
    checkpoint = Path(trainer.log_dir) / "checkpoints" / "last.ckpt"
    fresh = Trainer(logger=False, accelerator="cpu", default_root_dir=tmp_path)
    alone = make_method(AnchorReplayModule, model_dir)
    fresh.test(alone, datamodule=stream(), ckpt_path=checkpoint, weights_only=True, verbose=False)
    assert alone.anchor is None
    assert same(state(alone.model), state(module.model))


def test_replay_keeps_the_student_near_its_anchor(fit: Fit, model_dir: Path) -> None:
    """Without past rows, in the first stage, the run is SDFT's; with them it is another."""
    runs = []
    for method, names, mixtures in (
        (SDFTModule, ["first"], []),
        (AnchorReplayModule, ["first"], [PastReplay(1.0)]),
        (SDFTModule, ["first", "second"], []),
        (AnchorReplayModule, ["first", "second"], [PastReplay(1.0)]),
    ):
        module = make_method(method, model_dir)
        _, trained = fit(module=module, data=make_data(names, mixtures=mixtures))
        runs.append(state(trained.model))
    assert same(runs[0], runs[1])
    furthest = max((runs[2][name] - runs[3][name]).abs().max().item() for name in runs[2])
    assert furthest > 1e-3


def test_without_a_mixture_of_past_examples_it_does_not_start(fit: Fit, model_dir: Path) -> None:
    with pytest.raises(ValueError, match=r"'anchor_replay' needs 'past' rows: add .*PastReplay"):
        fit(module=make_method(AnchorReplayModule, model_dir), data=make_data())


def test_a_bad_anchor_is_named(model_dir: Path) -> None:
    with pytest.raises(ValueError, match="anchor must be one of stage_start, base, found 'now'"):
        make_method(AnchorReplayModule, model_dir, anchor="now")
