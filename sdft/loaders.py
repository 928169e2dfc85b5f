"""Loaders that deal their batches among the processes of a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

from torch.utils.data import DataLoader

from sdft.batch import Batch
from sdft.encoded import Encoded, collate_share
from sdft.ranks import rank, ranks
from sdft.stages import StageLoader


def own_share() -> Callable[[Sequence[Encoded]], Batch]:
    """Makes of a batch's items what this process gets of it."""
    return partial(collate_share, rank=rank(), ranks=ranks())


def evaluation_loader(items: list[Encoded], batch_size: int) -> Any:
    """Each item once, in their order.

    Args:
        items: The examples.
        batch_size: Prompts at once, of all processes together.
    """
    if ranks() == 1:
        # The size by name: `predict` re-creates the loader so.
        return DataLoader(cast(Any, items), batch_size=batch_size, collate_fn=own_share())
    # No DataLoader: Lightning would deal its rows anew, and repeat some.
    starts = range(0, len(items), batch_size)
    batches = [items[start : start + batch_size] for start in starts]
    return StageLoader(batches, own_share(), stage=0)
