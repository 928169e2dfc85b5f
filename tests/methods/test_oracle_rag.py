"""Oracle RAG: the context in the evaluation prompt, and weights that nothing touches."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_method
from lightning.pytorch import Trainer

from sdft import ContinualDataModule, Example, PythonTask
from sdft.methods import OracleRAGModule
from sdft.mixtures import PastReplay, Reinvoke
from sdft.penalties import EWC

pytestmark = pytest.mark.usefixtures("no_plots")

Fit = Callable[..., Any]


def asked(prompt: str, context: str = "") -> Example:
    return Example(({"role": "user", "content": prompt},), "a", "a", context)


def rag(folder: Path, **options: Any) -> OracleRAGModule:
    settings = {"rag_template": "{context} now {prompt}", "teacher_sees": "answer"}
    return make_method(OracleRAGModule, folder, **settings | options)


def task(name: str, *contexts: str, **splits: Any) -> PythonTask:
    examples = [asked("a b", context) for context in contexts]
    return PythonTask(name, **{"train": examples, "test": examples, **splits})


def stream(*tasks: PythonTask, **options: Any) -> ContinualDataModule:
    settings: dict[str, Any] = {"batch_size": 2, "steps": 5, "suites": [task("prior", "", "")]}
    return ContinualDataModule(list(tasks), **settings | options)


# ---------------------------------------------------------------- the prompt


def test_the_context_stands_in_the_prompt_that_is_answered(model_dir: Path) -> None:
    module = rag(model_dir)
    decode = module.tokenizer.decode
    found = module.encoder.student_ids(asked("a b", "c d"))
    assert decode(found) == "user : c d now a b assistant :"
    assert decode(module.encoder.student_ids(asked("a b"))) == "user : a b assistant :"


def test_the_default_template() -> None:
    module = OracleRAGModule()
    assert module.rag_template.render(asked("Q?", "facts {prompt}")) == "facts {prompt}\n\nQ?"


def test_only_the_last_turn_changes(model_dir: Path) -> None:
    module = rag(model_dir)
    system = {"role": "system", "content": "g"}
    example = Example((system, {"role": "user", "content": "a"}), "b", "b", "c")
    found = module.tokenizer.decode(module.encoder.student_ids(example))
    assert found == "system : g user : c now a assistant :"


@pytest.mark.parametrize("entry", ["test", "validate", "predict"])
def test_every_entry_point_asks_with_the_context(
    model_dir: Path, tmp_path: Path, entry: str
) -> None:
    module = rag(model_dir)
    seen: list[str] = []
    respond = module.respond

    def spy(prompts: Any, sampling: Any) -> Any:
        seen.extend(module.tokenizer.decode(prompt) for prompt in prompts)
        return respond(prompts, sampling)

    module.respond = spy  # type: ignore[method-assign]
    examples = [asked("a b", "c"), asked("d")]
    data = stream(task("facts", "c", validation=examples, test=examples), suites=[])
    trainer = Trainer(
        logger=False, accelerator="cpu", default_root_dir=tmp_path, enable_progress_bar=False
    )
    getattr(trainer, entry)(module, datamodule=data)
    assert seen == ["user : c now a b assistant :", "user : d assistant :"]


# ---------------------------------------------------------------- nothing trains


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"accumulate_grad_batches": 3},
        {"precision": "bf16-mixed"},
        {"data": {"from_base_each_task": True, "reset_optimizer_between_tasks": True}},
        {"data": {"mixtures": [PastReplay(1.0), Reinvoke(0.5)], "general": [task("any", "")]}},
    ],
    ids=["plain", "accumulation", "precision", "from base", "mixtures"],
)
def test_the_weights_stay_and_a_stage_takes_one_batch(
    fit: Fit, model_dir: Path, options: dict[str, Any]
) -> None:
    options = dict(options)
    expected = rag(model_dir).model.state_dict()
    module = rag(
        model_dir,
        penalty=EWC(1.0),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=0.1, weight_decay=0.5),
    )
    data = stream(task("one", "c", "d"), task("two", "e"), **options.pop("data", {}))
    trainer, _ = fit(module=module, data=data, **options)
    assert trainer.global_step == 2
    assert data.schedule_steps() == [1, 1]
    found = module.state_dict()
    assert {name.split(".")[0] for name in found} == {"student"}
    assert all(torch.equal(value, found[f"student.{name}"]) for name, value in expected.items())
    assert module.base is None, "no second model is kept for a student that is the base"


def test_a_run_leaves_a_whole_report(fit: Fit, model_dir: Path) -> None:
    trainer, _ = fit(module=rag(model_dir), data=stream(task("one", "c", "d"), task("two", "e")))
    folder = Path(trainer.log_dir)
    assert (folder / "retention.json").exists()
    assert (folder / "checkpoints" / "last.ckpt").exists()


# ---------------------------------------------------------------- missing contexts


def test_what_has_no_context_is_asked_bare_and_counted(
    fit: Fit, model_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="sdft.methods.oracle_rag"):
        fit(module=rag(model_dir), data=stream(task("one", "c", "", ""), task("two", "e")))
    assert [r.message for r in caplog.records if r.name == "sdft.methods.oracle_rag"] == [
        "task 'one', test: 2 of 3 examples have no context and are asked their bare prompt",
        "task 'prior', test: 2 of 2 examples have no context and are asked their bare prompt",
    ]


def test_no_context_at_all_is_an_error(fit: Fit, model_dir: Path) -> None:
    suite = task("prior", "c")  # a suite's context does not count
    with pytest.raises(ValueError, match=r"not one test example of 'one', 'two' has a context"):
        fit(module=rag(model_dir), data=stream(task("one", ""), task("two", ""), suites=[suite]))


def test_without_a_test_split_validation_counts(fit: Fit, model_dir: Path) -> None:
    examples = [asked("a", "c")]
    one = PythonTask("one", train=[asked("a")], validation=examples)
    fit(module=rag(model_dir), data=stream(one))


@pytest.mark.parametrize(
    ("template", "named"),
    [
        ("{prompt}", r"rag_template lacks \{context\}"),
        ("{context}", r"rag_template lacks \{prompt\}"),
        ("{context} {prompt} {demonstration}", r"must not show the \{demonstration\}"),
    ],
)
def test_a_bad_template_is_named(template: str, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        OracleRAGModule(rag_template=template)
