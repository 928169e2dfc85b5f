"""python tools/prepare_science.py --out data/science

Turns multiple choice of SciKnowEval (arXiv 2406.09098) into the science task.

    --source    a hub name (hicai-zju/SciKnowEval), or files of its records or of `ScienceTask`'s
    --subset    domain of the hub's data set (Chemistry)
    --split     its split (test, the only one)
    --level     level of the questions: L1 … L5 (L3, as in the paper); `all` keeps all
    --kind      type of the questions (mcq-4-choices)
    --out       gets train.jsonl, validation.jsonl, test.jsonl and prepared.json
    --shares    percent of training, validation and test rows (75 5 20)
    --seed      order and choice of the rows (0)

No prompt stands in two splits. Use the files with `ScienceTask`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from record_set import arguments, prepare, sources
from splits import run

from sdft.jsonl import Record
from sdft.task_kinds.science import science_record


def wanted(record: Record, level: str, kind: str) -> bool:
    """Whether a question is of a level and a type; one that names neither is."""
    details = record.get("details") or {}
    own = details.get("level", level)
    return level in ("all", own) and record.get("type", kind) == kind


def write(options: argparse.Namespace) -> None:
    """Act on the command line."""

    def convert(record: Record) -> dict[str, Any] | None:
        fits = wanted(record, options.level, options.kind)
        return science_record(record) if fits else None

    prepare(options, sources(options), convert)


if __name__ == "__main__":
    parser = arguments(
        "Multiple choice of SciKnowEval into the science task.",
        source="hicai-zju/SciKnowEval",
        subset="Chemistry",
        split="test",
    )
    parser.add_argument("--level", default="L3", help="L1 … L5, or all (L3)")
    parser.add_argument("--kind", default="mcq-4-choices", help="type of question")
    run(write, parser)
