"""Passages: documents cut at the borders of paragraphs, then of sentences, then of words.

Nothing is left out: a document's passages, one after the other, hold every character of it but
white space at the cuts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from sdft.knowledge.documents import Document

Measure = Callable[[str], int]
"""The length of a text: its words, or its tokens."""

_BORDERS = (
    re.compile(r"\n[ \t]*\n\s*"),  # paragraphs
    re.compile(r"\n+"),
    re.compile(r"(?<=[.!?])[\"'”’)\]]*\s+|(?<=[。！？])"),  # sentences
    re.compile(r"\s+"),  # words
)
_HEADING = re.compile(r"\s{0,3}#{1,6}\s+\S[^\n]*\Z")


@dataclass(frozen=True)
class Passage:
    """A piece of a document.

    Attributes:
        number: Its place among all passages, from 1.
        document: Name of the document.
        subject: See `Document.subject`.
        title: The document's title; empty when unknown.
        text: What it says, without outer white space.
        start: Where it begins in the document, in characters.
        end: Where it ends.
    """

    number: int
    document: str
    subject: str
    title: str
    text: str
    start: int
    end: int

    @property
    def shown(self) -> str:
        """The text under its title, where it does not begin with it."""
        first = self.text.split("\n", 1)[0].lstrip("# ").strip()
        return f"{self.title}\n\n{self.text}" if self.title not in ("", first) else self.text


def cut_documents(documents: Sequence[Document], size: int, measure: Measure) -> list[Passage]:
    """The passages of all documents.

    Args:
        documents: Texts.
        size: Longest passage.
        measure: Length of a text, in the unit of `size`.
    """
    passages: list[Passage] = []
    for document in documents:
        for start, end in spans(document.text, size, measure):
            text = document.text[start:end]
            own = (document.name, document.subject, document.title, text, start, end)
            passages.append(Passage(len(passages) + 1, *own))
    return passages


def spans(text: str, size: int, measure: Measure) -> list[tuple[int, int]]:
    """Where the passages of a text begin and end: as few as pieces in their order allow."""
    found: list[tuple[int, int]] = []
    for start, end in _pieces(text, 0, len(text), size, measure, 0):
        if found and measure(text[found[-1][0] : end]) <= size:
            found[-1] = (found[-1][0], end)
        else:
            found.append((start, end))
    return list(_with_headings(text, found, size, measure))


def _pieces(
    text: str, start: int, end: int, size: int, measure: Measure, level: int
) -> Iterator[tuple[int, int]]:
    """Pieces that fit, cut at the coarsest borders possible."""
    start, end = _stripped(text, start, end)
    if start == end:
        return
    if level == 0:
        inner = _cuts(text, start, end, _BORDERS[0])
    elif measure(text[start:end]) <= size:
        yield start, end
        return
    elif level < len(_BORDERS):
        inner = _cuts(text, start, end, _BORDERS[level])
    elif end - start == 1:  # one character is longer than a passage may be: it still is one
        yield start, end
        return
    else:
        inner = [(start, (start + end) // 2), ((start + end) // 2, end)]
    for one, other in inner:
        yield from _pieces(text, one, other, size, measure, level + 1)


def _cuts(text: str, start: int, end: int, border: re.Pattern[str]) -> list[tuple[int, int]]:
    marks = [found.end() for found in border.finditer(text, start, end)]
    places = [start, *(mark for mark in marks if start < mark < end), end]
    return list(pairwise(places))


def _stripped(text: str, start: int, end: int) -> tuple[int, int]:
    piece = text[start:end]
    if not piece.strip():
        return end, end
    return start + len(piece) - len(piece.lstrip()), end - len(piece) + len(piece.rstrip())


def _with_headings(
    text: str, found: Sequence[tuple[int, int]], size: int, measure: Measure
) -> Iterator[tuple[int, int]]:
    """A Markdown heading at a passage's end moves to the text below it, where both fit."""
    moved: int | None = None
    for place, (start, end) in enumerate(found):
        begin = start if moved is None else moved
        moved = None
        if place + 1 < len(found):
            cut = text.rfind("\n", begin, end) + 1
            above = _stripped(text, begin, cut) if cut else (begin, begin)
            below = text[cut : found[place + 1][1]]
            if _HEADING.match(text[cut:end]) and above[0] < above[1] and measure(below) <= size:
                moved, end = cut, above[1]
        yield begin, end
