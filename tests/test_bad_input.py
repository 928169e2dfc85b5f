"""Every mistake gives one clear line that names what and where, and status 2; no traceback."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import TEMPLATE, echo_examples, make_data, make_module, save_model, write_jsonl

import sdft.atomic
from sdft import ContinualDataModule, Example, PythonTask
from sdft.callbacks import Retention
from sdft.cli import main

QUIET = {
    "trainer": {
        "accelerator": "cpu",
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "log_every_n_steps": 1,
    },
    "retention": {"enabled": False},
    "samples": {"count": 0},
    "export": {"enabled": False},
}


def records(count: int) -> list[dict[str, str]]:
    return [
        {"prompt": example.prompt, "answer": example.answer} for example in echo_examples(count)
    ]


@pytest.fixture
def config(tmp_path: Path, model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A run that works; each test breaks one thing."""
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "train.jsonl", records(6))
    return {
        **{key: dict(value) for key, value in QUIET.items()},
        "model": {
            "model_name": str(model_dir),
            "max_new_tokens": 4,
            "teacher_template": TEMPLATE,
        },
        "data": {"steps": 1, "tasks": [jsonl_task("one", train="train.jsonl")]},
    }


def jsonl_task(name: str, **files: str) -> dict[str, Any]:
    return {"class_path": "JSONLTask", "init_args": {"name": name, **files}}


def run(config: dict[str, Any], *flags: str) -> int | str | None:
    Path("config.yaml").write_text(yaml.safe_dump(config))
    try:
        return main(["fit", "--config", "config.yaml", "--trainer.default_root_dir", "out", *flags])
    except SystemExit as stop:
        return stop.code


def error(capsys: pytest.CaptureFixture[str]) -> str:
    lines = capsys.readouterr().err.splitlines()
    told = [line for line in lines if line.startswith("sdft: error: ")]
    assert len(told) == 1, lines
    assert not any(line.startswith("Traceback") for line in lines)
    return told[0].removeprefix("sdft: error: ")


def test_the_unbroken_run_works(config: dict[str, Any]) -> None:
    assert run(config) == 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model.temprature", "2"], "no option 'temprature' (did you mean 'temperature'?)"),
        (["--techer.kind", "ema"], "unrecognized arguments: --techer.kind"),
        (["--teacher.kind", "emma"], "teacher.kind: must be one of 'ema', 'frozen', 'live'"),
        (["--teacher.rate", "1.5"], "teacher.rate must lie in [0, 1], found 1.5"),
        (["--teacher.rate", "nan"], "teacher.rate: must be a number, found nan"),
        (["--teacher.every_n_steps", "0"], "teacher.every_n_steps must be at least 1, found 0"),
        (["--model.class_path", "sdft.NoSuch"], "sdft.NoSuch"),
        (["--model.model_name", "./nope"], "'./nope' does not exist"),
        (["--model.model_name", "no.gguf"], "'no.gguf' does not exist"),
        (["--model.model_name", "sdft:nope"], "unknown model 'sdft:nope'"),
        (["--model.alpha", "2"], "alpha must lie in [0, 1]"),
        (["--model.temperature", "0"], "temperature must be above 0"),
        (["--model.temperature", "nan"], "temperature: must be a number, found nan"),
        (["--model.top_p", "0"], "top_p must lie in (0, 1], found 0"),
        (["--model.top_k", "-1"], "top_k must be 0 (keep all) or more, found -1"),
        (["--model.max_new_tokens", "0"], "max_new_tokens must be at least 1, found 0"),
        (["--model.skip_first_tokens", "-1"], "skip_first_tokens must be 0 or more, found -1"),
        (["--model.rollouts_per_prompt", "0"], "rollouts_per_prompt must be at least 1, found 0"),
        (["--model.teacher_template", "{prompt}"], "lacks {demonstration}"),
        (["--model.optimizer.init_args.lr", "-1"], "Invalid learning rate: -1"),
        (["--model.optimizer.init_args.lr", "nan"], "lr: must be a number"),
        (["--data.batch_size", "0"], "data.batch_size must be at least 1, found 0"),
        (["--data.steps", "-3"], "data.steps must be at least 1, found -3"),
        (["--data.epochs", "2"], "data.steps and data.epochs exclude each other"),
        (["--data.max_student_tokens", "2"], "task 'one', train: dropped 6 of 6 examples"),
        (["--watch.limit", "0"], "watch.limit must be at least 1, found 0"),
        (["--watch.on_drop", "panic"], "watch.on_drop: must be one of"),
        (
            ["--watch.every_n_steps", "1", "--watch.on_drop", "raise_weight"],
            "method 'sdft' does not have: set watch.on_drop to stop",
        ),
        (
            ["--watch.every_n_steps", "1", "--watch.on_drop", "stop"],
            "no task or suite has validation examples",
        ),
        (["--trainer.gradient_clip_val", "-1"], "trainer.gradient_clip_val must be 0 or more"),
        (["--ckpt_path", "nope.ckpt"], "--ckpt_path nope.ckpt: there is no checkpoint nope.ckpt"),
        (["--ckpt_path", "last"], "--ckpt_path last: no checkpoints/*.ckpt below out"),
        (["--trainer.default_root_dir", "config.yaml"], "cannot write to trainer.default_root_dir"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_bad_flag(
    config: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    message: str,
) -> None:
    assert run(config, *flags) == 2
    assert message in error(capsys)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"prompt": "a", "answer": "b"}\n{"prompt": \n', "bad.jsonl, line 2: broken JSON"),
        (b'{"answer": "b"}\n', "bad.jsonl, line 1: no field 'prompt'"),
        (b'{"prompt": "a"}\n', "bad.jsonl, line 1: a training example needs a demonstration"),
        (b'{"prompt": " ", "answer": "b"}\n', "bad.jsonl, line 1: the prompt is empty"),
        (b'{"prompt": "a\xff", "answer": "b"}\n', "bad.jsonl, line 1: not UTF-8"),
        (b"", "bad.jsonl: the file is empty"),
        (None, "bad.jsonl: no such file"),
    ],
)
def test_a_bad_file(
    config: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
    content: bytes | None,
    message: str,
) -> None:
    if content is not None:
        Path("bad.jsonl").write_bytes(content)
    config["data"]["tasks"] = [jsonl_task("one", train="bad.jsonl")]
    assert run(config) == 2
    assert message in error(capsys)


