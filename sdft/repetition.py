"""How much of a completion it has said before."""

from __future__ import annotations

import torch
from torch import Tensor

from sdft.rollout import Rollout

_MULTIPLIER = 6364136223846793005  # of Knuth's MMIX generator; products wrap around


@torch.no_grad()
def repetition(completion: Rollout, n: int = 4) -> Tensor:
    """Share of each completion's n-grams that stand in it before: seq-rep-n (arXiv 1908.04319).

    n-grams are compared by a 64-bit hash.

    Args:
        completion: B completions.
        n: Tokens of an n-gram.

    Returns:
        `[B]`, fp32: 0 where nothing comes twice, or where there are fewer than n tokens.
    """
    assert n >= 1
    ids_BT, mask_BT = completion.ids_BT, completion.mask_BT
    grams = ids_BT.shape[1] - n + 1
    if grams < 1:
        return torch.zeros(len(ids_BT), device=ids_BT.device)
    hashes_BG = torch.zeros_like(ids_BT[:, :grams])
    for place in range(n):
        hashes_BG = (hashes_BG + ids_BT[:, place : place + grams] + 1) * _MULTIPLIER
        hashes_BG = hashes_BG ^ (hashes_BG >> 29)
    real_BG = mask_BT[:, n - 1 :]
    # Padding goes behind everything: its n-grams are those of the largest hash.
    ordered_BG = hashes_BG.masked_fill(~real_BG, torch.iinfo(torch.long).max).sort(-1).values
    again_B = (ordered_BG.diff(dim=-1) == 0).sum(-1) - ((~real_BG).sum(-1) - 1).clamp(min=0)
    return again_B / real_BG.sum(-1).clamp(min=1)
