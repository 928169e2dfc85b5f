"""Medical: HuatuoGPT-o1's open questions (arXiv 2412.18925), graded by a judge."""

from __future__ import annotations

from typing import Any

from sdft.jsonl import Record
from sdft.scorers import Scorer
from sdft.task_kinds.converted import ConvertedTask, File, first_text, needed

QUESTION = ("prompt", "Question", "question", "Open-ended Verifiable Question")
ANSWER = ("answer", "Ground-True Answer", "Response", "response")
DEMONSTRATION = ("demonstration", "Response", "response")
THOUGHTS = ("Complex_CoT", "thoughts")


class MedicalTask(ConvertedTask):
    """Open medical questions; a judge compares the response with the reference answer.

    A record has HuatuoGPT-o1's fields, `Question`, `Complex_CoT` and `Response` (to train), or
    `Open-ended Verifiable Question` and `Ground-True Answer`; or `prompt` and `answer`. The
    reference is the ground truth where there is one, else the response.

    Args:
        scorer: Scores a response against the reference: a `Judge` with a model of your choice.
        name: Unique within a run.
        train: JSONL file with the training records.
        validation: JSONL file with the validation records.
        test: JSONL file with the test records.
        path: A dataset in place of files: a hub name, a folder, or a folder of `save_to_disk`.
        subset: The configuration of a dataset that has several (`en`).
        splits: Which split of the dataset is `train`, `validation` and `test`.
        with_thoughts: Put a record's chain of thought before its demonstration.
        limit: Use at most the first so many records of each split.
        steps: Optimizer steps spent on the task; exclusive with `epochs`.
        epochs: Passes over the training examples; exclusive with `steps`.
    """

    def __init__(
        self,
        scorer: Scorer,
        name: str = "medical",
        train: File | None = None,
        validation: File | None = None,
        test: File | None = None,
        path: str | None = None,
        subset: str | None = None,
        splits: dict[str, str] | None = None,
        with_thoughts: bool = False,
        limit: int | None = None,
        steps: int | None = None,
        epochs: int | None = None,
    ) -> None:
        files: dict[Any, File | None] = {"train": train, "validation": validation, "test": test}
        super().__init__(name, scorer, files, path, subset, splits, limit, steps, epochs)
        self.with_thoughts = with_thoughts

    def convert(self, record: Record) -> Record:
        """See `medical_record`."""
        return medical_record(record, self.with_thoughts)


def medical_record(record: Record, with_thoughts: bool = False) -> dict[str, Any]:
    """A medical record as prompt, answer and demonstration.

    Args:
        record: As HuatuoGPT-o1's data sets have it.
        with_thoughts: Put the chain of thought before the demonstration.

    Raises:
        ValueError: No question, or no answer.
    """
    prompt = record.get("prompt") if isinstance(record.get("prompt"), list) else None
    prompt = prompt or needed(first_text(record, *QUESTION), record, *QUESTION)
    answer = needed(first_text(record, *ANSWER), record, *ANSWER)
    shown = first_text(record, *DEMONSTRATION) or answer
    thoughts = first_text(record, *THOUGHTS) if with_thoughts else None
    if thoughts is not None:
        shown = f"{thoughts}\n\n{shown}"
    return {"prompt": prompt, "answer": answer, "demonstration": shown}
