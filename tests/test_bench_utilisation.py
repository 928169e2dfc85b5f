"""MBU and MFU of given steps on a given device, by hand."""

from __future__ import annotations

import pytest
import torch
from test_prepare import load

from sdft.budget import Device, Storage, Workload, step_time
from sdft.shapes import SHAPES

bench = load("bench_utilisation")
SHAPE = SHAPES["qwen2.5-7b"]
WEIGHTS, CACHE = 2 * SHAPE.matrix_parameters, 57_344  # bytes; per token, performance by hand
DEVICE = bench.Ceilings(flops=800e12, bandwidth=4e12)


def lap(**options: object) -> object:
    return bench.Lap(9.0, **options)


def test_decoding_reads_all_weights_and_the_cache_of_rows_under_way() -> None:
    # Two rows: of one token (none is decoded) and of three (two are, at contexts 6 and 7).
    found = bench.decode_floor(SHAPE, [10, 5], [1, 3], DEVICE)
    read = 2 * WEIGHTS + (6 + 7) * CACHE
    assert found == pytest.approx(read / 4e12)
    assert bench.decode_floor(SHAPE, [10, 5], [1, 1], DEVICE) == 0
    assert bench.decode_floor(SHAPE, [], [], DEVICE) == 0


def test_many_rows_are_bound_by_arithmetic() -> None:
    rows = 1000  # beyond the ridge of 200 rows
    found = bench.decode_floor(SHAPE, [1] * rows, [2] * rows, DEVICE)
    assert found == pytest.approx(rows * WEIGHTS / 800e12)


def test_it_is_the_calculators_cost_model() -> None:
    work = Workload(batch=32, prompt=512, demonstration=0, completion=1024)
    device = Device(bandwidth=4e12, flops=800e12, mbu=1.0, mfu=1.0)
    prefill = 2 * SHAPE.matrix_parameters * 32 * 512 / 800e12
    expected = step_time(SHAPE, work, Storage(), device).generate - prefill
    found = bench.decode_floor(SHAPE, [512] * 32, [1024] * 32, DEVICE)
    assert found == pytest.approx(expected, rel=2e-3)  # the first token comes from the prefill


def test_shares_are_floors_over_measured_seconds() -> None:
    steps = [
        lap(
            phases={"generate": seconds, "score": 2.0, "update": 4.0},
            flops={"generate": 1, "score": 400 * 10**12, "update": 1600 * 10**12},
            prompts=[5],
            completions=[2],
        )
        for seconds in (0.1, 0.2, 0.4)
    ]
    found = bench.utilisation(steps, SHAPE, DEVICE)
    floor = (WEIGHTS + 6 * CACHE) / 4e12
    assert found.mbu_generate == pytest.approx(floor / 0.2)
    assert found.mfu_score == pytest.approx(0.25)
    assert found.mfu_update == pytest.approx(0.5)


def test_a_phase_that_did_not_run_has_none() -> None:
    steps = [lap(phases={"update": 4.0}, flops={"update": 1600 * 10**12})]
    assert bench.utilisation(steps, SHAPE, DEVICE) == bench.Utilisation(None, None, 0.5)
    steps = [lap(phases={"generate": 1.0}, prompts=[1], completions=[2])]
    assert bench.utilisation(steps, None, DEVICE).mbu_generate is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without CUDA")
def test_without_cuda_there_are_no_ceilings() -> None:
    assert bench.measure_ceilings() is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_ceilings_are_of_a_gpus_order() -> None:
    found = bench.measure_ceilings(3)
    assert 1e12 < found.flops < 1e16
    assert 1e10 < found.bandwidth < 1e14
