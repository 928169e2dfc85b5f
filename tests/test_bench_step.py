"""The step benchmark runs, and its figures are what they say."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.slow
def test_a_tiny_benchmark_runs(tmp_path: Path) -> None:
    file = tmp_path / "step.json"
    sizes = ["--batch", "2", "--completion", "4", "--vocab", "64", "--repeats", "2"]
    command = [sys.executable, "tools/bench_step.py", "--quick", "--warmup", "1", *sizes]
    run = subprocess.run(
        [*command, "--json", str(file)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    found = json.loads(file.read_text())
    assert set(found["results"]) == {"ours", "sft", "generate"}
    assert found["ratios"]["trl_over_ours"] is None
    for first, second, ratio in (
        ("ours", "sft", "sdft_over_sft"),
        ("generate", "ours", "generate_over_ours"),
    ):
        pairs = zip(*(found["results"][n]["all_seconds"] for n in (first, second)), strict=True)
        quotients = sorted(a / b for a, b in pairs)
        assert found["ratios"][ratio] == pytest.approx(sum(quotients) / 2)
    ours = found["results"]["ours"]
    assert set(ours["phases"]) == {"generate", "score", "update"}
    assert ours["peak_memory_bytes"] > 1e8
    assert "| ours |" in run.stdout
