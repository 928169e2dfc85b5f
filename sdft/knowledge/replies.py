"""What models have replied, kept as it comes: a killed build asks for the rest alone."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from sdft.examples import Message
from sdft.redaction import redacted_text
from sdft.scorers.judge_model import JudgeError, JudgeModel, Usage
from sdft.scorers.local_judge import LocalJudge

Progress = Callable[[str, int, int], None]
"""Called with what is asked for, how many replies there are, and how many there will be."""


@dataclass(frozen=True)
class Said:
    """A reply.

    Attributes:
        text: What the model says.
        truncated: Whether the length limit ended it.
        prompt_tokens: Tokens read.
        completion_tokens: Tokens written.
    """

    text: str
    truncated: bool
    prompt_tokens: int
    completion_tokens: int


class Replies:
    """A JSONL file of replies, found again by the model and the conversation.

    A local model's replies may depend on what shares a batch with them, so batches are functions of
    all that is asked for, whatever is there already, and one that is not there whole is asked anew.

    Args:
        path: The file; made when the first reply comes.
        progress: Called now and then.
    """

    def __init__(self, path: Path, progress: Progress) -> None:
        self.path = path
        self.progress = progress
        self.used = Usage()
        self._known = dict(_read(path))

    def ask(self, model: JudgeModel, what: str, requests: Sequence[str]) -> list[Said]:
        """One reply per request; each different request is asked once.

        Args:
            model: Whom to ask.
            what: What it is asked for, in a few words.
            requests: The user's turn of each conversation.

        Raises:
            ValueError: The model cannot be had. Replies that came before are in the file.
        """
        mark = model.identity
        keys = [_key(mark, request) for request in requests]
        texts = dict(zip(keys, requests, strict=True))
        missing = {key for key in texts if key not in self._known}
        for batch in self._batches(model, texts):
            try:
                self._ask_batch(model, what, batch, texts, missing)
            except JudgeError as error:
                raise ValueError(
                    f"{error}; of {len(texts)} replies ({what}) those that came are kept in "
                    f"{self.path}: the same command goes on"
                ) from error
        found = [self._known[key] for key in texts]
        self.used.add(
            Usage(
                len(found),
                0,
                sum(said.prompt_tokens for said in found),
                sum(said.completion_tokens for said in found),
            )
        )
        return [self._known[key] for key in keys]

    def _batches(self, model: JudgeModel, texts: dict[str, str]) -> Iterator[list[str]]:
        """Keys to be asked for together."""
        if not isinstance(model, LocalJudge):
            waiting = [key for key in texts if key not in self._known]
            if waiting:
                yield waiting
            return
        order = sorted(texts, key=lambda key: len(texts[key]))
        for start in range(0, len(order), model.batch_size):
            batch = order[start : start + model.batch_size]
            if any(key not in self._known for key in batch):
                yield batch

    def _ask_batch(
        self,
        model: JudgeModel,
        what: str,
        batch: Sequence[str],
        texts: dict[str, str],
        missing: set[str],
    ) -> None:
        talks: list[list[Message]] = [[{"role": "user", "content": texts[key]}] for key in batch]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8", errors="replace") as file:
            for place, reply in model.replies(talks):
                usage = reply.usage
                said = Said(
                    reply.text, reply.truncated, usage.prompt_tokens, usage.completion_tokens
                )
                self._known[batch[place]] = said
                about = {"key": batch[place], "for": what, "model": redacted_text(model.name)}
                file.write(json.dumps({**about, **vars(said)}, ensure_ascii=False) + "\n")
                file.flush()
                missing.discard(batch[place])
                self.progress(what, len(texts) - len(missing), len(texts))
            os.fsync(file.fileno())


def _key(mark: str, request: str) -> str:
    content = json.dumps([mark, request], ensure_ascii=False)
    return hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()


def _read(path: Path) -> Iterator[tuple[str, Said]]:
    """The replies that are there; a line that a killed build left unfinished is cut off."""
    if not path.is_file():
        return
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        with path.open("r+b") as file:
            file.truncate(whole)
    for number, line in enumerate(content[:whole].decode("utf-8", "replace").split("\n")[:-1], 1):
        try:
            record = json.loads(line)
            counts = (int(record["prompt_tokens"]), int(record["completion_tokens"]))
            yield record["key"], Said(str(record["text"]), bool(record["truncated"]), *counts)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number} is damaged: delete the line") from error


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """One build at a time in a folder; the lock ends with the process, however it dies.

    Raises:
        ValueError: Another one is at work.
    """
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"another build is at work in {folder}: wait, or end it") from error
        yield
