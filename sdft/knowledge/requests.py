"""What models are asked: templates, and how they are filled."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from sdft.knowledge.passages import Passage
from sdft.knowledge.questions import Question

WRITE = """Read the text below and write {count} different questions about it, each with its \
answer. Ask for single facts that somebody may want to know: names, numbers, dates, places, \
causes, effects. A question must be clear to somebody who has never seen the text: say the names \
of people, places and events, and never mention "the text". An answer is short, complete and \
stands in the text. Use exactly this form:

Q: the question
A: the answer

Text:
{passage}"""

ANSWER = """Answer the question from the text below, in as few words as possible. If the text does \
not answer it, say: not in the text.

Text:
{passage}

Question: {question}"""

RECALL = """Answer the question in as few words as possible. If you do not know, say: I do not know.

Question: {question}"""

INDIRECT = """Below are {documents} texts. Write one question with its answer. The question must \
need all of the texts: it compares or connects what they say, and cannot be answered from one of \
them. It must be clear to somebody who has never seen the texts: say the names of people, places \
and events, and never mention "the texts". The answer is short and follows from the texts. Use \
exactly this form:

Q: the question
A: the answer

{passage}"""

COMPOSED = "Answer both questions in one sentence. First: {first} Second: {second}"

_NEEDED: dict[str, tuple[str, ...]] = {
    "write": ("passage", "count"),
    "answer": ("passage", "question"),
    "recall": ("question",),
    "indirect": ("passage",),
    "composed": ("first", "second"),
}


class Requests:
    """Fills the templates.

    Args:
        templates: Templates of one's own, by their names.

    Raises:
        ValueError: An unknown name, or a template without one of its placeholders.
    """

    def __init__(self, templates: Mapping[str, str] | None = None) -> None:
        self.templates = {
            "write": WRITE,
            "answer": ANSWER,
            "recall": RECALL,
            "indirect": INDIRECT,
            "composed": COMPOSED,
        }
        for name, template in (templates or {}).items():
            if name not in _NEEDED:
                raise ValueError(f"templates: found {name!r}, allowed are {', '.join(_NEEDED)}")
            for needed in _NEEDED[name]:
                if f"{{{needed}}}" not in template:
                    raise ValueError(f"templates.{name} lacks {{{needed}}}: {template!r}")
            self.templates[name] = template

    def write(self, passage: Passage, count: int) -> str:
        """Asks for questions about a passage."""
        return self._filled("write", passage=passage.shown, count=str(count))

    def answer(self, question: Question, passages: Sequence[Passage]) -> str:
        """Asks a question beside some passages."""
        return self._filled("answer", passage=joined(passages), question=question.text)

    def recall(self, question: Question) -> str:
        """Asks a question alone."""
        return self._filled("recall", question=question.text)

    def indirect(self, passages: Sequence[Passage]) -> str:
        """Asks for a question that needs several passages."""
        return self._filled("indirect", passage=joined(passages), documents=str(len(passages)))

    def composed(self, first: str, second: str) -> str:
        """A question made of two."""
        return self._filled("composed", first=first, second=second)

    def _filled(self, name: str, **values: str) -> str:
        pattern = "|".join(f"{{({key})}}" for key in values)
        template = self.templates[name]
        return re.sub(pattern, lambda match: values[match[match.lastindex or 1]], template)


def joined(passages: Sequence[Passage]) -> str:
    """Passages one below the other; numbered where there are several."""
    if len(passages) == 1:
        return passages[0].shown
    return "\n\n".join(f"Text {i}:\n{passage.shown}" for i, passage in enumerate(passages, 1))
