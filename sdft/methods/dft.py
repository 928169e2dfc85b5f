"""DFT: supervised fine-tuning that learns least where the model expects the target least."""

from __future__ import annotations

from torch import Tensor

from sdft.head_losses import head_cross_entropy
from sdft.losses import token_cross_entropy
from sdft.methods.sft import SFTModule
from sdft.states import States


class DFTModule(SFTModule):
    """Dynamic fine-tuning (Wu et al. 2025, arXiv 2508.05629, eq. 9): SFT weighted by confidence.

    Each target token's cross-entropy is multiplied by the probability that the model gives the
    token, taken as a constant: its gradient is p · ∇CE = −∇p. It cancels the factor 1/p of SFT's
    gradient, which lets unlikely targets dominate.

    Args:
        kwargs: See `StudentModule`.
    """

    method = "dft"

    def token_loss(self, logits_BTV: Tensor, target_BT: Tensor) -> Tensor:
        """p · CE of each target token, `[B, T]`; no gradient passes through p."""
        nll_BT = token_cross_entropy(logits_BTV, target_BT)
        return nll_BT.detach().neg().exp() * nll_BT

    def state_loss(self, student: States, targets_N: Tensor, weights_N: Tensor) -> Tensor:
        """The same from hidden states, times the tokens' weights: `[N]`."""
        return head_cross_entropy(*student, targets_N, times_probability=True, weights_N=weights_N)
