"""The scoring benchmark compares what is equal, and says so in figures."""

from __future__ import annotations

import torch
from conftest import make_qwen2, sharpen
from test_packing import COMPLETIONS, PROMPTS, rollout
from test_prepare import load

bench = load("bench_scoring")


@torch.no_grad()
def test_all_variants_compute_the_same() -> None:
    case = bench.Case("tiny", sharpen(make_qwen2()), PROMPTS, rollout(COMPLETIONS))
    expected = bench.hidden(case, "masked")
    for variant in bench.VARIANTS:
        torch.testing.assert_close(bench.hidden(case, variant), expected, atol=1e-4, rtol=0)


def test_figures() -> None:
    case = bench.Case("tiny", make_qwen2(), PROMPTS, rollout(COMPLETIONS))
    options = bench.arguments(["--repeats", "1"])
    figures = bench.measure(case, options)
    assert figures["tokens"] == 37
    assert figures["waste"] == 5 * 16 / 37
    assert figures["auto"] in ("packed", "padded")
    for passes in ("forward", "forward_and_backward"):
        assert figures[passes].keys() == set(bench.VARIANTS)
        assert all(seconds > 0 for seconds in figures[passes].values())
