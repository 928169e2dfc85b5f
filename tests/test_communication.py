"""What processes send one another: hand-made sums, and formulas beside real collective calls."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from conftest import make_model, make_qwen2

from sdft.communication import Network, collectives
from sdft.shapes import SHAPES, ModelShape

sys.path.append(str(Path(__file__).resolve().parent.parent / "tools"))
from count_collectives import Case, count


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_real_processes_make_the_calls_of_the_formulas(ranks: int) -> None:
    cases = [
        Case(layers=2),
        Case(layers=3, tied=True, precision="bf16-mixed", passes=2, recomputes=True),
    ]
    assert count(ranks, cases) == [case.expected() for case in cases]


def test_the_calls_of_a_7b_step() -> None:
    shape = SHAPES["qwen2.5-7b"]
    found = {(c.phase, c.kind): c for c in collectives(shape, passes=4)}
    calls = {key: call.calls for key, call in found.items()}
    assert calls == {
        ("rollout", "all-gather"): 30,
        ("teacher", "all-gather"): 120,
        ("student", "all-gather"): 232,
        ("student", "reduce-scatter"): 116,
        ("clipping", "all-reduce"): 1,
    }
    root = 3584 + 2 * 152_064 * 3584
    assert found["rollout", "all-gather"].size == 2 * (7_615_616_512 + root)
    assert found["student", "reduce-scatter"].size == 4 * 4 * 7_615_616_512


def test_only_the_root_and_the_head_are_waited_for() -> None:
    shape = SHAPES["qwen2.5-0.5b"]
    found = {(c.phase, c.kind): c for c in collectives(shape, weight_bytes=4)}
    root, head = shape.root_parameters, shape.vocab * shape.hidden
    assert found["teacher", "all-gather"].exposed_size == 4 * (root + head)
    assert found["student", "reduce-scatter"].exposed_size == 4 * root
    rollout = found["rollout", "all-gather"]
    assert rollout.exposed_size == rollout.size  # nothing is computed until all is there


@pytest.mark.parametrize("make", [make_model, make_qwen2])
def test_layers_root_and_tensors_are_those_of_a_model(make: type) -> None:
    model = make()
    shape = ModelShape.from_config(model.config)
    layer = sum(parameter.numel() for parameter in model.model.layers[0].parameters())
    assert shape.layer_parameters == layer
    assert shape.root_parameters == model.num_parameters() - shape.layers * layer
    assert shape.tensors == len(list(model.parameters()))


def test_a_ring_sends_all_but_its_own_part() -> None:
    network = Network(within=100.0, between=10.0, reached=0.5, latency=0.0)
    assert network.seconds("all-gather", 1, 800, gpus=8) == pytest.approx(700 / 50)
    assert network.seconds("reduce-scatter", 1, 800, gpus=8) == pytest.approx(700 / 50)
    assert network.seconds("all-reduce", 1, 800, gpus=8) == pytest.approx(2 * 700 / 50)
    assert network.seconds("all-gather", 1, 800, gpus=1) == 0.0
    # Sixteen: eight rings cross between two machines, 8 · 10 a second, less than 100 inside.
    assert network.seconds("all-gather", 1, 800, gpus=16) == pytest.approx(750 / 40)


def test_every_round_of_a_call_takes_its_time() -> None:
    network = Network(latency=1.0)
    assert network.seconds("all-gather", 3, 0, gpus=4) == 9.0
    assert network.seconds("all-reduce", 3, 0, gpus=4) == 18.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gpus_per_node": 0}, "gpus_per_node must be at least 1, found 0"),
        ({"within": 0.0}, "within must be above 0, found 0.0"),
        ({"between": -1.0}, "between must be above 0, found -1.0"),
        ({"reached": 1.5}, r"reached must be in \(0, 1\], found 1.5"),
        ({"latency": -1.0}, "latency must be 0 or more, found -1.0"),
    ],
)
def test_bad_networks(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Network(**options)  # type: ignore[arg-type]
