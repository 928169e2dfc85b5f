"""python tools/prepare_general.py --out data/general

Turns general instructions into the prompts on which SFT + re-invoke and the soft-target methods
distil the base (`data.general`). Their answers are not used.

    --source  a hub name (databricks/databricks-dolly-15k, CC BY-SA 3.0), or files with
              `instruction` and `response`, or with `prompt` and `answer`
    --out     gets train.jsonl, validation.jsonl, test.jsonl and prepared.json
    --shares  percent of training, validation and test rows (100 0 0)
    --seed    order and choice of the rows (0)
    --limit   at most so many rows

Instructions about a text of their own are left out and counted.
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


def general_record(record: Record) -> dict[str, Any] | None:
    """An instruction as prompt and answer; None where it comes with a text."""
    if record.get("context"):
        return None
    prompt = record.get("prompt", record.get("instruction"))
    answer = record.get("answer", record.get("response"))
    return {"prompt": prompt, "answer": answer, "demonstration": answer}


def write(options: argparse.Namespace) -> None:
    """Act on the command line."""
    prepare(options, sources(options), general_record)


if __name__ == "__main__":
    parser = arguments(
        "General instructions into prompts for the base.",
        source="databricks/databricks-dolly-15k",
    )
    parser.set_defaults(shares=[100, 0, 0])
    run(write, parser)
