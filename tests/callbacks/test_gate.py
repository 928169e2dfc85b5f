"""A stage that costs too much of the old is not accepted, and nothing is lost."""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import TEMPLATE, echo_examples, make_data, make_method, write_jsonl
from lightning.pytorch import Trainer

from sdft.callbacks import Gate, Retention
from sdft.checkpoints import CheckpointFolder, find_checkpoint
from sdft.cli import main
from sdft.data import ContinualDataModule
from sdft.examples import Example
from sdft.gate.ledger import read_ledger
from sdft.gate.stop import GateRetry, GateStop
from sdft.gate.version import versions
from sdft.methods import CPTModule
from sdft.scorers import Scorer
from sdft.student import StudentModule

pytestmark = pytest.mark.usefixtures("no_plots")
Fit = Callable[..., tuple[Trainer, StudentModule]]


class Scripted(Scorer):
    """Gives every example of the n-th evaluation the n-th score; the last one for ever."""

    def __init__(self, scores: list[float], examples: int = 4) -> None:
        self.scores, self.examples, self.calls = scores, examples, 0

    def __call__(self, response: str, example: Example) -> float:
        place = min(self.calls // self.examples, len(self.scores) - 1)
        self.calls += 1
        return self.scores[place]


def data(scores: list[float], **options: Any) -> ContinualDataModule:
    made = make_data(**options)
    made.suites[0].scorer = Scripted(scores)
    return made


def folder(tmp_path: Path) -> Path:
    (found,) = tmp_path.rglob("checkpoints")
    return found


def names(where: Path) -> set[str]:
    return {path.name for path in where.glob("*.ckpt") if "step-" not in path.name}


def test_stages_that_keep_the_old_are_accepted(fit: Fit, tmp_path: Path) -> None:
    trainer, _ = fit(data=data([1.0]), callbacks=[Gate("rollback")])
    entries = read_ledger(Path(trainer.log_dir or ""))
    assert [entry.decision for entry in entries] == ["accepted"] * 2
    assert [entry.task for entry in entries] == ["first", "second"]
    assert [entry.step for entry in entries] == [3, 6]
    assert {entry.version for entry in entries} == {v.name for v in versions(tmp_path)}
    assert entries[0].scores == {"first": 0.0, "second": 0.0, "prior": 1.0}


def test_a_stage_that_does_not_is_rolled_back(fit: Fit, tmp_path: Path) -> None:
    with pytest.raises(GateStop, match=r"stage 2 \(second\) is rejected: prior fell from 1\.000"):
        fit(data=data([1.0, 1.0, 0.0]), callbacks=[Gate("rollback")])
    where = folder(tmp_path)
    assert names(where) == {"stage-1-first.ckpt", "withdrawn-stage-2-second.ckpt", "last.ckpt"}
    assert (where / "last.ckpt").resolve().name == "stage-1-first.ckpt"
    assert CheckpointFolder(where).newest().path.name == "stage-1-first.ckpt"
    accepted, rejected = read_ledger(where.parent)
    assert (accepted.decision, rejected.decision) == ("accepted", "rejected")
    assert rejected.follows == str(where / "stage-1-first.ckpt")
    assert rejected.version.startswith("stage-2-second@")


def test_the_run_goes_on_from_what_was_accepted(fit: Fit, tmp_path: Path) -> None:
    _, whole = fit("whole", data=data([1.0]), callbacks=[Gate("rollback")])
    with pytest.raises(GateStop):
        fit("broken", data=data([1.0, 1.0, 0.0]), callbacks=[Gate("rollback")])
    start = find_checkpoint("last", tmp_path / "broken")
    trainer, again = fit("again", data=data([1.0]), callbacks=[Gate("rollback")], ckpt_path=start)
    for one, other in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)
    # The first stage is judged again: its checkpoint was written before it was.
    decisions = [entry.decision for entry in read_ledger(Path(trainer.log_dir or ""))]
    assert decisions == ["accepted", "accepted"]


def test_a_first_stage_that_fails_leaves_nothing_to_go_on_from(fit: Fit, tmp_path: Path) -> None:
    with pytest.raises(GateStop, match="No stage was accepted before"):
        fit(data=data([1.0, 0.0]), callbacks=[Gate("rollback")])
    where = folder(tmp_path)
    assert CheckpointFolder(where).found() == []
    assert "withdrawn-stage-1-first.ckpt" in names(where)
    assert not (where / "last.ckpt").exists()


