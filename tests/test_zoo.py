"""One model per task: every stage begins with the base, and the matrix shows a router."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import echo_examples, make_module, make_task
from lightning.pytorch import Callback, Trainer
from torch import Tensor

from sdft import ContinualDataModule, Example, PythonTask
from sdft.callbacks import Retention
from sdft.evaluator import Evaluator
from sdft.seeding import derive_seed

pytestmark = pytest.mark.usefixtures("no_plots")

Fit = Callable[..., Any]


def checksum(response: str, example: Example) -> float:
    """A score that moves with every token."""
    return sum(map(ord, response)) % 100 / 100


def stream(*names: str, **options: Any) -> ContinualDataModule:
    """Tasks with examples of their own, in an order that does not depend on the stage."""
    tasks = [
        PythonTask(
            name,
            train=echo_examples(6, offset=10 * len(name)),
            validation=echo_examples(3, offset=50),
            test=echo_examples(4, offset=100),
            scorer=checksum,
        )
        for name in names
    ]
    settings = {"batch_size": 4, "steps": 3, "shuffle": False, "from_base_each_task": True}
    suite = make_task("prior", scorer=checksum)
    return ContinualDataModule(tasks, suites=[suite], **settings | options)


def report(trainer: Trainer) -> Any:
    return json.loads((Path(trainer.log_dir) / "retention.json").read_text())


def state_of(trainer: Trainer, module: Any) -> dict[str, Tensor]:
    """Student, teacher and the optimizer's moments and step counts."""
    moments = trainer.optimizers[0].state_dict()["state"]
    numbers = {f"{i}/{name}": v for i, entry in moments.items() for name, v in entry.items()}
    return {**module.state_dict(), **numbers}


