"""Offline distillation: what the teacher wrote with the demonstration, learnt without it."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TEMPLATE, make_data, run_fit, save_model, sharpen
from lightning.pytorch import Callback, Trainer

from sdft import Example, StudentModule
from sdft.batch import Batch
from sdft.checks import Facts, ScoreCheck
from sdft.losses import token_divergence
from sdft.methods import SFTModule, TeacherSampleModule
from sdft.mixtures import PastReplay
from sdft.rollout import GenerateEngine, Rollout, Sampling
from sdft.scorers import Scorer
from sdft.scoring import completion_logits
from sdft.weights import frozen_copy, squared_distance

pytestmark = pytest.mark.usefixtures("no_plots")


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


def make(folder: Path, kind: type[SFTModule] = TeacherSampleModule, **options: Any) -> Any:
    settings: dict[str, Any] = {
        "model_name": str(folder),
        "max_new_tokens": 6,
        "teacher_template": TEMPLATE,
        "optimizer": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2),
    }
    return kind(**settings | options)


class Steps(Callback):
    def __init__(self) -> None:
        self.logged: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, *_: Any) -> None:
        values = {name: float(value) for name, value in trainer.callback_metrics.items()}
        self.logged.append(values | {"total": float(outputs["loss"])})


def records_of(trainer: Trainer) -> list[dict[str, Any]]:
    (path,) = (Path(trainer.log_dir) / "generated").glob("*/answers.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_teacher_is_the_base_that_sees_the_demonstration(fit: Any, model_dir: Path) -> None:
    trainer, module = fit(module=make(model_dir, temperature=0.0), data=make_data(("only",)))
    reference = make(model_dir, SFTModule, engine=GenerateEngine())
    prompts = module.book._places
    examples = trainer.datamodule.tasks[0].examples("train")
    assert {tuple(module.encoder.teacher_ids(example)) for example in examples} == set(prompts)
    for prompt, (place,) in prompts.items():
        (response,) = reference.respond([prompt], Sampling(6, temperature=0.0))
        assert module.book.answers[place].text == response.text


def test_the_hard_loss_is_sft_on_the_samples(fit: Any, model_dir: Path) -> None:
    _, module = fit("samples", make(model_dir), make_data(("only",)))

    class OnSamples(SFTModule):
        def targets(self, batch: Batch) -> Rollout:
            return module.completions([module.book._places[tuple(i)][0] for i in batch.teacher_ids])

    _, sft = fit("sft", make(model_dir, OnSamples), make_data(("only",)))
    state = module.student.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in sft.student.state_dict().items())


def test_the_soft_loss_is_the_divergence_from_the_teacher(fit: Any, model_dir: Path) -> None:
    steps = Steps()
    module = make(model_dir, loss="soft", temperature=0.8, track_base=False)
    batches: list[Any] = []

    class Watch(Callback):
        def on_train_batch_start(
            self, trainer: Trainer, pl_module: Any, batch: Any, i: int
        ) -> None:
            batches.append(batch)

    fit(module=module, data=make_data(("only",), steps=1), callbacks=[steps, Watch()])
    base = frozen_copy(make(model_dir, SFTModule).model)
    assert squared_distance(module.base, base) == 0
    (batch,) = batches
    expected = []
    for student_ids, teacher_ids in zip(batch.student_ids, batch.teacher_ids, strict=True):
        completion = module.completions(module.book._places[tuple(teacher_ids)])
        sides = [
            completion_logits(base, [ids], completion, 0) / 0.8
            for ids in (student_ids, teacher_ids)
        ]
        expected.append(token_divergence(*sides).mean())
    assert steps.logged[0]["total"] == pytest.approx(torch.stack(expected).mean().item(), rel=1e-4)


def test_nothing_to_learn_where_the_teacher_sees_what_the_student_sees(
    fit: Any, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sdft.prompts import PromptEncoder

    monkeypatch.setattr(PromptEncoder, "teacher_ids", PromptEncoder.student_ids)
    steps = Steps()
    fit(module=make(model_dir, loss="soft"), data=make_data(("only",), steps=1), callbacks=[steps])
    assert steps.logged[0]["total"] == pytest.approx(0.0, abs=1e-6)


class Short(Scorer):
    """Scores by the example alone: right where the prompt begins with b, c, d or e."""

    def __call__(self, response: str, example: Example) -> float:
        return float(example.prompt[0] in "bcde")


def test_a_score_drops_what_is_wrong_and_the_row_adds_nothing(fit: Any, model_dir: Path) -> None:
    steps = Steps()
    data = make_data(("only",), steps=2, batch_size=6)
    data.tasks[0].scorer = Short()
    trainer, _ = fit(module=make(model_dir, checks=[ScoreCheck()]), data=data, callbacks=[steps])
    records = records_of(trainer)
    assert {(r["prompt"][0]["content"][0] in "bcde", r["kept"]) for r in records} == {
        (True, True),
        (False, False),
    }
    dropped = sum(not record["kept"] for record in records)
    assert 0 < dropped < 6
    assert [v["train/without_sample"] for v in steps.logged] == pytest.approx([dropped / 6] * 2)


def test_a_batch_without_a_sample_changes_nothing(fit: Any, model_dir: Path) -> None:
    def only_one(text: str, example: Example, facts: Facts) -> str | None:
        return None if example.prompt.startswith("b") else "other"

    steps = Steps()
    data = make_data(("only",), steps=None, epochs=1, batch_size=1)
    fit(module=make(model_dir, checks=[only_one]), data=data, callbacks=[steps])
    losses = [values["total"] for values in steps.logged]
    assert len(losses) == 6
    assert sum(loss > 0 for loss in losses) == 1


def test_only_what_the_batches_hold_is_answered(fit: Any, model_dir: Path) -> None:
    trainer, _ = fit(module=make(model_dir), data=make_data(("only",), steps=2, batch_size=2))
    assert len(records_of(trainer)) == 4
    replay = make_data(("a", "b"), steps=1, batch_size=2, mixtures=[PastReplay(1.0)])
    trainer, module = fit("replay", make(model_dir, samples_per_prompt=2), replay)
    assert len(records_of(trainer)) == 2 * len(module.book._places)
    assert trainer.callback_metrics["train/without_sample"] == 0


def test_the_base_is_let_go_when_nobody_needs_it(fit: Any, model_dir: Path) -> None:
    module = make(model_dir, track_base=False)
    fit(module=module, data=make_data(("only",)))
    assert module.base is None


def test_every_setting_matters(fit: Any, model_dir: Path) -> None:
    def answers(name: str, **options: Any) -> list[list[int]]:
        return [r["tokens"] for r in records_of(fit(name, make(model_dir, **options))[0])]

    plain = answers("plain")
    assert answers("again") == plain
    for key, value in (("temperature", 0.1), ("top_k", 1), ("top_p", 0.1)):
        assert answers(key, **{key: value}) != plain


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "both"}, "loss must be one of .* found 'both'"),
        ({"loss": "soft", "temperature": 0.0}, "temperature must be above 0 with the soft loss"),
        ({"samples_per_prompt": 0}, "per prompt must be at least 1, found 0"),
        ({"top_p": 0.0}, "top_p"),
    ],
)
def test_bad_settings_are_named(model_dir: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(model_dir, **options)


def test_it_is_a_method_of_its_own() -> None:
    assert issubclass(TeacherSampleModule, StudentModule)
    assert TeacherSampleModule.method == "teacher_samples"