def test_it_can_be_told_to_go_on(
    fit: Fit, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer, _ = fit(data=data([1.0, 0.0, 0.0]), callbacks=[Gate("continue")])
    entries = read_ledger(Path(trainer.log_dir or ""))
    assert [entry.decision for entry in entries] == ["tolerated", "tolerated"]
    assert trainer.global_step == 6
    assert "prior fell from 1.000 to 0.000" in capsys.readouterr().out


def test_only_protected_columns_count_each_with_its_own_drop(fit: Fit) -> None:
    scores = [1.0, 0.0, 0.0]
    fit("none", data=data(scores), callbacks=[Gate("rollback", protect={"first": 0.0})])
    fit("much", data=data(scores), callbacks=[Gate("rollback", protect={"prior": 1.0})])
    with pytest.raises(GateStop):
        fit("all", data=data(scores), callbacks=[Gate("rollback", protect={"prior": 0.5})])


def test_a_probe_ends_a_stage_on_the_way(fit: Fit, tmp_path: Path) -> None:
    """The suite has two validation examples: base row of four, then probes of two."""
    made = make_data()
    calls = Scripted([1.0, 1.0, 1.0, 0.0], examples=2)
    made.suites[0].scorer = calls
    gate = Gate("rollback", every_n_steps=2, certain=False)
    with pytest.raises(GateStop, match=r"stage 1 \(first\) is rejected: prior fell"):
        fit(data=made, callbacks=[gate])
    (entry,) = read_ledger(folder(tmp_path).parent)
    assert (entry.version, entry.step, entry.decision) == ("stage-1-first", 2, "rejected")


def test_without_an_answer_nothing_is_judged(fit: Fit) -> None:
    trainer, _ = fit(data=data([1.0, 0.0]), callbacks=[Gate()])
    assert read_ledger(Path(trainer.log_dir or "")) == []


def test_a_retry_says_what_to_do_otherwise(fit: Fit, tmp_path: Path) -> None:
    with pytest.raises(GateRetry) as caught:
        fit(data=data([1.0, 1.0, 0.0]), callbacks=[Gate("retry")])
    retry = caught.value
    assert retry.attempts == {1: 1}
    assert retry.checkpoint == folder(tmp_path) / "stage-1-first.ckpt"
    words = retry.command_line(["fit", "-c", "a.yaml", "--ckpt_path", "x", "--ckpt_path=y"])
    assert words[:3] == ["fit", "-c", "a.yaml"]
    assert words[3:5] == ["--ckpt_path", str(retry.checkpoint)]
    assert json.loads(words[-1]) == {"1": 1}
    with pytest.raises(GateStop) as stopped:  # it has been tried often enough
        fit("again", data=data([1.0, 1.0, 0.0]), callbacks=[Gate("retry", attempts={1: 1})])
    assert not isinstance(stopped.value, GateRetry)


def test_what_is_tried_again_has_a_lower_rate_and_more_replay(fit: Fit) -> None:
    rates: dict[tuple[int, int], float] = {}
    rows: dict[tuple[int, int], int] = {}

    class Rates(Gate):
        def after_step(self, trainer: Trainer, pl_module: Any, batch: Any) -> None:
            key = (trainer.current_epoch, trainer.global_step)
            rates[key] = trainer.optimizers[0].param_groups[0]["lr"]
            rows[key] = sum(origin == "past" for origin in batch.origins)
            super().after_step(trainer, pl_module, batch)

    def run(name: str, **options: Any) -> tuple[dict[Any, float], dict[Any, int]]:
        rates.clear()
        rows.clear()
        made = make_data(("a", "b", "c"))
        fit(name, data=made, callbacks=[Rates("retry", retry_replay=0.5, **options)])
        return dict(rates), dict(rows)

    plain, none = run("plain")
    found, past = run("twice", attempts={1: 2})
    assert len(plain) == 9
    assert set(none.values()) == {0}
    for (stage, step), rate in plain.items():
        # The optimizer's rate at the end of a step is that of the next one.
        if step not in (3, 6):
            assert found[stage, step] == pytest.approx(rate * (0.25 if stage == 1 else 1.0))
    assert {stage for (stage, _), count in past.items() if count} == {1}
    assert sum(past.values()) == 10  # of 10 new rows


def test_what_cannot_be_judged_is_named(fit: Fit, model_dir: Path) -> None:
    with pytest.raises(ValueError, match=r"gate\.on_drop needs the retention matrix"):
        fit(retention=Retention(enabled=False), callbacks=[Gate("rollback")])
    with pytest.raises(ValueError, match=r"gate\.protect names 'old', which is no task or suite"):
        fit("b", callbacks=[Gate("rollback", protect={"old": 0.1})])
    cpt = make_method(CPTModule, model_dir)
    if "past" not in cpt.learns_from:
        with pytest.raises(ValueError, match=r"gate\.retry_replay"):
            fit("c", module=cpt, callbacks=[Gate("retry", retry_replay=0.5)])


# ---------------------------------------------------------------- the command line


@pytest.fixture
def config(tmp_path: Path, model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two tasks and a suite whose scores are those of `script.SCORES`."""
    script = types.ModuleType("gate_script")
    script.Forgetful = type(
        "Forgetful", (Scripted,), {"__init__": _begin, "__module__": "gate_script"}
    )  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "gate_script", script)
    monkeypatch.chdir(tmp_path)
    for name, offset in (("train", 0), ("test", 100)):
        rows = [{"prompt": e.prompt, "answer": e.answer} for e in echo_examples(4, offset)]
        write_jsonl(tmp_path / f"{name}.jsonl", rows)
    files = {"train": "train.jsonl", "test": "test.jsonl"}
    values = {
        "trainer": {"accelerator": "cpu", "enable_progress_bar": False, "logger": False},
        "model": {
            "class_path": "sdft.SDFTModule",
            "init_args": {
                "model_name": str(model_dir),
                "max_new_tokens": 4,
                "teacher_template": TEMPLATE,
            },
        },
        "data": {
            "batch_size": 4,
            "steps": 1,
            "tasks": [
                {"class_path": "JSONLTask", "init_args": {"name": name, **files}}
                for name in ("a", "b")
            ],
            "suites": [
                {
                    "class_path": "JSONLTask",
                    "init_args": {
                        "name": "old",
                        "test": "test.jsonl",
                        "scorer": {"class_path": "gate_script.Forgetful"},
                    },
                }
            ],
        },
        "retention": {"kl_to_base": False},
        "samples": {"count": 0},
    }
    values["trainer"]["logger"] = True
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    return tmp_path / "run.yaml"


CALLS = {"made": 0}
SCORES: list[float] = []


def _begin(self: Scripted) -> None:
    self.examples = 4


def _score(self: Scripted, response: str, example: Example) -> float:
    CALLS["made"] += 1
    return SCORES[min((CALLS["made"] - 1) // 4, len(SCORES) - 1)]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[float]], None]:
    monkeypatch.setattr(Scripted, "__call__", _score)

    def use(scores: list[float]) -> None:
        CALLS["made"] = 0
        SCORES[:] = scores

    return use


@pytest.mark.slow
def test_the_command_line_tries_again_by_itself(
    config: Path,
    script: Callable[[list[float]], None],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    script([1.0, 1.0, 0.0, 1.0])  # base, first stage, second stage, second stage again
    assert main(["fit", "-c", str(config), "--gate.on_drop", "retry"]) == 0
    out = capsys.readouterr().out
    assert "trying again" in out
    assert main(["history", "--dir", str(tmp_path), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["decision"] for row in rows] == ["accepted", "rejected", "accepted"]
    assert [row["attempt"] for row in rows] == [1, 1, 2]
    assert main(["history", "--dir", str(tmp_path)]) == 0
    assert "old fell from 1.000 to 0.000" in capsys.readouterr().out

    name = rows[1]["version"]  # the rejected one can be had as well
    target = tmp_path / "rejected"
    assert main(["export", "--ckpt", name, "--root", str(tmp_path), "--out", str(target)]) == 0
    assert (target / "model.safetensors").is_file()

    first = rows[0]["version"]
    assert main(["history", "--dir", str(tmp_path), "--rollback", first]) == 0
    assert find_checkpoint(first, tmp_path).name == "stage-1-a.ckpt"
    assert main(["history", "--dir", str(tmp_path), "--rollback", name]) == 0
    assert find_checkpoint(name, tmp_path).name == "stage-2-b.ckpt"
    assert len(versions(tmp_path)) == 3  # nothing is deleted


@pytest.mark.slow
def test_the_command_line_gives_up_with_a_status_of_its_own(
    config: Path, script: Callable[[list[float]], None], capsys: pytest.CaptureFixture[str]
) -> None:
    script([1.0, 1.0, 0.0])
    assert main(["fit", "-c", str(config), "--gate.on_drop", "retry"]) == 3
    assert "stage 2 (b) is rejected" in capsys.readouterr().err


def test_there_is_no_such_version(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["history", "--dir", str(tmp_path)]) == 1
    assert main(["history", "--dir", str(tmp_path), "--rollback", "stage-1-a@12"]) == 2
    assert "version 'stage-1-a@12'" in capsys.readouterr().err
