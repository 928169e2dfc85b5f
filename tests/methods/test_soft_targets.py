"""Soft targets: the base's own answers beside new examples."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TEMPLATE, make_data, make_task, run_fit, save_model, sharpen
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from sdft import ContinualDataModule, Example, PythonTask, StudentModule
from sdft.checks import Facts, LengthCheck
from sdft.generated import read_answers
from sdft.losses import zero_loss
from sdft.methods import SFTModule, SoftTargetModule
from sdft.mixtures import GeneralPrompts
from sdft.scoring import completion_logits
from sdft.weights import frozen_copy, squared_distance

pytestmark = pytest.mark.usefixtures("no_plots")

LETTERS = "abcdefgh"


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that is sure of something."""
    folder = save_model(tmp_path_factory.mktemp("sharp"))
    module = SFTModule(model_name=str(folder))
    sharpen(module.model, 6.0).save_pretrained(folder)  # type: ignore[operator]
    return folder


@pytest.fixture
def fit(tmp_path: Path, model_dir: Path) -> Callable[..., tuple[Trainer, Any]]:
    return partial(run_fit, tmp_path, model_dir, limit_val_batches=0)


def make(folder: Path, kind: type[SFTModule] = SoftTargetModule, **options: Any) -> Any:
    settings: dict[str, Any] = {
        "model_name": str(folder),
        "max_new_tokens": 6,
        "teacher_template": TEMPLATE,
        "optimizer": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2),
    }
    return kind(**settings | options)


def general(count: int = 8) -> PythonTask:
    prompts = [f"{LETTERS[i]} h {LETTERS[-i]}" for i in range(count)]
    turns = [({"role": "user", "content": prompt},) for prompt in prompts]
    return PythonTask("general", train=[Example(turn, "a", demonstration="a") for turn in turns])


def stream(*names: str, ratio: float = 0.5, **options: Any) -> ContinualDataModule:
    settings: dict[str, Any] = {"general": [general()], "mixtures": [GeneralPrompts(ratio)]}
    return make_data(names or ("only",), **settings | options)


class Steps(Callback):
    """Keeps what is logged, and the gradients of the first step."""

    def __init__(self) -> None:
        self.logged: list[dict[str, float]] = []
        self.gradients: dict[str, Tensor] = {}

    def on_after_backward(self, trainer: Trainer, pl_module: Any) -> None:
        if not self.gradients:
            named = pl_module.student.named_parameters()
            self.gradients = {name: p.grad.clone() for name, p in named if p.grad is not None}

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, *_: Any) -> None:
        values = {name: float(value) for name, value in trainer.callback_metrics.items()}
        self.logged.append(values | {"total": float(outputs["loss"])})


def store_of(trainer: Trainer) -> Path:
    (manifest,) = (Path(trainer.log_dir) / "generated").glob("*/store.json")
    return manifest.parent


# ---------------------------------------------------------------- the targets


@pytest.mark.parametrize(("k", "temperature"), [(99, 1.0), (3, 1.0), (3, 0.7)])
def test_stored_targets_are_the_bases_distribution(
    fit: Any, model_dir: Path, k: int, temperature: float
) -> None:
    module = make(model_dir, targets_per_token=k, temperature=temperature, track_base=True)
    fit(module=module, data=stream())
    assert module.base is not None
    book, stored = module.book, module._stored
    prompts = dict(book._places)
    assert len(prompts) == 8
    for prompt, (place,) in prompts.items():
        completion = module.completions([place])
        logits_TV = completion_logits(module.base, [prompt], completion, 0)[0] / temperature
        expected_TV = logits_TV.log_softmax(-1)
        found = stored.answer(place)
        assert len(found.ids) == len(book.answers[place].ids)
        kept, ids = expected_TV.topk(min(k, expected_TV.shape[-1]))
        torch.testing.assert_close(found.log_probs, kept, atol=1e-4, rtol=1e-4)
        if k > 17:
            torch.testing.assert_close(
                torch.zeros_like(expected_TV).scatter(-1, found.ids.long(), found.log_probs),
                expected_TV,
                atol=1e-4,
                rtol=1e-4,
            )
        else:
            assert torch.equal(found.ids.long(), ids)
        total = found.log_probs.exp().sum(-1) + found.tail.exp()
        torch.testing.assert_close(total, torch.ones_like(total))


