"""Penalties that hold the weights near where they were: for any method, once per optimizer step."""

from __future__ import annotations

import math
import random
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sdft.fisher import diagonal_fisher
from sdft.ranks import summed
from sdft.seeding import derive_seed, run_seed
from sdft.sharding import is_sharded, local
from sdft.weights import trained_parameters

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

    def check(self, data: ContinualDataModule) -> None:
        """Called before anything is trained.

        Args:
            data: The task stream.

        Raises:
            ValueError: It lacks what the penalty needs.
        """

    def consolidate(self, module: StudentModule, data: ContinualDataModule, stage: int) -> None:
        """Take note of what has just been learnt, before the next stage begins.

        Args:
            module: Its student has learnt the stage.
            data: The task stream.
            stage: Index of the finished stage; −1 before the first one, when the student is the
                base.
        """


class Quadratic(Penalty):
    """strength/2 · Σ w · (θ − θ*)², over the trained parameters, in fp32.

    Attributes:
        strength: Weight of the penalty.
        centre: θ*.
    """

    centre: WeightBuffers

    def __init__(self, strength: float) -> None:
        super().__init__()
        if not (math.isfinite(strength) and strength >= 0):
            raise ValueError(
                f"{type(self).__name__}: strength must be a number of 0 or more, found {strength}"
            )
        self.strength = strength

    def attach(self, student: PreTrainedModel) -> None:
        """The centre is where the student starts."""
        self.centre = WeightBuffers(student)
        self.centre.copy_weights(student)

    @abstractmethod
    def weight(self, name: str) -> Tensor | float:
        """w of a parameter, of its shape or one number for all of it."""

    @torch.no_grad()
    def add_gradient(self, student: PreTrainedModel) -> Tensor:
        """Add strength · w · (θ − θ*); returns the penalty."""
        terms = []
        for name, parameter in trained_parameters(student).items():
            moved = local(parameter).float() - local(self.centre[name])
            weight = self.weight(name)
            pull = self.strength * (local(weight) if isinstance(weight, Tensor) else weight) * moved
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            local(parameter.grad).add_(pull)
            terms.append((pull * moved).sum())
        total = torch.stack(terms).sum() / 2
        return summed(total) if is_sharded(student) else total


class L2ToStart(Quadratic):
    """strength/2 · ‖θ − θ₀‖², with θ₀ the weights at the start of the run.

    Args:
        strength: Weight of the penalty.

    Raises:
        ValueError: A strength that is not a number of 0 or more.
    """

    label = "l2"

    def __init__(self, strength: float) -> None:
        super().__init__(strength)

    def weight(self, name: str) -> float:
        """All weights count alike."""
        return 1.0


class EWC(Quadratic):
    """Elastic weight consolidation: strength/2 · Σ F · (θ − θ*)², with a diagonal Fisher F.

    F says how much a weight matters for the model's own responses to the prompts of what it has
    learnt (Kirkpatrick et al. 2017, arXiv 1612.00796); `sdft.fisher` defines it. It is kept online
    (Schwarz et al. 2018, arXiv 1805.06370, section 3.2): when a stage ends, F becomes gamma · F
    plus the stage's Fisher, and θ* the weights just learnt, so there is one penalty however many
    stages there are. With `data.from_base_each_task`, where no stage builds on another, only the
    base is protected.

    The Fisher of a response that the model is certain of is almost 0: a base that always gives the
    same answer to the general prompts is held only by a large strength.

    Args:
        strength: Weight of the penalty.
        examples: Prompts that a Fisher is estimated from, one sampled response each; all training
            prompts where there are fewer.
        gamma: What is left of the old Fisher when a stage's joins it, in [0, 1].
        protect_base: Begin with the base's own Fisher, on prompts of `data.general`.

    Raises:
        ValueError: A number out of range.
    """

    label = "ewc"

    def __init__(
        self,
        strength: float,
        examples: int = 64,
        gamma: float = 1.0,
        protect_base: bool = True,
    ) -> None:
        super().__init__(strength)
        if examples < 1:
            raise ValueError(f"EWC: examples must be at least 1, found {examples}")
        if not 0.0 <= gamma <= 1.0:
            raise ValueError(f"EWC: gamma must lie in [0, 1], found {gamma}")
        self.examples = examples
        self.gamma = gamma
        self.protect_base = protect_base

    def attach(self, student: PreTrainedModel) -> None:
        """Nothing is protected yet: F is 0."""
        super().attach(student)
        self.fisher = WeightBuffers(student)

    def weight(self, name: str) -> Tensor:
        """Its Fisher information."""
        return self.fisher[name]

    def check(self, data: ContinualDataModule) -> None:
        """The base's Fisher needs general prompts.

        Raises:
            ValueError: There are none.
        """
        if not self.protect_base:
            return
        if not data.general:
            raise ValueError(
                "EWC: protect_base needs prompts for the base to answer, found no data.general: "
                "give tasks with a train split there, or set protect_base to false"
            )
        data.general_prompts()

    def consolidate(self, module: StudentModule, data: ContinualDataModule, stage: int) -> None:
        """Let the Fisher of the finished stage join; the weights as they are become the centre."""
        if not (self.protect_base if stage < 0 else not data.from_base_each_task):
            return
        seed = derive_seed(run_seed(), self.label, stage)
        items = data.general_prompts() if stage < 0 else data.encoded(data.tasks[stage], "train")
        chosen = random.Random(seed).sample(items, min(self.examples, len(items)))
        found = diagonal_fisher(module, [item.student_ids for item in chosen], seed)
        for name, fisher in found.items():
            self.fisher[name].mul_(self.gamma).add_(fisher)
        self.centre.copy_weights(module.model)


class WeightBuffers(nn.Module):
    """One fp32 tensor per trained parameter, zero at first."""

    def __init__(self, student: PreTrainedModel) -> None:
        super().__init__()
        for name, parameter in trained_parameters(student).items():
            value = torch.zeros_like(parameter, dtype=torch.float32, requires_grad=False)
            self.register_buffer(_buffer(name), value)

    def __getitem__(self, name: str) -> Tensor:
        return self.get_buffer(_buffer(name))

    @torch.no_grad()
    def copy_weights(self, student: PreTrainedModel) -> None:
        """Take over the student's weights as they are."""
        for name, parameter in trained_parameters(student).items():
            self[name].copy_(parameter)


def _buffer(parameter: str) -> str:
    """A buffer's name may hold no dot."""
    return parameter.replace(".", "/")
