"""python tools/prepare_squad.py --source path/to/squad_passages --out data/squad --words 90

Makes a prior suite, questions about a short passage that are answered by one number, and a task,
questions about longer passages that are answered by a few of the passage's own words.

    --source  folder with passages.jsonl, one {"context", "questions": [{"question", "answer"}]}
              per line (SQuAD as used in Continual-Intelligence/SEAL, CC BY-SA 4.0)
    --out     gets test.jsonl, one {"prompt", "answer"} per line: only ever evaluated; and spans/
              with train.jsonl, validation.jsonl and test.jsonl, one {"prompt", "demonstration",
              "answer"} per line
    --words   longest passage of the suite, in words (90)
    --longest longest passage of the task, in words (120); all are longer than the suite's
    --seed    order of the questions, and which passages are in which split (0)

Score the suite with NumericMatch, the last number of the response is compared, and the task with
ExactMatch, ignore_case and strip_punctuation. The suite, and each split, has passages of its own.
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
SPAN_PROMPT = "{}\n\nQuestion: {}\nAnswer with the fewest words of the text, and nothing else."
LONGEST_ANSWER = 3  # words: "June 1884", "18 karat gold"
SHARES = (60, 10, 30)  # of the passages, in training, validation and test
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


def passages(file: Path, words: range) -> Iterator[tuple[str, Record, str]]:
    """The passages with so many words: the text, the row it stands in, and the row's place.

    Raises:
        ValueError: The file is missing, or has a bad line.
    """
    for place, passage in read_jsonl(file):
        context = passage.get("context")
        if not isinstance(context, str):
            raise ValueError(f"{place}: no text in field 'context'; fields: {sorted(passage)}")
        if len(context.split()) in words:
            yield context, passage, place


def read_suite(file: Path, words: int) -> list[dict[str, str]]:
    """The prompts with one number to find, each once.

    Raises:
        ValueError: The file is missing, has a bad line, or no passage fits.
    """
    found: dict[str, dict[str, str]] = {}
    for context, passage, place in passages(file, range(words + 1)):
        for question, answer in questions(passage, place):
            if is_one_number(answer):
                prompt = PROMPT.format(context, question)
                found.setdefault(normalised(prompt), {"prompt": prompt, "answer": answer})
    if not found:
        raise ValueError(f"{file}: no number to find in passages of at most {words} words")
    return list(found.values())


def read_spans(file: Path, words: range) -> list[list[dict[str, str]]]:
    """Of each passage the prompts that are answered by a few of its own words, without a number.

    Raises:
        ValueError: The file is missing, has a bad line, or no passage fits.
    """
    found: dict[str, dict[str, dict[str, str]]] = {}
    for context, passage, place in passages(file, words):
        for question, answer in questions(passage, place):
            short = answer in context and len(answer.split()) <= LONGEST_ANSWER
            if short and not _NUMBER.search(answer):
                prompt = SPAN_PROMPT.format(context, question)
                record = {"prompt": prompt, "demonstration": answer, "answer": answer}
                found.setdefault(normalised(context), {}).setdefault(normalised(prompt), record)
    if not found:
        raise ValueError(
            f"{file}: no words to find in passages of {words.start} to {words.stop - 1} words"
        )
    return [list(records.values()) for records in found.values()]


def write_spans(groups: list[list[dict[str, str]]], out: Path, seed: int) -> None:
    """Write the task, each passage in one of its splits."""
    rng = random.Random(seed)
    rng.shuffle(groups)
    train, validation = (len(groups) * share // 100 for share in SHARES[:2])
    ends = {"train": train, "validation": train + validation, "test": len(groups)}
    start = 0
    for split, end in ends.items():
        records = [record for group in groups[start:end] for record in group]
        rng.shuffle(records)
        file = out / "spans" / f"{split}.jsonl"
        print(f"{file}: {write_jsonl(file, records)} questions on {end - start} passages")
        start = end


def prepare(source: Path, out: Path, words: int, longest: int, seed: int) -> None:
    """Write suite and task."""
    groups = read_spans(source / "passages.jsonl", range(words + 1, longest + 1))
    records = read_suite(source / "passages.jsonl", words)
    write_spans(groups, out, seed)
    random.Random(seed).shuffle(records)
    file = out / "test.jsonl"
    print(f"{file}: {write_jsonl(file, records)} questions")


def write(options: argparse.Namespace) -> None:
    """Act on the command line."""
    prepare(options.source, options.out, options.words, options.longest, options.seed)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Passages into questions.")
    parser.add_argument("--source", type=Path, required=True, help="holds passages.jsonl")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--words", type=at_least(1), default=90, help="longest of the suite")
    parser.add_argument("--longest", type=at_least(1), default=120, help="longest of the task")
    parser.add_argument("--seed", type=int, default=0, help="order of the questions")
    run(write, parser)
