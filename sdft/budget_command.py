"""The calculator: `python -m sdft budget --model qwen2.5-7b --work.batch 32`.

Prints what a step of SDFT will hold in memory and how long it takes by the cost model, before
anything is loaded. A known shape's name needs no files.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from jsonargparse import ArgumentParser

from sdft.budget import Device, Line, StepTime, Storage, Workload, memory_lines, peak, step_time
from sdft.shapes import SHAPES, ModelShape, find_shape


def main(args: list[str]) -> int:
    """Print the budget; the exit status is 1 where it does not fit the device.

    Args:
        args: Command-line arguments behind `budget`.
    """
    given = _parser().parse_args(args)
    shape = find_shape(given.model)
    work, keep, device = Workload(**given.work), Storage(**given.keep), Device(**given.device)
    lines = memory_lines(shape, work, keep)
    seconds = step_time(shape, work, keep, device)
    if given.json:
        print(json.dumps(_record(shape, lines, seconds, device), indent=1))
    else:
        print(_text(given.model, shape, lines, seconds, device))
    return 0 if peak(lines) <= device.memory else 1


def _parser() -> ArgumentParser:
    parser = ArgumentParser(prog="sdft budget", description=__doc__)
    parser.add_argument(
        "--model",
        type=str,
        required=True,
        help=f"a known shape ({', '.join(SHAPES)}), a model folder or a hub name",
    )
    parser.add_class_arguments(Workload, "work")
    parser.add_class_arguments(Storage, "keep")
    parser.add_class_arguments(Device, "device")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _record(
    shape: ModelShape, lines: list[Line], seconds: StepTime, device: Device
) -> dict[str, Any]:
    return {
        "parameters": shape.parameters,
        "lines": [asdict(line) for line in lines],
        "peak_bytes": peak(lines),
        "fits": peak(lines) <= device.memory,
        "seconds": {**asdict(seconds), "total": seconds.total},
        "ratios": {"sdft_over_sft": seconds.total / seconds.sft},
    }


def _text(
    name: str, shape: ModelShape, lines: list[Line], seconds: StepTime, device: Device
) -> str:
    total = peak(lines)
    verdict = "fits" if total <= device.memory else "DOES NOT FIT"
    rows = [
        f"  {line.name:<28}{line.size / 1e9:>9.1f} GB  {_when(line):<12}{line.formula}"
        for line in lines
    ]
    return "\n".join(
        [
            f"{name}: {shape.parameters / 1e9:.2f} billion parameters",
            *rows,
            f"  {'peak':<28}{total / 1e9:>9.1f} GB  {verdict} {device.memory / 1e9:.0f} GB",
            f"a step by the cost model (MBU {device.mbu:.0%}, MFU {device.mfu:.0%}): "
            f"{seconds.total:.1f} s = generate {seconds.generate:.1f} + score {seconds.score:.1f} "
            f"+ update {seconds.update:.1f}; {seconds.total / seconds.sft:.1f} × an SFT step on "
            "the same tokens",
        ]
    )


def _when(line: Line) -> str:
    return "" if line.phase == "always" else line.phase
