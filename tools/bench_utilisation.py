"""How much of a GPU a step uses: of its memory bandwidth (MBU) and of its arithmetic (MFU).

Both are floors over what was measured, against ceilings measured in the same run, not those of a
data sheet: a large matrix product in bfloat16, and a large copy. The floor of decoding is

    Σ_t max[(2P + Σ_rows (Tp + t)·kv) / bandwidth, 2P·B_t / FLOPs]

with P the parameters that a token is multiplied with, B_t the rows still under way and kv the bytes
that a token holds in the cache; that of another phase is its FLOPs over the ceiling. A phase is
timed whole: the prefill counts against the MBU, the optimizer against the MFU.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from bench_laps import Lap

from sdft.shapes import ModelShape

NOTE = "MBU and MFU are left out: their ceilings are measured on CUDA alone."
_SIDE = 8192  # of the matrices multiplied
_COPIED = 2**30  # bytes


@dataclass(frozen=True)
class Ceilings:
    """What the device reaches.

    Attributes:
        flops: bf16 FLOP per second of a matrix product.
        bandwidth: Bytes per second, read and written, of a copy.
    """

    flops: float
    bandwidth: float


@dataclass(frozen=True)
class Utilisation:
    """Shares of the ceilings, medians over the steps; None for a phase that did not run.

    Attributes:
        mbu_generate: Floor of decoding over the phase `generate`.
        mfu_score: Of the teacher's pass.
        mfu_update: Of the student's pass, backward and optimizer included.
    """

    mbu_generate: float | None
    mfu_score: float | None
    mfu_update: float | None


def decode_floor(
    shape: ModelShape, prompts: Sequence[int], completions: Sequence[int], ceilings: Ceilings
) -> float:
    """Seconds below which the completions cannot be decoded in bfloat16.

    The first token of each comes from the prefill, and the last is drawn and not read.

    Args:
        shape: The model.
        prompts: Tokens of each prompt.
        completions: Tokens of each completion.
        ceilings: What the device reaches.
    """
    weights, cache = 2 * shape.matrix_parameters, 2 * shape.kv_values
    seconds = 0.0
    for step in range(1, max(completions, default=0)):
        rows = [p + step for p, c in zip(prompts, completions, strict=True) if c > step]
        read = (weights + sum(rows) * cache) / ceilings.bandwidth
        seconds += max(read, weights * len(rows) / ceilings.flops)
    return seconds


def utilisation(laps: Sequence[Lap], shape: ModelShape | None, ceilings: Ceilings) -> Utilisation:
    """Shares of the ceilings that some steps reached.

    Args:
        laps: The steps.
        shape: The model; None where its sizes are of no known kind: there is no MBU then.
        ceilings: What the device reaches.
    """

    def median(share: Callable[[Lap], float], phase: str) -> float | None:
        shares = [share(lap) for lap in laps if lap.phases.get(phase)]
        return statistics.median(shares) if shares else None

    def mfu(phase: str) -> float | None:
        return median(
            lambda lap: lap.flops.get(phase, 0) / ceilings.flops / lap.phases[phase], phase
        )

    mbu = None
    if shape is not None:
        known = shape
        mbu = median(
            lambda lap: (
                decode_floor(known, lap.prompts, lap.completions, ceilings) / lap.phases["generate"]
            ),
            "generate",
        )
    return Utilisation(mbu, mfu("score"), mfu("update"))


def measure_ceilings(repeats: int = 10) -> Ceilings | None:
    """Measure a matrix product and a copy; None where there is no CUDA device."""
    if not torch.cuda.is_available():
        return None
    side = torch.randn(_SIDE, _SIDE, device="cuda", dtype=torch.bfloat16)
    product = _seconds(lambda: torch.mm(side, side), repeats)
    block = torch.zeros(_COPIED, dtype=torch.uint8, device="cuda")
    copy = _seconds(block.clone, repeats)
    return Ceilings(flops=2 * _SIDE**3 / product, bandwidth=2 * _COPIED / copy)


def _seconds(run: Callable[[], object], repeats: int) -> float:
    """The median of some runs, after two that warm up."""
    taken = []
    for repeat in range(repeats + 2):
        torch.cuda.synchronize()
        begun = time.perf_counter()
        run()
        torch.cuda.synchronize()
        if repeat >= 2:
            taken.append(time.perf_counter() - begun)
    return statistics.median(taken)
