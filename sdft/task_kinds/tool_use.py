"""Tool use: ToolAlpaca's questions, answered by calls of an API (arXiv 2306.05301)."""

from __future__ import annotations

import json
from typing import Any

from sdft.jsonl import Record, fill_template
from sdft.scorers import Scorer, ToolCallMatch
from sdft.scorers.tool_calls import wanted_calls
from sdft.task_kinds.converted import ConvertedTask, File, first_text, needed

PROMPT = """Your task is to answer the user's question using available tools.{blank}
You have access to the following tools:
Name: {name}
Description: {description}
Documentation:
{nl_documentation}

Use the following format:
Thought: you should always think about what to do
Action: the action to take, should be one of the tool names.
Action Input: the input to the action, must be in JSON format. All of the action input must be \
realistic and from the user.

Begin!
Question: {instruction}"""
"""The prompt of the published evaluation set, the blank at the end of its first line included."""


class ToolUseTask(ConvertedTask):
    """Tool use in ToolAlpaca's schema: an API's documentation, a question, the calls to make.

    A record has `prompt`, or the `name`, `description`, `nl_documentation` and `instruction` that
    make it; `golden_answer`, a list of `{"Action", "Action_Input"}` (or that list as a text); and,
    to train, `golden_response` (a text, or several in turn): without it the demonstration is the
    calls alone. Records with `prompt`, `answer` and `demonstration` are taken as they are.

    Args:
        name: Unique within a run.
        train: JSONL file with the training records.
        validation: JSONL file with the validation records.
        test: JSONL file with the test records.
        path: A dataset in place of files: a hub name, a folder, or a folder of `save_to_disk`.
        subset: The configuration of a dataset that has several.
        splits: Which split of the dataset is `train`, `validation` and `test`.
        scorer: Scores a response against the calls; `ToolCallMatch()` by default.
        limit: Use at most the first so many records of each split.
        steps: Optimizer steps spent on the task; exclusive with `epochs`.
        epochs: Passes over the training examples; exclusive with `steps`.
    """

    def __init__(
        self,
        name: str = "tool_use",
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
        scorer = scorer or ToolCallMatch()
        super().__init__(name, scorer, files, path, subset, splits, limit, steps, epochs)

    def convert(self, record: Record) -> Record:
        """See `tool_use_record`."""
        return tool_use_record(record)


def tool_use_record(record: Record) -> dict[str, Any]:
    """A record of ToolAlpaca's schema as prompt, answer and demonstration.

    Raises:
        ValueError: Something is missing, or the golden answer holds no calls.
    """
    prompt = record.get("prompt") or _prompt(record)
    answer = _as_text(needed(_first(record, "answer", "golden_answer"), record, "golden_answer"))
    wanted_calls(answer)  # before anything is scored with it
    shown = _first(record, "demonstration", "golden_response")
    return {"prompt": prompt, "answer": answer, "demonstration": _demonstration(shown, answer)}


def _prompt(record: Record) -> str:
    documentation = record.get("nl_documentation")
    if isinstance(documentation, str):
        documentation = documentation.rstrip("\n")
    return fill_template(PROMPT, {**record, "nl_documentation": documentation, "blank": " "})


def _first(record: Record, *fields: str) -> Any:
    return next((record[field] for field in fields if record.get(field) is not None), None)


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _demonstration(shown: Any, answer: str) -> str:
    if shown is None:
        calls = wanted_calls(answer)
        return "\n".join(
            f"Action: {call.name}\nAction Input: {json.dumps(call.arguments, ensure_ascii=False)}"
            for call in calls
        )
    texts = shown if isinstance(shown, list) else [shown]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(f"'golden_response' must be a text or a list of texts, found {shown!r}")
    return "\n".join(texts)


def flattened(api: Record) -> list[Record]:
    """The questions of one API in ToolAlpaca's own files, in the schema of `ToolUseTask`.

    `Instructions` with `Golden_Answers` (its evaluation files), or `Instances` with their
    `intermediate_steps` (its training file). Questions without a call are left out, and so are
    calls of `getDetails`, by which ToolAlpaca's agent asks the user back.

    Raises:
        ValueError: Neither is there.
    """
    described = {
        "name": first_text(api, "Name") or "",
        "description": first_text(api, "Description") or "",
        "nl_documentation": needed(first_text(api, "NLDocumentation"), api, "NLDocumentation"),
    }
    if "Golden_Answers" in api:
        questions = zip(api["Instructions"], api["Golden_Answers"], strict=True)
        rows = [{"instruction": text, "golden_answer": calls} for text, calls in questions]
    elif "Instances" in api:
        rows = [row for instance in api["Instances"] if (row := _instance(instance))]
    else:
        raise ValueError(f"no field 'Golden_Answers' or 'Instances'; fields found: {sorted(api)}")
    return [{**described, **row} for row in rows if row["golden_answer"]]


def _instance(instance: Record) -> dict[str, Any] | None:
    steps = [step[0] for step in instance.get("intermediate_steps") or []]
    steps = [step for step in steps if step[0] != "getDetails"]
    if not steps or not isinstance(instance.get("input"), str):
        return None
    calls = [{"Action": name, "Action_Input": text} for name, text, _ in steps]
    question = instance["input"].rsplit("\nHint: ", 1)[0]
    return {
        "instruction": question,
        "golden_answer": calls,
        "golden_response": [said.strip() for _, _, said in steps],
    }
