"""A captured step gives what the step gives; on the CPU a recording stands for a CUDA graph."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from conftest import make_model, make_qwen2, sharpen
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

import sdft.decode
import sdft.graph
from sdft.decode import DecodeEngine
from sdft.direct import DirectForward
from sdft.graph import StepGraph
from sdft.rollout import GenerateEngine, Sampling

ENGINE = DecodeEngine(fused=False)  # as on CUDA, where weights are never copied
PROMPTS = [[3, 9, 10, 4], [3, 12, 4], [3, 13, 14, 15, 16, 9, 4], [3, 12, 4], [5] * 300] * 3


class Recording(TorchDispatchMode):
    """Like a CUDA graph: fixed addresses, no Python at replay, nothing computed while recording."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []
        self.before: list[tuple[Tensor, Tensor]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            raise RuntimeError(f"{func} makes the host wait")
        kwargs = kwargs or {}
        for argument, given in zip(func._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                self.before.append((given, given.clone()))
        found = func(*args, **kwargs)
        self.calls.append((func, args, kwargs, found))
        return found

    def undo(self) -> None:
        for tensor, value in reversed(self.before):
            tensor.copy_(value)

    def replay(self) -> None:
        for func, args, kwargs, recorded in self.calls:
            found = func(*args, **kwargs)
            pairs = zip(tree_leaves(recorded), tree_leaves(found), strict=True)
            for old, new in pairs:
                if isinstance(new, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


@contextmanager
def recorded(graph: Recording, **options: Any) -> Iterator[None]:
    with graph:
        yield
    graph.undo()


class Uses:
    """How often graphs were captured and replayed."""

    def __init__(self) -> None:
        self.captures = self.replays = 0


@pytest.fixture
def uses(monkeypatch: pytest.MonkeyPatch) -> Uses:
    """Recordings in place of CUDA graphs, on the CPU."""
    counts = Uses()

    class Graph(Recording):
        def __init__(self) -> None:
            super().__init__()
            counts.captures += 1

        def replay(self) -> None:
            counts.replays += 1
            super().replay()

    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 0))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", recorded)
    monkeypatch.setattr(sdft.decode, "_pace", lambda device: (8, 0.5))
    always = property(lambda self: True, lambda *_: None)
    monkeypatch.setattr(DirectForward, "capturable", always, raising=False)
    return counts


@pytest.mark.parametrize("make", [make_model, make_qwen2])
@pytest.mark.parametrize("eos_ids", [[], [7]])
@pytest.mark.parametrize("sampling", [Sampling(60, 0.0), Sampling(60), Sampling(60, 0.7, 0.9, 9)])
def test_rollouts_are_the_same_with_graphs(
    make: Callable[[], PreTrainedModel], eos_ids: list[int], sampling: Sampling, uses: Uses
) -> None:
    model = sharpen(make(), 4.0).double()
    expected = rollout(DecodeEngine(direct=False), model, eos_ids, sampling)
    assert uses.captures == 0
    assert rollout(ENGINE, model, eos_ids, sampling) == expected
    assert uses.captures > 0
    assert uses.replays > (0 if eos_ids else 50)


def rollout(
    engine: DecodeEngine, model: PreTrainedModel, eos_ids: list[int], sampling: Sampling
) -> list[list[int]]:
    torch.manual_seed(0)
    return engine.generate(model, PROMPTS, sampling, eos_ids, 0).completions()


def test_a_graph_is_captured_anew_when_the_cache_grows(uses: Uses) -> None:
    model = sharpen(make_model(max_position_embeddings=1024)).double()
    long, greedy = [[3, 9, 10, 4] * 50, [5] * 240], Sampling(60, 0.0)
    found = ENGINE.generate(model, long, greedy, [], 0)
    assert uses.captures == 2  # 256 columns, then 512
    expected = GenerateEngine().generate(model, long, greedy, [], 0)
    assert found.completions() == expected.completions()


def test_a_step_that_cannot_be_captured_runs_as_it_is(
    uses: Uses, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = sharpen(make_model()).double()
    expected = rollout(DecodeEngine(direct=False), model, [], Sampling(60))

    @contextmanager
    def refuse(*args: Any, **options: Any) -> Iterator[None]:
        raise RuntimeError("operation not permitted when stream is capturing")
        yield

    monkeypatch.setattr(torch.cuda, "graph", refuse)
    with caplog.at_level(logging.WARNING):
        assert rollout(ENGINE, model, [], Sampling(60)) == expected
    assert [r.levelname for r in caplog.records if r.name == sdft.graph.__name__] == ["WARNING"]
    assert uses.replays == 0


def test_short_rollouts_are_not_captured(uses: Uses) -> None:
    rollout(ENGINE, make_model(), [], Sampling(8))
    assert uses.captures == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("make", [make_model, make_qwen2])
@pytest.mark.parametrize("eos_ids", [[], [7]])
def test_cuda_graphs_give_what_generate_gives(
    make: Callable[[], PreTrainedModel],
    eos_ids: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = sharpen(make(), 4.0).double().cuda()
    captured: list[torch.cuda.CUDAGraph | None] = []
    capture = StepGraph._capture
    monkeypatch.setattr(
        StepGraph,
        "_capture",
        lambda self, step: (capture(self, step), captured.append(self.graph)),
    )
    for greedy in (Sampling(60, 0.0), Sampling(300, 0.0)):
        for _ in range(2):
            expected = GenerateEngine().generate(model, PROMPTS, greedy, eos_ids, 0)
            found = ENGINE.generate(model, PROMPTS, greedy, eos_ids, 0)
            assert found.completions() == expected.completions()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.mul_(1.1)
    assert captured
    assert None not in captured


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_graphs_draw_what_eager_steps_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    model = sharpen(make_qwen2(), 4.0).double().cuda()
    graphs = rollout(ENGINE, model, [1], Sampling(60))
    monkeypatch.setattr(sdft.graph, "_PAYS_FROM", 10**9)
    assert rollout(ENGINE, model, [1], Sampling(60)) == graphs
