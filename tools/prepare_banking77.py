"""python tools/prepare_banking77.py --source path/to/banking77 --out data/banking77 --choices 4

Turns messages of bank customers into a task, the choice among a few topics that the prompt names,
and into a prior suite, repeating a message word for word.

    --source      folder with train.jsonl and test.jsonl, one {"text", "label"} per line
                  (BANKING77, PolyAI-LDN/task-specific-datasets, CC BY 4.0)
    --out         gets choice/ with train.jsonl, validation.jsonl and test.jsonl, and repeat/ with
                  test.jsonl, one {"prompt", "demonstration", "answer"} per line
    --choices     topics in each prompt: the right one and others drawn at random (4)
    --seed        choice and order of the rows and topics (0)
    --validation  rows per topic taken out of the training rows (5)
    --train       most training rows per topic (all)
    --test        most test rows per topic (all)

No message stands in two splits, whatever its case and spacing. The suite repeats the test messages
of at most 20 words. Score both with ExactMatch and strip_punctuation.
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
REPEAT = "Repeat this message word for word: {}"
LONGEST_REPEAT = 20  # words: longer ones cost time and say no more


def topic(label: str) -> str:
    """A label as words: `Lost_card` is "lost card"."""
    return label.replace("_", " ").strip("?").lower()


def choice(row: Row, labels: Sequence[str], choices: int, rng: random.Random) -> dict[str, Any]:
    """A message to be given its topic."""
    others = rng.sample([label for label in labels if label != row.label], choices - 1)
    topics = [topic(label) for label in (row.label, *others)]
    answer = topics[0]
    rng.shuffle(topics)
    prompt = PROMPT.format(row.text, "; ".join(topics))
    return {"prompt": prompt, "demonstration": answer, "answer": answer}


def repeat(row: Row) -> dict[str, Any]:
    """A message to be repeated."""
    return {"prompt": REPEAT.format(row.text), "demonstration": row.text, "answer": row.text}


def prepare(source: Path, out: Path, sizes: Sizes, choices: int, seed: int) -> None:
    """Write the task and the suite.

    Raises:
        ValueError: A source file that is missing or has a bad line, or fewer topics than choices.
    """
    train, test = (read_rows(source / f"{s}.jsonl", "text", "label") for s in ("train", "test"))
    labels = sorted({row.label for row in (*train, *test)})
    if choices > len(labels):
        raise ValueError(f"{source}: {len(labels)} topics, too few for {choices} choices")
    rng = random.Random(seed)
    splits = disjoint_splits(train, test, sizes, seed)
    for split, rows in splits.items():
        file = out / "choice" / f"{split}.jsonl"
        count = write_jsonl(file, [choice(row, labels, choices, rng) for row in rows])
        print(f"{file}: {count} messages")
    file = out / "repeat" / "test.jsonl"
    short = [repeat(row) for row in splits["test"] if len(row.text.split()) <= LONGEST_REPEAT]
    print(f"{file}: {write_jsonl(file, short)} messages")


def write(options: argparse.Namespace) -> None:
    """Act on the command line."""
    sizes = Sizes(options.train, options.validation, options.test)
    prepare(options.source, options.out, sizes, options.choices, options.seed)


if __name__ == "__main__":
    parser = arguments("Messages of bank customers into a choice among topics.", validation=5)
    parser.add_argument("--choices", type=at_least(2), default=4, help="topics in each prompt")
    run(write, parser)
