"""python tools/prepare_tool_use.py --source train_data.json --test-source eval_simulated.json \
--out data/tool_use

Turns ToolAlpaca (tangqiaoyu/ToolAlpaca, Apache-2.0; arXiv 2306.05301) into the tool-use task.

    --source       ToolAlpaca's train_data.json or eval_*.json (a list of APIs), records of
                   `ToolUseTask`'s schema (.jsonl, .json), or a hub name
    --test-source  the same with the test questions; without it they are taken out of --source
    --out          gets train.jsonl, validation.jsonl, test.jsonl and prepared.json
    --shares       percent of training, validation and test rows (75 5 20)
    --seed         order and choice of the rows (0)

Questions whose calls are not JSON are left out and counted. No prompt stands in two splits. Use the
files with `ToolUseTask`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from record_set import arguments, prepare, sources
from sources import Source, expanded
from splits import run

from sdft.task_kinds.tool_use import flattened, tool_use_record


def questions(source: Source) -> Source:
    """One record per question: ToolAlpaca's own files hold one per API."""
    if any("NLDocumentation" in record for _, record in source.records):
        return expanded(source, flattened)
    return source


def write(options: argparse.Namespace) -> None:
    """Act on the command line."""
    rows, test = sources(options)
    pair = (questions(rows), questions(test) if test else None)
    prepare(options, pair, tool_use_record)


if __name__ == "__main__":
    run(write, arguments("ToolAlpaca into the tool-use task.", source=None))
