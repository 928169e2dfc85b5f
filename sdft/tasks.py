"""Tasks: a name, examples per split, and a scorer.

Examples come from JSONL files (`JSONLTask`), from Hugging Face datasets (`DatasetTask`) or from
memory (`PythonTask`). A task without training examples can only be evaluated, as a prior suite is.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from itertools import islice
from os import PathLike
from typing import Literal, get_args

from sdft.examples import Example
from sdft.hf_datasets import DatasetSource
from sdft.jsonl import Record, RecordFields, read_jsonl
from sdft.metrics import METRICS
from sdft.names import name_problem
from sdft.scorers import ExactMatch, Scorer

Split = Literal["train", "validation", "test"]


class Task(ABC):
    """One task of the sequence, or a prior suite that is only ever evaluated.

    Args:
        name: Unique within a run; it names rows, columns, files and log entries: letters, digits,
            `_`, `-` and `.`, at most 100, with a letter, a digit or `_` first.
        scorer: Scores a response against an example.
        steps: Optimizer steps spent on the task; exclusive with `epochs`.
        epochs: Passes over the training examples; exclusive with `steps`.

    Raises:
        ValueError: A name that cannot name files or is a metric's, a schedule that is not a whole
            number of at least 1, or both schedules.
    """

    def __init__(
        self, name: str, scorer: Scorer, steps: int | None = None, epochs: int | None = None
    ) -> None:
        if (problem := name_problem(name)) is not None:
            raise ValueError(f"task name {name[:200]!r}: {problem}")
        if name in METRICS:
            raise ValueError(f"task name {name!r}: the log keeps it for the metric")
        if steps is not None and epochs is not None:
            raise ValueError(f"task {name!r}: give steps or epochs, not both")
        _check_count(name, "steps", steps)
        _check_count(name, "epochs", epochs)
        self.name = name
        self.scorer = scorer
        self.steps = steps
        self.epochs = epochs

    @abstractmethod
    def examples(self, split: Split) -> Sequence[Example]:
        """The examples of one split; empty when the task has none."""


def _check_count(name: str, what: str, count: int | None) -> None:
    whole = isinstance(count, int) and not isinstance(count, bool)
    if count is not None and not (whole and count >= 1):
        raise ValueError(
            f"task {name!r}: {what} must be a whole number of at least 1, found {count!r}"
        )


class PythonTask(Task):
    """A task whose examples are made in Python.

    Args:
        name: Unique within a run.
        train: Examples to train on, each with a demonstration.
        validation: Examples to validate on.
        test: Examples to test on.
        scorer: Scores a response against an example; `ExactMatch()` by default.
        steps: Optimizer steps spent on the task; exclusive with `epochs`.
        epochs: Passes over the training examples; exclusive with `steps`.

    Raises:
        ValueError: A bad name or schedule, or a training example without a demonstration.
    """

    def __init__(
        self,
        name: str,
        train: Sequence[Example] = (),
        validation: Sequence[Example] = (),
        test: Sequence[Example] = (),
        scorer: Scorer | None = None,
        steps: int | None = None,
        epochs: int | None = None,
    ) -> None:
        super().__init__(name, scorer or ExactMatch(), steps, epochs)
        for index, example in enumerate(train):
            if not (example.demonstration or "").strip():
                raise ValueError(f"task {name!r}: training example {index} has no demonstration")
        self._examples: dict[Split, Sequence[Example]] = {
            "train": train,
            "validation": validation,
            "test": test,
        }

    def examples(self, split: Split) -> Sequence[Example]:
        """The examples of one split, as they were given."""
        return self._examples[split]


class RecordTask(Task):
    """A task read from records: reads a split when it is first asked for, and keeps it.

    Subclasses say where the records of a split come from.
    """

    def __init__(
        self,
        name: str,
        scorer: Scorer | None,
        fields: RecordFields,
        limit: int | None,
        steps: int | None,
        epochs: int | None,
    ) -> None:
        super().__init__(name, scorer or ExactMatch(), steps, epochs)
        _check_count(name, "limit", limit)
        self.fields = fields
        self.limit = limit
        self._read: dict[Split, Sequence[Example]] = {}

    @abstractmethod
    def records(self, split: Split) -> Iterator[tuple[str, Record]]:
        """The records of one split with their places; none when the task has no such split."""

    def examples(self, split: Split) -> Sequence[Example]:
        """The examples of one split; empty when the task has none.

        Raises:
            ValueError: A source that cannot be read or a record that cannot be used.
        """
        if split not in self._read:
            records = islice(self.records(split), self.limit)
            training = split == "train"
            self._read[split] = [self.fields.example(r, place, training) for place, r in records]
        return self._read[split]


class JSONLTask(RecordTask):
    """A task in JSONL files, UTF-8, one object per line.

    Args:
        name: Unique within a run.
        train: File with the training examples; relative paths start at the working directory.
        validation: File with the validation examples.
        test: File with the test examples.
        scorer: Scores a response against an example; `ExactMatch()` by default.
        prompt_field: Field with the prompt: a text, or a list of messages `{"role", "content"}`.
            Where it is absent, the field `messages` is read.
        answer_field: Field with the answer that the scorer compares with. A training line may leave
            it out when it has a demonstration, which then is the answer as well.
        demonstration_field: Field with the demonstration, which only the teacher sees.
        context_field: Field with extra text for the teacher, optional.
        prompt_template: A text with `{field}` placeholders that makes the prompt, in place of
            `prompt_field`. Only a word in braces is a placeholder; `{{word}}` gives `{word}`.
        demonstration_from_answer: Use the answer where the demonstration is absent.
        limit: Use at most the first so many lines of each file.
        steps: Optimizer steps spent on the task; exclusive with `epochs`.
        epochs: Passes over the training examples; exclusive with `steps`.
    """

    def __init__(
        self,
        name: str,
        train: str | PathLike[str] | None = None,
        validation: str | PathLike[str] | None = None,
        test: str | PathLike[str] | None = None,
        scorer: Scorer | None = None,
        prompt_field: str = "prompt",
        answer_field: str = "answer",
        demonstration_field: str = "demonstration",
        context_field: str = "context",
        prompt_template: str | None = None,
        demonstration_from_answer: bool = True,
        limit: int | None = None,
        steps: int | None = None,
        epochs: int | None = None,
    ) -> None:
        fields = RecordFields(
            prompt_field,
            answer_field,
            demonstration_field,
            context_field,
            prompt_template,
            demonstration_from_answer,
        )
        super().__init__(name, scorer, fields, limit, steps, epochs)
        self.files = {"train": train, "validation": validation, "test": test}

    def records(self, split: Split) -> Iterator[tuple[str, Record]]:
        """The lines of the file of one split."""
        file = self.files[split]
        return iter(()) if file is None else read_jsonl(file)


class DatasetTask(RecordTask):
    """A task in a Hugging Face dataset.

    Args:
        name: Unique within a run.
        path: A hub name, a builder (`json`, `csv`, `parquet`), a folder of data files, or a folder
            that `save_to_disk` wrote.
        subset: The configuration of a dataset that has several.
        splits: Which split of the dataset is `train`, `validation` and `test`, or a slice of one
            (`train[:90%]`); those left out are empty. By default the splits of the same names.
        data_files: Files for a builder: a path, several, or one per split of the dataset.
        scorer: Scores a response against an example; `ExactMatch()` by default.
        prompt_field: Column with the prompt: a text, or a list of messages `{"role", "content"}`.
            Where it is absent, the column `messages` is read.
        answer_field: Column with the answer that the scorer compares with; a class label gives its
            name. A training row may leave it out when it has a demonstration.
        demonstration_field: Column with the demonstration, which only the teacher sees.
        context_field: Column with extra text for the teacher, optional.
        prompt_template: A text with `{column}` placeholders that makes the prompt, in place of
            `prompt_field`. Only a word in braces is a placeholder; `{{word}}` gives `{word}`.
        demonstration_from_answer: Use the answer where the demonstration is absent.
        limit: Use at most the first so many rows of each split.
        steps: Optimizer steps spent on the task; exclusive with `epochs`.
        epochs: Passes over the training examples; exclusive with `steps`.
    """

    def __init__(
        self,
        name: str,
        path: str,
        subset: str | None = None,
        splits: dict[str, str] | None = None,
        data_files: str | list[str] | dict[str, str] | None = None,
        scorer: Scorer | None = None,
        prompt_field: str = "prompt",
        answer_field: str = "answer",
        demonstration_field: str = "demonstration",
        context_field: str = "context",
        prompt_template: str | None = None,
        demonstration_from_answer: bool = True,
        limit: int | None = None,
        steps: int | None = None,
        epochs: int | None = None,
    ) -> None:
        fields = RecordFields(
            prompt_field,
            answer_field,
            demonstration_field,
            context_field,
            prompt_template,
            demonstration_from_answer,
        )
        super().__init__(name, scorer, fields, limit, steps, epochs)
        unknown = sorted(set(splits or ()) - set(get_args(Split)))
        if unknown:
            raise ValueError(f"task {name!r}: splits must be of {get_args(Split)}, found {unknown}")
        self.source = DatasetSource(path, subset, data_files)
        self.splits = splits

    def records(self, split: Split) -> Iterator[tuple[str, Record]]:
        """The rows of one split."""
        if self.splits is None:
            return self.source.rows(split) if split in self.source else iter(())
        return self.source.rows(self.splits[split]) if split in self.splits else iter(())
