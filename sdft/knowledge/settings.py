"""Settings of a build: their ranges, and what follows from them."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from sdft.scorers.judge_model import JudgeModel

Unit = Literal["words", "tokens"]
Answerable = Literal["auto", "model", "text", "off"]
IndirectBy = Literal["auto", "writer", "composition"]


def file_digest(path: str) -> str:
    """Name and SHA-256 of a file.

    Raises:
        ValueError: It is not there.
    """
    if not Path(path).is_file():
        raise ValueError(f"questions: {Path(path).absolute()} does not exist")
    return f"{Path(path).name} {hashlib.sha256(Path(path).read_bytes()).hexdigest()}"


def compiled(patterns: Sequence[str]) -> list[re.Pattern[str]]:
    """The regular expressions.

    Raises:
        ValueError: One is none.
    """
    found = []
    for text in patterns:
        try:
            found.append(re.compile(text))
        except re.error as error:
            raise ValueError(
                f"reject_patterns: {text!r} is no regular expression: {error}"
            ) from error
    return found


def check_settings(settings: Mapping[str, Any]) -> None:
    """See that settings are within their ranges.

    Raises:
        ValueError: One is not.
    """
    for name, least in (("chunk_size", 1), ("per_passage", 1), ("limit", 1), ("indirect", 0)):
        if settings[name] is not None and settings[name] < least:
            raise ValueError(f"{name} must be at least {least}, found {settings[name]}")
    if (size := settings["indirect_documents"]) < 2:
        raise ValueError(f"indirect_documents must be at least 2, found {size}")
    if (unit := settings["chunk_unit"]) not in get_args(Unit):
        raise ValueError(f"chunk_unit must be one of {get_args(Unit)}, found {unit!r}")
    shares = (settings["validation"], settings["test"])
    if not (min(shares) >= 0 and sum(shares) < 1):
        raise ValueError(
            f"validation and test must be shares that leave some to train on, found {shares}"
        )
    if "{question}" not in (template := settings["prompt_template"]):
        raise ValueError(f"prompt_template lacks {{question}}: {template!r}")
    if unknown := set(re.findall(r"\{(\w+)\}", template)) - {"question", "title"}:
        raise ValueError(
            f"prompt_template: only {{question}} and {{title}} may stand in it, found {unknown}"
        )


def answerable_by(given: str, checker: JudgeModel | None) -> str:
    """How questions are found to be answered: `model`, `text` or `off`.

    Raises:
        ValueError: Nobody is there to be asked, or an unknown way.
    """
    if given not in get_args(Answerable):
        raise ValueError(f"answerable must be one of {get_args(Answerable)}, found {given!r}")
    if given == "model" and checker is None:
        raise ValueError("answerable is model, but there is neither a checker nor a writer")
    return ("text" if checker is None else "model") if given == "auto" else given


def written_indirect(given: str, writer: JudgeModel | None) -> bool:
    """Whether indirect questions are written, not composed.

    Raises:
        ValueError: Nobody is there to write them, or an unknown way.
    """
    if given not in get_args(IndirectBy):
        raise ValueError(f"indirect_by must be one of {get_args(IndirectBy)}, found {given!r}")
    if given == "writer" and writer is None:
        raise ValueError("indirect_by is writer, but there is none: give one, or composition")
    return given == "writer" or (given == "auto" and writer is not None)
