"""Measures one task on the model as it is before training; nothing is trained or written."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from sdft.encoded import Encoded
from sdft.evaluation import Artifacts, Response, score_responses
from sdft.evaluator import respond_all
from sdft.methods import TeacherSampleModule
from sdft.metrics import Estimate
from sdft.module import SDFTModule
from sdft.preflight.alignment import align
from sdft.preflight.divergence import rollout_divergence
from sdft.preflight.facts import Speed, TaskFacts
from sdft.preflight.fitting import Fitting
from sdft.preflight.gap import Gap
from sdft.preflight.lengths import Lengths
from sdft.seeding import derive_seed
from sdft.student import StudentModule
from sdft.tasks import Task


def has_teacher(module: StudentModule) -> bool:
    """Whether the method shows the demonstration to a teacher."""
    return isinstance(module, SDFTModule | TeacherSampleModule)


@dataclass(frozen=True)
class Probe:
    """Looks at tasks with one model.

    Attributes:
        module: The method, its model loaded and in place.
        limits: Longest student and teacher prompt, in tokens.
        count: Examples per task, at most.
        seed: Chooses them, and draws the rollouts.
        batch_size: Prompts at once.
        artifacts: Tells answers that speak of the demonstration.
    """

    module: StudentModule
    limits: tuple[int, int]
    count: int
    seed: int
    batch_size: int
    artifacts: Artifacts

    def facts(self, task: Task) -> TaskFacts:
        """What there is to know of a task; a task that cannot be read is a fact, too."""
        limit, room = self.module.greedy.max_new_tokens, self.module.prompt_room
        try:
            fitting = Fitting.of(self.module.encoder, task, self.limits)
        except (ValueError, OSError) as error:
            return TaskFacts(task.name, problem=f"its examples cannot be used: {error}")
        found = TaskFacts(task.name, fitting, limit=limit, room=room)
        if not fitting.total:
            return replace(found, problem="it has no training examples")
        if not fitting.items:
            return replace(found, problem="not one of its training examples fits the limits")
        items = fitting.sample(task.name, self.count, self.seed)
        return self._measured(replace(found, examples=len(items)), task, items)

    def _measured(self, found: TaskFacts, task: Task, items: list[Encoded]) -> TaskFacts:
        found, scores = self._without(found, task, items)
        if not has_teacher(self.module):
            why = f"the method {self.module.method!r} has no teacher that sees the demonstration"
            names = ("accuracy_with", "gap", "divergence", "alignment")
            return replace(found, missing={**found.missing, **dict.fromkeys(names, why)})
        found = self._with(self._aligned(found, items), task, items, scores)
        return self._rollouts(found, task, items)

    def _without(
        self, found: TaskFacts, task: Task, items: list[Encoded]
    ) -> tuple[TaskFacts, list[float] | None]:
        """Greedy answers to the bare prompts, and how the demonstrations do in their place."""
        begin = time.perf_counter()
        answers = respond_all(self.module, items, self.batch_size)
        seconds = time.perf_counter() - begin
        read = sum(len(item.student_ids) for item in items)
        speed = Speed(seconds, len(items), sum(a.tokens for a in answers), read)
        written = self._demonstrations(items)
        scores, missing = self._scores(task, items, answers)
        own, _ = self._scores(task, items, written)
        measured = replace(
            found,
            without=Estimate.from_scores(scores) if scores else None,
            demonstrations=None if own is None else sum(own) / len(own),
            lengths={"without": _lengths(answers), "demonstrations": _lengths(written)},
            speed=speed,
            missing={"accuracy_without": missing} if missing else {},
        )
        return measured, scores

    def _aligned(self, found: TaskFacts, items: list[Encoded]) -> TaskFacts:
        module = self.module
        embedding: Any = module.model.get_input_embeddings()
        known = int(embedding.weight.shape[0])
        alignment = align(module.encoder, items, module.eos_ids, known)
        return replace(found, alignment=alignment)

    def _with(
        self, found: TaskFacts, task: Task, items: list[Encoded], before: list[float] | None
    ) -> TaskFacts:
        """Greedy answers to the prompts with the demonstration, against those without."""
        seen = [replace(item, student_ids=item.teacher_ids) for item in items]
        answers = respond_all(self.module, seen, self.batch_size)
        scores, why = self._scores(task, items, answers)
        missing = {"accuracy_with": why, "gap": why} if why else {}
        return replace(
            found,
            with_it=Estimate.from_scores(scores) if scores else None,
            gap=Gap.of(before, scores) if before and scores else None,
            lengths={**found.lengths, "with": _lengths(answers)},
            artifacts=sum(self.artifacts(a.text) for a in answers) / len(answers),
            missing={**found.missing, **missing},
        )

    def _rollouts(self, found: TaskFacts, task: Task, items: list[Encoded]) -> TaskFacts:
        """Answers as training draws them, and the divergence along them."""
        module = self.module
        sampling: Any = getattr(module, "sampling", module.greedy)
        seed = derive_seed(self.seed, "preflight", "rollouts", task.name)
        answers = respond_all(module, items, self.batch_size, sampling, seed)
        divergence = rollout_divergence(module, items, answers, self.batch_size)
        missing = {} if divergence else {"divergence": _all_skipped(module)}
        return replace(
            found,
            divergence=divergence,
            lengths={**found.lengths, "rollouts": _lengths(answers)},
            missing={**found.missing, **missing},
        )

    def _demonstrations(self, items: Sequence[Encoded]) -> list[Response]:
        """The demonstrations as if the model had answered them."""
        limit, found = self.module.greedy.max_new_tokens, []
        for item in items:
            text = item.example.demonstration or ""
            ids = self.module.tokenizer.encode(text, add_special_tokens=False)
            tokens = len(ids) + 1  # and the end
            found.append(Response(text.strip(), tokens, tokens > limit))
        return found

    @staticmethod
    def _scores(
        task: Task, items: Sequence[Encoded], answers: Sequence[Response]
    ) -> tuple[list[float] | None, str]:
        try:
            return score_responses(task, [item.example for item in items], answers), ""
        except ValueError as error:
            return None, str(error)


def _lengths(answers: Sequence[Response]) -> Lengths:
    return Lengths.of([a.tokens for a in answers], [a.truncated for a in answers])


def _all_skipped(module: StudentModule) -> str:
    skipped = getattr(module, "skip_first_tokens", 0)
    return f"no answer is longer than model.skip_first_tokens ({skipped}): no token counts"
