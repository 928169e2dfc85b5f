"""Hidden states at completion tokens with the head behind them: what losses in chunks take."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sdft.batch import counted
from sdft.flat_sharding import is_flat
from sdft.head import Head, head
from sdft.head_losses import head_divergence, head_entropy
from sdft.losses import sequence_weights
from sdft.respondent import Respondent
from sdft.rollout import Rollout
from sdft.sharding import forwarded

if TYPE_CHECKING:
    from sdft.student import StudentModule

Prompts = Sequence[Sequence[int]]


class States(NamedTuple):
    """Hidden states that predict completion tokens, `[N, D]`, and the head of their model.

    The head of a sharded model is in shards outside the model's passes (see `whole`).
    """

    hidden_ND: Tensor
    head: Head

    def detach(self) -> States:
        """The same hidden states without their graph."""
        return States(self.hidden_ND.detach(), self.head)

    def whole(self) -> States:
        """The same with the whole head; a collective call where it is in shards."""
        return States(self.hidden_ND, self.head.gathered(self.hidden_ND.dtype))


def states(
    module: Respondent, model: PreTrainedModel, prompts: Prompts, completion: Rollout
) -> States:
    """One pass of a model whose head is known (`heads_known`), through `Respondent.hidden`.

    The head is whole; that of a sharded model has a gradient inside `learnt` alone.
    """
    hidden_ND, known = module.hidden(model, prompts, completion), head(model)
    assert known is not None, "ask heads_known first"
    return States(hidden_ND, known).whole()


def learnt(
    module: Respondent,
    prompts: Prompts,
    completion: Rollout,
    loss: Callable[[States], Tensor],
) -> tuple[Tensor, States]:
    """A loss of the student's hidden states, taken within one pass of the student.

    Args:
        module: Its student learns.
        prompts: B prompts, unpadded.
        completion: B completions.
        loss: Makes a scalar of the states; these do not outlive the pass.

    Returns:
        The loss, and the states without their graph; of a sharded student the head is in shards.
    """
    model = module.model

    def learn() -> tuple[Tensor, Tensor]:
        student = states(module, model, prompts, completion)
        return loss(student), student.hidden_ND.detach()

    value, hidden_ND = forwarded(model, learn)
    known = head(model)
    assert known is not None
    return value, States(hidden_ND, known)


def heads_known(*models: PreTrainedModel | None) -> bool:
    """Whether losses behind the heads of all these models can be taken from hidden states."""
    return all(
        model is not None and not is_flat(model) and head(model) is not None for model in models
    )


def keeps(module: object, home: type, *names: str) -> bool:
    """Whether the module's class has these attributes as `home` has them."""
    return all(getattr(type(module), name) is getattr(home, name) for name in names)


def as_new(module: object, name: str, other: str) -> bool:
    """Whether no subclass of the class that wrote `name` has written `other` anew."""
    classes = type(module).__mro__
    first, second = (next(i for i, c in enumerate(classes) if n in vars(c)) for n in (name, other))
    return first <= second


class Lesson(NamedTuple):
    """Completions that a teacher grades for the student.

    Attributes:
        prompts: B student prompts.
        teacher: A model; gets no gradient.
        teacher_prompts: B prompts of its own.
        completion: B completions.
        weights_BT: Factors of the tokens' divergences, 0 at padding.
    """

    prompts: Prompts
    teacher: PreTrainedModel
    teacher_prompts: Prompts
    completion: Rollout
    weights_BT: Tensor


def taught_by(
    module: StudentModule, lesson: Lesson, temperature: float = 1.0, alpha: float = 0.0
) -> tuple[Tensor, States]:
    """Weighted sum of the divergences from a teacher, over the whole vocabulary, in two phases.

    Args:
        module: Its student learns.
        lesson: What from whom.
        temperature: Divides the logits of both sides.
        alpha: 0 forward KL, 1 reverse KL, between: JSD.

    Returns:
        The loss, and the student's hidden states that it came from (see `learnt`).
    """
    module.phases.enter("score")
    with torch.no_grad():
        teacher = states(module, lesson.teacher, lesson.teacher_prompts, lesson.completion)
    module.phases.enter("update")
    weights_N = lesson.weights_BT[lesson.completion.mask_BT]

    def divergence(student: States) -> Tensor:
        return head_divergence(
            *student, *teacher, alpha=alpha, temperature=temperature, weights_N=weights_N
        ).sum()

    return learnt(module, lesson.prompts, lesson.completion, divergence)


@torch.no_grad()
def track_states(
    module: StudentModule,
    values: dict[str, Tensor],
    prompts: list[list[int]],
    completion: Rollout,
    student: States,
    real: Sequence[bool] | None = None,
) -> None:
    """`StudentModule.track` from hidden states.

    Args:
        module: Logs.
        values: Named scalars: means over the rows.
        prompts: B prompts, unpadded.
        completion: The B completions that were trained on.
        student: The student's, detached.
        real: Whether each row counts (see `Batch.real`); all do when None.
    """
    if module.logs_this_step:
        mask_BT = counted(completion.mask_BT, real)
        weights_N = sequence_weights(mask_BT)[completion.mask_BT]
        of_base = partial(states, module, prompts=prompts, completion=completion)
        values |= figures(module, weights_N, student.whole(), of_base)
    module.log_means(values, len(prompts) if real is None else sum(real))


@torch.no_grad()
def figures(
    module: StudentModule,
    weights_N: Tensor,
    student: States,
    of_base: Callable[[PreTrainedModel], States],
) -> dict[str, Tensor]:
    """The student's entropy and, where the base is tracked, its distance to the base.

    Args:
        module: Tracks the base, or not.
        weights_N: Of the completion tokens, for the mean.
        student: The student's hidden states and its whole head.
        of_base: Computes the base's.
    """
    values = {"train/entropy": (weights_N * head_entropy(*student)).sum()}
    base = module.base if module.track_base else None
    if base is not None and heads_known(base):
        kl_N = head_divergence(*student, *of_base(base), weights_N=weights_N)
        values["train/kl_base_student"] = kl_N.sum()
    return values
