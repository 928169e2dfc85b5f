"""A contender in a process of its own."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_bench_models import TINY, material, models
from test_prepare import load

alone = load("bench_alone")
serve = load("bench_serve")


@pytest.mark.slow
def test_memory_and_steps_of_one_contender(tmp_path: Path) -> None:
    plan = models.Plan(TINY, str(material.make_model(TINY, tmp_path)))
    lengths = [[3, 1], [2, 2]]
    found = alone.run_alone("sft", plan, repeats=2, lengths=lengths)
    assert len(found.laps) == 2
    assert all(lap.seconds > 0 for lap in found.laps)
    assert found.peak >= found.held > 1e8
    assert found.above == found.peak - found.held


@pytest.mark.slow
def test_a_process_that_fails_says_why(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="does not exist"):
        alone.run_alone("ours", models.Plan(TINY, str(tmp_path / "nothing")))


def test_sft_learns_completions_of_the_lengths_that_the_line_says() -> None:
    given = serve.Given(models.Plan(TINY, "folder"))
    assert given().lengths_B.tolist() == [3, 3]
    given.lengths = [3, 1]
    assert given().lengths_B.tolist() == [3, 1]
