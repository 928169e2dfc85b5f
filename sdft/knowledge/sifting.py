"""From replies to questions: read, looked at for their form, freed of duplicates."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

from sdft.knowledge.checking import Sieve
from sdft.knowledge.passages import Passage
from sdft.knowledge.questions import Question, Reject, form_problem
from sdft.knowledge.replies import Said
from sdft.scorers.answer_words import answer_words
from sdft.self_edits.duplicates import Duplicates
from sdft.self_edits.parsing import as_pairs


class Sifter:
    """Remembers the questions that it has let through: of two alike the first one stays.

    Args:
        patterns: What no written question may match.
        ngram: See `Duplicates`.
        threshold: See `Duplicates`.

    Raises:
        ValueError: A number out of range.
    """

    def __init__(self, patterns: Sequence[re.Pattern[str]], ngram: int, threshold: float) -> None:
        self.patterns = patterns
        self.seen = Duplicates(ngram, threshold)
        self._answers: dict[tuple[str, ...], tuple[str, ...]] = {}

    def read(self, passages: tuple[Passage, ...], said: Said) -> Iterator[Question | Reject]:
        """The questions of a reply; the last one of a reply that was cut is left out."""
        items = as_pairs(said.text)
        if not items:
            reason = "truncated" if said.truncated else "no question could be read"
            yield Reject(reason, None, said.text, tuple(p.number for p in passages))
        for place, item in enumerate(items):
            question = Question(item.prompt or "", item.answer, passages, "written")
            if said.truncated and place == len(items) - 1:
                yield Reject("truncated", question)
            else:
                yield question

    def sift(self, found: Iterable[Question | Reject]) -> Sieve:
        """Leave out what has a wrong form, and what came before in the same words or nearly so."""
        sieve = Sieve()
        for own in found:
            if isinstance(own, Reject):
                sieve.rejected.append(own)
            elif (reason := self._problem(own)) is not None:
                sieve.rejected.append(Reject(reason, own, own.place))
            else:
                sieve.kept.append(own)
        return sieve

    def _problem(self, question: Question) -> str | None:
        problem = form_problem(question, self.patterns)
        if problem is not None:
            return problem
        asked, answer = tuple(answer_words(question.text)), tuple(answer_words(question.answer))
        if self._answers.get(asked, answer) != answer:
            return "the same question has another answer"
        compared = f"{question.text}\n{question.answer}"
        reason = self.seen.reason(compared)
        if reason is None:
            self.seen.add(compared)
            self._answers[asked] = answer
        return reason
