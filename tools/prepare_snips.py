"""python tools/prepare_snips.py --source path/to/snips --out data/snips --seed 0 --validation 20

Turns spoken requests into tasks: a request is answered by one function call, written as JSON.

    --source      folder with train.jsonl and test.jsonl, one {"request", "intent", "slots"} a line
                  (the 2017-06 custom intent engines of sonos/nlu-benchmark, CC0 1.0)
    --out         gets everyday/, media/ and functions/, each with train.jsonl, validation.jsonl,
                  test.jsonl, one {"prompt", "demonstration", "answer"} per line
    --seed        choice and order of the rows (0)
    --validation  rows per function taken out of the training rows (20)
    --train       most training rows per function (all)
    --test        most test rows per function (all)

Every prompt names all seven functions; everyday and media differ in which of them are right, and
functions, which has all requests, asks for the function's name alone. No request stands in two
splits, whatever its case and spacing.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from splits import Row, Sizes, arguments, disjoint_splits, read_rows, run, write_jsonl

TASKS = {
    "everyday": ("AddToPlaylist", "BookRestaurant", "GetWeather"),
    "media": ("PlayMusic", "RateBook", "SearchCreativeWork", "SearchScreeningEvent"),
}
FUNCTIONS = sorted(name for names in TASKS.values() for name in names)
PROMPT = "Turn the request into one function call, written as JSON.\nFunctions: {}\nRequest: {}"
CHOICE = (
    "Functions: {}\nRequest: {}\n"
    "Which function serves the request? Answer with the function's name only."
)


def prompt(request: str) -> str:
    """What the student reads."""
    return PROMPT.format(", ".join(FUNCTIONS), request)


def function_call(row: Row) -> str:
    """The right call, as compact JSON.

    Raises:
        ValueError: An unknown function, or slots that are not texts.
    """
    slots = row.record.get("slots")
    if row.label not in FUNCTIONS:
        raise ValueError(f"{row.place}: unknown intent {row.label!r}; known: {FUNCTIONS}")
    if not isinstance(slots, dict) or not all(isinstance(value, str) for value in slots.values()):
        raise ValueError(f"{row.place}: 'slots' must be an object of texts, found {slots!r}")
    return json.dumps({"name": row.label, "arguments": slots}, ensure_ascii=False)


def record(row: Row) -> dict[str, Any]:
    """One line of the framework's JSONL."""
    call = function_call(row)
    return {"prompt": prompt(row.text), "demonstration": call, "answer": call}


def choice(row: Row) -> dict[str, Any]:
    """A line that asks for the function's name alone."""
    asked = CHOICE.format(", ".join(FUNCTIONS), row.text)
    return {"prompt": asked, "demonstration": row.label, "answer": row.label}


def prepare(source: Path, out: Path, sizes: Sizes, seed: int) -> None:
    """Write the three tasks.

    Raises:
        ValueError: A source file that is missing or has a bad line; names it.
    """
    train, test = (read_rows(source / f"{s}.jsonl", "request", "intent") for s in ("train", "test"))
    records = {row.place: record(row) for row in (*train, *test)}  # before anything is written
    for split, rows in disjoint_splits(train, test, sizes, seed).items():
        for task, functions in TASKS.items():
            file = out / task / f"{split}.jsonl"
            lines = [records[row.place] for row in rows if row.label in functions]
            print(f"{file}: {write_jsonl(file, lines)} requests")
        file = out / "functions" / f"{split}.jsonl"
        print(f"{file}: {write_jsonl(file, map(choice, rows))} requests")


def write(options: argparse.Namespace) -> None:
    """Act on the command line."""
    sizes = Sizes(options.train, options.validation, options.test)
    prepare(options.source, options.out, sizes, options.seed)


if __name__ == "__main__":
    run(write, arguments("Spoken requests into function calls.", validation=20))
