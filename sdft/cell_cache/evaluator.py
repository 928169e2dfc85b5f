"""An evaluator that measures nothing twice."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict
from pathlib import Path

from transformers import PreTrainedModel

from sdft.base_kl import BaseResponses
from sdft.cell_cache.described import Undescribed
from sdft.cell_cache.facts import Facts, facts_of
from sdft.cell_cache.model_digest import model_digest
from sdft.cell_cache.store import CellStore, Entry
from sdft.encoded import Encoded
from sdft.evaluation import Artifacts
from sdft.evaluator import Evaluator
from sdft.metrics import Cell
from sdft.pass_at import PassAt
from sdft.ranks import agreed, rank
from sdft.seeding import run_seed
from sdft.student import StudentModule
from sdft.tasks import Task

log = logging.getLogger(__name__)


class CachedEvaluator(Evaluator):
    """Takes cells from a folder where the very same was measured before, and keeps new ones.

    A cell is found by the digest of the weights and of everything else that it depends on; what
    cannot be told (a scorer with a nested function, say) is measured every time. Cells without a
    score are not kept.

    Args:
        folder: Holds the cells.
        artifacts: See `Evaluator`.
        base: See `Evaluator`.
        pass_at: See `Evaluator`.
        limit: See `Evaluator`.

    Attributes:
        reused: Cells that were found so far.
    """

    def __init__(
        self,
        folder: str | Path,
        artifacts: Artifacts,
        base: BaseResponses | None,
        pass_at: PassAt | None,
        limit: int | None = None,
    ) -> None:
        super().__init__(artifacts, base, pass_at, limit)
        self.store = CellStore(Path(folder))
        self.reused = 0
        self._weights: str | None = None
        self._base: tuple[PreTrainedModel, str] | None = None

    def same_weights(self, module: StudentModule) -> AbstractContextManager[None]:
        """Inside, the student does not change: its digest is taken once."""
        return self._held(module)

    @contextmanager
    def _held(self, module: StudentModule) -> Iterator[None]:
        self._weights = model_digest(module.model)
        try:
            yield
        finally:
            self._weights = None

    def score(
        self, module: StudentModule, task: Task, encoded: Sequence[Encoded], batch_size: int
    ) -> Cell:
        """See `Evaluator.score`."""
        facts = self._facts(module, task, encoded, {"kind": "score", "batch_size": batch_size})
        found = self._found(facts)
        if found is not None:
            return found.cell
        return self._kept(facts, Entry(super().score(module, task, encoded, batch_size)))

    def cell(
        self,
        module: StudentModule,
        task: Task,
        encoded: Sequence[Encoded],
        batch_size: int,
        stage: int,
        with_pass_at: bool,
    ) -> Cell:
        """See `Evaluator.cell`."""
        more = {"kind": "cell", "batch_size": batch_size, "base_row": stage == 0}
        if self.pass_at is not None and with_pass_at:
            more |= {"pass_at": asdict(self.pass_at), "stage": stage, "seed": run_seed()}
        facts = self._facts(module, task, encoded, {**more, "kl": self._base_facts(module)})
        found = self._found(facts)
        if found is not None:
            if self.base is not None and found.base_ids is not None:
                self.base.ids[task.name] = found.base_ids
            return found.cell
        cell = super().cell(module, task, encoded, batch_size, stage, with_pass_at)
        ids = self.base.ids.get(task.name) if self.base is not None and stage == 0 else None
        return self._kept(facts, Entry(cell, ids))

    # ---------------------------------------------------------------- facts

    def _facts(
        self, module: StudentModule, task: Task, encoded: Sequence[Encoded], more: Facts
    ) -> Facts | None:
        """None where not everything that the cell depends on can be told."""
        weights = self._weights or model_digest(module.model)
        try:
            return {"weights": weights, **facts_of(self, module, task, encoded), **more}
        except Undescribed as reason:
            log.warning("retention.cache: %r is measured every time: %s", task.name, reason)
            return None

    def _base_facts(self, module: StudentModule) -> list[object] | None:
        if self.base is None or module.base is None:
            return None
        if self._base is None or self._base[0] is not module.base:
            self._base = (module.base, model_digest(module.base))  # nothing ever changes it
        return [self._base[1], self.base.limit]

    # ---------------------------------------------------------------- the folder

    def _found(self, facts: Facts | None) -> Entry | None:
        own = self.store.get(facts) if rank() == 0 and facts is not None else None
        found = agreed(own)
        if found is not None:
            self.reused += 1
            if rank() == 0 and facts is not None:
                print(f"{facts['column'][0]}: measured before, taken from retention.cache")
        return found

    def _kept(self, facts: Facts | None, entry: Entry) -> Cell:
        if rank() == 0 and facts is not None and entry.cell.score is not None:
            self.store.keep(facts, entry)
        return entry.cell
