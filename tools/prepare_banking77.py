"""python tools/prepare_banking77.py --source path/to/banking77 --out data/banking77 --choices 4

Turns messages of bank customers into a choice among a few topics that the prompt names.

    --source      folder with train.jsonl and test.jsonl, one {"text", "label"} per line
                  (BANKING77, PolyAI-LDN/task-specific-datasets, CC BY 4.0)
    --out         gets train.jsonl, validation.jsonl, test.jsonl,
                  one {"prompt", "demonstration", "answer"} per line
    --choices     topics in each prompt: the right one and others drawn at random (4)
    --seed        choice and order of the rows and topics (0)
    --validation  rows per topic taken out of the training rows (5)
    --train       most training rows per topic (all)
    --test        most test rows per topic (all)

Name only the test file in a run's configuration and it is a prior suite. No message stands in two
splits, whatever its case and spacing.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from splits import Row, Sizes, arguments, at_least, disjoint_splits, read_rows, run, write_jsonl

PROMPT = (
    "Message of a bank customer: {}\nTopics: {}\n"
    "Which topic is the message about? Answer with the topic only."
)


def topic(label: str) -> str:
    """A label as words: `Lost_card` is "lost card"."""
    return label.replace("_", " ").strip("?").lower()


def record(row: Row, labels: Sequence[str], choices: int, rng: random.Random) -> dict[str, Any]:
    """One line of the framework's JSONL."""
    others = rng.sample([label for label in labels if label != row.label], choices - 1)
    topics = [topic(label) for label in (row.label, *others)]
    answer = topics[0]
    rng.shuffle(topics)
    prompt = PROMPT.format(row.text, "; ".join(topics))
    return {"prompt": prompt, "demonstration": answer, "answer": answer}


def prepare(source: Path, out: Path, sizes: Sizes, choices: int, seed: int) -> None:
    """Write the three splits.

    Raises:
        ValueError: A source file that is missing or has a bad line, or fewer topics than choices.
    """
    train, test = (read_rows(source / f"{s}.jsonl", "text", "label") for s in ("train", "test"))
    labels = sorted({row.label for row in (*train, *test)})
    if choices > len(labels):
        raise ValueError(f"{source}: {len(labels)} topics, too few for {choices} choices")
    rng = random.Random(seed)
    for split, rows in disjoint_splits(train, test, sizes, seed).items():
        file = out / f"{split}.jsonl"
        count = write_jsonl(file, [record(row, labels, choices, rng) for row in rows])
        print(f"{file}: {count} messages")


def write(options: argparse.Namespace) -> None:
    """Act on the command line."""
    sizes = Sizes(options.train, options.validation, options.test)
    prepare(options.source, options.out, sizes, options.choices, options.seed)


if __name__ == "__main__":
    parser = arguments("Messages of bank customers into a choice among topics.", validation=5)
    parser.add_argument("--choices", type=at_least(2), default=4, help="topics in each prompt")
    run(write, parser)
