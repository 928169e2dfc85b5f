"""The calculator: `python -m sdft budget --model qwen2.5-7b --work.batch 32`.

Prints what a step of SDFT will hold in memory and how long it takes by the cost model, before
anything is loaded, on as many GPUs as `--gpus` says, communication included. A known shape's name
needs no files. `--scaling` prints the tables of docs/scaling.md instead.
"""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from typing import Any

from jsonargparse import ArgumentParser

from sdft.budget import Device, Line, Storage, Workload, memory_lines, peak
from sdft.communication import Network
from sdft.scaling import Scaling, known_models, tables
from sdft.shapes import SHAPES, ModelShape, find_shape
from sdft.step_time import TimeLine, bottleneck, time_lines, total_time


def main(args: list[str]) -> int:
    """Print the budget; the exit status is 1 where it does not fit the device.

    Args:
        args: Command-line arguments behind `budget`.
    """
    given = _parser().parse_args(args)
    work, keep, device = Workload(**given.work), Storage(**given.keep), Device(**given.device)
    network = Network(**given.network)
    if given.gpus is not None:
        keep = replace(keep, gpus=given.gpus)
    if given.scaling:
        models = {given.model: find_shape(given.model)} if given.model else known_models()
        _print_scaling(Scaling(work, keep, device, network, models), given.json)
        return 0
    if given.model is None:
        raise ValueError(f"--model is missing: a known shape ({', '.join(SHAPES)}) or a model")
    shape = find_shape(given.model)
    lines = memory_lines(shape, work, keep)
    times = time_lines(shape, work, keep, device, network)
    if given.json:
        print(json.dumps(_record(shape, lines, times, device), indent=1))
    else:
        print(_text(given.model, shape, lines, times, device))
    return 0 if peak(lines) <= device.memory else 1


def _print_scaling(scaling: Scaling, as_json: bool) -> None:
    if not as_json:
        print("\n\n".join(tables(scaling)))
        return
    records = {
        name: {
            gpus: _record(
                shape, scaling.memory(shape, gpus), scaling.times(shape, gpus), scaling.device
            )
            for gpus in scaling.gpus
        }
        for name, shape in scaling.models.items()
    }
    print(json.dumps(records, indent=1))


def _parser() -> ArgumentParser:
    parser = ArgumentParser(prog="sdft budget", description=__doc__)
    parser.add_argument(
        "--model",
        type=str | None,
        help=f"a known shape ({', '.join(SHAPES)}), a model folder or a hub name",
    )
    parser.add_class_arguments(Workload, "work")
    parser.add_class_arguments(Storage, "keep")
    parser.add_class_arguments(Device, "device")
    parser.add_class_arguments(Network, "network")
    parser.add_argument("--gpus", type=int | None, help="short for --keep.gpus")
    parser.add_argument(
        "--scaling",
        action="store_true",
        help="tables in Markdown for 1, 8 and 64 GPUs, work.batch prompts on each",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _record(
    shape: ModelShape, lines: list[Line], times: list[TimeLine], device: Device
) -> dict[str, Any]:
    seconds = total_time(times)
    return {
        "parameters": shape.parameters,
        "lines": [asdict(line) for line in lines],
        "peak_bytes": peak(lines),
        "fits": peak(lines) <= device.memory,
        "seconds": {**asdict(seconds), "total": seconds.total},
        "time_lines": [asdict(line) for line in times],
        "bottleneck": bottleneck(times).name,
        "ratios": {"sdft_over_sft": seconds.total / seconds.sft},
    }


def _text(
    name: str, shape: ModelShape, lines: list[Line], times: list[TimeLine], device: Device
) -> str:
    seconds = total_time(times)
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
            *map(_time_text, times),
        ]
    )


def _time_text(line: TimeLine) -> str:
    hidden = f"+{line.hidden:.2f} hidden" if line.hidden else ""
    return f"  {line.name:<28}{line.seconds:>9.2f} s   {hidden:<14}{line.formula}"


def _when(line: Line) -> str:
    return "" if line.phase == "always" else line.phase
