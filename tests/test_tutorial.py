"""docs/tutorial.md: its script and its configuration work as they stand there."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from sdft import cli
from sdft.jsonl import read_jsonl

PAGE = (Path(__file__).parents[1] / "docs" / "tutorial.md").read_text(encoding="utf-8")


def block(language: str) -> str:
    (found,) = re.findall(rf"(?s)```{language}\n(.*?)```", PAGE)
    return str(found)


@pytest.mark.usefixtures("no_plots")
@pytest.mark.parametrize("method", ["sdft", "sft"])
def test_the_tutorial_s_run(
    method: str, tmp_path: Path, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("make_desk.py").write_text(block("python"), encoding="utf-8")
    Path("desk.yaml").write_text(block("yaml"), encoding="utf-8")
    subprocess.run([sys.executable, "make_desk.py"], check=True)
    tickets = {
        split: {line["prompt"] for _, line in read_jsonl(Path(f"desk/{split}.jsonl"))}
        for split in ("train", "test")
    }
    assert [len(found) for found in tickets.values()] == [48, 36]
    assert not tickets["train"] & tickets["test"]
    overlay = Path(__file__).parents[1] / "configs" / "methods" / f"{method}.yaml"
    small = ["--trainer.enable_progress_bar", "false", "--export.enabled", "false"]
    small += ["--trainer.accelerator", "cpu", "--trainer.precision", "32-true"]
    small += ["--model.model_name", str(model_dir), "--data.steps", "2"]
    assert cli.main(["fit", "-c", "desk.yaml", "-c", str(overlay), *small]) == 0
    report = json.loads(next(Path().rglob("retention.json")).read_text())
    assert [cell["n"] for cell in report["matrix"][-1]] == [36, 12]