def test_the_size_that_is_said_is_the_size_on_disk(
    fit: Any, model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer, _ = fit(module=make(model_dir), data=stream())
    folder = store_of(trainer)
    size = (folder / "soft_targets.safetensors").stat().st_size
    assert json.loads((folder / "store.json").read_text())["bytes"] == {
        "answers.jsonl": (folder / "answers.jsonl").stat().st_size,
        "soft_targets.safetensors": size,
    }
    assert f"soft targets take {size:,} bytes" in capsys.readouterr().out


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("targets", ["stored", "snapshot"])
def test_a_student_that_is_the_base_has_no_distillation_loss(
    fit: Any, model_dir: Path, targets: str, temperature: float
) -> None:
    steps = Steps()
    module = make(model_dir, targets=targets, weight=1.0, temperature=temperature)
    trainer, _ = fit(module=module, data=stream(steps=1), callbacks=[steps])
    assert steps.logged[0]["total"] == pytest.approx(0.0, abs=1e-6)
    assert max(g.abs().max() for g in steps.gradients.values()) < 1e-4
    assert (store_of(trainer) / "soft_targets.safetensors").exists() is (targets == "stored")


def test_both_kinds_of_targets_teach_the_same_when_all_tokens_are_stored(
    fit: Any, model_dir: Path
) -> None:
    logged = []
    for targets in ("stored", "snapshot"):
        steps = Steps()
        options = {"targets": targets, "weight": 0.5, "targets_per_token": 99, "temperature": 1.5}
        module = make(model_dir, **options)
        fit(targets, module=module, data=stream(), callbacks=[steps])
        logged.append([values["train/distillation"] for values in steps.logged])
    assert logged[0] == pytest.approx(logged[1], rel=1e-3, abs=1e-5)
    assert logged[0][-1] > 1e-3


# ---------------------------------------------------------------- the loss


def test_a_weight_of_zero_is_sft_bit_for_bit(fit: Any, model_dir: Path) -> None:
    soft, plain = Steps(), Steps()
    _, module = fit("soft", make(model_dir, weight=0.0), stream("a", "b"), callbacks=[soft])
    _, sft = fit("sft", make(model_dir, SFTModule), make_data(("a", "b")), callbacks=[plain])
    assert soft.gradients.keys() == plain.gradients.keys()
    for name, gradient in plain.gradients.items():
        assert torch.equal(soft.gradients[name], gradient), name
    expected = sft.student.state_dict()
    assert all(torch.equal(v, expected[k]) for k, v in module.student.state_dict().items())
    assert not any("train/distillation" in values for values in soft.logged)


def test_a_weight_of_one_never_sees_a_demonstration(fit: Any, model_dir: Path) -> None:
    weights = []
    for demonstration in ("a a a a a", "h"):
        task = make_task("only")
        examples = [Example(e.messages, e.answer, demonstration) for e in task.examples("train")]
        data = ContinualDataModule(
            [PythonTask("only", train=examples)],
            batch_size=4,
            steps=3,
            general=[general()],
            mixtures=[GeneralPrompts()],
        )
        _, module = fit(demonstration[:1], make(model_dir, weight=1.0), data)
        weights.append(module.student.state_dict())
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_the_loss_weighs_both_parts(fit: Any, model_dir: Path) -> None:
    steps = Steps()
    fit(module=make(model_dir, weight=0.3), data=stream(), callbacks=[steps])
    for values in steps.logged:
        expected = 0.7 * values["train/loss"] + 0.3 * values["train/distillation"]
        assert values["total"] == pytest.approx(expected)
        assert values["train/distil_weight"] == pytest.approx(0.3)
    assert steps.logged[-1]["train/distillation"] > 0


def test_a_batch_without_general_rows_has_the_tasks_part_alone(fit: Any, model_dir: Path) -> None:
    steps = Steps()
    data = stream(ratio=0.2, batch_size=2)  # every other batch or so gets a general row
    fit(module=make(model_dir, weight=0.4), data=data, callbacks=[steps])
    first = steps.logged[0]
    assert "train/distillation" not in first
    assert first["total"] == pytest.approx(0.6 * first["train/loss"])
    alone = Steps()
    fit("alone", make(model_dir, weight=1.0), stream(ratio=0.2, batch_size=2), callbacks=[alone])
    assert alone.logged[0]["total"] == 0.0
    assert all(gradient.abs().max() == 0 for gradient in alone.gradients.values())


def test_distillation_keeps_the_student_near_the_base(fit: Any, model_dir: Path) -> None:
    """On general prompts, against SFT, after the same steps."""
    kept = {}
    for weight in (0.0, 0.5):
        module = make(model_dir, weight=weight, track_base=True)
        fit(f"{weight}", module, stream(steps=25, ratio=1.0))
        prompts = list(module.book._places)
        completion = module.completions([module.book._places[p][0] for p in prompts])
        with torch.no_grad():
            logits = completion_logits(module.student.eval(), prompts, completion, 0)
        kept[weight] = module.kl_to_base(
            [list(p) for p in prompts], completion, logits, completion.mask_BT
        ).item()
    assert kept[0.5] < 0.3 * kept[0.0]


def test_the_base_does_not_move_and_is_let_go_when_its_targets_are_stored(
    fit: Any, model_dir: Path
) -> None:
    original = frozen_copy(make(model_dir, SFTModule).model)
    snapshot = make(model_dir, targets="snapshot", track_base=False)
    fit("snapshot", snapshot, stream())
    assert snapshot.base is not None
    assert squared_distance(snapshot.base, original) == 0
    assert squared_distance(snapshot.student, original) > 0
    assert {name.split(".")[0] for name in snapshot.state_dict()} == {"student"}
    stored = make(model_dir, track_base=False)
    fit("stored", stored, stream())
    assert stored.base is None


def test_several_answers_are_all_drawn_in_time(fit: Any, model_dir: Path) -> None:
    drawn: list[int] = []
    module = make(model_dir, answers_per_prompt=3, weight=1.0)
    plain = module.completions
    module.completions = lambda places: drawn.extend(places) or plain(places)
    trainer, _ = fit(module=module, data=stream(ratio=1.0, steps=60))
    assert len(read_answers(store_of(trainer) / "answers.jsonl")) == 24
    assert set(drawn) == set(range(24))


# ---------------------------------------------------------------- checks and prompts


def refuse_a(text: str, example: Example, facts: Facts) -> str | None:
    return "begins with a" if example.prompt.startswith("a") else None


def test_a_dropped_prompt_is_never_drawn(
    fit: Any, model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: set[str] = set()

    class Watch(Callback):
        def on_train_batch_start(
            self, trainer: Trainer, pl_module: Any, batch: Any, i: int
        ) -> None:
            seen.update(example.prompt for example in batch.of("general").examples)

    data = stream("one", "two", ratio=2.0)
    trainer, _ = fit(module=make(model_dir, checks=[refuse_a]), data=data, callbacks=[Watch()])
    assert len(seen) == 7
    assert not any(prompt.startswith("a") for prompt in seen)
    answers = read_answers(store_of(trainer) / "answers.jsonl")
    assert [answer.reason for answer in answers].count("begins with a") == 1
    assert "7 of 8 answers of the base kept (1 begins with a)" in capsys.readouterr().out


def test_checks_that_drop_everything_end_the_run(fit: Any, model_dir: Path, tmp_path: Path) -> None:
    module = make(model_dir, checks=[LengthCheck(min_tokens=40, drop_truncated=False)])
    with pytest.raises(ValueError, match="dropped all 8 answers"):
        fit(module=module, data=stream())
    assert not list(tmp_path.rglob("generated/*"))


def test_a_prompt_that_stands_twice_is_answered_once(fit: Any, model_dir: Path) -> None:
    twice = general()
    twice.name = "again"
    trainer, _ = fit(module=make(model_dir), data=stream(general=[general(), twice]))
    assert len(read_answers(store_of(trainer) / "answers.jsonl")) == 8


def test_general_prompts_and_their_mixture_are_needed(fit: Any, model_dir: Path) -> None:
    with pytest.raises(ValueError, match=r"add sdft\.mixtures\.GeneralPrompts or Reinvoke to"):
        fit(module=make(model_dir), data=stream(mixtures=[]))
    with pytest.raises(ValueError, match=r"data\.general"):
        fit(module=make(model_dir), data=stream(general=[]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight": -0.1}, r"weight must lie in \[0, 1\], found -0.1"),
        ({"weight": float("nan")}, "weight"),
        ({"targets_per_token": 0}, "targets_per_token must be at least 1, found 0"),
        ({"targets": "live"}, "targets must be one of .* found 'live'"),
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"answers_per_prompt": 0}, "per prompt must be at least 1, found 0"),
    ],
)
def test_bad_settings_are_named(model_dir: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(model_dir, **options)


def test_a_zero_loss_has_a_zero_gradient() -> None:
    values = [torch.ones(2, 3, requires_grad=True), torch.ones(4)]
    zero_loss(values).backward()
    assert values[0].grad is not None
    assert values[0].grad.tolist() == [[0.0] * 3] * 2


# ---------------------------------------------------------------- the store


def generations(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many prompts each call of the generator was given."""
    calls: list[int] = []
    plain = StudentModule.sample

    def counted(self: Any, model: Any, prompts: Any, *others: Any) -> Any:
        if self.phases.current == "prepare":
            calls.append(len(prompts))
        return plain(self, model, prompts, *others)

    monkeypatch.setattr(StudentModule, "sample", counted)
    return calls


def test_a_shared_store_is_reused_and_what_differs_is_made_anew(
    fit: Any, model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = generations(monkeypatch)
    shared = str(tmp_path / "shared")
    first = fit("first", make(model_dir, store=shared), stream())[1]
    assert calls == [8]
    again = fit("again", make(model_dir, store=shared), stream())[1]
    assert calls == [8]
    state = first.student.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in again.student.state_dict().items())
    others: list[dict[str, Any]] = [
        {"temperature": 0.5},
        {"checks": [LengthCheck(0, drop_truncated=False)]},
        {"targets_per_token": 2},
        {"max_new_tokens": 4},
        {"targets": "snapshot"},
    ]
    for number, options in enumerate(others):
        fit(f"other {number}", make(model_dir, store=shared, **options), stream())
    fewer = stream(general=[general(5)])
    fit("fewer", make(model_dir, store=shared), fewer)
    assert calls == [8] * 6 + [5]
    assert len(list(Path(shared).iterdir())) == 7


def test_a_store_of_another_base_is_not_used(
    fit: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = generations(monkeypatch)
    for seed in (0, 1):
        folder = save_model(tmp_path / f"model-{seed}", seed=seed)
        module = make(folder, store=str(tmp_path / "shared"))
        fit(f"run-{seed}", module, stream())
    assert calls == [8, 8]


def test_a_dry_run_leaves_nothing(fit: Any, model_dir: Path, tmp_path: Path) -> None:
    fit(module=make(model_dir), data=stream(), fast_dev_run=True)
    assert not list(tmp_path.rglob("answers.jsonl"))


# ---------------------------------------------------------------- resuming


class Schedule(Callback):
    """Raises the weight once, after the first step."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        if trainer.global_step == 1:
            pl_module.distil_weight = 0.9


@pytest.mark.parametrize("again", ["found", "made anew"])
def test_a_changed_weight_and_the_answers_survive_a_resume(
    fit: Any, model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, again: str
) -> None:
    calls = generations(monkeypatch)
    steps = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=1)
    trainer, whole = fit("whole", make(model_dir), stream("a", "b"), callbacks=[Schedule(), steps])
    if again == "made anew":
        shutil.rmtree(store_of(trainer))
    checkpoint = tmp_path / "step=2.ckpt"  # in the middle of the first stage
    _, resumed = fit("resumed", make(model_dir), stream("a", "b"), ckpt_path=checkpoint)
    assert len(calls) == (1 if again == "found" else 2)
    assert (whole.distil_weight, resumed.distil_weight) == (0.9, 0.9)
    state = whole.student.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in resumed.student.state_dict().items())


def test_a_weight_that_the_configuration_sets_anew_wins(
    fit: Any, model_dir: Path, tmp_path: Path
) -> None:
    trainer, _ = fit("whole", make(model_dir), stream("a", "b"), callbacks=[Schedule()])
    checkpoint = next(Path(trainer.log_dir).rglob("stage-1-*.ckpt"))
    _, resumed = fit("resumed", make(model_dir, weight=0.4), stream("a", "b"), ckpt_path=checkpoint)
    assert resumed.distil_weight == 0.4
