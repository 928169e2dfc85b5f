"""Two processes leave what one leaves: loss, student, teacher, optimizer, retention matrix."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import CASES, REPLICATED
from runs import ran
from transformers import AutoConfig, AutoModelForCausalLM

from sdft.shard_reader import read_whole

pytestmark = pytest.mark.slow

NAMES = tuple(CASES)
GROUPS = [NAMES[start : start + 5] for start in range(0, len(NAMES), 5)]
TOLERANCE = 1e-5


def left(folder: Path, name: str) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """What was kept of a run, its last checkpoint and its report."""
    kept = json.loads((folder / name / "kept-0.json").read_text())
    run = Path(kept["folder"])
    last = run / "checkpoints" / "last.ckpt"
    checkpoint = read_whole(last) if last.is_dir() else torch.load(last, weights_only=True)
    return kept, checkpoint, json.loads((run / "retention.json").read_text())


def assert_close(found: Any, expected: Any, place: str = "", tolerance: float = TOLERANCE) -> None:
    """Compare nested values; numbers and tensors to the tolerance."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), place
        for key, value in expected.items():
            assert_close(found[key], value, f"{place}/{key}", tolerance)
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected), place
        for i, (one, other) in enumerate(zip(found, expected, strict=True)):
            assert_close(one, other, f"{place}/{i}", tolerance)
    elif isinstance(expected, float | torch.Tensor) and found is not None:
        torch.testing.assert_close(
            torch.as_tensor(found, dtype=torch.float64),
            torch.as_tensor(expected, dtype=torch.float64),
            rtol=tolerance,
            atol=tolerance,
            msg=lambda text: f"{place}: {text}",
        )
    else:
        assert found == expected, place


def without_own(steps: list[dict[str, float]]) -> list[dict[str, float]]:
    """The logged values, without the progress bar's: it shows the process's own loss."""
    return [{k: v for k, v in step.items() if k not in ("loss", "divergence")} for step in steps]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize("group", GROUPS, ids=["; ".join(group) for group in GROUPS])
def test_two_processes_leave_what_one_leaves(strategy: str, group: tuple[str, ...]) -> None:
    alone, together = ran("one", group), ran(strategy, group)
    for name in group:
        kept, checkpoint, report = left(together, name)
        expected_kept, expected, expected_report = left(alone, name)
        assert kept["sharded"] == (strategy == "fsdp")
        assert_close(without_own(kept["steps"]), without_own(expected_kept["steps"]), name)
        assert_close(checkpoint["state_dict"], expected["state_dict"], name)
        states = [found["optimizer_states"][0]["state"] for found in (checkpoint, expected)]
        assert_close(*states, name)
        assert_close(report, expected_report, name)
        assert checkpoint["global_step"] == expected["global_step"] > 0


def test_what_needs_whole_weights_works_with_ddp() -> None:
    names = tuple(REPLICATED)
    alone, together = ran("one", names), ran("ddp", names)
    for name in names:
        kept, checkpoint, report = left(together, name)
        expected_kept, expected, expected_report = left(alone, name)
        assert_close(without_own(kept["steps"]), without_own(expected_kept["steps"]), name)
        # Factors of a teacher over adapters are not unique; its products are in the steps.
        found, wanted = (
            {k: v for k, v in c["state_dict"].items() if k.startswith("student.")}
            for c in (checkpoint, expected)
        )
        assert_close(found, wanted, name)
        assert_close(report, expected_report, name)
        assert kept["steps"][-1]["train/kl_base_student"] > 1e-5


def test_the_cases_train_something() -> None:
    for group in GROUPS:
        for name in group:
            folder = ran("one", group)
            steps = left(folder, name)[0]["steps"]
            moved = max(step.get("train/kl_base_student", 0.0) for step in steps)
            assert moved > 1e-5 or name == "no token counts", name


def test_each_process_has_a_share() -> None:
    for strategy in ("ddp", "fsdp"):
        rows = [
            json.loads((ran(strategy, GROUPS[0]) / "sdft" / f"kept-{rank}.json").read_text())
            for rank in range(2)
        ]
        assert [kept["rows"][:4] for kept in rows] == [[3, 1, 3, 1], [2, 1, 2, 1]]
        assert rows[0]["folder_here"] == rows[1]["folder_here"]  # no process writes elsewhere
        one = [
            json.loads(
                (ran(strategy, GROUPS[0]) / "a row at a time" / f"kept-{r}.json").read_text()
            )
            for r in range(2)
        ]
        assert [kept["rows"] for kept in one] == [[1] * 4, [0] * 4]


def test_costs_are_those_of_all() -> None:
    def costs(strategy: str) -> dict[str, Any]:
        folder = Path(left(ran(strategy, GROUPS[0]), "sdft")[0]["folder"])
        found: dict[str, Any] = json.loads((folder / "cost.json").read_text())
        return found

    alone, together = costs("one"), costs("ddp")
    assert (alone["processes"], together["processes"]) == (1, 2)
    for phase in ("generate", "score", "update", "evaluate"):
        for key in ("tokens", "flops"):
            assert together["phases"][phase][key] == alone["phases"][phase][key], phase


def test_the_exported_model_is_whole() -> None:
    kept, checkpoint, _ = left(ran("fsdp", GROUPS[0]), "sdft")
    folder = Path(kept["folder"]) / "model"
    assert AutoConfig.from_pretrained(folder).architectures == ["LlamaForCausalLM"]
    model = AutoModelForCausalLM.from_pretrained(folder)
    for name, value in model.named_parameters():
        assert torch.equal(value, checkpoint["state_dict"][f"student.{name}"])
