"""Counts what the processes of a sharded step really send one another, beside the formulas.

    python tools/count_collectives.py --ranks 2 4 --layers 2 5

Starts that many processes on this machine's CPU (gloo), has them make one step of a tiny randomly
initialised Llama by the functions that training calls, and compares calls and bytes of every phase
with `sdft.communication.collectives`. Nothing is timed. The exit status is 1 where they differ.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
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

KINDS = {"allgather": "all-gather", "reducescatter": "reduce-scatter", "allreduce": "all-reduce"}
PROMPTS = [[3, 9, 10], [4, 11, 12, 13, 9], [3, 10]]
SHOWN = [[5, 6, 7, *prompt] for prompt in PROMPTS]
Key = tuple[str, str]
"""Phase and kind of call."""
Counts = dict[Key, tuple[int, int]]
"""Calls, and bytes of the whole tensors."""


@dataclass(frozen=True)
class Case:
    """One step.

    Attributes:
        layers: Decoder layers of student and teacher.
        tied: Whether the head is the embedding.
        precision: The trainer's.
        passes: Forward and backward passes of the step.
        recomputes: Whether the backward pass computes activations anew.
    """

    layers: int = 2
    tied: bool = False
    precision: str = "32-true"
    passes: int = 1
    recomputes: bool = False

    def model(self) -> LlamaForCausalLM:
        """A tiny Llama whose every first dimension 4 divides, so that no shard is padded."""
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=self.layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=self.tied,
            pad_token_id=0,
            eos_token_id=1,
            bos_token_id=None,
        )
        return LlamaForCausalLM(config).eval()

    def expected(self) -> Counts:
        """By the formulas."""
        shape = ModelShape.from_config(self.model().config)
        weight_bytes = 4 if self.precision == "32-true" else 2
        found = collectives(shape, self.passes, weight_bytes)
        return {(call.phase, call.kind): (call.calls, int(call.size)) for call in found}


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


def counted(case: Case) -> Counts:
    """One optimizer step of sharded models, in every process of a group."""
    student = case.model().train()
    teacher = frozen_copy(student)
    if case.recomputes:
        student.gradient_checkpointing_enable()
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    for model in (student, teacher):
        shard(model, mesh, case.precision)
        head(model)  # the first use checks it, once per run
    optimizer = torch.optim.AdamW(student.parameters())
    counting = Counting()
    with counting.during("rollout"), whole(student):
        completion = DecodeEngine().generate(student, PROMPTS, Sampling(6), [1], 0)
    for _ in range(case.passes):
        update(student, teacher, completion, counting)
    with counting.during("clipping"):
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
    with counting.during("optimizer"):
        optimizer.step()
    with counting.during("average"):
        update_average(teacher, student, 0.01)
    return {key: (calls, counting.bytes[key]) for key, calls in counting.calls.items()}


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


# ---------------------------------------------------------------- processes


def work(rank: int, ranks: int, cases: list[Case], folder: str) -> None:
    """One of several processes: counts every case, and writes down what it found."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=ranks
    )
    found = [counted(case) for case in cases]
    torch.save(found, Path(folder) / f"{rank}.pt")
    distributed.destroy_process_group()


def count(ranks: int, cases: list[Case]) -> list[Counts]:
    """What so many processes count, case by case; each of them counts the same."""
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(work, (ranks, cases, folder), nprocs=ranks)
        found = [torch.load(Path(folder) / f"{rank}.pt") for rank in range(ranks)]
    assert all(each == found[0] for each in found), "processes differ in their calls"
    return found[0]


def table(ranks: int, case: Case, found: Counts) -> str:
    """Counts beside formulas, in Markdown."""
    expected = case.expected()
    kinds = ["tied" if case.tied else "untied", case.precision]
    kind = ", ".join(kinds + ["recomputes"] * case.recomputes)
    rows = [
        [ranks, case.layers, case.passes, kind, *key, _cells(found, key), _cells(expected, key)]
        for key in dict.fromkeys([*expected, *found])
    ]
    return "\n".join("| " + " | ".join(map(str, cells)) + " |" for cells in rows)


def _cells(counts: Counts, key: Key) -> str:
    calls, size = counts.get(key, (0, 0))
    return f"{calls}, {size:,}"


VARIANTS = ((False, "32-true", False), (True, "bf16-mixed", True))
HEAD = """| ranks | layers | passes | model | phase | call | counted: calls, bytes | by formula |
|---|---|---|---|---|---|---|---|"""


def main() -> int:
    """Print the table; 1 where counts and formulas differ."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 5])
    parser.add_argument("--passes", type=int, nargs="+", default=[1, 2])
    given = parser.parse_args()
    cases = [
        Case(layers, tied, precision, passes, recomputes)
        for layers in given.layers
        for passes in given.passes
        for tied, precision, recomputes in VARIANTS
    ]
    print(HEAD)
    differ = False
    for ranks in given.ranks:
        for case, found in zip(cases, count(ranks, cases), strict=True):
            print(table(ranks, case, found))
            differ |= found != case.expected()
    print("counts and formulas DIFFER" if differ else "counts and formulas agree")
    return int(differ)


if __name__ == "__main__":
    sys.exit(main())
