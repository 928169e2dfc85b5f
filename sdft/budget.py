"""What a training step will need, reckoned before anything is loaded: memory and time.

Memory: what is held all the time (weights, gradients, optimizer states, copies) plus the larger
of two peaks: the rollout's key-value cache, or the update's activations and chunk of logits.
Time: the roofline of each phase over what share of it is reached; decoding reads all weights for
every token, the rest is arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from sdft.shapes import ModelShape

Phase = Literal["always", "rollout", "update"]

WEIGHT_BYTES = {"float32": 4, "bfloat16": 2}
STATE_BYTES = {"adamw": 8, "adamw_bf16": 4, "adamw_8bit": 2, "sgd": 0}
COPY_BYTES = {"float32": 4, "bfloat16": 2, "none": 0}
NF4_BYTES = 0.5 + (1 + 4 / 256) / 64  # 8 bits more per 64 weights, and fp32 per 256 of those
TEACHER_RANKS = 4  # the teacher's rank over the student's
_CHUNK = 1024  # rows of logits at a time
_CHUNK_COPIES = 4  # fp32 [chunk, V] tensors alive at once in the chunked divergence
_FULL_COPIES = 6  # fp32 [N, V] tensors alive at once in the plain one: both sides, probabilities
_DECODE_BYTES = 2  # per weight and cache entry: rollouts run in bf16


@dataclass(frozen=True)
class Workload:
    """One optimizer step.

    Attributes:
        batch: Prompts per optimizer step.
        prompt: Tokens of a student prompt.
        demonstration: Tokens that the teacher's prompt adds.
        completion: Tokens of a completion.
        micro_batch: Rows per forward and backward pass.
    """

    batch: int = 32
    prompt: int = 512
    demonstration: int = 1024
    completion: int = 1024
    micro_batch: int = 1

    def __post_init__(self) -> None:
        for name in ("batch", "prompt", "completion", "micro_batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, found {getattr(self, name)}")
        if self.demonstration < 0:
            raise ValueError(f"demonstration must be 0 or more, found {self.demonstration}")


@dataclass(frozen=True)
class Storage:
    """What is kept in which precision.

    Attributes:
        weights: Of the student; float32 under `bf16-mixed` keeps bf16 casts beside them.
        optimizer: AdamW with fp32, bf16 or 8-bit moments, or plain SGD.
        teacher: Of the EMA copy; `none` for an adapter's teacher or a method without one.
        base: Of the tracked base; `none` without `track_base`.
        checkpointing: Recompute activations in the backward pass.
        full_logits: Hold all logits of a micro-batch in place of chunks.
        lora_rank: Of adapters that train in place of the weights; 0 trains the weights.
        quantization: `nf4` keeps the base's linear layers in 4 bits; with adapters alone.
        gpus: Over how many the weights, gradients, states and copies are sharded.
    """

    weights: Literal["float32", "bfloat16"] = "float32"
    optimizer: Literal["adamw", "adamw_bf16", "adamw_8bit", "sgd"] = "adamw"
    teacher: Literal["float32", "bfloat16", "none"] = "float32"
    base: Literal["float32", "bfloat16", "none"] = "none"
    checkpointing: bool = True
    full_logits: bool = False
    lora_rank: int = 0
    quantization: Literal["none", "nf4"] = "none"
    gpus: int = 1

    def __post_init__(self) -> None:
        if self.gpus < 1:
            raise ValueError(f"gpus must be at least 1, found {self.gpus}")
        if self.lora_rank < 0:
            raise ValueError(f"lora_rank must be 0 or more, found {self.lora_rank}")
        if self.quantization != "none" and self.lora_rank == 0:
            raise ValueError("quantization needs a lora_rank: weights of 4 bits cannot be trained")
        if self.lora_rank > 0 and self.gpus > 1:
            raise ValueError(
                f"gpus must be 1 with a lora_rank, found {self.gpus}: adapters are not sharded"
            )


@dataclass(frozen=True)
class Line:
    """One line of the budget: how many bytes, and by which formula."""

    name: str
    size: float
    formula: str
    phase: Phase = "always"


@dataclass(frozen=True)
class Device:
    """An accelerator and how much of it is reached.

    Attributes:
        memory: Bytes.
        bandwidth: Bytes per second.
        flops: bf16 FLOP per second.
        mbu: Share of the bandwidth that decoding reaches.
        mfu: Share of the arithmetic that the other phases reach.
    """

    memory: float = 141e9
    bandwidth: float = 4.3e12
    flops: float = 790e12
    mbu: float = 0.7
    mfu: float = 0.5


def memory_lines(shape: ModelShape, work: Workload, keep: Storage) -> list[Line]:
    """The lines of the memory budget, per GPU."""
    held = _adapter_lines(shape, keep) if keep.lora_rank else _weight_lines(shape, keep)
    return [*held, *_rollout_lines(shape, work, keep), *_update_lines(shape, work, keep)]


def _adapter_lines(shape: ModelShape, keep: Storage) -> list[Line]:
    """A base that is shared by student, teacher and base, and fp32 adapters."""
    rank, weight = keep.lora_rank, WEIGHT_BYTES[keep.weights]
    adapters = shape.adapter_parameters(rank) / keep.gpus
    packed = shape.linear_parameters if keep.quantization == "nf4" else 0
    size = (weight * (shape.parameters - packed) + NF4_BYTES * packed) / keep.gpus
    formula = f"{weight} B × P" + (f", {NF4_BYTES:.3f} B per packed weight" if packed else "")
    states = STATE_BYTES[keep.optimizer]
    lines = [
        Line("base", size, formula),
        Line("adapters", 4 * adapters, f"4 B × A, A = {rank}·Σ(in + out)"),
        Line("gradients", 4 * adapters, "4 B × A"),
        Line(f"optimizer ({keep.optimizer})", states * adapters, f"{states} B × A"),
    ]
    if keep.teacher != "none":
        lines.append(Line("teacher", 4 * TEACHER_RANKS * adapters, f"4 B × {TEACHER_RANKS}·A"))
    return lines


def _weight_lines(shape: ModelShape, keep: Storage) -> list[Line]:
    per_gpu = shape.parameters / keep.gpus
    weight = WEIGHT_BYTES[keep.weights]
    lines = [
        Line("student", weight * per_gpu, f"{weight} B × P"),
        Line("gradients", weight * per_gpu, f"{weight} B × P"),
    ]
    for name, each in (
        (f"optimizer ({keep.optimizer})", STATE_BYTES[keep.optimizer]),
        ("teacher", COPY_BYTES[keep.teacher]),
        ("base", COPY_BYTES[keep.base]),
    ):
        if each:
            lines.append(Line(name, each * per_gpu, f"{each} B × P"))
    lines += _cast_lines(shape, keep) if keep.gpus == 1 else _gathered_lines(shape, keep)
    return lines


def _cast_lines(shape: ModelShape, keep: Storage) -> list[Line]:
    """Beside the weights of a model that is not sharded."""
    if keep.weights == "bfloat16":
        return []
    phases: tuple[Phase, Phase] = ("rollout", "update")
    size = 2 * shape.parameters
    return [Line("bf16 casts of the weights", size, "2 B × P", phase) for phase in phases]


def _gathered_lines(shape: ModelShape, keep: Storage) -> list[Line]:
    """What a sharded model holds whole: all of it for a rollout, then two layers at a time."""
    root, layer = shape.root_parameters, shape.layer_parameters
    passing = root + 2 * layer  # the layer that runs, and the next one on its way
    head = shape.vocab * shape.hidden  # the teacher's, for the loss
    return [
        Line("gathered weights", 2 * shape.parameters, "2 B × P", "rollout"),
        Line("gathered weights", 2 * (passing + head), "2 B × (R + 2·layer + V·D)", "update"),
        Line("gradients to scatter", 4 * (root + layer), "4 B × (R + layer)", "update"),
    ]


def _rollout_lines(shape: ModelShape, work: Workload, keep: Storage) -> list[Line]:
    tokens = math.ceil(work.batch / keep.gpus) * (work.prompt + work.completion)
    size = _DECODE_BYTES * shape.kv_values * tokens
    return [Line("key-value cache", size, "2 B × 2·L·kv·d × B·(Tp+Tc)", "rollout")]


def _update_lines(shape: ModelShape, work: Workload, keep: Storage) -> list[Line]:
    rows = work.micro_batch * work.completion
    tokens = work.micro_batch * (work.prompt + work.completion)
    if keep.checkpointing:
        stored = (shape.layers * shape.hidden + shape.layer_activations) * tokens
        activations = Line("activations", 2 * stored, "2 B × n·(L·D + one layer)", "update")
    else:
        stored = shape.layers * shape.layer_activations * tokens
        activations = Line("activations", 2 * stored, "2 B × n·L·(4D+2q+2k+4I)", "update")
    if keep.full_logits:
        logits = Line(
            "logits",
            4 * _FULL_COPIES * rows * shape.vocab,
            f"4 B × {_FULL_COPIES}·b·Tc·V",
            "update",
        )
    else:
        chunk = 4 * (_CHUNK_COPIES * min(rows, _CHUNK) * shape.vocab + shape.vocab * shape.hidden)
        logits = Line(
            "loss in chunks", chunk, f"4 B × ({_CHUNK_COPIES}·{_CHUNK}·V + V·D)", "update"
        )
    return [activations, logits]


def peak(lines: list[Line]) -> float:
    """Bytes at the worst moment: what is always held, and the larger of the two phases."""
    held = {"always": 0.0, "rollout": 0.0, "update": 0.0}
    for line in lines:
        held[line.phase] += line.size
    return held["always"] + max(held["rollout"], held["update"])


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step by phase, and of an SFT step on the same tokens.

    Attributes:
        generate: Decoding and prefill.
        score: The teacher's forward pass.
        update: The student's passes, optimizer and average.
        sft: The student's passes and the optimizer.
        parts: The same, one by one.
    """

    generate: float
    score: float
    update: float
    sft: float = field(default=0.0)
    parts: Mapping[str, float] = field(default_factory=dict)

    @property
    def total(self) -> float:
        """All phases."""
        return self.generate + self.score + self.update


