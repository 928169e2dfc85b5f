"""A training step sends what the cost model says, and hardly anything beside it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from conftest import make_model, save_model
from processes import HERE, start

from sdft.communication import collectives
from sdft.shapes import ModelShape

PHASES = {"rollout": "generate", "teacher": "score", "student": "update"}


@pytest.mark.slow
def test_a_training_step_makes_the_calls_of_the_formulas(tmp_path: Path) -> None:
    changes = {"vocab_size": 64}  # every shard is full
    save_model(tmp_path, **changes)
    command = [sys.executable, str(HERE / "step_calls.py"), str(tmp_path), "2"]
    processes = start(command, 2, tmp_path)
    try:
        codes = [process.wait(240) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert codes == [0, 0], (tmp_path / "out-0").read_text()[-3000:]
    _, step = json.loads((tmp_path / "calls.json").read_text())
    # The first step also checks the heads, once per run.
    found = {(phase, kind): (calls, size) for phase, kind, calls, size in step}
    norms = [found.pop((phase, "all-reduce")) for phase in ("update", "track")]
    shape = ModelShape.from_config(make_model(**changes).config)
    by_formula = collectives(shape, weight_bytes=4)
    assert found == {
        (PHASES[call.phase], call.kind): (call.calls, call.size)
        for call in by_formula
        if call.kind != "all-reduce"
    }
    # Beside the norms: the loss's count, and two calls for the logged means.
    clipping = next(call for call in by_formula if call.phase == "clipping")
    assert norms == [(clipping.calls + 1, clipping.size + 8), (2, 48)]
