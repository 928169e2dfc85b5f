"""What self-edits are written from: passages of a JSONL file, or one description of a task."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from os import PathLike

from sdft.jsonl import Record, read_jsonl

_TOPIC_WORDS = 8


@dataclass(frozen=True)
class Passage:
    """A text.

    Attributes:
        number: Its place among the passages, from 1.
        text: The text, without outer white space.
        title: What it is about; empty when unknown.
    """

    number: int
    text: str
    title: str = ""

    @property
    def shown(self) -> str:
        """The text under its title."""
        return f"{self.title}\n\n{self.text}" if self.title else self.text

    @property
    def topic(self) -> str:
        """The title, or the beginning of the text."""
        words = self.text.split()
        beginning = " ".join(words[:_TOPIC_WORDS])
        return self.title or (f"{beginning} …" if len(words) > _TOPIC_WORDS else beginning)


def read_passages(
    path: str | PathLike[str], text_field: str, title_field: str, limit: int | None = None
) -> list[Passage]:
    """The passages of a JSONL file.

    Args:
        path: The file, one object per line.
        text_field: Field with the text.
        title_field: Field with the title; a line may lack it.
        limit: Read at most this many lines.

    Raises:
        ValueError: A file that cannot be read, or a line without a text.
    """
    return [
        Passage(number, _field(place, record, text_field), _title(place, record, title_field))
        for number, (place, record) in enumerate(islice(read_jsonl(path), limit), 1)
    ]


def _field(place: str, record: Record, field: str) -> str:
    value = record.get(field)
    if not isinstance(value, str) or not value.strip():
        fields = ", ".join(map(repr, record)) or "none"
        raise ValueError(f"{place}: needs a text in the field {field!r}; fields found: {fields}")
    return value.strip()


def _title(place: str, record: Record, field: str) -> str:
    return "" if record.get(field) is None else _field(place, record, field)
