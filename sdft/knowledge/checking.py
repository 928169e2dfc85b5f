"""Is a question answered by its passage, and by nothing less?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from sdft.examples import Example, as_messages
from sdft.knowledge.questions import Question, Reject
from sdft.knowledge.replies import Replies, Said
from sdft.knowledge.requests import Requests
from sdft.scorers import AnswerWords, JudgeError, Scorer
from sdft.scorers.judge_model import JudgeModel
from sdft.scorers.scorer import ScoresTogether

RIGHT = 0.5
"""The score from which a reply counts as right."""


@dataclass
class Sieve:
    """Questions so far, and what was left out.

    Attributes:
        kept: Those that are still in.
        rejected: The others, with reasons.
    """

    kept: list[Question] = field(default_factory=list)
    rejected: list[Reject] = field(default_factory=list)

    def drop(self, reasons: Sequence[tuple[str, str] | None]) -> None:
        """Leave out the questions that have a reason and a detail."""
        before, self.kept = self.kept, []
        for question, reason in zip(before, reasons, strict=True):
            if reason is None:
                self.kept.append(question)
            else:
                self.rejected.append(Reject(reason[0], question, reason[1]))


class Checks:
    """Asks models the questions, and compares what they say with the answers.

    Args:
        requests: What is asked.
        replies: Keeps what is said.
        scorer: Compares.
        checker: Reads passages; None looks for the answer's words in them.
        closed_book: Is asked without passages; None asks nobody.
    """

    def __init__(
        self,
        requests: Requests,
        replies: Replies,
        scorer: Scorer,
        checker: JudgeModel | None,
        closed_book: JudgeModel | None,
    ) -> None:
        self.requests = requests
        self.replies = replies
        self.scorer = scorer
        self.checker = checker
        self.closed_book = closed_book

    def answerable(self, sieve: Sieve) -> None:
        """Leave out what its own passages do not answer."""
        if self.checker is None:
            found = AnswerWords()
            texts = [question.context for question in sieve.kept]
            right = [found(t, _example(q)) >= RIGHT for t, q in zip(texts, sieve.kept, strict=True)]
            reason = "the answer's words do not stand in the passage"
            sieve.drop([None if ok else (reason, "") for ok in right])
            return
        asked = [self.requests.answer(q, q.passages) for q in sieve.kept]
        said = self.replies.ask(self.checker, "answers from the passages", asked)
        reason = "not answered from its passage"
        sieve.drop(self._reasons(sieve.kept, said, reason, lambda right: not right))

    def needs_all(self, sieve: Sieve) -> None:
        """Leave out indirect questions that one of their passages answers alone."""
        if self.checker is None:
            return
        asked = [(q, passage) for q in sieve.kept for passage in q.passages]
        texts = [self.requests.answer(q, [passage]) for q, passage in asked]
        said = self.replies.ask(self.checker, "answers from one passage alone", texts)
        right = self._right([q for q, _ in asked], said)
        pairs = list(zip(asked, said, right, strict=True))
        found = {q.key: text.text for (q, _), text, ok in reversed(pairs) if ok}
        reason = "one passage answers it"
        sieve.drop([(reason, found[q.key]) if q.key in found else None for q in sieve.kept])

    def unknown(self, sieve: Sieve) -> None:
        """Leave out what a model answers without any passage."""
        if self.closed_book is None:
            return
        asked = [self.requests.recall(question) for question in sieve.kept]
        said = self.replies.ask(self.closed_book, "answers without the passages", asked)
        sieve.drop(
            self._reasons(sieve.kept, said, "known without its passage", lambda right: right)
        )

    def _reasons(
        self,
        questions: Sequence[Question],
        said: Sequence[Said],
        reason: str,
        drops: Callable[[bool], bool],
    ) -> list[tuple[str, str] | None]:
        right = self._right(questions, said)
        pairs = zip(said, right, strict=True)
        return [(reason, own.text) if drops(ok) else None for own, ok in pairs]

    def _right(self, questions: Sequence[Question], said: Sequence[Said]) -> list[bool]:
        texts = [own.text for own in said]
        examples = [_example(question) for question in questions]
        try:
            if isinstance(self.scorer, ScoresTogether):
                scores = self.scorer.score_all(texts, examples)
            else:
                pairs = zip(texts, examples, strict=True)
                scores = [float(self.scorer(text, example)) for text, example in pairs]
        except JudgeError as error:
            raise ValueError(
                f"{error}; the same command goes on. A model that gives no grades is no judge: "
                "set scorer to another one, or to AnswerWords"
            ) from error
        return [score >= RIGHT for score in scores]


def _example(question: Question) -> Example:
    return Example(as_messages(question.text), question.answer)
