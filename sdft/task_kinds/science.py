"""Science: SciKnowEval's multiple choice (arXiv 2406.09098)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sdft.jsonl import Record
from sdft.scorers import LetterMatch, Scorer
from sdft.task_kinds.converted import ConvertedTask, File, first_text, needed

SYSTEM = """
Given a question and four options, please select the right answer. Respond in the following format:
<reasoning>
...
</reasoning>
<answer>
...
</answer>

For the answer, only output the letter corresponding to the correct option (A, B, C, or D), and \
nothing else. Do not restate the answer text. For example, if the answer is "A", just output:
<answer>
A
</answer>
"""
"""The system turn of the published evaluation set."""


class ScienceTask(ConvertedTask):
    """Multiple choice in SciKnowEval's schema, answered by a letter in `<answer>`.

    A record has `question`, `choices` (`{"label": […], "text": […]}`) and `answerKey`, as
    SciKnowEval publishes them; or `prompt` (messages) and `answer`, a letter, as the paper's
    evaluation set does. A `demonstration` is used where there is one, else it is the letter in its
    tags.

    Args:
        name: Unique within a run.
        train: JSONL file with the training records.
        validation: JSONL file with the validation records.
        test: JSONL file with the test records.
        path: A dataset in place of files: a hub name, a folder, or a folder of `save_to_disk`.
        subset: The configuration of a dataset that has several.
        splits: Which split of the dataset is `train`, `validation` and `test`.
        scorer: Scores a response against the letter; `LetterMatch()` by default.
        limit: Use at most the first so many records of each split.
        steps: Optimizer steps spent on the task; exclusive with `epochs`.
        epochs: Passes over the training examples; exclusive with `steps`.
    """

    def __init__(
        self,
        name: str = "science",
        train: File | None = None,
        validation: File | None = None,
        test: File | None = None,
        path: str | None = None,
        subset: str | None = None,
        splits: dict[str, str] | None = None,
        scorer: Scorer | None = None,
        limit: int | None = None,
        steps: int | None = None,
        epochs: int | None = None,
    ) -> None:
        files: dict[Any, File | None] = {"train": train, "validation": validation, "test": test}
        scorer = scorer or LetterMatch()
        super().__init__(name, scorer, files, path, subset, splits, limit, steps, epochs)

    def convert(self, record: Record) -> Record:
        """See `science_record`."""
        return science_record(record)


def science_record(record: Record) -> dict[str, Any]:
    """A record of multiple choice as prompt, answer and demonstration.

    Raises:
        ValueError: Something is missing, or the answer is none of the choices.
    """
    letter = needed(first_text(record, "answerKey", "answer"), record, "answerKey", "answer")
    letter = letter.strip().upper()
    prompt = record.get("prompt")
    if not isinstance(prompt, str | list):  # SciKnowEval's own holds instructions for its prompts
        prompt = [
            {"role": "system", "content": SYSTEM},
            {"role": "user", "content": _question(record, letter)},
        ]
    shown = first_text(record, "demonstration") or f"<answer>\n{letter}\n</answer>"
    return {"prompt": prompt, "answer": letter, "demonstration": shown}


def _question(record: Record, letter: str) -> str:
    question = needed(first_text(record, "question"), record, "question")
    choices = record.get("choices")
    if not isinstance(choices, Mapping):
        raise ValueError(f"'choices' must hold 'label' and 'text', found {choices!r}")
    labels, texts = choices.get("label") or [], choices.get("text") or []
    if len(labels) != len(texts) or letter not in labels:
        raise ValueError(f"the answer {letter!r} is none of the choices {labels} ({len(texts)})")
    options = "\n".join(f"{label}: {text}" for label, text in zip(labels, texts, strict=True))
    return f"{question}\n\n{options}"
