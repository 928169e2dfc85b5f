"""The moving average of adapters: of their products, for that is what the student has learnt.

Averaging A and B apart gives another matrix: the mean of products is no product of means. The
average of rank-r products has a rank of its own, which grows as they turn. Factors of a fixed rank
hold it; what they cannot hold is cut where it is smallest (Eckart and Young 1936) and reported.
"""

from __future__ import annotations

from collections import defaultdict
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sdft.adapters import Adapter, adapters


class Cut(NamedTuple):
    """The best factors of some rank.

    Attributes:
        up_NOR: B, `[N, outputs, rank]`.
        down_NRI: A, `[N, rank, inputs]`.
        lost_N: Squared Frobenius norm of what was cut.
        whole_N: Squared Frobenius norm of what was there.
    """

    up_NOR: Tensor
    down_NRI: Tensor
    lost_N: Tensor
    whole_N: Tensor


@torch.no_grad()
def update_products(teacher: nn.Module, student: nn.Module, rate: float) -> Tensor:
    """Teacher's products ← products + rate · (student's − teacher's), in place.

    Args:
        teacher: Adapters of scale 1.
        student: The same layers, any rank and scale.
        rate: In [0, 1]; 1 makes the products the student's.

    Returns:
        The share of the new products' energy (squared norm) that did not fit the teacher's rank.
    """
    groups: dict[tuple[torch.Size, torch.Size], list[tuple[Adapter, Adapter]]] = defaultdict(list)
    own, other = adapters(teacher), adapters(student)
    assert own.keys() == other.keys(), "teacher and student have the same layers"
    for name, average in own.items():  # layers of one shape are worked on together
        groups[average.up_OR.shape, average.down_RI.shape].append((average, other[name]))
    lost, whole = [], []
    for pairs in groups.values():
        cut = _blended(pairs, rate)
        for (average, _), up_OR, down_RI in zip(pairs, cut.up_NOR, cut.down_NRI, strict=True):
            average.up_OR.copy_(up_OR)
            average.down_RI.copy_(down_RI)
        lost.append(cut.lost_N.sum())
        whole.append(cut.whole_N.sum())
    energy = torch.stack(whole).sum()
    share = torch.stack(lost).sum() / energy
    return torch.where(energy > 0, share, torch.zeros_like(share))


def _blended(pairs: list[tuple[Adapter, Adapter]], rate: float) -> Cut:
    """Stack both sides' factors, the products' weights on B, and cut them to the teacher's rank."""
    ups, downs = [], []
    for average, value in pairs:
        assert average.scale == 1.0, "a teacher's adapters have scale 1"
        parts = ((1 - rate) * average.up_OR, rate * value.scale * value.up_OR)
        ups.append(torch.cat(parts, dim=1))
        downs.append(torch.cat((average.down_RI, value.down_RI)))
    return cut_to_rank(torch.stack(ups), torch.stack(downs), pairs[0][0].up_OR.shape[1])


def cut_to_rank(up_NOS: Tensor, down_NSI: Tensor, rank: int) -> Cut:
    """The factors of that rank whose product is nearest to B·A.

    Args:
        up_NOS: B, `[N, outputs, S]`.
        down_NSI: A, `[N, S, inputs]`.
        rank: At most the smaller of inputs and outputs.

    Returns:
        Balanced factors: BᵀB = AAᵀ, diagonal.

    Raises:
        ValueError: A number that is not finite.
    """
    left_NOK, left_NKS = torch.linalg.qr(up_NOS.float())
    right_NIL, right_NLS = torch.linalg.qr(down_NSI.float().mT)
    core_NKL = left_NKS @ right_NLS.mT
    if not core_NKL.isfinite().all():
        raise ValueError("the student's adapters are not finite: its training has diverged")
    left, singular_NM, right = torch.linalg.svd(core_NKL, full_matrices=False)
    root_NM = singular_NM[:, :rank].sqrt()
    up_NOR = left_NOK @ (left[..., :rank] * root_NM[:, None])
    down_NRI = (root_NM[..., None] * right[:, :rank]) @ right_NIL.mT
    missing = rank - up_NOR.shape[2]
    if missing > 0:  # the stack has fewer directions than there is room for
        up_NOR = nn.functional.pad(up_NOR, (0, missing))
        down_NRI = nn.functional.pad(down_NRI, (0, 0, 0, missing))
    energy_NM = singular_NM.square()
    return Cut(up_NOR, down_NRI, energy_NM[:, rank:].sum(-1), energy_NM.sum(-1))


@torch.no_grad()
def products_moved(teacher: nn.Module, student: nn.Module) -> Tensor:
    """‖teacher's products‖ / ‖student's products‖; 0 where the student has not moved either."""
    moved, whole = (
        torch.stack([a.squared_norm() for a in adapters(m).values()]).sum()
        for m in (teacher, student)
    )
    return torch.where(whole > 0, (moved / whole).sqrt(), torch.zeros_like(whole)).float()
