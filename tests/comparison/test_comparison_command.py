"""`python -m sdft compare`: the command line, and whole comparisons in processes of their own."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import TEMPLATE, echo_examples, write_jsonl
from fake_runs import SETTINGS, finish, make_plan, retention, write_plan

from sdft.cli import main
from sdft.comparison.folder import RunFolder
from sdft.comparison.settings import run_settings

ROOT = Path(__file__).resolve().parents[2]
ROWS = [[0.0, 0.1, 1.0, 1.0], [0.8, 0.1, 0.9, 0.9], [0.7, 0.9, 0.9, 0.8]]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("base: [1\nseeds: [0]\n", r"compare.yaml, line 2"),
        ("- base\n", "expected keys and values, found list"),
        ("base: base.yaml\nmethods: {sft: {}}\njobs: many\n", "jobs: must be a whole number"),
        ("base: base.yaml\nmethods: {sft: {}}\nseeds: [0, a]\n", "seeds: must be a whole number"),
        ("base: base.yaml\nmethods: {sft: {}}\nspeed: 3\n", "speed"),
        ("methods: {sft: {}}\n", "base"),
        ("base: base.yaml\nmethods: {sft: {}}\nseeds: [1, 1]\n", "seeds repeat 1"),
        ("base: base.yaml\nmethods: {nope: {}}\n", "nope is no known method; in .*sft"),
    ],
)
def test_bad_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, told: str
) -> None:
    write_plan(tmp_path, {"sft": None})
    Path("compare.yaml").write_text(text)
    try:
        status: Any = main(["compare", "--config", "compare.yaml"])
    except SystemExit as stop:
        status = stop.code
    assert status == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert error.startswith("sdft: error: ")
    assert re.search(told, error), error
    assert not (tmp_path / "out").exists()


def test_the_help_names_the_command_and_explains_it(capsys: pytest.CaptureFixture[str]) -> None:
    for words, told in (
        (["--help"], "Beside these: budget, check,"),
        (["compare", "--help"], "Seeds that every method runs with at every rate."),
    ):
        with pytest.raises(SystemExit) as stop:
            main(words)
        assert stop.value.code == 0
        assert told in " ".join(capsys.readouterr().out.split())


@pytest.fixture
def resolved(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every method's configuration is that of the made-up runs."""
    monkeypatch.setattr(
        "sdft.comparison.command.effective_settings", lambda files: deepcopy(SETTINGS)
    )


@pytest.mark.usefixtures("resolved")
def test_a_report_on_what_is_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = make_plan(tmp_path, {"sft": {"learning_rates": [1e-4]}, "dft": None})
    finish(plan, plan.runs[0], retention(ROWS))
    words = ["compare", "--config", str(tmp_path / "compare.yaml"), "--report_only"]
    assert main(words) == 0
    told = capsys.readouterr().out
    assert "sft has the highest mean" in told
    found = json.loads((plan.out / "compare.json").read_text())
    assert [run["status"] for run in found["runs"]] == ["finished", "missing", "missing", "missing"]
    assert found["command"] == " ".join(["python", "-m", "sdft", *words])


def test_settings_with_class_paths_are_reported_as_they_stand_in_the_file(tmp_path: Path) -> None:
    suite = {"class_path": "sdft.world.WorldSuite", "init_args": {"kind": "named"}}
    settings = {"data": {"general": [suite]}}
    plan = make_plan(tmp_path, {"sft": {"learning_rates": [1e-4]}}, settings=settings)
    finish(plan, plan.runs[0], retention(ROWS))
    assert main(["compare", "--config", str(tmp_path / "compare.yaml"), "--report_only"]) == 0
    found = json.loads((plan.out / "compare.json").read_text())
    (own,) = found["comparison"]["settings"]["data"]["general"]
    assert own["class_path"] == suite["class_path"]
    assert own["init_args"]["kind"] == "named"


