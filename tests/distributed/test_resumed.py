"""A run goes on with another number of processes, or another strategy, as if nothing had been."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import work
from runs import models, new_folder
from test_equal import assert_close, left, without_own

pytestmark = pytest.mark.slow

STEP = 3  # of 4 in the first stage
CHANGES = [("one", "ddp"), ("one", "fsdp"), ("ddp", "one"), ("fsdp", "one"), ("fsdp", "ddp")]
CHANGES += [("folder", after) for after in ("one", "ddp", "fsdp", "folder of one")]
CHANGES += [("one", "folder"), ("fsdp", "folder")]
SAME = [("ddp", "ddp"), ("fsdp", "fsdp"), ("folder", "folder")]


def job(folder: Path, strategy: str, name: str, **more: Any) -> dict[str, Any]:
    devices = 1 if strategy in ("one", "folder of one") else 2
    options = {"models": models(), "folder": folder, "strategy": strategy, "devices": devices}
    return {"kind": "run", "name": name, **options, **more}


def work_all(jobs: list[dict[str, Any]], folder: Path) -> None:
    """Those of one process by one, the others by two."""
    for ranks in (1, 2):
        own = [job for job in jobs if job["devices"] == ranks]
        if own:
            work(own, folder / f"{ranks}", ranks)


@pytest.fixture(scope="module")
def begun() -> Path:
    """The run in all ways, whole, with a checkpoint of every step."""
    folder = new_folder("begun")
    strategies = ("one", "ddp", "fsdp", "folder")
    more = {"name": "resumed", "every_step": True}
    work_all([job(folder / s, s, **more) for s in strategies], folder)
    return folder


def resume(begun: Path, folder: Path, changes: list[tuple[str, str]]) -> None:
    jobs = []
    for before, after in changes:
        where = folder / f"{before}-{after}"
        jobs.append(job(where, after, "resumed", ckpt_path=begun_at(begun, before)))
    work_all(jobs, folder)


def begun_at(begun: Path, strategy: str, step: int = STEP) -> str:
    return str(begun / strategy / "resumed" / "steps" / f"step={step}.ckpt")


def assert_same(found: Path, expected: Path) -> None:
    kept, checkpoint, report = left(found, "resumed")
    expected_kept, expected_checkpoint, expected_report = left(expected, "resumed")
    assert_close(without_own(kept["steps"]), without_own(expected_kept["steps"][STEP:]))
    assert_close(checkpoint["state_dict"], expected_checkpoint["state_dict"])
    states = [found["optimizer_states"] for found in (checkpoint, expected_checkpoint)]
    assert_close(*states)
    assert states[0][0]["state"][0]["momentum_buffer"].abs().max() > 0
    assert_close(report, expected_report)


def test_whole_runs_are_alike(begun: Path) -> None:
    for strategy in ("ddp", "fsdp", "folder"):
        kept = json.loads((begun / strategy / "resumed" / "kept-0.json").read_text())
        alone = json.loads((begun / "one" / "resumed" / "kept-0.json").read_text())
        assert_close(without_own(kept["steps"]), without_own(alone["steps"]))


def test_more_or_fewer_processes_go_on(begun: Path, tmp_path: Path) -> None:
    resume(begun, tmp_path, CHANGES)
    for before, after in CHANGES:
        assert_same(tmp_path / f"{before}-{after}", begun / "one")


def test_as_many_go_on_bit_for_bit(begun: Path, tmp_path: Path) -> None:
    resume(begun, tmp_path, SAME)
    for strategy, _ in SAME:
        found = left(tmp_path / f"{strategy}-{strategy}", "resumed")
        expected = left(begun / strategy, "resumed")
        for key in ("state_dict", "optimizer_states"):
            assert_close(found[1][key], expected[1][key], tolerance=0.0)
        assert found[2] == expected[2]


def test_this_run_s_settings_win(begun: Path, tmp_path: Path) -> None:
    """Another learning rate: one process and several go on with it alike."""
    more = {"ckpt_path": begun_at(begun, "folder"), "learning_rate": 0.05}
    strategies = ("one", "ddp", "folder")
    work_all([job(tmp_path / s, s, "resumed", **more) for s in strategies], tmp_path)
    expected = left(tmp_path / "one", "resumed")
    unchanged = left(begun / "one", "resumed")
    assert expected[1]["optimizer_states"][0]["param_groups"][0]["lr"] == 0.05
    for strategy in ("ddp", "folder"):
        found = left(tmp_path / strategy, "resumed")
        assert_close(found[1]["state_dict"], expected[1]["state_dict"])
        assert_close(found[1]["optimizer_states"], expected[1]["optimizer_states"])
        (told,) = Path(found[0]["folder"]).glob("resumed.jsonl")
        differences = json.loads(told.read_text())["differences"]
        assert differences["model.optimizer.lr"] == [0.2, 0.05]
    name = "student.lm_head.weight"
    assert not torch.equal(expected[1]["state_dict"][name], unchanged[1]["state_dict"][name])


def test_noise_of_shards_and_dropout_is_reproducible(tmp_path: Path) -> None:
    """bf16 moments and teacher, rounded at random, and dropout: resumed bit for bit."""
    strategies = ("ddp", "fsdp")
    whole = [job(tmp_path / s, s, "rough", every_step=True) for s in strategies]
    work_all(whole, tmp_path)
    again = []
    for strategy in strategies:
        checkpoint = str(tmp_path / strategy / "rough" / "steps" / f"step={STEP}.ckpt")
        again.append(job(tmp_path / f"{strategy}-2", strategy, "rough", ckpt_path=checkpoint))
    work_all(again, tmp_path)
    for strategy in strategies:
        first, second = (left(tmp_path / f, "rough")[1] for f in (strategy, f"{strategy}-2"))
        for key in ("state_dict", "optimizer_states"):
            assert_close(second[key], first[key], tolerance=0.0)
        kinds = {str(v.dtype) for k, v in first["state_dict"].items() if k.startswith("teacher.")}
        assert "torch.bfloat16" in kinds


def test_what_was_drawn_ahead_is_no_hindrance(tmp_path: Path) -> None:
    """One process had the rest of a window: two draw it anew, both of them."""
    work_all([job(tmp_path / "one", "one", "rough", every_step=True)], tmp_path)
    checkpoint = tmp_path / "one" / "rough" / "steps" / f"step={STEP}.ckpt"
    assert torch.load(checkpoint, weights_only=True)["rollouts"][0]["draws"]
    again = [job(tmp_path / s, s, "rough", ckpt_path=str(checkpoint)) for s in ("ddp", "fsdp")]
    work_all(again, tmp_path / "again")
    expected = left(tmp_path / "one", "rough")
    for strategy in ("ddp", "fsdp"):
        kept, found, _ = left(tmp_path / strategy, "rough")
        assert len(kept["steps"]) == len(expected[0]["steps"]) - STEP
        assert found["global_step"] == expected[1]["global_step"]
