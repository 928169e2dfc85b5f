"""`python -m sdft preflight` from the command line, on tiny models."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import TEMPLATE, echo_examples, write_jsonl

import sdft.preflight.command as command
from sdft.cli import main
from sdft.methods import SFTModule
from sdft.preflight.trial import Stopwatch, run_trial
from sdft.weights import weights_digest

QUICK = ("--examples", "4", "--timed_steps", "1")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def records(count: int, offset: int = 0) -> list[dict[str, Any]]:
    return [
        {"prompt": e.prompt, "answer": e.answer, "demonstration": e.demonstration}
        for e in echo_examples(count, offset)
    ]


def configuration(model_dir: Path, **data: Any) -> Path:
    task = {"name": "echo", "train": "train.jsonl", "test": "test.jsonl"}
    write_jsonl(Path("train.jsonl"), records(6))
    write_jsonl(Path("test.jsonl"), records(4, 50))
    path = Path("run.yaml")
    values = {
        "trainer": {"accelerator": "cpu", "default_root_dir": "runs"},
        "model": {
            "class_path": "sdft.SDFTModule",
            "init_args": {
                "model_name": str(model_dir),
                "max_new_tokens": 6,
                "teacher_template": TEMPLATE,
                "skip_first_tokens": 1,
            },
        },
        "data": {
            "batch_size": 3,
            "steps": 5,
            "tasks": [{"class_path": "JSONLTask", "init_args": task}],
            **data,
        },
    }
    path.write_text(yaml.safe_dump(values))
    return path


def look(path: Path, *flags: str) -> tuple[int, dict[str, Any]]:
    found = Path("found.json")
    status = main(["preflight", "--config", str(path), "--json", str(found), *QUICK, *flags])
    return status, json.loads(found.read_text())


def test_the_embedded_world_goes(capsys: pytest.CaptureFixture[str]) -> None:
    world = Path(__file__).resolve().parents[2] / "configs" / "seq_skills.yaml"
    status, found = look(world, "--data.steps", "7", "--examples", "24")
    assert status == 0
    assert {name: own["verdict"] for name, own in found["tasks"].items()} == dict.fromkeys(
        ("garden", "forest", "market"), "go"
    )
    garden = found["tasks"]["garden"]
    assert garden["accuracy_without"] < 0.2 < 0.9 < garden["accuracy_with"]
    assert garden["gap"]["ci95"][0] > 0.5
    assert garden["dropped_student"] == garden["dropped_teacher"] == 0
    assert garden["alignment"]["problems"] == []
    time = found["estimate"]["time"]
    assert time["tasks"]["garden"]["batches"] == 7
    assert time["seconds"] == pytest.approx(time["training_seconds"] + time["evaluation_seconds"])
    # 32 prompts of 10 tokens, 18 for the teacher, answers of 14; 3 tasks of 7 steps
    tokens = found["estimate"]["tokens"]
    assert tokens["generate"] == tokens["update"] == 3 * 7 * 32 * 24
    assert tokens["score"] == 3 * 7 * 32 * 32
    assert found["estimate"]["memory"]["fits"] is True
    told = capsys.readouterr().out
    assert "⟦<user>⟧│garden" in told
    assert told.index("garden: go\nforest: go") > 0


def test_it_leaves_the_page_and_nothing_else(model_dir: Path) -> None:
    path = configuration(model_dir)
    before = set(Path().rglob("*"))
    look(path)
    made = {str(file) for file in set(Path().rglob("*")) - before}
    assert made == {"found.json", "runs", "runs/preflight.html"}
    page = Path("runs/preflight.html").read_text()
    assert "token by token" in page
    assert "http" not in page


def test_the_page_goes_where_it_is_told_to(model_dir: Path) -> None:
    look(configuration(model_dir), "--page", "some/where.html")
    assert Path("some/where.html").is_file()
    assert not Path("runs").exists()


def test_the_same_seed_finds_the_same_and_another_draws_anew(model_dir: Path) -> None:
    path = configuration(model_dir)
    flags = ("--model.temperature", "2.0")
    (_, first), (_, second), (_, other) = (
        look(path, *flags, *seed) for seed in ((), (), ("--seed", "5"))
    )
    assert first["tasks"] == second["tasks"]
    assert first["tasks"] != other["tasks"]
    assert (first["seed"], other["seed"]) == (0, 5)


def test_limits_are_counted_over_the_whole_task_as_fit_counts_them(model_dir: Path) -> None:
    path = configuration(model_dir)
    longer = [{**records(1)[0], "prompt": "a b c d e f"}] * 3
    demonstrated = [{**records(1)[0], "demonstration": "a b c d e f g h"}] * 2
    longer[0] = {**longer[0], "demonstration": demonstrated[0]["demonstration"]}  # over both
    write_jsonl(Path("train.jsonl"), [*records(20), *longer, *demonstrated])
    limits = ("--data.max_student_tokens", "7", "--data.max_teacher_tokens", "16")
    status, found = look(path, *limits, "--examples", "2")
    own = found["tasks"]["echo"]
    assert (own["dropped_student"], own["dropped_teacher"]) == (3, 2)
    assert own["training_examples"] == 25
    assert own["examples"] == 2
    assert any("drop 5 of 25" in reason["why"] for reason in own["reasons"])
    assert status == 1  # a model that was never trained is not helped by a demonstration


def test_no_example_that_fits_is_a_no_with_the_limit_to_raise(model_dir: Path) -> None:
    status, found = look(configuration(model_dir, max_teacher_tokens=9))
    own = found["tasks"]["echo"]
    assert (status, own["verdict"]) == (1, "no")
    assert (own["dropped_student"], own["dropped_teacher"]) == (0, 6)
    assert own["accuracy_with"] is None
    assert "raise data.max_teacher_tokens to 12 (now 9)" in own["reasons"][0]["change"]
    assert found["estimate"]["time"]["seconds"] is None


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ({"prompt": "a b", "answer": "b", "demonstration": ""}, "line 2.*it is empty"),
        ({"prompt": "a b"}, "line 2.*needs a demonstration"),
    ],
)
def test_a_task_that_cannot_be_read_is_a_no(
    model_dir: Path, line: dict[str, Any], told: str
) -> None:
    path = configuration(model_dir)
    write_jsonl(Path("train.jsonl"), [records(1)[0], line])
    status, found = look(path)
    (reason,) = found["tasks"]["echo"]["reasons"]
    assert status == 1
    assert re.search(told, reason["why"])


def test_a_template_without_the_demonstration_is_an_error(
    model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = configuration(model_dir)
    flags = ("--model.teacher_template", "{prompt} now")
    assert main(["preflight", "--config", str(path), *flags]) == 2
    assert "lacks {demonstration}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (("--examples", "0"), "--examples: must be a whole number of at least 1, found '0'"),
        (("--ckpt_path", "last"), "leave out ckpt_path"),
        (("--data.batch_size", "0"), "data.batch_size must be at least 1"),
        (("--nonsense", "1"), "nonsense"),
    ],
)
def test_bad_flags(
    model_dir: Path, capsys: pytest.CaptureFixture[str], flags: tuple[str, ...], told: str
) -> None:
    try:
        status: Any = main(["preflight", "--config", str(configuration(model_dir)), *flags])
    except SystemExit as stop:
        status = stop.code
    assert status == 2
    assert told in capsys.readouterr().err


def test_overlays_win_and_a_method_without_a_teacher_says_so(model_dir: Path) -> None:
    overlay = Path("sft.yaml")
    overlay.write_text("model: {class_path: sdft.methods.SFTModule}\n")
    _, found = look(configuration(model_dir), "--config", str(overlay))
    own = found["tasks"]["echo"]
    assert found["method"] == "sft"
    assert own["accuracy_with"] is None
    assert "has no teacher" in own["missing"]["accuracy_with"]
    assert set(found["estimate"]["tokens"]) == {"total", "update"}
    assert "has no teacher" in Path("runs/preflight.html").read_text()


def test_timed_steps_change_no_weight(model_dir: Path) -> None:
    path = configuration(model_dir)
    flags = ("--model.optimizer", "torch.optim.AdamW", "--model.optimizer.init_args.lr", "0.1")
    configured = command.configure(["--config", str(path), *flags])
    configured.put_in_place()
    before = weights_digest(configured.module.model)
    (task,) = configured.data.tasks
    items = command.Probe(
        configured.module, (99, 99), 6, 0, 4, configured.measured.artifacts
    ).facts(task)
    assert items.fitting is not None
    trial = run_trial(configured, task, items.fitting.items, steps=3)
    assert (trial.steps, trial.problem, trial.finite) == (2, "", True)
    assert set(trial.phases) >= {"generate", "score", "update"}
    assert weights_digest(configured.module.model) == before


def test_a_gradient_that_is_no_number_is_a_no(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: Any, *args: Any) -> torch.Tensor:
        return sum(p.sum() for p in self.model.parameters()) * float("inf")  # type: ignore[return-value]

    monkeypatch.setattr(SFTModule, "training_step", broken)
    overlay = Path("sft.yaml")
    overlay.write_text("model: {class_path: sdft.methods.SFTModule}\n")
    status, found = look(configuration(model_dir), "--config", str(overlay))
    assert status == 1
    assert "gradient" in found["tasks"]["echo"]["reasons"][0]["why"]


def test_a_broken_gradient_moves_nothing() -> None:
    parameter = torch.nn.Parameter(torch.ones(2))
    parameter.grad = torch.tensor([float("inf"), 1.0])
    watch = Stopwatch()
    watch.on_before_optimizer_step(None, None, torch.optim.SGD([parameter], lr=0.0))  # type: ignore[arg-type]
    assert not watch.finite
    assert parameter.grad.tolist() == [0.0, 0.0]
