"""Builds the data set: documents → passages → questions → checks → splits → files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sdft.atomic import atomic_folder
from sdft.knowledge.checking import Checks, Sieve
from sdft.knowledge.dataset import MANIFEST, DataSet
from sdft.knowledge.documents import Library, read_documents
from sdft.knowledge.given import GivenQuestions
from sdft.knowledge.indirect import compose, related_groups
from sdft.knowledge.local_model import LocalWriter, greedy
from sdft.knowledge.passages import Measure, Passage, cut_documents
from sdft.knowledge.questions import REFERS, Question, Reject
from sdft.knowledge.replies import Progress, Replies, alone
from sdft.knowledge.requests import Requests
from sdft.knowledge.settings import (
    Answerable,
    IndirectBy,
    Unit,
    answerable_by,
    check_settings,
    compiled,
    file_digest,
    written_indirect,
)
from sdft.knowledge.sifting import Sifter
from sdft.knowledge.splits import split
from sdft.models import ModelSource
from sdft.redaction import redacted, redacted_text
from sdft.scorers import AnswerWords, Judge, Scorer
from sdft.scorers.judge_model import JudgeModel
from sdft.stores import describe, fingerprint


class KnowledgeBuild:
    """Makes a data set that teaches a model what documents say.

    The folder `out` gets `train.jsonl`, `validation.jsonl`, `test.jsonl` and `ood.jsonl` (what
    `JSONLTask` reads), `passages.jsonl`, `rejected.jsonl` (with reasons), `manifest.json` and a
    `README.md` for the person who reviews it. It appears whole or not at all. What models have
    replied is kept in `OUT.work`, and never asked for twice.

    Args:
        docs: A file, or a folder of text, Markdown and JSONL files.
        out: The data set's folder.
        questions: JSONL file of given questions (`question`, `answer`, and `document` or
            `context`). Questions that stand in the documents' JSONL lines are taken in any case.
        text_field: Field with a JSONL line's text; `text`, `context` or `content` when unset.
        title_field: Field with its title, which a line may lack.
        limit: Read at most so many documents.
        chunk_size: Longest passage.
        chunk_unit: What `chunk_size` counts.
        tokenizer: Model whose tokens are counted; the writer's when it is a model on this machine.
        writer: Writes questions: a `ChatEndpoint`, or a `LocalWriter`. Without one there are the
            given questions alone.
        per_passage: Questions that are asked for per passage.
        checker: Answers each question from its passage; the writer, greedily, when unset.
        closed_book: Answers each question without a passage, and what it knows is left out: the
            model that is to be trained. Nobody is asked when unset.
        scorer: Compares these answers; when unset a `Judge` that asks the checker (without one, the
            answer's words have to stand in the reply).
        answerable: How a question is found to be answered by its passage: `model` (the checker is
            asked), `text` (the answer's words stand in the passage), `off`, or `auto`: the first
            where there is a checker, else the second.
        indirect: Indirect questions that are asked for.
        indirect_documents: Documents that one of them needs.
        indirect_by: `writer` has them written, `composition` joins two training questions; `auto`
            is the first where there is a writer.
        templates: What models are asked, by name: `write`, `answer`, `recall`, `indirect`; and
            `composed`, which joins two questions.
        prompt_template: The prompt of an example, with `{question}`, and `{title}` where questions
            are not clear without it.
        validation: Share of the questions that validates.
        test: Share of the questions that tests.
        reject_patterns: Regular expressions that no written question may match; when unset, those
            that find "according to the text" and the like.
        duplicate_ngram: Words of an n-gram, for near-duplicates.
        duplicate_threshold: Share of n-grams in common (Jaccard) from which two questions with
            their answers are near-duplicates, in (0, 1].
        seed: Of the splits, of what is composed, and of a `LocalWriter` without its own.

    Raises:
        ValueError: A setting out of range, or settings that do not go together.
    """

    def __init__(
        self,
        docs: str,
        out: str,
        questions: str | None = None,
        text_field: str | None = None,
        title_field: str = "title",
        limit: int | None = None,
        chunk_size: int = 300,
        chunk_unit: Unit = "words",
        tokenizer: str | None = None,
        writer: JudgeModel | None = None,
        per_passage: int = 5,
        checker: JudgeModel | None = None,
        closed_book: JudgeModel | None = None,
        scorer: Scorer | None = None,
        answerable: Answerable = "auto",
        indirect: int = 50,
        indirect_documents: int = 2,
        indirect_by: IndirectBy = "auto",
        templates: dict[str, str] | None = None,
        prompt_template: str = "{question}",
        validation: float = 0.1,
        test: float = 0.2,
        reject_patterns: list[str] | None = None,
        duplicate_ngram: int = 3,
        duplicate_threshold: float = 0.7,
        seed: int = 0,
    ) -> None:
        self.settings = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        check_settings(self.settings)
        self.folder, self.work = Path(out), Path(f"{out.rstrip('/')}.work")
        self.docs, self.questions = docs, questions
        self.reading = (text_field, title_field, limit)
        self.chunk_size, self.chunk_unit, self.seed = chunk_size, chunk_unit, seed
        self.tokenizer = tokenizer
        self.prompt_template, self.shares = prompt_template, (validation, test)
        self.per_passage = per_passage
        self.indirect, self.indirect_documents = indirect, indirect_documents
        self.writer, self.closed_book = writer, closed_book
        self._name_model("model that writes questions", writer)
        self.checker = greedy(writer) if checker is None and writer is not None else checker
        self._name_model("model that checks questions", self.checker)
        self._name_model("model that answers without a passage", closed_book)
        self.answerable = answerable_by(answerable, self.checker)
        self.writes_indirect = written_indirect(indirect_by, writer)
        self.scorer = scorer
        self.requests = Requests(templates)
        patterns = compiled(REFERS if reject_patterns is None else reject_patterns)
        self.sifter = Sifter(patterns, duplicate_ngram, duplicate_threshold)

    def _name_model(self, role: str, model: JudgeModel | None) -> None:
        """Have errors say which model it was, and hand on the seed."""
        if model is not None:
            model.role = role
        if isinstance(model, LocalWriter) and model.seed is None:
            model.seed = self.seed

    # ---------------------------------------------------------------- the build

    def write(self, overwrite: bool = False, progress: Progress | None = None) -> DataSet | None:
        """Build the data set; None where it is there already.

        Args:
            overwrite: Put it in the place of one that was built otherwise.
            progress: Called as replies come.

        Raises:
            ValueError: Documents or questions that cannot be read, a model that cannot be had, a
                folder that holds something else, or no question left. Replies are kept.
        """
        library = read_documents(self.docs, *self.reading)
        mark = fingerprint({"settings": self._described(), "sources": library.sources})
        if self._finished(mark, overwrite):
            return None
        self.work.mkdir(parents=True, exist_ok=True)
        with alone(self.work):
            replies = Replies(self.work / "replies.jsonl", progress or (lambda *_: None))
            data = self._build(library, replies)
            data.facts = {"fingerprint": mark, **self._facts(replies)}
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            with atomic_folder(self.folder, replace=True) as temporary:
                data.write(temporary)
        if not replies.path.exists():  # nobody was asked
            shutil.rmtree(self.work)
        return data

    def _build(self, library: Library, replies: Replies) -> DataSet:
        passages = cut_documents(library.documents, self.chunk_size, self._measure())
        checks = self._checks(replies)
        sieve = self.sifter.sift(
            [*self._given(library, passages), *self._written(passages, replies)]
        )
        if self.answerable != "off":
            checks.answerable(sieve)
        checks.unknown(sieve)
        direct = [question for question in sieve.kept if not question.indirect]
        if not direct:
            reasons = sorted({reject.reason for reject in sieve.rejected}) or ["none was found"]
            raise ValueError(
                f"not one question about a passage is left ({'; '.join(reasons)}): give a writer, "
                "or questions"
            )
        splits = split(direct, *self.shares, self.seed)
        ood = [question for question in sieve.kept if question.indirect]
        more = self._indirect(passages, splits.train, replies, checks)
        rejected = [*sieve.rejected, *more.rejected]
        return DataSet(
            library, passages, splits, [*ood, *more.kept], rejected, self.prompt_template
        )

    def _given(self, library: Library, passages: list[Passage]) -> Iterator[Question | Reject]:
        given = GivenQuestions(passages)
        yield from given.of_documents(library.documents)
        if self.questions is not None:
            yield from given.of_file(self.questions)

    def _written(self, passages: list[Passage], replies: Replies) -> Iterator[Question | Reject]:
        if self.writer is None:
            return
        asked = [self.requests.write(passage, self.per_passage) for passage in passages]
        said = replies.ask(self.writer, "questions about passages", asked)
        for passage, own in zip(passages, said, strict=True):
            yield from self.sifter.read((passage,), own)

    def _indirect(
        self, passages: list[Passage], train: list[Question], replies: Replies, checks: Checks
    ) -> Sieve:
        about = {question.passages[0].number for question in train}
        known = [passage for passage in passages if passage.number in about]
        groups = related_groups(known, self.indirect, self.indirect_documents, self.seed)
        if not self.writes_indirect:
            return self.sifter.sift(compose(train, groups, self.requests, self.seed))
        assert self.writer is not None
        asked = [self.requests.indirect(group) for group in groups]
        said = replies.ask(self.writer, "indirect questions", asked)
        found = [q for g, own in zip(groups, said, strict=True) for q in self.sifter.read(g, own)]
        sieve = self.sifter.sift(found)
        if self.answerable == "model":
            checks.answerable(sieve)
            checks.needs_all(sieve)
        checks.unknown(sieve)
        return sieve

    def _checks(self, replies: Replies) -> Checks:
        checker = self.checker if self.answerable == "model" else None
        scorer: Scorer | None = self.scorer
        if scorer is None:
            judge = self.checker
            verdicts = self.work / "verdicts"
            scorer = AnswerWords() if judge is None else Judge(judge, cache=verdicts)
        return Checks(self.requests, replies, scorer, checker, self.closed_book)

    def _measure(self) -> Measure:
        if self.chunk_unit == "words":
            return lambda text: len(text.split())
        name = self.tokenizer or getattr(self.writer, "model_name", None)
        if name is None:
            raise ValueError("chunk_unit is tokens: name a model as tokenizer")
        tokenizer = ModelSource(name).load_tokenizer()
        return lambda text: len(tokenizer.encode(text, add_special_tokens=False, verbose=False))

    # ---------------------------------------------------------------- what it was made from

    def _finished(self, mark: str, overwrite: bool) -> bool:
        if not self.folder.exists() or (self.folder.is_dir() and not any(self.folder.iterdir())):
            return False
        try:
            manifest = json.loads((self.folder / MANIFEST).read_text(encoding="utf-8"))
            found = manifest["fingerprint"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"out: {self.folder} holds something that is no data set of ours: give another "
                "folder"
            ) from error
        if not overwrite and found != mark:
            raise ValueError(
                f"out: {self.folder} holds a data set of other documents or settings: give another "
                "folder, or --overwrite, which also discards what was edited in it"
            )
        return not overwrite

    def _described(self) -> dict[str, Any]:
        """Settings as plain values; a model is what its replies depend on."""
        found: dict[str, Any] = {}
        for name, value in self.settings.items():
            if name in ("docs", "out"):
                continue
            if isinstance(value, JudgeModel):
                found[name] = redacted_text(value.identity)
            else:
                found[name] = describe(value) if name == "scorer" else value
        if self.questions is not None:
            found["questions"] = file_digest(self.questions)
        return dict(redacted({**found, "templates": self.requests.templates}))

    def _facts(self, replies: Replies) -> dict[str, Any]:
        used = replies.used
        spent = {
            "replies": used.calls,
            "read": used.prompt_tokens,
            "written": used.completion_tokens,
        }
        return {"seed": self.seed, "settings": self._described(), "tokens": spent}
