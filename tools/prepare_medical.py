"""python tools/prepare_medical.py --out data/medical

Turns open questions of HuatuoGPT-o1 (FreedomIntelligence, arXiv 2412.18925) into the medical task.

    --source         a hub name (FreedomIntelligence/medical-o1-reasoning-SFT), or files of its
                     records, of medical-o1-verifiable-problem's, or of `MedicalTask`'s
    --subset         language of the hub's data set (en)
    --with-thoughts  put the chain of thought before the demonstration
    --out            gets train.jsonl, validation.jsonl, test.jsonl and prepared.json
    --shares         percent of training, validation and test rows (75 5 20)
    --seed           order and choice of the rows (0)
    --limit          at most so many rows

No prompt stands in two splits. Use the files with `MedicalTask` and a `Judge`.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from record_set import arguments, prepare, sources
from splits import run

from sdft.task_kinds.medical import medical_record


def write(options: argparse.Namespace) -> None:
    """Act on the command line."""
    convert = partial(medical_record, with_thoughts=options.with_thoughts)
    prepare(options, sources(options), convert)


if __name__ == "__main__":
    parser = arguments(
        "Open questions of HuatuoGPT-o1 into the medical task.",
        source="FreedomIntelligence/medical-o1-reasoning-SFT",
        subset="en",
    )
    parser.add_argument("--with-thoughts", action="store_true", help="keep chains of thought")
    run(write, parser)
