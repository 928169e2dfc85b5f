"""python tools/prepare_gsm8k.py --source path/to/gsm8k --out data/gsm8k

Turns grade-school maths (openai/gsm8k, MIT; arXiv 2110.14168) into a task: solve it in steps.

    --source  a hub name (openai/gsm8k), or a folder with train.jsonl and test.jsonl, one
              {"question", "answer"} per line
    --out     gets train.jsonl, validation.jsonl, test.jsonl and prepared.json
    --shares  percent of training and validation rows, in the proportion of the first two (75 5 20);
              the test rows are the source's own
    --seed    order and choice of the rows (0)

Demonstrations are the worked solutions without their calculator marks (`<<48/2=24>>`), the answer
is the number behind `####`. No question stands in two splits. Score with `NumericMatch` and the
marker `####`.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from record_set import arguments, prepare, sources
from splits import run

from sdft.jsonl import Record

PROMPT = "{}\n\nThink step by step. End with a line that holds #### and the number alone."
MARK = re.compile(r"<<[^<>]*>>")


def solved(record: Record) -> dict[str, Any]:
    """A question with its solution.

    Raises:
        ValueError: A field is missing, or the answer has no `####`.
    """
    question, answer = record.get("question"), record.get("answer")
    if not isinstance(question, str) or not isinstance(answer, str):
        raise ValueError(f"'question' and 'answer' must be texts; fields found: {sorted(record)}")
    number = answer.rpartition("####")[2].strip() if "####" in answer else ""
    if not number:
        raise ValueError(f"no number behind '####' in the answer {answer[-60:]!r}")
    prompt = PROMPT.format(question.strip())
    return {"prompt": prompt, "answer": number, "demonstration": MARK.sub("", answer).strip()}


def write(options: argparse.Namespace) -> None:
    """Act on the command line."""
    if options.source == options.default_source and options.test_split is None:
        options.test_split = "test"
    prepare(options, sources(options), solved)


if __name__ == "__main__":
    run(write, arguments("Grade-school maths into a task.", source="openai/gsm8k", subset="main"))
