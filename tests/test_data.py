"""The task stream: stages, limits, and how many steps they take."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import echo_examples, make_data, make_module, make_task, save_model
from lightning.pytorch import Callback, Trainer

from sdft import ContinualDataModule, Example, PythonTask
from sdft.batch import Batch
from sdft.encoded import Encoded, collate
from sdft.mixtures import Joint, PastReplay, Reinvoke, stage_parts

pytestmark = pytest.mark.usefixtures("no_plots")

Fit = Callable[..., Any]


class Seen(Callback):
    """The prompts of every training batch, by stage, and what the optimizer remembers."""

    def __init__(self) -> None:
        self.batches: list[tuple[int, list[str]]] = []
        self.moments: list[tuple[int, int, int]] = []

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: Any, batch: Batch, batch_idx: int
    ) -> None:
        self.batches.append((trainer.current_epoch, [e.prompt for e in batch.examples]))

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Any) -> None:
        self.moments.append((trainer.current_epoch, trainer.global_step, len(optimizer.state)))

    def prompts(self, stage: int) -> list[str]:
        return [prompt for s, prompts in self.batches if s == stage for prompt in prompts]

    def sizes(self, stage: int) -> list[int]:
        return [len(prompts) for s, prompts in self.batches if s == stage]


def distinct(count: int, offset: int = 0) -> list[Example]:
    """Examples told apart by their prompts."""
    letters = "abcdefgh"
    names = [f"{a} {b}" for a in letters for b in letters][offset : offset + count]
    return [Example(({"role": "user", "content": name},), "a", "a") for name in names]


def tasks_of(*counts: int, **options: Any) -> list[PythonTask]:
    return [
        PythonTask(f"task{i}", train=distinct(n, 10 * i), test=distinct(1), **options)
        for i, n in enumerate(counts)
    ]


# ---------------------------------------------------------------- stages


def test_each_stage_trains_its_own_task_in_order(fit: Fit) -> None:
    seen = Seen()
    data = ContinualDataModule(tasks_of(5, 3, 7), batch_size=2, epochs=1)
    trainer, _ = fit(data=data, callbacks=[seen])
    for stage, count in enumerate((5, 3, 7)):
        expected = sorted(example.prompt for example in distinct(count, 10 * stage))
        assert sorted(seen.prompts(stage)) == expected
    assert seen.sizes(0) == [2, 2, 1]
    assert trainer.global_step == 3 + 2 + 4


def test_the_order_is_the_seeds(fit: Fit) -> None:
    orders = []
    for noise in (0, 1):
        seen = Seen()
        torch.manual_seed(noise)
        fit(data=ContinualDataModule(tasks_of(6), batch_size=2, epochs=2), callbacks=[seen])
        orders.append(seen.batches)
    assert orders[0] == orders[1]
    prompts = [prompt for _, batch in orders[0] for prompt in batch]
    assert prompts[:6] != prompts[6:]
    assert sorted(prompts[:6]) == sorted(prompts[6:])


def test_unshuffled(fit: Fit) -> None:
    seen = Seen()
    data = ContinualDataModule(tasks_of(3), batch_size=2, epochs=2, shuffle=False)
    fit(data=data, callbacks=[seen])
    assert seen.prompts(0) == [example.prompt for example in distinct(3)] * 2


def test_fewer_rows_than_a_batch(fit: Fit) -> None:
    seen = Seen()
    trainer, _ = fit(
        data=ContinualDataModule(tasks_of(2), batch_size=32, steps=3), callbacks=[seen]
    )
    assert seen.sizes(0) == [2, 2, 2]
    assert trainer.global_step == 3


@pytest.mark.parametrize(
    ("data", "task", "accumulate", "batches", "steps"),
    [
        ({"steps": 4}, {}, 1, 4, 4),
        ({"steps": 4}, {}, 3, 12, 4),
        ({"epochs": 2}, {}, 1, 6, 6),
        ({"epochs": 2}, {}, 4, 6, 2),  # 6 batches make 4 + 2: the rest steps too
        ({}, {}, 1, 3, 3),  # one pass
        ({"steps": 4}, {"epochs": 1}, 1, 3, 3),  # the task's own schedule wins
        ({"epochs": 2}, {"steps": 5}, 1, 5, 5),
    ],
)
def test_steps_and_epochs(
    fit: Fit, data: dict[str, int], task: dict[str, int], accumulate: int, batches: int, steps: int
) -> None:
    seen = Seen()
    stream = ContinualDataModule(tasks_of(6, **task), batch_size=2, **data)
    trainer, _ = fit(data=stream, callbacks=[seen], accumulate_grad_batches=accumulate)
    assert len(seen.batches) == batches
    assert trainer.global_step == steps == sum(stream.schedule_steps())


def test_the_parts_of_a_stage() -> None:
    """Each mixture splits what the one before made of it; an empty part is none."""
    assert stage_parts([], 10) == [10]
    assert stage_parts([Reinvoke(share=0.3)], 10) == [7, 3]
    assert stage_parts([Reinvoke(share=0.3)], 1) == [1]
    assert stage_parts([PastReplay(), Reinvoke(0.5), Joint(), Reinvoke(0.5)], 8) == [2, 2, 2, 2]


def test_fewer_epochs_than_stages_stop_early(fit: Fit) -> None:
    trainer, _ = fit(max_epochs=1)
    assert trainer.global_step == 3
    names = {path.name for path in (Path(trainer.log_dir) / "checkpoints").glob("st*")}
    assert names == {"step-2.ckpt", "step-3.ckpt", "stage-1-first.ckpt"}


def test_more_epochs_than_stages_change_nothing(fit: Fit) -> None:
    trainer, _ = fit(max_epochs=9)
    assert trainer.global_step == 6


@pytest.mark.parametrize("reset", [True, False])
def test_the_optimizer_forgets_between_tasks_if_asked(fit: Fit, reset: bool) -> None:
    seen = Seen()
    fit(data=make_data(reset_optimizer_between_tasks=reset), callbacks=[seen])
    remembered = {(stage, step): count > 0 for stage, step, count in seen.moments}
    assert remembered[0, 0] is False
    assert remembered[0, 1] is True
    assert remembered[1, 3] is not reset
    assert remembered[1, 4] is True


# ---------------------------------------------------------------- limits


def length_of(model_dir: Path, example: Example) -> tuple[int, int]:
    encoder = make_module(model_dir).encoder
    return len(encoder.student_ids(example)), len(encoder.teacher_ids(example))


def long_and_short() -> list[Example]:
    """Four examples: fits, long prompt, long demonstration, both."""
    long = " ".join(["a"] * 30)
    pairs = [("a", "b"), (long, "b"), ("a", long), (long, long)]
    return [Example(({"role": "user", "content": p},), d, d) for p, d in pairs]


def limited(fit: Fit, **options: Any) -> tuple[ContinualDataModule, Seen]:
    seen = Seen()
    task = PythonTask("mixed", train=long_and_short(), test=long_and_short())
    data = ContinualDataModule([task], batch_size=4, epochs=1, **options)
    fit(data=data, callbacks=[seen])
    return data, seen


def test_what_does_not_fit_is_dropped_counted_and_reported(
    fit: Fit, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="sdft.data"):
        data, seen = limited(fit, max_student_tokens=20, max_teacher_tokens=20)
    assert seen.prompts(0) == ["a"]
    assert [len(data.encoded(data.tasks[0], split)) for split in ("train", "test")] == [1, 2]
    assert [record.message for record in caplog.records] == [
        "task 'mixed', train: dropped 3 of 4 examples (2 student prompts over 20 tokens, 1 teacher "
        "prompts over 20)",
        "task 'mixed', test: dropped 2 of 4 examples (2 student prompts over 20 tokens, 0 teacher "
        "prompts over 20)",
    ]


def test_student_and_teacher_have_limits_of_their_own(fit: Fit) -> None:
    _, seen = limited(fit, max_student_tokens=20, max_teacher_tokens=60)
    assert seen.prompts(0) == ["a", "a"] if seen.prompts(0)[0] == "a" else False
    _, seen = limited(fit, max_student_tokens=60, max_teacher_tokens=45)
    assert sorted(map(len, seen.prompts(0))) == [1, 1, 59]


def test_the_longest_that_fits_is_kept_whole(fit: Fit, model_dir: Path) -> None:
    student, teacher = length_of(model_dir, long_and_short()[3])
    data, _ = limited(fit, max_student_tokens=student, max_teacher_tokens=teacher)
    encoded = data.encoded(data.tasks[0], "train")
    assert len(encoded) == 4
    assert (len(encoded[3].student_ids), len(encoded[3].teacher_ids)) == (student, teacher)
    data, _ = limited(fit, max_student_tokens=student, max_teacher_tokens=teacher - 1)
    assert len(data.encoded(data.tasks[0], "train")) == 3
    data, _ = limited(fit, max_student_tokens=student - 1, max_teacher_tokens=teacher)
    assert len(data.encoded(data.tasks[0], "train")) == 2


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_models_context_limits_both_prompts(fit: Fit, tmp_path: Path, family: str) -> None:
    """GPT-2 has no position beyond its context: a prompt that overflows it would crash."""
    key = "n_positions" if family == "gpt2" else "max_position_embeddings"
    folder = save_model(tmp_path / family, family=family, **{key: 40})
    task = PythonTask("mixed", train=long_and_short(), test=long_and_short()[:1])
    data = ContinualDataModule([task], batch_size=4, epochs=1)
    fit(module=make_module(folder, max_new_tokens=8), data=data)
    assert [e.example.prompt for e in data.encoded(task, "train")] == ["a"]


@pytest.mark.parametrize("key", ["max_student_tokens", "max_teacher_tokens"])
def test_nothing_left_is_an_error(fit: Fit, key: str) -> None:
    with pytest.raises(ValueError, match=r"'mixed', train: dropped 4 of 4.*none is left") as error:
        limited(fit, **{key: 2})
    assert key in str(error.value)


# ---------------------------------------------------------------- evaluation


def test_loaders_of_each_entry_point(model_dir: Path, tmp_path: Path) -> None:
    silent = PythonTask("no-validation", train=distinct(2), test=distinct(3))
    data = ContinualDataModule(
        [make_task("first", test=5), silent], suites=[make_task("prior")], eval_batch_size=2
    )
    trainer = Trainer(
        logger=False, accelerator="cpu", default_root_dir=tmp_path, enable_progress_bar=False
    )
    module = make_module(model_dir)
    validated = trainer.validate(module, datamodule=data, verbose=False)
    names = {key.split("/")[1] for metrics in validated for key in metrics}
    assert names == {"first", "prior"}
    tested = trainer.test(module, datamodule=data, verbose=False)
    assert {key for metrics in tested for key in metrics} == {
        f"test/{name}/{key}"
        for name in ("first", "no-validation", "prior")
        for key in ("accuracy", "length")
    }
    predicted = trainer.predict(module, datamodule=data)
    counts = [sum(map(len, batches)) for batches in predicted]
    assert counts == [5, 3, 4]


def test_metrics_of_an_entry_point_are_means_over_examples(model_dir: Path, tmp_path: Path) -> None:
    """Batches of 2 + 1: the mean over examples is not the mean over batches."""

    def scorer(response: str, example: Example) -> float:
        return float(example.answer == "last")

    examples = [*distinct(2), Example(({"role": "user", "content": "c"},), "last")]
    task = PythonTask("only", train=distinct(1), test=examples, scorer=scorer)
    data = ContinualDataModule([task], eval_batch_size=2)
    trainer = Trainer(
        logger=False, accelerator="cpu", default_root_dir=tmp_path, enable_progress_bar=False
    )
    metrics = trainer.test(make_module(model_dir), datamodule=data, verbose=False)[0]
    assert metrics["test/only/accuracy"] == pytest.approx(1 / 3)


# ---------------------------------------------------------------- bad values


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"tasks": []}, "data.tasks is empty"),
        ({"tasks": tasks_of(1) * 2}, "named 'task0'"),
        ({"suites": tasks_of(1)}, "named 'task0'"),
        ({"batch_size": 0}, "data.batch_size must be at least 1, found 0"),
        ({"eval_batch_size": -1}, "data.eval_batch_size"),
        ({"steps": 0}, "data.steps"),
        ({"epochs": 0}, "data.epochs"),
        ({"steps": 1, "epochs": 1}, "data.steps and data.epochs exclude each other"),
        ({"max_student_tokens": 0}, "data.max_student_tokens"),
        ({"max_teacher_tokens": 0}, "data.max_teacher_tokens"),
    ],
)
def test_a_bad_value_is_named(options: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        ContinualDataModule(**{"tasks": tasks_of(1), **options})


def test_a_task_without_training_examples_is_named(fit: Fit) -> None:
    with pytest.raises(ValueError, match="'bare' has no training examples"):
        fit(data=ContinualDataModule([PythonTask("bare", test=distinct(1))]))


def test_an_error_in_a_prompt_names_task_and_split(fit: Fit) -> None:
    with_context = Example(({"role": "user", "content": "a"},), "a", "a", context="c")
    data = ContinualDataModule([PythonTask("wordy", train=[with_context])])
    with pytest.raises(ValueError, match=r"'wordy', train: .*no \{context\}"):
        fit(data=data)


def test_collate_keeps_what_belongs_together() -> None:
    one, two = echo_examples(2)
    batch = collate([Encoded(one, [1], [2, 3]), Encoded(two, [4, 5], [])])
    assert batch.examples == [one, two]
    assert batch.student_ids == [[1], [4, 5]]
    assert batch.teacher_ids == [[2, 3], []]
