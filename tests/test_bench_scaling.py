"""Exponents of given points, and the grid that they come from."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from test_prepare import load

bench, laps_of = load("bench_scaling"), load("bench_laps")
ROOT = Path(__file__).resolve().parent.parent


def setting(**sizes: int) -> Any:
    return bench.Setting(**{"batch": 2, "completion": 8, "vocab": 64, "ragged": 0.0} | sizes)


def points(above: Any) -> list[Any]:
    """Time grows with the square root of the batch and with the completion; memory as said."""
    found = []
    for s in bench.grid(setting(), [2, 4]):
        costs = {
            "step": 0.1 * s.batch**0.5 * s.completion,
            "generate": 0.05 * s.completion,
            "score": 0.01,
            "update": 0.02 * s.batch,
            "peak": 1e9 + above(s),
            "above": above(s),
        }
        found.append(bench.Point(s.batch, s.completion, s.vocab, costs))
    return found


def test_the_grid_grows_one_size_at_a_time_and_two_together() -> None:
    found = [(s.batch, s.completion, s.vocab) for s in bench.grid(setting(), [2, 4])]
    assert found == [
        (2, 8, 64),
        (4, 8, 64),
        (8, 8, 64),
        (2, 16, 64),
        (2, 32, 64),
        (2, 8, 128),
        (2, 8, 256),
        (8, 8, 256),
    ]


def test_exponents_of_every_cost_along_every_size() -> None:
    measured = points(lambda s: 100.0 * s.vocab)
    found = bench.exponents(measured, measured[0])
    assert found["batch"]["step"] == pytest.approx(0.5)
    assert found["completion"]["step"] == pytest.approx(1.0)
    assert found["vocab"]["step"] == pytest.approx(0.0)
    assert found["vocab"]["above"] == pytest.approx(1.0), "the corner is on no line"
    assert found["batch"]["above"] == pytest.approx(0.0)
    assert found["batch"]["update"] == pytest.approx(1.0)
    assert found["completion"]["score"] == pytest.approx(0.0)


def test_growing_batch_and_vocabulary_together() -> None:
    separate = points(lambda s: 1e6 + 1e4 * s.vocab + 1e5 * s.batch)
    found = bench.together(separate, separate[0])
    assert found["added"] == pytest.approx(0.0, abs=1e-3)
    assert found["whole_logits"] == 4 * 8 * (8 - 2) * (256 - 64)
    whole = points(lambda s: 4.0 * s.batch * s.completion * s.vocab)
    joint = bench.together(whole, whole[0])
    assert joint["added"] == pytest.approx(joint["whole_logits"])
    assert "grown together add 0 MB" in bench.sentence(found)


def test_a_point_holds_medians_and_memory() -> None:
    laps = [
        laps_of.Lap(seconds, {"generate": seconds / 2}, held=held, peak=peak)
        for seconds, held, peak in ((1.0, 200, 400), (4.0, 300, 500), (2.0, 250, 350))
    ]
    found = bench.Point.of(setting(), bench.Alone(laps))
    assert found.costs == {"step": 2.0, "generate": 1.0, "peak": 500.0, "above": 300.0}


def test_the_table_has_points_and_exponents() -> None:
    measured = points(lambda s: 1e6 * s.vocab)
    text = bench.table(measured, bench.exponents(measured, measured[0]))
    assert "| 2 | 8 | 64 | 1.131 | 0.400 | 0.010 | 0.040 | 1064 | 64 |" in text
    assert "| vocabulary | 0.00 | 0.00 | 0.00 | 0.00 | 0.12 | 1.00 |" in text


def test_sizes_from_the_command_line() -> None:
    base = bench.base_setting(bench.parse(["--quick"]))
    assert (base.batch, base.completion, base.vocab, base.ragged) == (8, 32, 4096, 0.0)
    shaped = bench.base_setting(bench.parse(["--shape", "qwen2.5-0.5b", "--batch", "4"]))
    assert (shaped.batch, shaped.completion, shaped.vocab) == (4, 64, 151936)
    with pytest.raises(SystemExit):
        bench.parse(["--model", "sdft:world"])


@pytest.mark.slow
def test_a_tiny_benchmark_runs(tmp_path: Path) -> None:
    file = tmp_path / "scaling.json"
    sizes = ["--batch", "2", "--completion", "3", "--vocab", "64", "--factors", "2"]
    command = [sys.executable, "tools/bench_scaling.py", "--quick", "--repeats", "1", *sizes]
    run = subprocess.run(
        [*command, "--json", str(file)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    found = json.loads(file.read_text())
    assert len(found["points"]) == 5
    assert found["points"][0]["costs"]["peak"] > 1e8
    assert set(found["exponents"]) == {"batch", "completion", "vocab"}
    assert set(found["points"][0]["costs"]) == {
        "step",
        "generate",
        "score",
        "update",
        "peak",
        "above",
    }
    assert "| exponent of |" in run.stdout
