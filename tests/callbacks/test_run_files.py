"""Checkpoints, samples, predictions, the exported model, and the progress bar's words."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_data, make_module, make_tokenizer
from lightning.pytorch import Callback, Trainer
from transformers import AutoModelForCausalLM, AutoTokenizer

from sdft.callbacks import ModelExport, Predictions, Samples, StageCheckpoint, StageProgressBar
from sdft.weights import identity

pytestmark = pytest.mark.usefixtures("no_plots")

Fit = Callable[..., Any]


def folder_of(trainer: Trainer) -> Path:
    return Path(trainer.log_dir)


def jsonl(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# ---------------------------------------------------------------- checkpoints


def test_checkpoints_load_without_pickle_and_know_their_place(fit: Fit) -> None:
    trainer, module = fit()
    folder = folder_of(trainer) / "checkpoints"
    steps = {}
    for path in folder.iterdir():
        found = torch.load(path, weights_only=True)
        steps[path.name] = found["global_step"]
        assert found["sdft"] == {
            **identity(module.model),
            "method": "sdft",
            "model": module.model_name,
            "penalty": "",
        }
        assert "hyper_parameters" not in found, "they would override the configuration on resume"
    assert steps == {
        "step-5.ckpt": 5,
        "step-6.ckpt": 6,
        "stage-1-first.ckpt": 3,
        "stage-2-second.ckpt": 6,
        "last.ckpt": 6,
    }
    assert (folder / "last.ckpt").samefile(folder / "stage-2-second.ckpt")


@pytest.mark.parametrize(
    ("every", "expected"), [(0, [3, 6]), (2, [2, 3, 4, 6]), (3, [3, 6]), (50, [3, 6])]
)
def test_the_cadence_of_steps(fit: Fit, every: int, expected: list[int]) -> None:
    """Where a stage's training ends (steps 3 and 6) there is always one."""
    saved: list[int] = []

    class Counting(StageCheckpoint):
        def _save(self, trainer: Trainer, name: str) -> Path | None:
            if name == f"step-{trainer.global_step}.ckpt":
                saved.append(trainer.global_step)
            return super()._save(trainer, name)

    fit(callbacks=[Counting(every_n_steps=every)], accumulate_grad_batches=2)
    assert saved == expected


def test_without_checkpoints_of_stages(fit: Fit, tmp_path: Path) -> None:
    names: list[str] = []

    class Naming(StageCheckpoint):
        def _save(self, trainer: Trainer, name: str) -> Path | None:
            names.append(name)
            return super()._save(trainer, name)

    fit(callbacks=[Naming(every_n_steps=0, stages=False)])
    assert names == ["step-3.ckpt", "step-3.ckpt", "step-6.ckpt", "step-6.ckpt"], (
        "twice: before and after the evaluation"
    )