@pytest.mark.usefixtures("resolved")
def test_runs_of_another_configuration_are_left_out_and_named(tmp_path: Path) -> None:
    plan = make_plan(tmp_path, {"sft": {"learning_rates": [1e-4]}})
    finish(plan, plan.runs[0], retention(ROWS))
    other = deepcopy(SETTINGS)
    other["data"]["init_args"]["steps"] = 61
    finish(plan, plan.runs[1], retention(ROWS), settings=other)
    assert main(["compare", "--config", str(tmp_path / "compare.yaml"), "--report_only"]) == 0
    found = json.loads((plan.out / "compare.json").read_text())
    assert [run["status"] for run in found["runs"]] == ["finished", "changed"]
    assert found["summary"]["sft"]["seeds"] == [0]
    assert any("another configuration: sft, lr 1e-4, seed 1" in note for note in found["notes"])


@pytest.mark.usefixtures("resolved")
def test_a_report_on_runs_of_different_streams(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = make_plan(tmp_path, {"sft": {"learning_rates": [1e-4]}})
    finish(plan, plan.runs[0], retention(ROWS))
    finish(plan, plan.runs[1], retention(ROWS, tasks=["garden", "market"]))
    assert main(["compare", "--config", str(tmp_path / "compare.yaml"), "--report_only"]) == 2
    told = capsys.readouterr().err
    assert "different tasks: ['garden', 'forest'] and ['garden', 'market']" in told


def test_a_report_on_a_folder_that_is_not_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_plan(tmp_path, {"sft": None})
    assert main(["compare", "--config", str(file), "--report_only", "--out", "nowhere"]) == 2
    assert "there is no folder nowhere" in capsys.readouterr().err
    assert not Path("nowhere").exists()


@pytest.mark.usefixtures("resolved")
def test_a_report_with_failed_runs_ends_with_status_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = make_plan(tmp_path, {"sft": {"learning_rates": [1e-4]}})
    finish(plan, plan.runs[0], retention(ROWS))
    folder = RunFolder(plan.folder(plan.runs[1]))
    folder.prepare(run_settings(SETTINGS, plan.runs[1], folder.path))
    folder.log.write_text("out of luck\n")
    folder.fail("ended with status 3", resumed=False)
    assert main(["compare", "--config", str(tmp_path / "compare.yaml"), "--report_only"]) == 1
    told = capsys.readouterr().err
    assert "sft, lr 1e-4, seed 1 ended with status 3:\n    out of luck" in told


# ---------------------------------------------------------------- whole comparisons


class Command:
    """A comparison of tiny runs, and its process."""

    def __init__(self, folder: Path, model_dir: Path) -> None:
        self.folder = folder
        self.model_dir = model_dir
        self.process: subprocess.Popen[str] | None = None

    def write(self, methods: dict[str, Any], steps: int = 2, **keys: Any) -> None:
        for name, offset in (("train", 0), ("validation", 50), ("test", 100)):
            rows = [{"prompt": e.prompt, "answer": e.answer} for e in echo_examples(8, offset)]
            write_jsonl(self.folder / f"{name}.jsonl", rows)
        (self.folder / "base.yaml").write_text(yaml.safe_dump(self.base(steps)))
        overlays = ROOT / "configs" / "methods"
        for name, own in methods.items():
            own["config"] = str(overlays / f"{name}.yaml")
        content = {"base": "base.yaml", "out": "out", "jobs": 2, "methods": methods, **keys}
        (self.folder / "compare.yaml").write_text(yaml.safe_dump(content))

    def base(self, steps: int) -> dict[str, Any]:
        files = {name: f"{name}.jsonl" for name in ("train", "validation", "test")}
        tasks = [
            {"class_path": "JSONLTask", "init_args": {"name": name, **files}}
            for name in ("one", "two")
        ]
        prior = {"name": "prior", "test": "test.jsonl", "validation": "validation.jsonl"}
        optimizer = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}}
        arguments = {
            "model_name": str(self.model_dir),
            "max_new_tokens": 5,
            "teacher_template": TEMPLATE,
            "optimizer": optimizer,
        }
        return {
            "trainer": {"accelerator": "cpu"},
            "model": {"class_path": "sdft.SDFTModule", "init_args": arguments},
            "data": {
                "batch_size": 4,
                "steps": steps,
                "tasks": tasks,
                "suites": [{"class_path": "JSONLTask", "init_args": prior}],
            },
            "retention": {"limit": 8},
            "checkpoint": {"every_n_steps": 1},
        }

    def start(self, *flags: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "sdft", "compare", "--config", "compare.yaml", *flags],
            cwd=self.folder,
            env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def end(self) -> tuple[int, str, str]:
        assert self.process is not None
        out, err = self.process.communicate(timeout=400)
        return self.process.returncode, out, err

    def wait_for(self, pattern: str, count: int) -> list[Path]:
        deadline = time.monotonic() + 200
        while time.monotonic() < deadline:
            found = sorted(self.folder.glob(pattern))
            if len(found) >= count:
                return found
            assert self.process is not None
            assert self.process.poll() is None, self.process.communicate()
            time.sleep(0.05)
        raise AssertionError(f"no {count} × {pattern}")


