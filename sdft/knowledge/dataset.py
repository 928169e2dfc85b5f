"""The data set as files: for training, for evaluation, and for a person to review."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sdft.knowledge.documents import Library
from sdft.knowledge.passages import Passage
from sdft.knowledge.questions import Question, Record, Reject
from sdft.knowledge.splits import Splits
from sdft.scorers.answer_words import answer_words

SPLITS = ("train", "validation", "test", "ood")
REJECTED, PASSAGES, MANIFEST, README = (
    "rejected.jsonl",
    "passages.jsonl",
    "manifest.json",
    "README.md",
)

_SHOWN = 5  # questions of a split that the README shows


@dataclass
class DataSet:
    """What a build has made.

    Attributes:
        library: The documents.
        passages: Their passages.
        splits: The direct questions.
        ood: The indirect ones.
        rejected: What was left out.
        prompt_template: Makes a prompt of a `{question}`.
        facts: Further entries of the manifest.
    """

    library: Library
    passages: list[Passage]
    splits: Splits
    ood: list[Question]
    rejected: list[Reject]
    prompt_template: str
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def questions(self) -> dict[str, list[Question]]:
        """The questions of every split."""
        own = self.splits
        return {"train": own.train, "validation": own.validation, "test": own.test, "ood": self.ood}

    def write(self, folder: Path) -> None:
        """Write every file into an empty folder."""
        records: dict[str, Sequence[Record]] = {
            f"{name}.jsonl": [q.record(self.prompt_template) for q in found]
            for name, found in self.questions.items()
            if found
        }
        records[REJECTED] = [reject.record() for reject in self.rejected]
        records[PASSAGES] = [_passage_record(passage) for passage in self.passages]
        files = {name: _write(folder / name, found) for name, found in records.items()}
        manifest = self.manifest(files)
        text = json.dumps(manifest, indent=1, ensure_ascii=False) + "\n"
        (folder / MANIFEST).write_text(text, encoding="utf-8")
        (folder / README).write_text(readme(self, manifest), encoding="utf-8", errors="replace")

    def manifest(self, files: Mapping[str, Any]) -> dict[str, Any]:
        """Where everything comes from, and how much of it there is."""
        return {
            **self.facts,
            "sources": self.library.sources,
            "ignored": self.library.ignored,
            "counts": self.counts(),
            "rejected": self.reasons(),
            "longest": self.longest(),
            "files": dict(files),
        }

    def counts(self) -> dict[str, int]:
        """Documents, passages, questions by split, and what a reader should know of them."""
        trained = {q.passages[0].number for q in self.splits.train}
        facts = {_fact(q) for q in self.splits.train}
        return {
            "documents": len(self.library.documents),
            "passages": len(self.passages),
            "passages_without_a_training_question": len(self.passages) - len(trained),
            **{name: len(found) for name, found in self.questions.items()},
            "test_questions_whose_answer_trains": sum(_fact(q) in facts for q in self.splits.test),
            "rejected": len(self.rejected),
        }

    def reasons(self) -> dict[str, int]:
        """How many were left out for each reason, the commonest first."""
        return dict(Counter(reject.reason for reject in self.rejected).most_common())

    def longest(self) -> dict[str, int]:
        """Words of the longest prompt, answer, and context with its prompt and answer."""
        every = [question for found in self.questions.values() for question in found]
        sizes = [[len(t.split()) for t in (q.text, q.answer, q.context)] for q in every]
        return {
            "prompt_words": max(size[0] for size in sizes),
            "answer_words": max(size[1] for size in sizes),
            "teacher_words": max(map(sum, sizes)),
        }


def _fact(question: Question) -> tuple[int, tuple[str, ...]]:
    return question.passages[0].number, tuple(answer_words(question.answer))


def _passage_record(passage: Passage) -> Record:
    return {
        "number": passage.number,
        "document": passage.document,
        "title": passage.title,
        "text": passage.text,
        "characters": [passage.start, passage.end],
    }


def _write(path: Path, records: Sequence[Record]) -> dict[str, Any]:
    lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    content = "".join(lines).encode("utf-8", "replace")
    path.write_bytes(content)
    return {"lines": len(records), "sha256": hashlib.sha256(content).hexdigest()}


# ---------------------------------------------------------------- for the reviewer


def readme(data: DataSet, manifest: Mapping[str, Any]) -> str:
    """What a person reads before anything trains on the data set."""
    counts, longest = manifest["counts"], manifest["longest"]
    table = [f"| `{name}.jsonl` | {counts[name]} | {_USES[name]} |" for name in SPLITS]
    rejected = [f"| {reason} | {count} |" for reason, count in manifest["rejected"].items()]
    parts = [
        "# Questions about documents",
        f"{counts['documents']} documents in {counts['passages']} passages. Made by "
        "`python -m sdft knowledge build`; `manifest.json` has sources, checksums and settings.",
        "\n".join(["| file | questions | use |", "|---|---|---|", *table]),
        _REVIEW,
        "\n".join(_notes(counts, longest)),
        "## Left out",
        "\n".join(["| reason | questions |", "|---|---|", *rejected]) if rejected else "Nothing.",
        *(_examples(name, found) for name, found in data.questions.items() if found),
        _TRAIN,
    ]
    return "\n\n".join(parts) + "\n"


def _notes(counts: Mapping[str, int], longest: Mapping[str, int]) -> list[str]:
    return [
        f"- {counts['passages_without_a_training_question']} passages have no training question: "
        "no method learns them from this data set (`passages.jsonl` has all).",
        f"- {counts['test_questions_whose_answer_trains']} of {counts['test']} test questions have "
        "the answer of a training question of the same passage: the same fact, asked otherwise.",
        f"- Longest prompt {longest['prompt_words']} words, longest answer "
        f"{longest['answer_words']}, longest prompt with context and answer "
        f"{longest['teacher_words']}; a token is about three quarters of an English word. Examples "
        "beyond `data.max_student_tokens` and `data.max_teacher_tokens` are dropped and counted.",
    ]


def _examples(name: str, found: Sequence[Question]) -> str:
    step = max(1, len(found) // _SHOWN)
    lines = [f"## From {name}.jsonl"]
    for question in found[::step][:_SHOWN]:
        about = ", ".join(passage.document for passage in question.passages)
        lines.append(f"- **{_line(question.text)}** {_line(question.answer)} ({_line(about)})")
    return "\n".join([lines[0], "", *lines[1:]])


def _line(text: str) -> str:
    return " ".join(text.split())


_USES = {
    "train": "trains: prompt, answer, demonstration, context (the passage)",
    "validation": "chooses the learning rate",
    "test": "other questions about the same passages",
    "ood": "indirect questions over several passages, never trained on",
}

_REVIEW = """## Before you train

Read some of each file. Delete lines that are wrong, not clear by themselves, or not answered by
their `context`; correct answers in place (`answer` and `demonstration`). Keep a question out of
`train.jsonl` when another file has it. `rejected.jsonl` has what was left out, with reasons: what
was left out wrongly may be moved back. More questions about a passage can be added in the same
form."""

_TRAIN = """## Training and evaluating

`configs/knowledge.yaml` reads these files (its paths, or your own):

```bash
python -m sdft fit --config configs/knowledge.yaml
python -m sdft compare --config configs/compare_knowledge.yaml
```"""
