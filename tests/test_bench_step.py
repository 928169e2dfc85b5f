"""The step benchmark runs, and its figures are what they say."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from test_prepare import load

from sdft.shapes import SHAPES

bench = load("bench_step")
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
    assert "MBU and MFU are left out" in run.stdout
    assert found["ceilings"] is None
    (first,) = found["runs"]
    assert first["ratios"] == found["ratios"]
    assert all(found["results"][name]["held_memory_bytes"] > 0 for name in OURS)


OURS = ("ours", "sft", "generate")
RESULTS = {
    "ours": {
        "seconds": 2.0,
        "all_seconds": [2.0],
        "phases": {"generate": 0.5, "score": 0.25, "update": 1.0},
        "completion_tokens": 100,
        "peak_memory_bytes": 7e9,
        "mbu_generate": 0.5,
        "mfu_score": 0.4,
        "mfu_update": None,
    },
    "trl": {"seconds": 4.0, "all_seconds": [4.0], "phases": {}, "completion_tokens": None},
}


def test_tables_with_and_without_shares_of_the_ceilings() -> None:
    record = {"results": RESULTS, "ratios": {"trl_over_ours": 2.0, "sdft_over_sft": None}}
    text = bench.table(record, shares=True)
    assert text.splitlines()[0].endswith("| MBU generate | MFU score | MFU update |")
    assert "| ours | 2.000 | 0.500 | 0.250 | 1.000 | 200 | 7000 | 50% | 40% |  |" in text
    assert text.endswith("trl_over_ours = 2.00")
    assert "sdft_over_sft" not in text
    plain = bench.table(record, shares=False)
    assert "MBU" not in plain
    assert "| trl | 4.000 |  |  |  |  |  |" in plain


def test_the_first_setting_stands_on_top_of_the_report() -> None:
    records = [
        {"plan": {"setting": {"batch": b}}, "results": {"ours": b}, "ratios": {"sdft_over_sft": b}}
        for b in (32, 128)
    ]
    found = bench.report(records, {"device": "cpu"})
    assert found["ratios"] == {"sdft_over_sft": 32}
    assert found["setting"] == {"batch": 32}
    assert found["device"] == "cpu"
    assert [run["ratios"]["sdft_over_sft"] for run in found["runs"]] == [32, 128]


@pytest.mark.parametrize(
    ("name", "memory", "crowded"),
    [
        ("qwen2.5-0.5b", 80e9, False),
        ("qwen2.5-1.5b", 80e9, True),
        ("qwen2.5-7b", 141e9, True),
        ("qwen2.5-7b", None, False),
    ],
)
def test_contenders_that_do_not_fit_together_run_one_by_one(
    name: str, memory: float | None, crowded: bool
) -> None:
    given = bench.parse(["--shape", name])
    plan = bench.Plan(bench.read_setting(given), "folder", random=True)
    assert bench.crowded(plan, SHAPES[name], memory) is crowded
    assert bench.shape_of(plan, None) == SHAPES[name]
    assert bench.crowded(plan, None, memory) is False


def test_arguments_that_exclude_each_other() -> None:
    for wrong in (
        ["--one-by-one", "--trl-python", "python"],
        ["--model", "sdft:smollm2", "--trl-python", "python"],
    ):
        with pytest.raises(SystemExit):
            bench.parse(wrong)
    assert bench.parse(["--prompts", "32", "128"]).prompts == [32, 128]
    assert bench.parse(["--batch", "4"]).prompts == [4]
    assert bench.parse([]).one_by_one is None
