"""Memory and time of a step for several models on 1, 8 and 64 GPUs, as tables in Markdown.

`python -m sdft budget --scaling` prints them; docs/scaling.md holds what it prints.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sdft.budget import Device, Line, Storage, Workload, memory_lines, peak
from sdft.communication import Network, collectives
from sdft.shapes import SHAPES, ModelShape
from sdft.step_time import TimeLine, bottleneck, passes_of, time_lines, total_time

MODELS = ("qwen2.5-0.5b", "qwen2.5-7b", "qwen2.5-32b", "llama-3.1-70b")
GPUS = (1, 8, 64)
PRECISIONS: dict[str, dict[str, Any]] = {
    "all fp32": {"optimizer": "adamw", "teacher": "float32"},
    "bf16 moments and teacher": {"optimizer": "adamw_bf16", "teacher": "bfloat16"},
    "8-bit moments, bf16 teacher": {"optimizer": "adamw_8bit", "teacher": "bfloat16"},
    "all bf16": {"weights": "bfloat16", "optimizer": "adamw_bf16", "teacher": "bfloat16"},
}
"""How a model may be kept: beside fp32 weights unless said."""

Cells = list[str]


@dataclass(frozen=True)
class Scaling:
    """What is common to the tables.

    Attributes:
        work: A step's work; `batch` prompts are those of one GPU.
        keep: What is kept, on however many GPUs.
        device: Each GPU.
        network: Between them.
        models: Shapes by name.
        gpus: How many.
    """

    work: Workload
    keep: Storage
    device: Device
    network: Network
    models: dict[str, ModelShape]
    gpus: Sequence[int] = GPUS

    def storage(self, gpus: int, **changes: Any) -> Storage:
        """What is kept on so many GPUs."""
        return replace(self.keep, gpus=gpus, **changes)

    def workload(self, gpus: int) -> Workload:
        """A step of so many GPUs, each with its own prompts."""
        return replace(self.work, batch=self.work.batch * gpus)

    def times(self, shape: ModelShape, gpus: int, work: Workload | None = None) -> list[TimeLine]:
        """The lines of a step's time; each GPU has its own prompts unless `work` says otherwise."""
        work = self.workload(gpus) if work is None else work
        return time_lines(shape, work, self.storage(gpus), self.device, self.network)

    def memory(self, shape: ModelShape, gpus: int, **changes: Any) -> list[Line]:
        """The lines of the memory budget, per GPU."""
        return memory_lines(shape, self.workload(gpus), self.storage(gpus, **changes))


def known_models(names: Iterable[str] = MODELS) -> dict[str, ModelShape]:
    """The shapes that the document is about."""
    return {name: SHAPES[name] for name in names}


def tables(scaling: Scaling) -> list[str]:
    """All tables, each with its caption."""
    makers = (
        peaks_table,
        memory_table,
        time_table,
        steps_table,
        divided_table,
        collectives_table,
    )
    return [make(scaling) for make in makers]


def peaks_table(scaling: Scaling) -> str:
    """Peak memory for every way of keeping a model; what fits is bold."""
    rows = [
        [name, option, *(_fitting(scaling, shape, gpus, **changes) for gpus in scaling.gpus)]
        for name, shape in scaling.models.items()
        for option, changes in PRECISIONS.items()
    ]
    heads = ["model", "kept", *(_gpus(gpus) for gpus in scaling.gpus)]
    memory = f"{scaling.device.memory / 1e9:.0f}"
    return _table(f"Peak memory per GPU, GB; bold where it fits {memory} GB", heads, rows)


def _fitting(scaling: Scaling, shape: ModelShape, gpus: int, **changes: Any) -> str:
    size = peak(scaling.memory(shape, gpus, **changes))
    text = figure(size / 1e9)
    return f"**{text}**" if size <= scaling.device.memory else text


def memory_table(scaling: Scaling) -> str:
    """Each line of the memory budget with its formula."""

    def lines(shape: ModelShape, gpus: int) -> dict[tuple[str, ...], float]:
        found = scaling.memory(shape, gpus)
        return {(x.name, x.phase, _sharded(x.name, x.formula)): x.size / 1e9 for x in found}

    caption = f"Memory per GPU line by line, GB, on {_counts(scaling)} GPUs"
    return _by_line(scaling, caption, ["what", "when", "formula"], lines)


def _sharded(name: str, formula: str) -> str:
    held = name in ("student", "gradients", "teacher", "base") or name.startswith("optimizer")
    return f"{formula} / G" if held else formula


