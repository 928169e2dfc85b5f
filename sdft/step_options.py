"""Which numbers the options of a training step may be."""

from __future__ import annotations


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
