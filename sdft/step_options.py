"""What the options of a training step may be, and what they need."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sdft.logits_loss import check_weighable
from sdft.micro_step import check_micro_batches

if TYPE_CHECKING:
    from sdft.module import SDFTModule


def check_step_options(
    temperature: float,
    skip_first_tokens: int,
    rollouts_per_prompt: int,
    micro_batch_tokens: int | None,
) -> None:
    """Check options of `SDFTModule`.

    Raises:
        ValueError: One of them is out of range.
    """
    if temperature == 0:
        raise ValueError("temperature must be above 0 in training, found 0")
    if skip_first_tokens < 0:
        raise ValueError(f"skip_first_tokens must be 0 or more, found {skip_first_tokens}")
    if rollouts_per_prompt < 1:
        raise ValueError(f"rollouts_per_prompt must be at least 1, found {rollouts_per_prompt}")
    if micro_batch_tokens is not None and micro_batch_tokens < 1:
        raise ValueError(f"micro_batch_tokens must be at least 1, found {micro_batch_tokens}")


def check_step(module: SDFTModule) -> None:
    """See that something moves the teacher, and that the step can be what is asked for.

    Raises:
        ValueError: No callback of the trainer does, or an option does not fit the loss or the
            trainer's strategy.
    """
    if not any(getattr(c, "moves_teacher", False) for c in module.trainer.callbacks):  # type: ignore[attr-defined]
        raise ValueError(
            "no callback moves the teacher: add sdft.callbacks.EMATeacher() to the trainer's "
            "callbacks (kind 'frozen' keeps it still)"
        )
    if module.micro_batch_tokens is not None:
        check_micro_batches(module.trainer.strategy, type(module).__name__, module.compares_hidden)
    if module.updates_per_generation > 1 and module.stale == "correct":
        check_weighable(module, "model.stale is 'correct'")
