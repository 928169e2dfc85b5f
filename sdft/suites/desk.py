"""One process asks, all processes answer: lm-eval runs on rank 0 alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sdft.evaluation import Response
from sdft.ranks import agreed
from sdft.respondent import Respondent
from sdft.suites.completions import Order, complete
from sdft.suites.likelihood import Likelihood, Pair, likelihoods


@dataclass(frozen=True)
class _Job:
    """What is to be computed together.

    Attributes:
        prompts: Token ids of prompts, or pairs.
        order: How prompts are to be completed; None asks for the likelihoods of pairs.
    """

    prompts: Sequence[Any]
    order: Order | None


class Desk:
    """Where rank 0 hands in work that all processes share.

    Rank 0 calls `likelihoods` and `complete`, and `close` at last; the others call `serve`, which
    ends with it.

    Args:
        module: Holds the model.
        batch_size: Rows at once, of all processes together.
    """

    def __init__(self, module: Respondent, batch_size: int) -> None:
        self.module, self.batch_size = module, batch_size

    def likelihoods(self, pairs: Sequence[Pair]) -> list[Likelihood]:
        """Of every continuation, given its context."""
        found: list[Likelihood] = self._work(agreed(_Job(pairs, None)))
        return found

    def complete(self, prompts: Sequence[Sequence[int]], order: Order) -> list[Response]:
        """A completion of every prompt."""
        found: list[Response] = self._work(agreed(_Job(prompts, order)))
        return found

    def close(self) -> None:
        """Nothing else will be asked."""
        agreed(None)

    def serve(self) -> None:
        """Do what rank 0 asks for, until it has closed."""
        nothing: _Job | None = None
        while (job := agreed(nothing)) is not None:
            self._work(job)

    def _work(self, job: _Job) -> list[Any]:
        if not job.prompts:
            return []
        if job.order is None:
            return likelihoods(self.module, job.prompts, self.batch_size)
        return complete(self.module, job.prompts, job.order, self.batch_size)
