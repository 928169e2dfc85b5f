"""A whole run leaves what it promises."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

FILES = ("retention.json", "retention.csv", "retention.png", "curves.png", "samples.jsonl")


def test_a_run_leaves_its_files(fit: Callable[..., Any]) -> None:
    trainer, _ = fit()
    folder = Path(trainer.log_dir)
    for name in FILES:
        assert (folder / name).stat().st_size > 0, name
    names = {path.name for path in (folder / "checkpoints").iterdir()}
    stages = {"stage-1-first.ckpt", "stage-2-second.ckpt"}
    assert names == stages | {"step-5.ckpt", "step-6.ckpt", "last.ckpt"}
    report = json.loads((folder / "retention.json").read_text())
    assert report["tasks"] == ["first", "second"]
    assert report["suites"] == ["prior"]
    assert len(report["matrix"]) == 3
    assert all(len(row) == 3 for row in report["matrix"])
    assert trainer.global_step == 6
