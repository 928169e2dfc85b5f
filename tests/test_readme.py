"""What the README promises: its commands, its snippets and the files that it names."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands() -> list[str]:
    lines = "".join(blocks("bash")).splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def python(*args: str, folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *args],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_ci_runs_exactly_the_test_command() -> None:
    tests = commands()[1]
    assert tests in (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()


@pytest.mark.slow
def test_the_main_job_runs_through_every_stage(tmp_path: Path) -> None:
    main = shlex.split(commands()[0].rsplit("&&", 1)[1])
    assert main[:2] == ["python", "-m"]
    smoke = ["--config", "configs/smoke.yaml", "--trainer.default_root_dir", str(tmp_path)]
    result = python(*main[1:], *smoke)
    assert result.returncode == 0, result.stderr
    run = tmp_path / "lightning_logs" / "version_0"
    table = README.split("## What a run leaves behind")[1].split("## ")[0]
    for name in re.findall(r"^\| `([\w/]+(?:\.\w+)?)`", table, re.MULTILINE):
        assert (run / name).exists(), name


@pytest.mark.slow
def test_the_custom_loss_overlay_runs(tmp_path: Path) -> None:
    (overlay,) = (line for line in commands() if "custom_loss" in line)
    smoke = ["-c", "configs/smoke.yaml", "--trainer.default_root_dir", str(tmp_path)]
    result = python(*shlex.split(overlay)[1:], *smoke)
    assert result.returncode == 0, result.stderr
    assert '"method": "confident-sdft"' in next(tmp_path.rglob("retention.json")).read_text()


@pytest.mark.slow
def test_the_python_snippet_runs(tmp_path: Path) -> None:
    (snippet,) = blocks("python")
    snippet = snippet.replace("steps=50", "steps=2")
    result = python("-c", snippet, folder=tmp_path)
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
def test_the_yaml_snippet_parses(tmp_path: Path) -> None:
    (snippet,) = blocks("yaml")
    (tmp_path / "run.yaml").write_text(snippet)
    result = python("-m", "sdft", "fit", "-c", "run.yaml", "--print_config", folder=tmp_path)
    assert result.returncode == 0, result.stderr


def test_the_files_that_it_names_exist() -> None:
    for name in re.findall(r"\b((?:configs|docs|tools)/[\w.]+\.(?:yaml|md|py|sh|png))", README):
        assert (ROOT / name).is_file(), name
