"""python tools/prepare_squad.py --source path/to/squad_passages --out data/squad --words 90

Makes a prior suite: questions about a short passage that are answered by one number.

    --source  folder with passages.jsonl, one {"context", "questions": [{"question", "answer"}]}
              per line (SQuAD as used in Continual-Intelligence/SEAL, CC BY-SA 4.0)
    --out     gets test.jsonl, one {"prompt", "answer"} per line: only ever evaluated
    --words   longest passage, in words (90)
    --seed    order of the questions (0)

Score it with NumericMatch: the last number of the response is compared.
"""

from __future__ import annotations

import argparse
import random
import re
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from splits import at_least, normalised, run, write_jsonl

from sdft.jsonl import Record, read_jsonl

PROMPT = "{}\n\nQuestion: {}\nAnswer in one short sentence."
LONGEST_ANSWER = 3  # words: "June 1884", "18 karat gold"
_NUMBER = re.compile(r"\d[\d.,]*")


def is_one_number(answer: str) -> bool:
    """Whether an answer is a few words with exactly one number."""
    return len(_NUMBER.findall(answer)) == 1 and len(answer.split()) <= LONGEST_ANSWER


def questions(passage: Record, place: str) -> Iterator[tuple[str, str]]:
    """The questions of a passage with their answers.

    Raises:
        ValueError: A passage without texts where they are needed; names the line.
    """
    try:
        for item in passage["questions"]:
            yield str(item["question"]), str(item["answer"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"{place}: 'questions' must be a list of {{question, answer}}") from error


def read_suite(file: Path, words: int) -> list[dict[str, str]]:
    """The prompts with one number to find, each once.

    Raises:
        ValueError: The file is missing, has a bad line, or no passage fits.
    """
    found: dict[str, dict[str, str]] = {}
    for place, passage in read_jsonl(file):
        context = passage.get("context")
        if not isinstance(context, str):
            raise ValueError(f"{place}: no text in field 'context'; fields: {sorted(passage)}")
        if len(context.split()) > words:
            continue
        for question, answer in questions(passage, place):
            if is_one_number(answer):
                prompt = PROMPT.format(context, question)
                found.setdefault(normalised(prompt), {"prompt": prompt, "answer": answer})
    if not found:
        raise ValueError(f"{file}: no number to find in passages of at most {words} words")
    return list(found.values())


def prepare(source: Path, out: Path, words: int, seed: int) -> None:
    """Write the suite."""
    records = read_suite(source / "passages.jsonl", words)
    random.Random(seed).shuffle(records)
    file = out / "test.jsonl"
    print(f"{file}: {write_jsonl(file, records)} questions")


def write(options: argparse.Namespace) -> None:
    """Act on the command line."""
    prepare(options.source, options.out, options.words, options.seed)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Passages into questions with one number.")
    parser.add_argument("--source", type=Path, required=True, help="holds passages.jsonl")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--words", type=at_least(1), default=90, help="longest passage")
    parser.add_argument("--seed", type=int, default=0, help="order of the questions")
    run(write, parser)