def test_no_half_written_checkpoint_remains(fit: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, _ = fit()
    assert not list(folder_of(trainer).rglob(".*"))


def test_a_dry_run_leaves_no_files(fit: Fit, tmp_path: Path) -> None:
    trainer, _ = fit(fast_dev_run=True)
    assert trainer.global_step == 1
    assert not list(tmp_path.rglob("*.ckpt"))


# ---------------------------------------------------------------- samples


def test_samples_show_tokens_and_their_probabilities(fit: Fit) -> None:
    trainer, _ = fit()
    records = jsonl(folder_of(trainer) / "samples.jsonl")
    assert [(r["stage"], r["task"]) for r in records] == [(0, "first")] * 2 + [(1, "second")] * 2
    for record in records:
        assert record["teacher_prompt"].endswith("now assistant :")
        assert "shown" not in record["prompt"]
        assert 1 <= len(record["tokens"]) <= 6
        for token in record["tokens"]:
            assert 0 < token["student"] <= 1
            assert 0 < token["teacher"] <= 1


def test_samples_are_scored_as_a_plain_forward_scores_them(fit: Fit, gpt2_dir: Path) -> None:
    """With a model that has dropout: it must be off when one only looks."""
    trainer, module = fit(module=make_module(gpt2_dir))
    record = jsonl(folder_of(trainer) / "samples.jsonl")[-1]
    encode = module.tokenizer.convert_tokens_to_ids
    completion = [encode(token["token"]) for token in record["tokens"]]
    for key, model, prompt in (
        ("student", module.student.eval(), record["prompt"]),
        ("teacher", module.teacher, record["teacher_prompt"]),
    ):
        prompt_ids = encode(prompt.split())
        with torch.no_grad():
            logits = model(torch.tensor([prompt_ids + completion])).logits[0]
        probs = logits[len(prompt_ids) - 1 : -1].softmax(-1)
        expected = [probs[t, token].item() for t, token in enumerate(completion)]
        found = [token[key] for token in record["tokens"]]
        assert found == pytest.approx(expected, abs=1e-3)


def test_taking_samples_changes_nothing(fit: Fit, gpt2_dir: Path) -> None:
    class NoSamples(Callback):
        def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
            next(c for c in trainer.callbacks if isinstance(c, Samples)).count = 0

    trainer, one = fit(module=make_module(gpt2_dir))
    silent, other = fit(module=make_module(gpt2_dir), callbacks=[NoSamples()])
    assert (folder_of(trainer) / "samples.jsonl").exists()
    assert not (folder_of(silent) / "samples.jsonl").exists()
    pairs = zip(one.student.parameters(), other.student.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


# ---------------------------------------------------------------- export and predictions


def test_the_exported_folder_is_an_ordinary_model(fit: Fit) -> None:
    trainer, module = fit(callbacks=[ModelExport()])
    folder = folder_of(trainer) / "model"
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert list(folder.glob("*.safetensors"))
    chat = [{"role": "user", "content": "a b"}]
    ids = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_dict=False, tokenize=True
    )
    assert ids == make_tokenizer().apply_chat_template(
        chat, add_generation_prompt=True, return_dict=False, tokenize=True
    )
    with torch.no_grad():
        found = model(torch.tensor([ids])).logits
        expected = module.student.eval()(torch.tensor([ids])).logits
    assert torch.equal(found, expected)
    assert identity(make_module(folder).model) == identity(module.model)


def test_no_export(fit: Fit) -> None:
    trainer, _ = fit(callbacks=[ModelExport(enabled=False)])
    assert not (folder_of(trainer) / "model").exists()


def test_predictions_are_kept(model_dir: Path, tmp_path: Path) -> None:
    trainer = Trainer(
        logger=False, accelerator="cpu", default_root_dir=tmp_path, callbacks=[Predictions()]
    )
    data = make_data(eval_batch_size=3)
    for _ in range(2):  # a second pass does not repeat the first
        batches = trainer.predict(make_module(model_dir), datamodule=data)
        records = jsonl(tmp_path / "predictions.jsonl")
        assert records == [r for loader in batches for batch in loader for r in batch]
    assert [r["task"] for r in records] == ["first"] * 4 + ["second"] * 4 + ["prior"] * 4


# ---------------------------------------------------------------- the bar


def test_the_bar_names_stage_task_and_phase(fit: Fit) -> None:
    seen: list[str] = []

    class Bar(StageProgressBar):
        def _get_train_description(self, current_epoch: int) -> str:
            seen.append(super()._get_train_description(current_epoch))
            return seen[-1]

    fit(callbacks=[Bar()], enable_progress_bar=True)
    for stage, task in ((1, "first"), (2, "second")):
        for phase in ("generate", "score", "update"):
            assert f"stage {stage}/2 · {task} · {phase}" in seen


# ---------------------------------------------------------------- bad values


def test_a_bad_value_is_named() -> None:
    with pytest.raises(ValueError, match=r"checkpoint.every_n_steps must be 0 or more, found -1"):
        StageCheckpoint(every_n_steps=-1)
    with pytest.raises(ValueError, match=r"samples.count must be 0 or more, found -1"):
        Samples(count=-1)
