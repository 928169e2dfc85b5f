"""Questions that somebody else has written: with the documents, or in a file of their own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from sdft.jsonl import Record, read_jsonl
from sdft.knowledge.documents import Document
from sdft.knowledge.passages import Passage
from sdft.knowledge.questions import Question, Reject
from sdft.scorers.answer_words import answer_words

NO_PASSAGE = "no passage of its document holds the answer"


class GivenQuestions:
    """Finds the passages that given questions are about.

    Args:
        passages: All passages.
    """

    def __init__(self, passages: Sequence[Passage]) -> None:
        self.passages = passages
        self._said = {p.number: f" {' '.join(answer_words(p.shown))} " for p in passages}
        self._names: dict[str, list[Passage]] = {}
        for passage in passages:
            for name in {passage.document, passage.subject, passage.document.partition(":")[0]}:
                self._names.setdefault(name, []).append(passage)

    def of_documents(self, documents: Sequence[Document]) -> Iterator[Question | Reject]:
        """Questions that stand beside their text."""
        for document in documents:
            for place, record in document.questions:
                question, answer = self._words(place, record)
                yield self._placed(place, question, answer, [[*self._names[document.name]]])

    def of_file(self, path: str) -> Iterator[Question | Reject]:
        """Questions of a JSONL file.

        A line has `question` (or `prompt`) and `answer`, and where they are known `document` (the
        name or title of its document; a list for an indirect question) or `context` (a text that
        holds its passage or stands in it). Without either, all passages are looked through.

        Raises:
            ValueError: A line without question or answer, or an unknown document.
        """
        for number, (place, record) in enumerate(read_jsonl(path), 1):
            question, answer = self._words(place, record)
            candidates = self._candidates(place, record)
            yield self._placed(f"{Path(path).name}, line {number}", question, answer, candidates)

    def _words(self, place: str, record: Record) -> tuple[str, str]:
        question = record.get("question", record.get("prompt"))
        answer = record.get("answer")
        for name, value in (("question", question), ("answer", answer)):
            if not isinstance(value, str) or not value.strip():
                fields = ", ".join(map(repr, record)) or "none"
                raise ValueError(f"{place}: no text in the field {name!r}; fields found: {fields}")
        return str(question).strip(), str(answer).strip()

    def _candidates(self, place: str, record: Record) -> list[list[Passage]]:
        """Per document, the passages that it may be about."""
        names = record.get("documents", record.get("document"))
        if names is not None:
            listed = names if isinstance(names, list) else [names]
            unknown = [name for name in listed if str(name) not in self._names]
            if unknown or not listed:
                raise ValueError(f"{place}: no document has the name or title {unknown!r}")
            return [self._names[str(name)] for name in listed]
        context = " ".join(answer_words(str(record.get("context") or "")))
        if not context:
            return [list(self.passages)]
        return [[p for p in self.passages if self._same(p, context)]]

    def _same(self, passage: Passage, context: str) -> bool:
        own = " ".join(answer_words(passage.text))
        return own in context or context in self._said[passage.number]

    def _placed(
        self, place: str, question: str, answer: str, candidates: Sequence[Sequence[Passage]]
    ) -> Question | Reject:
        if len(candidates) > 1:
            chosen = tuple(self._nearest(found, question, answer) for found in candidates)
            return Question(question, answer, chosen, "given", place)
        (found,) = candidates
        words = f" {' '.join(answer_words(answer))} "
        holders = [p for p in found if words in self._said[p.number]]
        if not holders and len(found) != 1:
            about = Question(question, answer, (), "given", place)
            return Reject(NO_PASSAGE, about, place)
        return Question(
            question, answer, (self._nearest(holders or found, question, answer),), "given", place
        )

    def _nearest(self, found: Sequence[Passage], question: str, answer: str) -> Passage:
        """The passage with most of the words; the first of several."""
        words = {*answer_words(question), *answer_words(answer)}
        return max(found, key=lambda p: sum(f" {w} " in self._said[p.number] for w in words))