@pytest.fixture
def command(tmp_path: Path, model_dir: Path) -> Iterator[Command]:
    made = Command(tmp_path, model_dir)
    yield made
    if made.process is not None and made.process.poll() is None:
        made.process.kill()
        made.process.communicate()


@pytest.mark.slow
def test_a_comparison_that_is_terminated_goes_on(command: Command) -> None:
    """Two methods × two rates × two seeds, and a method whose runs fail."""
    sweep = {"learning_rates": [0.01, 0.001]}
    methods = {"sdft": dict(sweep), "sft": dict(sweep), "sdft_text": {"label": "fails"}}
    command.write(methods, seeds=[0, 1])
    command.start()
    command.wait_for("out/runs/*/*/finished.json", 2)
    assert command.process is not None
    command.process.send_signal(signal.SIGTERM)
    status, _, told = command.end()
    assert (status, "the same command goes on" in told) == (128 + signal.SIGTERM, True), told
    finished = sorted(command.folder.glob("out/runs/*/*/finished.json"))
    assert 2 <= len(finished) < 8
    stamps = {file: file.stat().st_mtime_ns for file in finished}

    command.start()
    status, out, told = command.end()
    assert status == 1, out + told
    assert f"{len(finished)} of them finished before" in out
    assert {file: file.stat().st_mtime_ns for file in finished} == stamps
    assert len(list(command.folder.glob("out/runs/*/*/finished.json"))) == 8
    assert not list(command.folder.glob("out/runs/s[df]*/lr*/checkpoints"))
    assert "teacher_sees is 'text', but an example has no context" in told
    assert "Traceback" not in told

    found = json.loads((command.folder / "out" / "compare.json").read_text())
    assert found["selection"]["split"] == "validation"
    assert [run["status"] for run in found["runs"]].count("finished") == 8
    assert {own["method"] for own in found["failed"]} == {"sdft_text"}
    assert found["summary"]["sdft"]["n"] == 2
    assert found["summary"]["sdft_text"]["undefined"]["acc"] == "no finished run"
    rates = {run["learning_rate"] for run in found["runs"] if run["method"] == "sft"}
    assert rates == {0.01, 0.001}
    assert "no context" in (command.folder / "out" / "report.html").read_text()

    # What a run leaves repeats it: the same matrix, bit for bit.
    again = command.folder / "out" / "runs" / "sft" / "lr0.01-seed1"
    before = json.loads((again / "retention.json").read_text())["matrix"]
    (again / "retention.json").unlink()
    assert main(["fit", "--config", str(again / "run.yaml")]) == 0
    assert json.loads((again / "retention.json").read_text())["matrix"] == before


@pytest.mark.slow
def test_a_killed_comparison_takes_its_runs_along_and_resumes_them(command: Command) -> None:
    command.write({"sft": {"learning_rates": [0.01]}}, steps=60, seeds=[0])
    command.start()
    (checkpoint,) = command.wait_for("out/runs/sft/*/checkpoints/last.ckpt", 1)
    time.sleep(0.5)
    assert command.process is not None
    command.process.kill()
    command.process.communicate()
    folder = checkpoint.parents[1]
    assert not (folder / "finished.json").exists()

    command.start()
    status, out, told = command.end()
    assert status == 0, out + told
    assert "sft, lr 0.01, seed 0 goes on from its checkpoint" in out
    assert json.loads((folder / "finished.json").read_text())["resumed"] is True
    resumed = json.loads((folder / "retention.json").read_text())["matrix"]

    command.start("--out", "whole")
    status, out, told = command.end()
    assert status == 0, out + told
    whole = command.folder / "whole" / "runs" / "sft" / folder.name / "retention.json"
    assert json.loads(whole.read_text())["matrix"] == resumed
