"""Hidden states at completion tokens with the head behind them: what losses in chunks take."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sdft.batch import Batch
from sdft.head import Head, gathered_head, head
from sdft.head_losses import head_divergence, head_entropy
from sdft.losses import sequence_weights
from sdft.respondent import Respondent
from sdft.rollout import Rollout
from sdft.sharding import forwarded

if TYPE_CHECKING:
    from sdft.student import StudentModule

Prompts = Sequence[Sequence[int]]


class States(NamedTuple):
    """Hidden states that predict completion tokens, `[N, D]`, and the head of their model."""

    hidden_ND: Tensor
    head: Head


def states(
    module: Respondent, model: PreTrainedModel, prompts: Prompts, completion: Rollout
) -> States:
    """One pass of a model whose head is known (`heads_known`), through `Respondent.hidden`.

    Of a sharded model, gradients reach the head inside `sdft.sharding.forwarded` alone.
    """
    return with_head(model, module.hidden(model, prompts, completion))


def with_head(model: PreTrainedModel, hidden_ND: Tensor) -> States:
    """Hidden states of a model, and its head as it is now."""
    known = gathered_head(model, hidden_ND.dtype)
    assert known is not None, "ask heads_known first"
    return States(hidden_ND, known)


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
) -> tuple[Tensor, Tensor]:
    """Weighted sum of the divergences from a teacher, over the whole vocabulary, in two phases.

    Args:
        module: Its student learns.
        lesson: What from whom.
        temperature: Divides the logits of both sides.
        alpha: 0 forward KL, 1 reverse KL, between: JSD.

    Returns:
        The loss, and the student's hidden states that it came from, detached.
    """
    module.phases.enter("score")
    with torch.no_grad():
        teacher = states(module, lesson.teacher, lesson.teacher_prompts, lesson.completion)
    module.phases.enter("update")
    weights_N = lesson.weights_BT[lesson.completion.mask_BT]

    def compare() -> tuple[Tensor, Tensor]:
        student = states(module, module.model, lesson.prompts, lesson.completion)
        divergence_N = head_divergence(
            *student, *teacher, alpha=alpha, temperature=temperature, weights_N=weights_N
        )
        return divergence_N.sum(), student.hidden_ND.detach()

    return forwarded(module.model, compare)


@torch.no_grad()
def track_states(
    module: StudentModule,
    values: dict[str, Tensor],
    batch: Batch,
    completion: Rollout,
    hidden_ND: Tensor,
) -> None:
    """`StudentModule.track` from hidden states.

    Args:
        module: Logs.
        values: Named scalars: means over the rows.
        batch: B rows.
        completion: The B completions that were trained on.
        hidden_ND: The student's, detached.
    """
    if module.logs_this_step:
        weights_N = sequence_weights(batch.counted(completion.mask_BT))[completion.mask_BT]
        values |= figures(
            module,
            weights_N,
            with_head(module.model, hidden_ND),
            lambda base: states(module, base, batch.student_ids, completion),
        )
    module.log_means(values, batch.count)


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
        weights_N: Make a mean of the tokens' values.
        student: The student's hidden states.
        of_base: Computes the base's.
    """
    values = {"train/entropy": (weights_N * head_entropy(*student)).sum()}
    base = module.base if module.track_base else None
    if base is not None and heads_known(base):
        kl_N = head_divergence(*student, *of_base(base), weights_N=weights_N)
        values["train/kl_base_student"] = kl_N.sum()
    return values