def time_table(scaling: Scaling) -> str:
    """Each line of a step's time with its formula."""

    def lines(shape: ModelShape, gpus: int) -> dict[tuple[str, ...], float]:
        return {(x.name, x.formula): x.seconds for x in scaling.times(shape, gpus)}

    caption = f"Seconds per step line by line, on {_counts(scaling)} GPUs"
    return _by_line(scaling, caption, ["what", "formula"], lines)


def _by_line(
    scaling: Scaling,
    caption: str,
    heads: Cells,
    lines: Callable[[ModelShape, int], dict[tuple[str, ...], float]],
) -> str:
    found = {
        name: [lines(shape, gpus) for gpus in scaling.gpus]
        for name, shape in scaling.models.items()
    }
    keys = dict.fromkeys(key for each in found.values() for some in each for key in some)
    rows = [
        [*key, *(" / ".join(figure(some.get(key)) for some in each) for each in found.values())]
        for key in keys
    ]
    return _table(caption, [*heads, *found], rows)


def steps_table(scaling: Scaling) -> str:
    """A step as a whole, each GPU with its own prompts."""
    rows = [
        [name, str(gpus), *_step(scaling.times(shape, gpus))]
        for name, shape in scaling.models.items()
        for gpus in scaling.gpus
    ]
    heads = ["model", "GPUs", "step", "generate", "score", "update"]
    heads += ["communication: not hidden", "hidden", "× SFT", "longest"]
    caption = f"Seconds per step, {scaling.work.batch} prompts per GPU"
    return _table(caption, heads, rows)


def _step(lines: list[TimeLine]) -> Cells:
    time = total_time(lines)
    sent = [line for line in lines if line.name.startswith("communication")]
    seconds = (time.total, time.generate, time.score, time.update)
    waits, hidden = (sum(getattr(x, k) for x in sent) for k in ("seconds", "hidden"))
    ratio, longest = f"{time.total / time.sft:.1f}", bottleneck(lines).name
    return [*map(figure, seconds), figure(waits), figure(hidden), ratio, longest]


def divided_table(scaling: Scaling) -> str:
    """The same prompts divided among the GPUs: how much faster a step gets."""
    work = scaling.workload(max(scaling.gpus))
    work = replace(work, batch=max(scaling.gpus))
    rows = []
    for name, shape in scaling.models.items():
        lines = [scaling.times(shape, gpus, work) for gpus in scaling.gpus]
        times = [total_time(each).total for each in lines]
        faster = [f"{times[0] / time:.1f}" for time in times[1:]]
        rows.append([name, *map(figure, times), *faster, bottleneck(lines[-1]).name])
    heads = ["model", *(f"{_gpus(gpus)}, s" for gpus in scaling.gpus)]
    heads += [f"times faster on {gpus}" for gpus in scaling.gpus[1:]]
    heads.append(f"longest on {scaling.gpus[-1]}")
    return _table(f"{work.batch} prompts per step in all", heads, rows)


def collectives_table(scaling: Scaling) -> str:
    """Calls and what they gather or scatter, in one step of one GPU."""
    rows: dict[tuple[str, str, str], Cells] = {}
    gpus = max(scaling.gpus)
    passes = passes_of(scaling.workload(gpus), scaling.storage(gpus))
    for shape in scaling.models.values():
        for call in collectives(shape, passes):
            cells = rows.setdefault((call.phase, call.kind, call.formula), [])
            cells.append(f"{call.calls}, {figure(call.size / 1e9)}")
    heads = ["phase", "call", "formula", *scaling.models]
    caption = f"Collective calls per step, and GB of the whole tensors; m = {passes}"
    return _table(caption, heads, [[*key, *cells] for key, cells in rows.items()])


def figure(value: float | None) -> str:
    """Two or three figures; a dash for what there is none of."""
    if value is None:
        return "–"
    if value == 0:
        return "0"
    if value < 0.005:
        return "<.01"
    text = f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 1 else f"{value:.2f}"
    return text.removeprefix("0") if text.startswith("0.") else text


def _gpus(count: int) -> str:
    return "1 GPU" if count == 1 else f"{count} GPUs"


def _counts(scaling: Scaling) -> str:
    return " / ".join(map(str, scaling.gpus))


def _table(caption: str, heads: Cells, rows: Iterable[Cells]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join([f"{caption}:", "", *("| " + " | ".join(cells) + " |" for cells in lines)])
