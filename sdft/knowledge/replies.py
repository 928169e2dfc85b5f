"""What models have replied, kept as it comes: a killed build asks for the rest alone."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from sdft.examples import Message
from sdft.redaction import redacted_text
from sdft.scorers.judge_model import JudgeError, JudgeModel, Reply, Usage
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
        batches = list(_batches(model, list(dict.fromkeys(requests))))
        texts = {key: text for batch in batches for key, text in batch.items()}
        missing = {key for key in texts if key not in self._known}
        for batch in batches:
            # A local model's batch is asked for as a whole: its replies depend on it.
            whole = isinstance(model, LocalJudge)
            if not missing.isdisjoint(batch):
                wanted = {k: text for k, text in batch.items() if whole or k in missing}
                self._ask_batch(model, what, wanted, len(texts), missing)
        found = {texts[key]: self._known[key] for key in texts}
        for said in found.values():
            self.used.add(Usage(1, 0, said.prompt_tokens, said.completion_tokens))
        return [found[request] for request in requests]

    def _ask_batch(
        self,
        model: JudgeModel,
        what: str,
        batch: Mapping[str, str],
        total: int,
        missing: set[str],
    ) -> None:
        keys = list(batch)
        talks: list[list[Message]] = [[{"role": "user", "content": batch[key]}] for key in keys]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8", errors="replace") as file:
            try:
                for place, reply in model.replies(talks):
                    self._keep(file, keys[place], what, model, reply)
                    missing.discard(keys[place])
                    self.progress(what, total - len(missing), total)
            except JudgeError as error:
                raise ValueError(
                    f"{error}; of {total} replies ({what}) those that came are kept in "
                    f"{self.path}: the same command goes on"
                ) from error
            finally:
                os.fsync(file.fileno())

    def _keep(self, file: TextIO, key: str, what: str, model: JudgeModel, reply: Reply) -> None:
        spent = (reply.usage.prompt_tokens, reply.usage.completion_tokens)
        self._known[key] = Said(reply.text, reply.truncated, *spent)
        about = {"key": key, "for": what, "model": redacted_text(model.name)}
        record = {**about, **vars(self._known[key])}
        file.write(json.dumps(record, ensure_ascii=False) + "\n")
        file.flush()


def _batches(model: JudgeModel, requests: Sequence[str]) -> Iterator[dict[str, str]]:
    """Key → request, of what is asked for together.

    What a local model says may depend on its batch, so its keys do, too.
    """
    if not isinstance(model, LocalJudge):
        yield {_key(model.identity, request): request for request in requests}
        return
    order = sorted(requests, key=len)
    for start in range(0, len(order), model.batch_size):
        batch = order[start : start + model.batch_size]
        yield {_key(model.identity, *batch, request): request for request in batch}


def _key(*parts: str) -> str:
    content = json.dumps(parts, ensure_ascii=False)
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
