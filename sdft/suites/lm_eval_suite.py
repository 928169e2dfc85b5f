"""Benchmarks of lm-eval as columns of the retention matrix; needs the extra `sdft[lm-eval]`."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from sdft.evaluation import Response
from sdft.metrics import Cell
from sdft.randomness import kept_generators
from sdft.ranks import agreed, rank
from sdft.respondent import Respondent
from sdft.suite import Suite
from sdft.suites.desk import Desk
from sdft.suites.lm_results import Found
from sdft.suites.lm_tasks import LoadedTasks, Setting
from sdft.suites.ready import READY, Ready

log = logging.getLogger(__name__)


class LMEvalSuite(Suite):
    """A task or group of EleutherAI's lm-evaluation-harness, asked of the student in memory.

    Likelihoods are fp32 logarithms of the student as it trains, and completions come from the
    run's own rollout engine. A request that does not fit into the model's context is not cut: its
    example is left out, counted and reported.

    Args:
        name: Names the column; `hellaswag`, `mmlu`, `truthfulqa`, `winogrande`, `humaneval` and
            `ifeval` need nothing else.
        task: A task or group of lm-eval, or a task file of yours (`.yaml`); the one of that name
            when unset.
        metric: Which of its metrics is the score; may be left out where there is one.
        filter: Which form of the responses is measured, where lm-eval has several
            (`strict-match`).
        num_fewshot: Examples in the prompt; as the task says when unset.
        limit: Use at most so many examples (of each task of a group).
        chat: Put prompts through the chat template; no, except for `ifeval`, when unset.
        system: A system message, with `chat`.
        fewshot_as_multiturn: With `chat`, examples are turns of the conversation.
        max_new_tokens: Longest completion; as the task says when unset.
        batch_size: Rows at once; `data.eval_batch_size` when unset.
        include_path: A folder with more task files.
        run_code: Allow tasks that execute what the model writes, on this machine and unguarded.

    Raises:
        ValueError: A number out of range, an unknown name, or code that is not allowed to run.
    """

    def __init__(
        self,
        name: str,
        task: str | None = None,
        metric: str | None = None,
        filter: str | None = None,
        num_fewshot: int | None = None,
        limit: int | None = None,
        chat: bool | None = None,
        system: str | None = None,
        fewshot_as_multiturn: bool = False,
        max_new_tokens: int | None = None,
        batch_size: int | None = None,
        include_path: str | None = None,
        run_code: bool = False,
    ) -> None:
        super().__init__(name)
        ready = self._ready(name, task)
        for key, value, least in (
            ("num_fewshot", num_fewshot, 0),
            ("limit", limit, 1),
            ("max_new_tokens", max_new_tokens, 1),
            ("batch_size", batch_size, 1),
        ):
            if value is not None and value < least:
                raise ValueError(f"suite {name!r}: {key} must be at least {least}, found {value}")
        if ready.runs_code and not run_code:
            raise ValueError(
                f"suite {name!r} executes code that the model writes, on this machine and "
                "unguarded: set run_code to true to allow it, or leave the suite out"
            )
        self.task = ready.task
        self.metric = metric or ready.metric or None
        self.filter = filter or (ready.filter if self.metric == ready.metric else None)
        self.num_fewshot, self.limit = num_fewshot, limit
        self.chat = ready.chat if chat is None else chat
        self.system, self.fewshot_as_multiturn = system, fewshot_as_multiturn
        self.max_new_tokens, self.batch_size = max_new_tokens, batch_size
        self.include_path, self.run_code = include_path, run_code
        self._loaded: LoadedTasks | None = None

    @staticmethod
    def _ready(name: str, task: str | None) -> Ready:
        by_task = {ready.task: ready for ready in READY.values()}
        if task is not None:
            return by_task.get(task, Ready(task, ""))
        if name not in READY:
            raise ValueError(
                f"suite {name!r}: give the task of lm-eval that it is; without one the name must "
                f"be one of {', '.join(READY)}"
            )
        return READY[name]

    # ---------------------------------------------------------------- measuring

    def prepare(self, module: Respondent) -> None:
        """Load the task and its data on rank 0.

        Raises:
            ValueError: lm-eval, the task or its data are not there, or it would run code.
        """
        problem = None
        if rank() == 0 and self._loaded is None:
            try:
                self._loaded = self._load(module)
            except ValueError as error:
                problem = str(error)
        problem = agreed(problem)
        if problem is not None:
            raise ValueError(problem)

    def _load(self, module: Respondent) -> LoadedTasks:
        if importlib.util.find_spec("lm_eval") is None:
            raise ValueError(
                f"suite {self.name!r} needs lm-eval, which is not installed: "
                "pip install 'sdft[lm-eval]'"
            )
        with kept_generators(module.device):
            return LoadedTasks(self.setting)

    @property
    def setting(self) -> Setting:
        """What lm-eval is told."""
        return Setting(
            self.name,
            self.task,
            self.num_fewshot,
            self.chat,
            self.system,
            self.fewshot_as_multiturn,
            self.include_path,
            self.run_code,
        )

    def measure(self, module: Respondent, batch_size: int, limit: int | None = None) -> Cell:
        """One cell, from lm-eval on rank 0 and all processes' work (see `Suite.measure`)."""
        self.prepare(module)
        desk = Desk(module, self.batch_size or batch_size)
        if rank() != 0:
            desk.serve()
            return agreed(Cell(None, 0))
        try:
            with kept_generators(module.device):
                cell = self._cell(desk, limit)
        except Exception as error:  # a task's own functions may raise anything
            log.warning("suite %r: %s", self.name, error)
            cell = Cell(None, 0, error=f"suite {self.name!r}: {type(error).__name__}: {error}")
        finally:
            desk.close()
        return agreed(cell)

    def _cell(self, desk: Desk, limit: int | None) -> Cell:
        from sdft.suites.lm_adapter import StudentLM

        assert self._loaded is not None
        model = StudentLM(desk, self.max_new_tokens)
        limits = [one for one in (self.limit, limit) if one is not None]
        results = self._loaded.evaluate(model, min(limits, default=None))
        if model.unfit:
            log.warning(
                "suite %r: left out %d examples that do not fit into the model's context of %s "
                "tokens",
                *(self.name, len(model.unfit), model.room),
            )
        found = Found(
            self._loaded.name,
            results,
            self._loaded.aggregations,
            frozenset(model.unfit),
            model.unanswered,
        )
        return replace(found.cell(self.metric, self.filter), **lengths(model.responses.values()))

    def described(self) -> dict[str, Any]:
        """The task with its data, lm-eval's version, and everything that it is told."""
        own = {"limit": self.limit, "metric": self.metric, "filter": self.filter}
        own |= {"max_new_tokens": self.max_new_tokens, "batch_size": self.batch_size}
        found = None if self._loaded is None else self._loaded.described()
        return {**own, "tasks": agreed(found)}


def lengths(responses: Iterable[Sequence[Response]]) -> dict[str, Any]:
    """A cell's lengths; empty for a task that has nothing written."""
    found = [response for own in responses for response in own]
    if not found:
        return {}
    n, thoughts = len(found), [one.thoughts for one in found if one.thoughts is not None]
    facts = {
        "mean_length": sum(one.tokens for one in found) / n,
        "truncated": sum(one.truncated for one in found) / n,
    }
    if thoughts:
        facts["thought_length"] = sum(one.tokens for one in thoughts) / n
        facts["unfinished"] = sum(not one.finished for one in thoughts) / n
    return facts
