"""Penalties that hold the weights near where they were: for any method, once per optimizer step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

from torch import Tensor, nn
from transformers import PreTrainedModel

if TYPE_CHECKING:
    from sdft.data import ContinualDataModule
    from sdft.student import StudentModule


class Penalty(nn.Module, ABC):
    """A quadratic penalty on the student's weights; a submodule that checkpoints carry.

    Attributes:
        label: Its name in reports, behind the method's.
    """

    label = "penalty"

    @abstractmethod
    def attach(self, student: PreTrainedModel) -> None:
        """Make the buffers, from the freshly loaded student, before a checkpoint is restored."""

    @abstractmethod
    def add_gradient(self, student: PreTrainedModel) -> Tensor:
        """Add the penalty's gradient to the parameters' `.grad`; returns the penalty, a scalar."""

    def consolidate(self, module: StudentModule, data: ContinualDataModule, stage: int) -> None:
        """Take note of a stage that has just been learnt, before the next one begins.

        Args:
            module: Its student has learnt the stage.
            data: The task stream.
            stage: Index of the finished stage.
        """
