"""How long rollouts may get in training: a cap below the longest response, fixed or on a ramp."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Horizon:
    """A linear ramp of the longest rollout, begun afresh in each stage.

    A function of the step in the stage, so a resumed run has the same.

    Args:
        start: Tokens of the longest rollout in a stage's first optimizer step.
        end: Tokens of the longest rollout after the ramp; may be less than `start`.
        steps: Optimizer steps from the one to the other.

    Raises:
        ValueError: A number below 1.
    """

    start: int
    end: int
    steps: int

    def __post_init__(self) -> None:
        for key in ("start", "end", "steps"):
            if getattr(self, key) < 1:
                raise ValueError(f"horizon.{key} must be at least 1, found {getattr(self, key)}")

    def at(self, step: int) -> int:
        """Tokens of the longest rollout.

        Args:
            step: Optimizer steps made in the stage so far.
        """
        return self.start + (self.end - self.start) * min(step, self.steps) // self.steps

    @property
    def longest(self) -> int:
        """The most tokens that it ever allows."""
        return max(self.start, self.end)


def as_horizon(value: int | Horizon | None, max_new_tokens: int) -> Horizon | None:
    """A number as the ramp that stays there; checked.

    Args:
        value: What the configuration says.
        max_new_tokens: Longest response in evaluation.

    Raises:
        ValueError: Below 1, or above the longest response.
    """
    if value is None:
        return None
    if isinstance(value, int):
        if value < 1:
            raise ValueError(f"horizon must be at least 1, or unset, found {value}")
        value = Horizon(value, value, 1)
    if value.longest > max_new_tokens:
        raise ValueError(
            f"horizon must not exceed max_new_tokens, {max_new_tokens}, found {value.longest}: "
            "raise max_new_tokens, which evaluation keeps to, or lower the horizon"
        )
    return value