def step_time(shape: ModelShape, work: Workload, keep: Storage, device: Device) -> StepTime:
    """Seconds of an SDFT step by the cost model; data parallel over `keep.gpus`.

    Communication is left out (`sdft.step_time` adds it).

    Decoding: Σ_t max[(2P + B·(Tp+t)·kv)/bandwidth, 2P·B/FLOPs]; prefill 2P·B·Tp, teacher
    2P·B·(Tp+Td+Tc), student 6P·B·(Tp+Tc) FLOPs (8P with recomputation); AdamW ≈ 30·P bytes and the
    EMA ≈ 14·P bytes of traffic. Under adapters the weights need no gradient (2P less), and P of the
    latter two is theirs.
    """
    matrix = shape.matrix_parameters
    batch = math.ceil(work.batch / keep.gpus)
    cache = 2 * shape.kv_values
    decode = 0.0
    for step in range(work.completion):
        read = 2 * matrix + batch * (work.prompt + step) * cache
        decode += max(read / device.bandwidth, 2 * matrix * batch / device.flops)
    rate = device.flops * device.mfu
    prefill = 2 * matrix * batch * work.prompt / rate
    teacher_tokens = batch * (work.prompt + work.demonstration + work.completion)
    student_tokens = batch * (work.prompt + work.completion)
    passes = (8 if keep.checkpointing else 6) - (2 if keep.lora_rank else 0)
    trained = shape.adapter_parameters(keep.lora_rank) if keep.lora_rank else shape.parameters
    traffic = (30 * trained / keep.gpus) / device.bandwidth
    average = (14 * trained / keep.gpus) / device.bandwidth if keep.teacher != "none" else 0
    student = passes * matrix * student_tokens / rate
    score = 2 * matrix * teacher_tokens / rate
    return StepTime(
        generate=decode / device.mbu + prefill,
        score=score,
        update=student + traffic + average,
        sft=student + traffic,
        parts={
            "decode": decode / device.mbu,
            "prefill": prefill,
            "teacher": score,
            "student": student,
            "optimizer": traffic,
            "average": average,
        },
    )
