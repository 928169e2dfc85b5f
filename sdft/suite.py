"""A column of the retention matrix that is not made of prompts and answers."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sdft.examples import Example
from sdft.scorers.exact import ExactMatch
from sdft.tasks import Split, Task

if TYPE_CHECKING:
    from sdft.metrics import Cell
    from sdft.respondent import Respondent


class Suite(Task):
    """Measures a model by itself, in place of examples with a scorer; only ever evaluated.

    Args:
        name: Unique within a run.
    """

    def __init__(self, name: str) -> None:
        super().__init__(name, ExactMatch())

    def examples(self, split: Split) -> Sequence[Example]:
        """None."""
        return ()

    @abstractmethod
    def prepare(self, module: Respondent) -> None:
        """Find everything that a measurement needs, before anything is trained; all processes.

        Raises:
            ValueError: Something is missing.
        """

    @abstractmethod
    def measure(self, module: Respondent, batch_size: int, limit: int | None = None) -> Cell:
        """One cell; a collective call. What goes wrong costs this cell's score alone.

        Args:
            module: Holds the model.
            batch_size: Rows at once, of all processes together.
            limit: Examples, at most.
        """

    @abstractmethod
    def described(self) -> dict[str, Any]:
        """What a measurement depends on beside the model, ready for JSON; after `prepare`."""
