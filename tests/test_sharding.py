"""Sharding as far as one process sees it. Two processes: tests/distributed/."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from conftest import make_gpt2, make_model, make_qwen2
from lightning.pytorch import Trainer
from torch import nn

from sdft.adapter_training import AdapterTraining
from sdft.lora import LoRA
from sdft.placement import spread
from sdft.sharding import (
    blocks,
    forwarded,
    gathered,
    is_sharded,
    local,
    original,
    whole,
    whole_state,
)
from sdft.strategies import FlatShardedStrategy, ReplicatedStrategy, ShardedStrategy


def test_the_blocks_are_the_decoder_layers() -> None:
    for model, layers in (
        (llama := make_model(), llama.model.layers),
        (qwen := make_qwen2(), qwen.model.layers),
        (gpt2 := make_gpt2(), gpt2.transformer.h),
    ):
        assert blocks(model) == list(layers)


def test_without_names_the_longest_list_is_taken() -> None:
    model = make_model()
    model._no_split_modules = None
    assert blocks(model) == list(model.model.layers)


def test_a_model_in_one_piece_stays_as_it_is() -> None:
    model = make_model()
    assert not is_sharded(model)
    assert original(model) is type(model)
    assert whole_state(model) is None
    with whole(model):
        assert forwarded(model, lambda: "inside") == "inside"
    tensor = torch.ones(2)
    assert gathered(tensor) is local(tensor) is tensor


@pytest.mark.parametrize("kind", [ReplicatedStrategy, ShardedStrategy, FlatShardedStrategy])
@pytest.mark.parametrize("minutes", [0, -1.0, float("nan"), float("inf")])
def test_a_timeout_is_above_0(kind: type, minutes: float) -> None:
    with pytest.raises(ValueError, match=r"timeout_minutes must be above 0"):
        kind(timeout_minutes=minutes)


def test_fsdp1_needs_gpus() -> None:
    trainer = Trainer(
        accelerator="cpu", strategy=FlatShardedStrategy(), logger=False, barebones=True
    )
    with pytest.raises(ValueError, match=r"FSDP1 needs GPUs.*configs/fsdp.yaml"):
        trainer.strategy.setup_environment()


def test_fsdp1_wraps_decoder_layers_alone() -> None:
    policy = FlatShardedStrategy().kwargs["auto_wrap_policy"]
    layer = make_model().model.layers[0]
    assert policy(module=layer, recurse=False, nonwrapped_numel=1)
    assert not policy(module=nn.Linear(2, 2), recurse=False, nonwrapped_numel=1)


@pytest.mark.parametrize("kind", [ShardedStrategy, FlatShardedStrategy])
def test_adapters_need_whole_weights(kind: type) -> None:
    module = SimpleNamespace(
        _trainer=True,
        trainer=SimpleNamespace(strategy=kind()),
        device_mesh=object() if kind is ShardedStrategy else None,
        adapters=AdapterTraining(LoRA(2), None),
    )
    with pytest.raises(ValueError, match=rf"model\.lora works with whole .* {kind.__name__}"):
        spread(cast(Any, module), [], [])
