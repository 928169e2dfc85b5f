"""Verdicts of a judge: three levels, how they are read, and where they are kept."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from enum import Enum
from pathlib import Path

from sdft.atomic import atomic_write
from sdft.examples import Message


class Verdict(Enum):
    """How right an answer is."""

    CORRECT = "correct"
    PARTIAL = "partial"
    INCORRECT = "incorrect"


SCORES = {
    "strict": {Verdict.CORRECT: 1.0, Verdict.PARTIAL: 0.0, Verdict.INCORRECT: 0.0},
    "lenient": {Verdict.CORRECT: 1.0, Verdict.PARTIAL: 1.0, Verdict.INCORRECT: 0.0},
    "graded": {Verdict.CORRECT: 1.0, Verdict.PARTIAL: 0.5, Verdict.INCORRECT: 0.0},
}

_LEVEL = r"(correct|partial(?:ly)?(?:[ _-]correct)?|incorrect)"
_GRADE = re.compile(rf"\b(?:grade|verdict)\b\W*(?:is\b\W*)?{_LEVEL}\b", re.IGNORECASE)
_ALONE = re.compile(rf"\W*{_LEVEL}\W*", re.IGNORECASE)


def read_verdict(reply: str) -> Verdict | None:
    """The last grade that a reply gives, or the level that it consists of; None without one."""
    graded = _GRADE.findall(reply)
    alone = _ALONE.fullmatch(reply)
    level = graded[-1] if graded else alone[1] if alone else None
    if level is None:
        return None
    return Verdict.PARTIAL if level.lower().startswith("partial") else Verdict(level.lower())


def verdict_key(model: str, conversation: Sequence[Message]) -> str:
    """What a verdict depends on, hashed: the judge, its instructions, prompt, answer, response."""
    content = json.dumps([model, [dict(m) for m in conversation]], ensure_ascii=False)
    return hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()


class VerdictCache:
    """Verdicts in memory, and in a folder where one is given: a small file each.

    Several processes may share a folder: files appear whole or not at all.

    Args:
        folder: Made when the first verdict is kept; None keeps them in memory alone.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self._known: dict[str, Verdict] = {}

    def get(self, key: str) -> Verdict | None:
        """A verdict that was kept; a damaged file counts as none."""
        if key not in self._known and self.folder is not None:
            try:
                content = json.loads(self._file(key).read_text("utf-8"))
                self._known[key] = Verdict(content["verdict"])
            except (OSError, ValueError, KeyError, TypeError):
                return None
        return self._known.get(key)

    def keep(self, key: str, verdict: Verdict, model: str, reply: str) -> None:
        """Keep one, with the words it was given in.

        Raises:
            OSError: The folder cannot be written.
        """
        self._known[key] = verdict
        if self.folder is None:
            return
        file = self._file(key)
        file.parent.mkdir(parents=True, exist_ok=True)
        content = {"verdict": verdict.value, "model": model, "reply": reply}
        with atomic_write(file) as temporary:
            temporary.write_text(json.dumps(content, ensure_ascii=False), "utf-8", "replace")

    def _file(self, key: str) -> Path:
        assert self.folder is not None
        return self.folder / key[:2] / f"{key}.json"
