"""Hidden states at completion tokens with the head behind them: what losses in chunks take."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sdft.head import Head, head
from sdft.head_losses import head_divergence, head_entropy
from sdft.losses import sequence_weights
from sdft.respondent import Respondent
from sdft.rollout import Rollout

if TYPE_CHECKING:
    from sdft.student import StudentModule

Prompts = Sequence[Sequence[int]]


class States(NamedTuple):
    """Hidden states that predict completion tokens, `[N, D]`, and the head of their model."""

    hidden_ND: Tensor
    head: Head

    def detach(self) -> States:
        """The same hidden states without their graph."""
        return States(self.hidden_ND.detach(), self.head)


def states(
    module: Respondent, model: PreTrainedModel, prompts: Prompts, completion: Rollout
) -> States:
    """One pass of a model whose head is known (`heads_known`), through `Respondent.hidden`."""
    known = head(model)
    assert known is not None, "ask heads_known first"
    return States(module.hidden(model, prompts, completion), known)


def heads_known(*models: PreTrainedModel | None) -> bool:
    """Whether losses behind the heads of all these models can be taken from hidden states."""
    return all(model is not None and head(model) is not None for model in models)


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
        The loss, and the student's hidden states that it came from.
    """
    module.phases.enter("score")
    with torch.no_grad():
        teacher = states(module, lesson.teacher, lesson.teacher_prompts, lesson.completion)
    module.phases.enter("update")
    student = states(module, module.model, lesson.prompts, lesson.completion)
    weights_N = lesson.weights_BT[lesson.completion.mask_BT]
    divergence_N = head_divergence(
        *student, *teacher, alpha=alpha, temperature=temperature, weights_N=weights_N
    )
    return divergence_N.sum(), student


@torch.no_grad()
def track_states(
    module: StudentModule,
    values: dict[str, Tensor],
    prompts: list[list[int]],
    completion: Rollout,
    student: States,
) -> None:
    """`StudentModule.track` from hidden states.

    Args:
        module: Logs.
        values: Named scalars.
        prompts: B prompts, unpadded.
        completion: The B completions that were trained on.
        student: The student's, detached.
    """
    if module.logs_this_step:
        values |= figures(
            module, completion, student, lambda base: states(module, base, prompts, completion)
        )
    module.log_dict(values, batch_size=len(prompts))


@torch.no_grad()
def figures(
    module: StudentModule,
    completion: Rollout,
    student: States,
    of_base: Callable[[PreTrainedModel], States],
) -> dict[str, Tensor]:
    """The student's entropy and, where the base is tracked, its distance to the base.

    Args:
        module: Tracks the base, or not.
        completion: B completions.
        student: The student's hidden states.
        of_base: Computes the base's.
    """
    weights_N = sequence_weights(completion.mask_BT)[completion.mask_BT]
    values = {"train/entropy": (weights_N * head_entropy(*student)).sum()}
    base = module.base if module.track_base else None
    if base is not None and heads_known(base):
        kl_N = head_divergence(*student, *of_base(base), weights_N=weights_N)
        values["train/kl_base_student"] = kl_N.sum()
    return values
