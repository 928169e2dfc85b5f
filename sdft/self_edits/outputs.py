"""What the model wrote, passage by passage: kept as it comes, so that a killed run continues."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sdft.atomic import atomic_write
from sdft.generated import generate
from sdft.redaction import redacted
from sdft.seeding import derive_seed
from sdft.self_edits.author import Author
from sdft.self_edits.kinds import Kind
from sdft.self_edits.passages import Passage
from sdft.stores import fingerprint


@dataclass(frozen=True)
class Output:
    """What the model wrote when it was asked once.

    Attributes:
        kind: Name of the kind of self-edit.
        text: What it wrote.
        truncated: Whether the length limit ended it.
        problem: Why it was not asked, or None.
    """

    kind: str
    text: str
    truncated: bool = False
    problem: str | None = None


@dataclass(frozen=True)
class Asking:
    """How the model is asked.

    Attributes:
        kinds: What it writes of each passage.
        count: Items of each kind.
        batch_size: Requests at once.
        seed: Of the random numbers.
    """

    kinds: Sequence[Kind]
    count: int
    batch_size: int
    seed: int

    @property
    def group(self) -> int:
        """Passages that are asked for together; what is drawn is a function of their group."""
        each = sum(self.count if kind.single else 1 for kind in self.kinds)
        return max(1, self.batch_size // each)

    def requests(self, passage: Passage) -> list[tuple[str, str]]:
        """Kind and text of each request about a passage."""
        return [
            (kind.name, kind.request(passage, self.count))
            for kind in self.kinds
            for _ in range(self.count if kind.single else 1)
        ]


class OutputFile:
    """A JSONL file of outputs: first what they are made from, then one line per passage.

    Args:
        path: The file.
        made_from: Everything that the outputs depend on, as plain values.
    """

    def __init__(self, path: Path, made_from: Mapping[str, Any]) -> None:
        self.path = path
        self.header = {"fingerprint": fingerprint(made_from), "made_from": redacted(made_from)}

    def begin(self, passages: int, group: int, overwrite: bool) -> list[list[Output]]:
        """The outputs that are there already, one list per passage, in whole groups.

        A line that a killed run left unfinished is cut off.

        Args:
            passages: How many there are.
            group: Passages that are written together.
            overwrite: Throw away what was made from something else.

        Raises:
            ValueError: A file that was made from something else, unless it is overwritten.
        """
        header, records = self._read()
        if header is not None and header.get("fingerprint") != self.header["fingerprint"]:
            if not overwrite:
                raise ValueError(
                    f"{self.path} belongs to another model, configuration or other passages: give "
                    "another folder as out, or --overwrite"
                )
            records = []
        if len(records) < passages:
            records = records[: len(records) - len(records) % group]
        with atomic_write(self.path) as temporary:
            temporary.write_text(_lines([self.header, *records]), encoding="utf-8")
        return [[Output(**output) for output in record["outputs"]] for record in records]

    def append(self, passages: Sequence[Passage], outputs: Sequence[Sequence[Output]]) -> None:
        """Add a group's outputs, safely on disk when this returns."""
        records = [
            {"passage": passage.number, "outputs": [asdict(output) for output in found]}
            for passage, found in zip(passages, outputs, strict=True)
        ]
        with self.path.open("a", encoding="utf-8") as file:
            file.write(_lines(records))
            file.flush()
            os.fsync(file.fileno())

    def _read(self) -> tuple[dict[str, Any] | None, list[dict[str, Any]]]:
        if not self.path.is_file():
            return None, []
        text = self.path.read_text(encoding="utf-8", errors="replace")
        lines = text.split("\n")[:-1]  # not splitlines: a model may write U+2028
        try:
            header, *records = (json.loads(line) for line in lines)
            return dict(header), records
        except (ValueError, TypeError) as error:
            raise ValueError(f"{self.path} is damaged ({error}): delete it") from error


def write_outputs(
    author: Author,
    passages: Sequence[Passage],
    asking: Asking,
    file: OutputFile,
    overwrite: bool,
    progress: Callable[[int], None],
) -> list[list[Output]]:
    """What the model writes about every passage; continues where the file ends.

    Args:
        author: The model.
        passages: What it writes about.
        asking: How it is asked.
        file: Keeps what it writes.
        overwrite: Throw away a file that was made from something else.
        progress: Called with the number of passages done.
    """
    done = file.begin(len(passages), asking.group, overwrite)
    for start in range(len(done), len(passages), asking.group):
        progress(start)
        group = passages[start : start + asking.group]
        outputs = list(_group_outputs(author, group, asking))
        file.append(group, outputs)
        done += outputs
    return done


def _group_outputs(
    author: Author, group: Sequence[Passage], asking: Asking
) -> Iterator[list[Output]]:
    asked = [(passage, *request) for passage in group for request in asking.requests(passage)]
    prompts = [author.encode(text) for _, _, text in asked]
    room = author.prompt_room
    if room is not None and room < 1:
        longest = author.sampling.max_new_tokens
        raise ValueError(
            f"max_new_tokens is {longest}, which leaves no room for a request: the model's context "
            f"has {room + longest} tokens"
        )
    fits = [place for place, ids in enumerate(prompts) if room is None or len(ids) <= room]
    found: dict[int, Output] = {
        place: Output(asked[place][1], "", problem=f"the request has {len(ids)} tokens, {room} fit")
        for place, ids in enumerate(prompts)
        if place not in set(fits)
    }
    seed = derive_seed(asking.seed, "self_edits", group[0].number)
    chosen = [prompts[place] for place in fits]
    arguments = (author.sampling, asking.batch_size, seed)
    for batch in generate(author, author.model, chosen, *arguments):
        for index, answer in batch:
            place = fits[index]
            found[place] = Output(asked[place][1], answer.text, answer.truncated)
    for passage in group:
        yield [found[place] for place, request in enumerate(asked) if request[0] is passage]


def _lines(records: Sequence[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
