"""Truncated importance weights: rollouts that another policy drew, corrected token by token.

A rollout's tokens may come from an older student (`updates_per_generation`) or from an engine whose
probabilities differ. The divergence at each token is then multiplied by
min(cap, π_now(token) / π_drawn(token)), without a gradient; the normaliser stays. That is truncated
importance sampling by the token's own ratio: the exact weight of a token is the product over all
tokens before it, whose variance grows with the length, so the ratio is biased and calm.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sdft.head import Head
from sdft.rollout import Sampling
from sdft.sampler import shaped

_ROWS = 256


def check_cap(cap: float) -> None:
    """Raise ValueError unless weights can be capped so."""
    if not (math.isfinite(cap) and cap >= 1):
        raise ValueError(f"importance_cap must be a finite number, 1 or more, found {cap}")


@dataclass(frozen=True)
class Importance:
    """Weights of N tokens.

    Attributes:
        weights_N: min(cap, π_now / π_drawn), fp32.
        capped_N: True where the cap has cut.
    """

    weights_N: Tensor
    capped_N: Tensor

    @classmethod
    def of(cls, now_N: Tensor, drawn_N: Tensor, cap: float) -> Importance:
        """The weights of tokens with these log-probabilities.

        Args:
            now_N: Under the student as it is; −inf for a token that it would never draw (top-p,
                top-k), which gets weight 0.
            drawn_N: Under the distribution that they were drawn from.
            cap: The largest weight.
        """
        log_ratios_N = now_N.detach().float() - drawn_N.float()
        # −inf on both sides: rounding at the edge of top-p or top-k, of which nothing is known.
        log_ratios_N = log_ratios_N.nan_to_num(nan=0.0, posinf=math.inf, neginf=-math.inf)
        capped_N = log_ratios_N > math.log(cap)
        return cls(log_ratios_N.exp().clamp(max=cap), capped_N)

    @classmethod
    def joined(cls, parts: Sequence[Importance]) -> Importance:
        """The tokens of several, one after another."""
        return cls(
            torch.cat([part.weights_N for part in parts]),
            torch.cat([part.capped_N for part in parts]),
        )

    def rows(self, chosen_N: Tensor) -> Importance:
        """The tokens where the mask is true."""
        return Importance(self.weights_N[chosen_N], self.capped_N[chosen_N])

    def scalars(self) -> dict[str, Tensor]:
        """The mean weight and the share of capped tokens, by the names that they are logged by."""
        return {
            "train/importance": self.weights_N.mean(),
            "train/importance_capped": self.capped_N.float().mean(),
        }


@torch.no_grad()
def token_log_probs(logits_NV: Tensor, ids_N: Tensor, sampling: Sampling) -> Tensor:
    """Log-probabilities of tokens under what `sampling` makes of the logits: `[N]`, fp32.

    Args:
        logits_NV: `[N, V]`, the model's.
        ids_N: The tokens.
        sampling: Its temperature is above 0.
    """
    log_probs_NV = shaped(logits_NV, sampling).log_softmax(-1)
    return log_probs_NV.gather(-1, ids_N[:, None]).squeeze(-1)


@torch.no_grad()
def head_log_probs(hidden_ND: Tensor, head: Head, ids_N: Tensor, sampling: Sampling) -> Tensor:
    """`token_log_probs` from hidden states, a few rows of logits at a time: `[N]`, fp32."""
    parts = zip(hidden_ND.split(_ROWS), ids_N.split(_ROWS), strict=True)
    return torch.cat([token_log_probs(head.logits(h), ids, sampling) for h, ids in parts])


def has_dropout(model: PreTrainedModel) -> bool:
    """Whether the model's probabilities in training are other ones than those that it draws by."""
    layers = any(isinstance(m, nn.modules.dropout._DropoutNd) and m.p > 0 for m in model.modules())
    config = model.config.get_text_config().to_dict()
    names = (key for key in config if key.endswith(("dropout", "pdrop")))
    return layers or any(isinstance(config[n], float) and config[n] > 0 for n in names)
