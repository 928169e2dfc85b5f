"""Evaluates a student on one column of the retention matrix: a task or a suite."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import torch

from sdft.base_kl import BaseResponses
from sdft.draws import Draws
from sdft.encoded import Encoded
from sdft.evaluation import Artifacts, Response, score_responses, summarise
from sdft.metrics import Cell, Estimate
from sdft.pass_at import PassAt
from sdft.ranks import agreed, gathered, rank, ranks
from sdft.rollout import Sampling
from sdft.seeding import derive_seed, run_seed
from sdft.sharding import whole
from sdft.student import StudentModule
from sdft.suite import Suite
from sdft.tasks import Task

log = logging.getLogger(__name__)


class Evaluator:
    """Turns a student and examples into cells.

    Args:
        artifacts: Tells artifacts of the demonstration.
        base: Measures the divergence from the base; left out when None.
        pass_at: Which pass@k can be measured; none when None.
        limit: Examples of a suite that measures by itself, at most; all when None.
    """

    def __init__(
        self,
        artifacts: Artifacts,
        base: BaseResponses | None,
        pass_at: PassAt | None,
        limit: int | None = None,
    ) -> None:
        self.artifacts = artifacts
        self.base = base
        self.pass_at = pass_at
        self.limit = limit

    def same_weights(self, module: StudentModule) -> AbstractContextManager[None]:
        """Inside, the caller vouches that the student does not change."""
        return nullcontext()

    def score(
        self, module: StudentModule, task: Task, encoded: Sequence[Encoded], batch_size: int
    ) -> Cell:
        """The cell of the greedy responses alone, or what a suite measures by itself."""
        if isinstance(task, Suite):
            return task.measure(module, batch_size, self.limit)
        return self._summary(task, encoded, respond_all(module, encoded, batch_size))

    def cell(
        self,
        module: StudentModule,
        task: Task,
        encoded: Sequence[Encoded],
        batch_size: int,
        stage: int,
        with_pass_at: bool,
    ) -> Cell:
        """The cell with everything that is measured.

        Args:
            module: Holds the student and the base.
            task: The task or suite.
            encoded: Its examples.
            batch_size: Prompts at once.
            stage: Finished stages; at 0 the student is still the base.
            with_pass_at: Draw samples for pass@k, too.
        """
        if isinstance(task, Suite):
            return task.measure(module, batch_size, self.limit)
        responses = respond_all(module, encoded, batch_size)
        cell = self._summary(task, encoded, responses)
        if self.base is not None:
            if stage == 0:
                self.base.keep(task.name, responses)
            kl = self.base.divergence(module, task.name, encoded, batch_size)
            cell = replace(cell, kl_base=kl)
        if self.pass_at is not None and with_pass_at and cell.score is not None:
            passes = sample_passes(self.pass_at, module, task, encoded, batch_size, stage)
            cell = replace(cell, pass_at=passes)
        return agreed(cell)

    def _summary(
        self, task: Task, encoded: Sequence[Encoded], responses: Sequence[Response]
    ) -> Cell:
        if rank() != 0:  # one process asks the scorer: it may cost money, and need not answer alike
            return agreed(Cell(score=None, n=0))
        examples = [item.example for item in encoded]
        return agreed(summarise(task, examples, responses, self.artifacts))


def sample_passes(
    pass_at: PassAt,
    module: StudentModule,
    task: Task,
    encoded: Sequence[Encoded],
    batch_size: int,
    stage: int,
) -> dict[str, Estimate] | None:
    """pass@k of one column; None when the scorer fails on a sample.

    Args:
        pass_at: Which k, and how the samples are drawn.
        module: Holds the student.
        task: The task or suite.
        encoded: Its examples, at least one.
        batch_size: Responses at once.
        stage: Finished stages; it enters the seed.
    """
    n = pass_at.samples
    scores: list[float] = []
    items = sorted(encoded[: pass_at.limit], key=lambda item: len(item.student_ids))
    together = max(1, batch_size // n)  # examples at a time: only their scores are kept
    # A seed of its own, so that looking never changes what is trained.
    seed = derive_seed(run_seed(), "pass@k", task.name, stage)
    with torch.random.fork_rng(), whole(module.model):
        torch.manual_seed(derive_seed(seed, rank()) if ranks() > 1 else seed)
        for start in range(0, len(items), together):
            rows = [item for item in items[start : start + together] for _ in range(n)]
            chunk_seed = derive_seed(seed, start)
            found = _sampled_scores(pass_at, module, task, rows, batch_size, chunk_seed)
            if found is None:
                return None
            scores += found
    return pass_at.estimates([scores[start : start + n] for start in range(0, len(scores), n)])


def _sampled_scores(
    pass_at: PassAt,
    module: StudentModule,
    task: Task,
    rows: list[Encoded],
    batch_size: int,
    seed: int,
) -> list[float] | None:
    sampling = Sampling(module.greedy.max_new_tokens, pass_at.temperature)
    responses = respond_all(module, rows, batch_size, sampling, seed)
    scores: list[float] | None = None
    if rank() == 0:
        try:
            scores = score_responses(task, [row.example for row in rows], responses)
        except ValueError as error:
            log.warning("%s", error)
    return agreed(scores)


def respond_all(
    module: StudentModule,
    encoded: Sequence[Encoded],
    batch_size: int,
    sampling: Sampling | None = None,
    seed: int = 0,
) -> list[Response]:
    """Responses to all examples, in their order; batched by length to save padding.

    Several processes deal the rows of every batch among themselves, and all get all responses.

    Args:
        module: Answers.
        encoded: The examples.
        batch_size: Prompts at once, of all processes together.
        sampling: How they are drawn; greedily when None.
        seed: Draws them whatever the number of processes.
    """
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i].student_ids))
    own: dict[int, Response] = {}
    with whole(module.model):
        for start in range(0, len(order), batch_size):
            places = range(start, min(start + batch_size, len(order)))[rank() :: ranks()]
            if not places:
                continue
            prompts = [encoded[order[place]].student_ids for place in places]
            rows = tuple(place - start for place in places)
            total = min(batch_size, len(order) - start)
            draws = None if sampling is None else Draws(rows, total, derive_seed(seed, start))
            answers = module.respond(prompts, sampling or module.greedy, draws)
            own |= {order[place]: answer for place, answer in zip(places, answers, strict=True)}
    found = {i: response for part in gathered(own) for i, response in part.items()}
    return [found[i] for i in range(len(encoded))]
