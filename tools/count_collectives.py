"""Counts what the processes of a sharded step really send one another, beside the formulas.

    python tools/count_collectives.py --ranks 2 4 --layers 2 5

Starts that many processes on this machine's CPU (gloo), has them make one step of a tiny randomly
initialised Llama by the functions that training calls, and compares calls and bytes of every phase
with `sdft.communication.collectives`. Nothing is timed. The exit status is 1 where they differ.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch import Tensor, distributed, multiprocessing
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM

from sdft.callbacks.ema_teacher import update_average
from sdft.communication import collectives
from sdft.decode import DecodeEngine
from sdft.head import gathered_head, head
from sdft.head_losses import head_divergence
from sdft.packing import completion_hidden
from sdft.rollout import Rollout, Sampling
from sdft.shapes import ModelShape
from sdft.sharding import forwarded, shard, whole
from sdft.weights import frozen_copy

TIED = (False, True)
KINDS = {"allgather": "all-gather", "reducescatter": "reduce-scatter", "allreduce": "all-reduce"}
PROMPTS = [[3, 9, 10], [4, 11, 12, 13, 9], [3, 10]]
SHOWN = [[5, 6, 7, *prompt] for prompt in PROMPTS]
Key = tuple[str, str]
"""Phase and kind of call."""


class Counting(TorchDispatchMode):
    """Counts collective calls and the bytes of the whole tensors, phase by phase."""

    def __init__(self) -> None:
        super().__init__()
        self.phase = ""
        self.calls: Counter[Key] = Counter()
        self.bytes: Counter[Key] = Counter()

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """Count what happens inside under this name."""
        self.phase = phase
        with self:
            yield

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # it comes back as what it does to shards
        result = function(*args, **(kwargs or {}))
        library, _, name = str(function).partition(".")
        if library in ("c10d", "_c10d_functional") and not name.startswith(("wait", "_wrap")):
            plain = name.partition(".")[0].replace("_", "")
            kind = next((KINDS[k] for k in KINDS if plain.startswith(k)), name)
            # Of what goes in and what comes out, the larger is the whole.
            tensors = [t for t in tree_leaves((args, result)) if isinstance(t, Tensor)]
            self.calls[self.phase, kind] += 1
            self.bytes[self.phase, kind] += max(t.numel() * t.element_size() for t in tensors)
        return result


def make_model(layers: int, tied: bool) -> LlamaForCausalLM:
    """A tiny Llama whose every dimension up to 4 processes divide, so that no shard is padded."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


def step(layers: int, tied: bool, precision: str, passes: int) -> Counting:
    """One optimizer step of sharded models, counted."""
    student = make_model(layers, tied).train()
    teacher = frozen_copy(student)
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    for model in (student, teacher):
        shard(model, mesh, precision)
        head(model)  # the first use checks it, once per run
    optimizer = torch.optim.AdamW(student.parameters())
    counting = Counting()
    with counting.during("rollout"), whole(student):
        completion = DecodeEngine().generate(student, PROMPTS, Sampling(6), [1], 0)
    for _ in range(passes):
        update(student, teacher, completion, counting)
    with counting.during("clipping"):
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
    with counting.during("optimizer"):
        optimizer.step()
    with counting.during("average"):
        update_average(teacher, student, 0.01)
    return counting


def update(student: Any, teacher: Any, completion: Rollout, counting: Counting) -> None:
    """Scoring, and the student's forward and backward pass, as in `SDFTModule`."""
    with counting.during("teacher"):
        with torch.no_grad():
            teacher_ND = forwarded(teacher, lambda: completion_hidden(teacher, SHOWN, completion))
        known = gathered_head(teacher, teacher_ND.dtype)
    assert known is not None

    def compare() -> Tensor:
        own = head(student)
        assert own is not None
        student_ND = completion_hidden(student, PROMPTS, completion)
        return head_divergence(student_ND, own, teacher_ND, known).sum()

    with counting.during("student"):
        forwarded(student, compare).backward()


def expected(layers: int, tied: bool, precision: str, passes: int) -> dict[Key, tuple[int, int]]:
    """Calls and bytes by the formulas."""
    shape = ModelShape.from_config(make_model(layers, tied).config)
    weight_bytes = 4 if precision == "32-true" else 2
    found = collectives(shape, passes=passes, weight_bytes=weight_bytes)
    return {(c.phase, c.kind): (c.calls, int(c.size)) for c in found}
