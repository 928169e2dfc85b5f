"""Questions about passages, and what tells a usable one without asking a model."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from sdft.jsonl import fill_template
from sdft.knowledge.passages import Passage
from sdft.scorers.answer_words import answer_words, holds

Origin = Literal["given", "written", "composed"]

Record = dict[str, Any]

REFERS = (
    r"(?i)\b(?:in|to|from|by|of|according to|based on) (?:the|this|that|these|the given|the above|"
    r"the following) (?:passages?|texts?|articles?|paragraphs?|excerpts?|documents?)\b",
    r"(?i)\b(?:the|this) (?:passage|text|article|paragraph|excerpt|author) "
    r"(?:says?|states?|mentions?|describes?|claims?|explains?)\b",
)
"""Questions that only make sense beside the text; nobody shows it to the student."""


@dataclass(frozen=True)
class Question:
    """A question with its answer.

    Attributes:
        text: What is asked.
        answer: The right answer.
        passages: What it is about; more than one for an indirect question.
        origin: Who wrote it.
        place: Where it was given; empty for others.
        parts: The questions that a composed one consists of.
    """

    text: str
    answer: str
    passages: tuple[Passage, ...]
    origin: Origin
    place: str = ""
    parts: tuple[Question, ...] = ()

    @property
    def key(self) -> str:
        """Twelve hexadecimal digits that name it."""
        numbers = [passage.number for passage in self.passages]
        return hashlib.sha256(repr((self.text, self.answer, numbers)).encode()).hexdigest()[:12]

    @property
    def indirect(self) -> bool:
        """Whether it needs several passages."""
        return len(self.passages) > 1

    @property
    def context(self) -> str:
        """Its passages, as the teacher reads them."""
        return "\n\n".join(passage.shown for passage in self.passages)

    def record(self, prompt_template: str) -> Record:
        """A line of the data set, as `JSONLTask` reads it.

        Args:
            prompt_template: With `{question}`; `{title}` is the passages' title.
        """
        titles = dict.fromkeys(passage.title for passage in self.passages if passage.title)
        fields = {"question": self.text, "title": ", ".join(titles)}
        return {
            "prompt": fill_template(prompt_template, fields),
            "answer": self.answer,
            "demonstration": self.answer,
            "context": self.context,
            "id": self.key,
            "origin": self.origin,
            "passages": [passage.number for passage in self.passages],
            "documents": [passage.document for passage in self.passages],
            **({"parts": [part.key for part in self.parts]} if self.parts else {}),
        }


@dataclass(frozen=True)
class Reject:
    """What was left out.

    Attributes:
        reason: Why, in words that are the same for all that were left out for it.
        question: The question, where there was one.
        detail: What shows it: a model's reply, a question's place.
        passages: Numbers of the passages, where there was no question.
    """

    reason: str
    question: Question | None = None
    detail: str = ""
    passages: tuple[int, ...] = ()

    def record(self) -> Record:
        """A line of `rejected.jsonl`."""
        own = self.question
        found: Record = {"reason": self.reason, "detail": self.detail}
        if own is None:
            return {**found, "passages": list(self.passages)}
        about = {"question": own.text, "answer": own.answer, "origin": own.origin}
        numbers = [passage.number for passage in own.passages]
        return {**found, **about, "place": own.place, "passages": numbers}


def form_problem(question: Question, patterns: Sequence[re.Pattern[str]]) -> str | None:
    """What is wrong with a question's own words; None where nothing is.

    Args:
        question: The question.
        patterns: What a written question must not match; those that a person gave are trusted.
    """
    if not answer_words(question.text):
        return "an answer without a question"
    if not answer_words(question.answer):
        return "a question without an answer"
    if question.origin != "written":
        return None
    if any(pattern.search(question.text) for pattern in patterns):
        return "refers to the text"
    if holds(answer_words(question.text), answer_words(question.answer)):
        return "gives its answer away"
    return None
