"""Reads the items out of what a model wrote: lists, pairs of question and answer, a whole text.

Small models keep to a form only roughly, so each reader takes the usual variants: any bullet or
number, bold labels, an opening remark, answers over several lines or on the question's line.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True)
class Item:
    """What becomes one training example.

    Attributes:
        answer: The text to learn; empty where the model left it out.
        prompt: What it answers; None for a kind whose items have no prompt of their own, empty
            where the model left it out.
    """

    answer: str
    prompt: str | None = None


_BULLET = re.compile(r"^\s*(?:[*_]{2})?(?:\(?\d{1,3}[.):](?=\s|\*|_|$)|[-*•–·+](?=\s|$))\s*(.*)$")
_NUMBERED = re.compile(r"^\s*\(?(\d{1,3})[.):]\s")
_INLINE_NUMBER = re.compile(r"(?<=[;,.!?])\s+(?=\(?(\d{1,3})[.):]\s)")
_LABELS = {
    "question": "Q|Question|Request|Prompt|Input|User",
    "answer": "A|Answer|Response|Output|Assistant",
}
_LABEL = re.compile(
    r"^[\s>#*_\-•–·+]*(?:\(?\d{1,3}[.):]\s*)?[*_]*"
    rf"(?:(?P<question>{_LABELS['question']})|(?P<answer>{_LABELS['answer']}))"
    r"[ \t]*#?\d{0,3}[*_]*[ \t]*[::][*_]*[ \t]*",
    re.IGNORECASE | re.MULTILINE,
)
_INLINE_ANSWER = re.compile(rf"(?<=\S)\s+[*_]*(?:{_LABELS['answer']})[*_]*\s*[::][*_]*\s+")
_QUOTES = {'"': '"', "“": "”", "«": "»"}


def as_list(text: str) -> list[Item]:
    """The points of a list; without a list, its paragraphs or lines.

    A point goes on until the next one or a blank line, so that a closing remark is left out.
    Points may stand on one line, numbered in order.
    """
    points: list[str] = []
    within = False
    for line in (part for whole in text.splitlines() for part in _one_per_line(whole)):
        found = _BULLET.match(line)
        if found:
            points.append(found[1])
        elif within and line.strip():
            points[-1] += f" {line.strip()}"
        within = bool(found) or (within and bool(line.strip()))
    return _items(points or _pieces(text))


def _one_per_line(line: str) -> list[str]:
    """A line cut where its points go on counting: `1. a; 2. b` holds two, `1. In 5. b` one."""
    first = _NUMBERED.match(line)
    if not first:
        return [line]
    cuts, number = [0], int(first[1])
    for found in _INLINE_NUMBER.finditer(line):
        if int(found[1]) == number + 1:
            cuts.append(found.end())
            number += 1
    return [line[a:b].rstrip(" ;") for a, b in pairwise([*cuts, len(line)])]


def as_pairs(text: str) -> list[Item]:
    """Questions (requests) with their answers (responses).

    One without the other comes back with an empty text in its place.
    """
    marks = list(_LABEL.finditer(text))
    ends = [*(mark.start() for mark in marks), len(text)][1:]
    items: list[Item] = []
    open_question: str | None = None
    for mark, end in zip(marks, ends, strict=True):
        said = text[mark.end() : end]
        if mark["answer"] is not None:
            items.append(Item(_clean(said), open_question or ""))
            open_question = None
            continue
        if open_question is not None:
            items.append(Item("", open_question))
        question, *answer = _INLINE_ANSWER.split(said, maxsplit=1)
        open_question = _clean(question)
        if answer:
            items.append(Item(_clean(answer[0]), open_question))
            open_question = None
    return items if open_question is None else [*items, Item("", open_question)]


def as_whole(text: str) -> list[Item]:
    """The whole text as one item, without an opening remark."""
    lines = text.strip().splitlines()
    while len(lines) > 1 and (not lines[0].strip() or lines[0].rstrip(" *_").endswith(":")):
        lines = lines[1:]
    return _items(["\n".join(lines)])


def _pieces(text: str) -> list[str]:
    """Paragraphs where there are several, else lines; an opening remark is left out."""
    paragraphs = [" ".join(p.split()) for p in re.split(r"\n\s*\n", text.strip())]
    pieces = paragraphs if len(paragraphs) > 1 else text.strip().splitlines()
    return [piece for piece in pieces if not piece.rstrip(" *_").endswith(":")]


def _items(texts: list[str]) -> list[Item]:
    return [Item(clean) for clean in map(_clean, texts) if clean]


def _clean(text: str) -> str:
    """Without outer white space, bold marks and quotation marks around all of it."""
    text = text.strip()
    for mark in ("**", "__"):
        text = text.removeprefix(mark).removesuffix(mark).strip() if _wraps(mark, text) else text
    if len(text) > 1 and _QUOTES.get(text[0]) == text[-1] and text.count(text[-1]) <= 2:
        text = text[1:-1].strip()
    return text


def _wraps(mark: str, text: str) -> bool:
    alone = text.count(mark) == 1 and (text.startswith(mark) or text.endswith(mark))
    return alone or (text.count(mark) == 2 and text.startswith(mark) and text.endswith(mark))