def unequal(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    assert one.keys() == other.keys()
    return [name for name in one if not torch.equal(one[name], other[name])]


@pytest.fixture
def same_seeds(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same rollouts in every stage: seeds name it, all else must not depend on it."""
    monkeypatch.setattr(
        "sdft.shared_steps.derive_seed", lambda seed, stage, *place: derive_seed(seed, *place)
    )


@pytest.mark.usefixtures("same_seeds")
def test_the_second_model_is_that_of_a_run_of_its_task_alone(fit: Fit) -> None:
    zoo = state_of(*fit("zoo", data=stream("first", "second")))
    alone = state_of(*fit("alone", data=stream("second")))
    sequence = state_of(*fit("sequence", data=stream("first", "second", from_base_each_task=False)))
    assert unequal(zoo, alone) == []
    assert {name.split(".")[0] for name in unequal(sequence, alone)} >= {"student", "teacher"}
    assert zoo["0/step"].item() == 3
    assert sequence["0/step"].item() == 6


@pytest.mark.usefixtures("same_seeds")
def test_so_is_the_third(fit: Fit) -> None:
    zoo = state_of(*fit("zoo", data=stream("first", "2nd", "third")))
    assert unequal(zoo, state_of(*fit("alone", data=stream("third")))) == []


def test_the_base_is_kept_even_when_it_is_not_tracked(fit: Fit, model_dir: Path) -> None:
    module = make_module(model_dir, track_base=False)
    untracked = state_of(*fit("untracked", module=module, data=stream("first", "second")))
    assert unequal(untracked, state_of(*fit("tracked", data=stream("first", "second")))) == []


def test_every_stage_begins_with_the_base(fit: Fit) -> None:
    distances: list[tuple[float, float]] = []

    class Watch(Callback):
        def on_after_backward(self, trainer: Trainer, pl_module: Any) -> None:
            pairs = zip(pl_module.student.parameters(), pl_module.base.parameters(), strict=True)
            student = sum((a - b).abs().sum().item() for a, b in pairs)
            pairs = zip(pl_module.teacher.parameters(), pl_module.base.parameters(), strict=True)
            distances.append((student, sum((a - b).abs().sum().item() for a, b in pairs)))

    fit(data=stream("first", "second"), callbacks=[Watch()])
    assert [student == 0 for student, _ in distances] == [True, False, False] * 2
    assert [teacher == 0 for _, teacher in distances] == [True, False, False] * 2


# ---------------------------------------------------------------- the matrix


def test_the_matrix_shows_a_router(fit: Fit) -> None:
    trainer, module = fit(data=stream("first", "second"))
    found = report(trainer)
    base, one, two = found["matrix"]
    assert found["routed"]
    assert found["method"] == "sdft+zoo"
    assert one[1:] == base[1:], "later tasks and suites: the base"
    assert two[0] == one[0], "the first task's own model"
    assert two[2] == base[2]
    assert one[0] != base[0]
    assert two[1] != base[1]
    metrics = found["metrics"]
    assert (metrics["bwt"], metrics["fwt"], metrics["forgetting"]) == (0, 0, 0)
    assert metrics["retention"] == {"prior": 0}
    task = trainer.datamodule.tasks[1]
    prompts = [module.encoder.student_ids(e) for e in task.examples("test")]
    scores = [checksum(r.text, None) for r in module.respond(prompts, module.greedy)]  # type: ignore[arg-type]
    assert two[1]["score"] == pytest.approx(sum(scores) / 4)


def test_only_the_new_column_is_evaluated(fit: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    real = Evaluator.cell

    def cell(self: Evaluator, module: Any, task: Any, *args: Any, **options: Any) -> Any:
        asked.append(task.name)
        return real(self, module, task, *args, **options)

    monkeypatch.setattr(Evaluator, "cell", cell)
    fit(data=stream("first", "second"))
    assert asked == ["first", "second", "prior", "first", "second"]


def test_each_column_has_the_pass_at_k_of_its_own_model(fit: Fit) -> None:
    trainer, _ = fit(data=stream("first", "second"), retention=Retention(pass_at=[1, 2]))
    assert all(cell["pass_at"] for row in report(trainer)["matrix"] for cell in row)


@pytest.mark.parametrize("resumed_after", [None, 1])
def test_the_selection_split_asks_each_model_about_its_own_task(
    fit: Fit, resumed_after: int | None
) -> None:
    """Also when the run goes on after its first stage."""
    chosen = {"retention": Retention(selection_split="validation")}
    trainer, module = fit("whole", data=stream("first", "second"), **chosen)
    paths = sorted((Path(trainer.log_dir) / "checkpoints").glob("stage-*"))
    found = report(trainer)["selection"]
    assert found["split"] == "validation"
    assert list(found["cells"]) == ["first", "second", "prior"]
    assert [cell["n"] for cell in found["cells"].values()] == [3, 3, 2]
    for name, path in zip(("first", "second"), paths, strict=True):
        module.load_state_dict(torch.load(path, weights_only=True)["state_dict"])
        prompts = [module.encoder.student_ids(e) for e in echo_examples(3, offset=50)]
        scores = [checksum(r.text, None) for r in module.respond(prompts, module.greedy)]  # type: ignore[arg-type]
        assert found["cells"][name]["score"] == pytest.approx(sum(scores) / 3)
    if resumed_after is not None:
        chosen = {"retention": Retention(selection_split="validation")}
        path = paths[resumed_after - 1]
        resumed, _ = fit("resumed", data=stream("first", "second"), ckpt_path=path, **chosen)
        assert report(resumed)["selection"] == found


def test_a_model_that_is_gone_is_said_to_be(fit: Fit) -> None:
    """The split is asked for when the first task's model is past."""
    trainer, _ = fit("whole", data=stream("first", "second"))
    path = Path(trainer.log_dir) / "checkpoints" / "stage-1-first.ckpt"
    late = Retention(selection_split="validation")
    resumed, _ = fit("resumed", data=stream("first", "second"), ckpt_path=path, retention=late)
    cells = report(resumed)["selection"]["cells"]
    assert cells["second"]["score"] is not None
    for name in ("first", "prior"):
        assert (cells[name]["score"], cells[name]["n"]) == (None, 0)
        assert "its model was gone" in cells[name]["error"]
