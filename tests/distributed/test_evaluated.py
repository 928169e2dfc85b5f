"""Validation, test and prediction by two processes say what one says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from processes import work
from runs import models, ran
from test_equal import assert_close, left

pytestmark = pytest.mark.slow


def test_two_processes_say_what_one_says(tmp_path: Path) -> None:
    run = Path(left(ran("one", ("sdft",)), "sdft")[0]["folder"])
    checkpoint = str(run / "checkpoints" / "last.ckpt")
    for ranks, strategies in ((1, ("one",)), (2, ("ddp", "fsdp"))):
        shared = {"kind": "evaluate", "models": models(), "ckpt_path": checkpoint, "devices": ranks}
        jobs = [{**shared, "strategy": s, "folder": tmp_path / s} for s in strategies]
        work(jobs, tmp_path / f"{ranks}", ranks)
    expected = json.loads((tmp_path / "one" / "found.json").read_text())
    assert expected["predictions"].count("\n") == 15
    assert len(expected["validate"]) == len(expected["test"]) == 6
    for strategy in ("ddp", "fsdp"):
        assert_close(json.loads((tmp_path / strategy / "found.json").read_text()), expected)
