"""More replay in the stages that are tried again, and in no other."""

from __future__ import annotations

from collections.abc import Mapping

from sdft.mixtures import Batches, PastReplay, Stream


class MoreReplay(PastReplay):
    """`PastReplay` in the stages that have failed before, so much per failed attempt.

    Args:
        ratio: Replayed examples per new one, for each failed attempt.
        attempts: Failed attempts by stage, from 0; looked at when a stage begins.

    Raises:
        ValueError: A ratio that is not above 0.
    """

    label = ""  # it names no method

    def __init__(self, ratio: float, attempts: Mapping[int, int]) -> None:
        super().__init__(ratio)
        self.each, self.attempts = ratio, attempts

    def mix(self, stream: Stream, stage: int, batches: Batches, seed: int) -> Batches:
        """Append past examples to each batch of a stage that is tried again."""
        failed = self.attempts.get(stage, 0)
        if not failed:
            return batches
        self.ratio = self.each * failed
        return super().mix(stream, stage, batches, seed)
