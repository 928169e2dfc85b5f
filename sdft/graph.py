"""A decode step as one CUDA graph: a single launch in place of hundreds."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch

log = logging.getLogger(__name__)

_WARM_UP = 2  # steps before a capture: libraries set themselves up, autocast casts the weights
_PAYS_FROM = 16  # steps left; a capture costs about as much as an eager step


class StepGraph:
    """Runs a step a few times as it is, then as a captured graph.

    A graph holds addresses. It is forgotten when the step's tensors move, and lives for one batch
    of rollouts: it cannot outlast an update that moves the weights, and holds no memory meanwhile.
    """

    def __init__(self) -> None:
        self.graph: torch.cuda.CUDAGraph | None = None
        self.pool = torch.cuda.graph_pool_handle()
        self.usable = True
        self.warm = 0

    def forget(self) -> None:
        """The step's tensors have moved."""
        self.graph = None
        self.warm = 0

    def run(self, step: Callable[[], None], left: int) -> None:
        """Run the step.

        Args:
            step: Works in place on tensors of a CUDA device and leaves the host nothing to decide;
                always the same one.
            left: Steps that may follow.
        """
        if self.graph is None and self.usable and self.warm >= _WARM_UP and left >= _PAYS_FROM:
            self._capture(step)
        if self.graph is not None:
            self.graph.replay()
        else:
            self.warm += 1
            step()

    def _capture(self, step: Callable[[], None]) -> None:
        graph = torch.cuda.CUDAGraph()
        try:
            # Threads of the data loader may allocate meanwhile.
            with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
                step()
        except RuntimeError as error:
            self.usable = False
            log.warning("rollouts run without a CUDA graph, which could not be captured: %s", error)
        else:
            self.graph = graph