def test_a_bad_file_of_a_later_split_is_found_before_training(
    config: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    Path("bad.jsonl").write_text("{")
    config["data"]["suites"] = [jsonl_task("prior", test="bad.jsonl")]
    config["retention"] = {"enabled": True}
    assert run(config) == 2
    assert "bad.jsonl, line 1: broken JSON" in error(capsys)
    assert not list(Path("out").rglob("*.ckpt"))


def test_zero_tasks(config: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    config["data"]["tasks"] = []
    assert run(config) == 2
    assert "data.tasks is empty" in error(capsys)


def test_two_tasks_of_one_name(config: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    config["data"]["suites"] = [jsonl_task("one", test="train.jsonl")]
    assert run(config) == 2
    assert "named 'one'" in error(capsys)


def test_a_misspelt_class_and_option(
    config: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    config["data"]["tasks"] = [{"class_path": "JSONTask", "init_args": {"name": "one"}}]
    assert run(config) == 2
    assert "no class named 'JSONTask'" in error(capsys)
    config["data"]["tasks"] = [jsonl_task("one", trian="train.jsonl")]
    assert run(config) == 2
    assert "no option 'trian' (did you mean 'train'?)" in error(capsys)


def test_broken_yaml(config: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    Path("broken.yaml").write_text("model:\n  alpha: [1\n")
    assert run(config, "--config", "broken.yaml") == 2
    assert "broken.yaml, line 3" in error(capsys)


@pytest.mark.parametrize("missing", ["tokenizer", "weights"])
def test_a_model_folder_that_lacks(
    config: dict[str, Any], capsys: pytest.CaptureFixture[str], tmp_path: Path, missing: str
) -> None:
    folder = save_model(tmp_path / "half")
    patterns = {"tokenizer": "tokenizer*", "weights": "model*"}
    for file in folder.glob(patterns[missing]):
        file.unlink()
    assert run(config, "--model.model_name", str(folder)) == 2
    message = error(capsys)
    assert str(folder) in message
    assert "cannot load a" in message


def test_a_damaged_checkpoint(config: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(config) == 0
    capsys.readouterr()
    (whole,) = Path("out").rglob("last.ckpt")
    Path("half.ckpt").write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    assert run(config, "--ckpt_path", "half.ckpt") == 2
    assert "half.ckpt is damaged" in error(capsys)
    whole.write_bytes(Path("half.ckpt").read_bytes())
    for name in ("last", str(whole.parent.parent), str(whole)):
        assert run(config, "--ckpt_path", name) == 0, "the one before it is whole"
        assert "no settings differ" in capsys.readouterr().out
    (before,) = whole.parent.glob("step-*.ckpt")
    assert run(config, "--ckpt_path", str(whole.parent / whole.readlink())) == 2
    assert f"take the one before it: {before}" in error(capsys)


def test_a_checkpoint_of_another_model_or_task_list(
    config: dict[str, Any], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert run(config) == 0
    (checkpoint,) = (str(path) for path in Path("out").rglob("last.ckpt"))
    capsys.readouterr()
    wider = save_model(tmp_path / "wider", hidden_size=48)
    assert run(config, "--ckpt_path", checkpoint, "--model.model_name", str(wider)) == 2
    assert "belongs to another model" in error(capsys)
    config["data"]["tasks"] = [jsonl_task("two", train="train.jsonl")]
    assert run(config, "--ckpt_path", checkpoint) == 2
    assert "belongs to the task sequence ['one']" in error(capsys)


class Picky:
    """A scorer that fails on one task."""

    def __call__(self, response: str, example: Example) -> float:
        raise RuntimeError("no idea")


def test_a_scorer_that_raises_costs_only_its_own_cells(fit: Callable[..., Any]) -> None:
    good = PythonTask("good", train=echo_examples(6), test=echo_examples(3))
    bad = PythonTask("bad", train=echo_examples(6), test=echo_examples(3), scorer=Picky())
    trainer, _ = fit(data=ContinualDataModule([good, bad], batch_size=4, steps=1))
    report = json.loads((Path(trainer.log_dir) / "retention.json").read_text())
    for row in report["matrix"]:
        assert row[0]["score"] is not None
        assert row[1]["score"] is None
        assert "no idea" in row[1]["error"]
        assert row[1]["mean_length"] is not None
    assert report["metrics"]["acc"] is None


def test_a_full_disk_names_the_file_and_keeps_the_checkpoint(
    fit: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    model_dir: Path,
) -> None:
    real = os.replace

    def full(source: Any, target: Any) -> None:
        if Path(target).name == "retention.csv" and Path(target).exists():
            raise OSError(errno.ENOSPC, "No space left on device", str(target))
        real(source, target)

    monkeypatch.setattr(sdft.atomic.os, "replace", full)
    with pytest.raises(OSError, match=r"No space left on device.*retention\.csv"):
        fit(root="full")
    monkeypatch.setattr(sdft.atomic.os, "replace", real)
    (report,) = (tmp_path / "full").rglob("retention.json")
    assert len(json.loads(report.read_text())["matrix"]) == 2
    (last,) = (tmp_path / "full").rglob("last.ckpt")
    trainer, _ = fit(root="again", ckpt_path=last)
    whole, _ = fit(root="whole", module=make_module(model_dir), data=make_data())
    rows = [
        json.loads((Path(run.log_dir) / "retention.json").read_text())["matrix"]
        for run in (trainer, whole)
    ]
    assert rows[0] == rows[1]


def test_bad_artifact_pattern() -> None:
    with pytest.raises(ValueError, match="is no regex"):
        Retention(artifact_patterns=["("])


def test_an_example_without_a_demonstration_is_named() -> None:
    bare = Example(({"role": "user", "content": "a b"},), "b a")
    with pytest.raises(ValueError, match="training example 0 has no demonstration"):
        PythonTask("x", train=[bare])


def test_nan_logits_do_not_pass_for_a_loss() -> None:
    """A NaN that the model makes stays visible: the mask hides only what is masked."""
    from sdft.losses import sequence_mean

    per_token = torch.tensor([[1.0, torch.nan]])
    assert sequence_mean(per_token, torch.ones(1, 2)).isnan()


@pytest.mark.parametrize("value", [None, -1, [[]], "x"])
@pytest.mark.parametrize("key", ["trainer", "retention", "guard"])
def test_a_group_that_holds_no_keys_is_named(
    config: dict[str, Any], key: str, value: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    config[key] = value
    assert run(config) == 2
    assert f"config.yaml: {key} must hold keys and values, found {value!r}" in error(capsys)
