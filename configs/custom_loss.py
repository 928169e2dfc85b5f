"""An example of a loss of one's own: see `configs/custom_loss.yaml`."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from sdft import SDFTModule
from sdft.losses import sequence_mean, token_divergence, token_entropy


class ConfidentSDFT(SDFTModule):
    """Forward KL that counts a token less where the teacher itself is unsure.

    Args:
        power: 0 is plain SDFT; the higher, the more the teacher's confidence decides.
        kwargs: See `SDFTModule`.
    """

    method = "confident-sdft"

    def __init__(self, power: float = 1.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.power = power

    def loss(
        self, student_logits_BTV: Tensor, teacher_logits_BTV: Tensor, mask_BT: Tensor
    ) -> Tensor:
        """Token divergence times the teacher's confidence, 1 − entropy / log V."""
        ignorance_BT = token_entropy(teacher_logits_BTV) / math.log(teacher_logits_BTV.shape[-1])
        weight_BT = (1.0 - ignorance_BT) ** self.power
        return sequence_mean(
            weight_BT * token_divergence(student_logits_BTV, teacher_logits_BTV), mask_BT
        )
