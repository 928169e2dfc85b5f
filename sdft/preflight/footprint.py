"""Memory of the run by the calculator (`sdft.budget`), fed with what the task's prompts are."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, cast

import torch

from sdft.budget import Line, Storage, Workload, memory_lines, peak
from sdft.preflight.configured import Configured
from sdft.preflight.facts import TaskFacts
from sdft.shapes import ModelShape
from sdft.states import heads_known

_HALF = ("activations", "key-value cache")  # the calculator reckons them in 16 bits
_OPTIMIZERS: dict[str, Literal["adamw", "adamw_bf16", "adamw_8bit", "sgd"]] = {
    "AdamWBF16": "adamw_bf16",
    "AdamW8bit": "adamw_8bit",
    "PagedAdamW8bit": "adamw_8bit",
    "SGD": "sgd",
}


@dataclass(frozen=True)
class Footprint:
    """Memory of a step with the longest prompts and answers, on each device.

    Attributes:
        peak_bytes: By the calculator; None where it does not know the model, and `problem` says so.
        lines: What it is made of.
        available_bytes: Of this machine's device, or of its main memory.
        measured_bytes: The most that the timed steps took; None without them.
        problem: Why there is no figure.
    """

    peak_bytes: float | None
    lines: list[Line] = field(default_factory=list)
    available_bytes: int | None = None
    measured_bytes: int | None = None
    problem: str = ""

    @property
    def fits(self) -> bool | None:
        """Whether it fits this machine; None where that cannot be told."""
        if self.peak_bytes is None or self.available_bytes is None:
            return None
        return self.peak_bytes <= self.available_bytes

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {
            "peak_bytes": self.peak_bytes,
            "available_bytes": self.available_bytes,
            "fits": self.fits,
            "measured_peak_bytes": self.measured_bytes,
            "lines": [asdict(line) for line in self.lines],
            "problem": self.problem or None,
        }


def footprint(configured: Configured, facts: Sequence[TaskFacts], optimizer: str) -> Footprint:
    """The run's memory, where all tasks' longest prompts that fit come together.

    Args:
        configured: The run, its model loaded.
        facts: Of its tasks.
        optimizer: Name of the optimizer's class.
    """
    available = available_memory(configured.module.device)
    fits = [fact.fitting for fact in facts if fact.fitting and fact.fitting.items]
    if not fits:
        return Footprint(
            None, available_bytes=available, problem="no task has an example that fits"
        )
    try:
        shape = ModelShape.from_config(configured.module.model.config)
    except ValueError as error:
        return Footprint(None, available_bytes=available, problem=str(error))
    items = [item for fit in fits for item in fit.items]
    student = max(len(item.student_ids) for item in items)
    teacher = max(len(item.teacher_ids) for item in items)
    work = _workload(configured, student, teacher)
    keep = _storage(configured, optimizer)
    lines = _as_run(memory_lines(shape, work, keep), configured)
    if not keep.lora_rank:
        others = configured.module.copies[1:]  # the calculator knows of the teacher alone
        lines += [Line(n, 4 * shape.parameters / keep.gpus, "4 B × P") for n in others]
    return Footprint(peak(lines), lines, available)


def _workload(configured: Configured, student: int, teacher: int) -> Workload:
    module: Any = configured.module
    completion = module.greedy.max_new_tokens
    rows = configured.data.batch_size * getattr(module, "rollouts_per_prompt", 1)
    together = -(-rows // (configured.processes or 1))
    if budget := getattr(module, "micro_batch_tokens", None):
        together = max(1, min(together, budget // (student + completion)))
    return Workload(rows, student, max(teacher - student, 0), completion, together)


def _storage(configured: Configured, optimizer: str) -> Storage:
    module: Any = configured.module
    adapters = module.adapters
    weights = "bfloat16" if _half(configured) else "float32"
    copies: dict[str, Any] = {
        "teacher": "none",
        "base": weights if module.track_base or module.needs_base else "none",
    }
    if module.copies:
        stored = "bfloat16" if configured.teacher.storage == torch.bfloat16 else "float32"
        copies["teacher"] = stored
    sharded = "fsdp" in configured.strategy.lower()
    lora = adapters.lora
    return Storage(
        weights=cast(Any, weights),
        optimizer=_OPTIMIZERS.get(optimizer, "adamw"),
        checkpointing=module.gradient_checkpointing,
        full_logits=not heads_known(module.model),
        lora_rank=0 if lora is None else lora.rank,
        quantization=adapters.quantization or "none",
        gpus=(configured.processes or 1) if sharded and lora is None else 1,
        **copies,
    )


def _half(configured: Configured) -> bool:
    dtype = next(configured.module.model.parameters()).dtype
    return dtype in (torch.bfloat16, torch.float16) or configured.precision in (
        "bf16-true",
        "16-true",
    )


def _as_run(lines: list[Line], configured: Configured) -> list[Line]:
    """The lines in the run's precision: in 32 bits there are no casts, and all else doubles."""
    if "32" not in configured.precision:
        return lines
    kept = [line for line in lines if not line.name.startswith("bf16 casts")]
    return [
        replace(line, size=2 * line.size, formula=f"2 × {line.formula} (fp32)")
        if line.name in _HALF
        else line
        for line in kept
    ]


def available_memory(device: torch.device) -> int | None:
    """Bytes of the device, or of main memory; None where the system does not say."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None
