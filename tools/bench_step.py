"""How long a training step takes: ours, SFT on the same tokens, `generate`-based SDFT, and TRL's.

    python tools/bench_step.py --quick --json step.json
    python tools/bench_step.py --trl-python path/to/venv/bin/python     # pip install trl==1.16.0
    python tools/bench_step.py --shape qwen2.5-1.5b --prompts 32 128    # on a GPU
    python tools/bench_step.py --model sdft:smollm2 --prompts 32

All contenders make their steps in turn, each in a process of its own, on one model and the same
prompts; the table shows medians, and the most memory of each process. SFT is our own, packed and
with its loss in chunks like SDFT's, on completions as long as those that we have just sampled.
Compare ratios, not seconds.

Where three contenders do not fit the GPU together, they go `--one-by-one`: one process after
another.
On CUDA the table has MBU and MFU, against ceilings measured in the same run.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from bench_alone import run_alone
from bench_laps import PHASES, Lap, ratios, summary
from bench_material import model_config
from bench_models import Plan, add_arguments, plans, read_setting
from bench_remote import start, start_trl
from bench_serve import quiet
from bench_utilisation import NOTE, Ceilings, measure_ceilings, utilisation

from sdft.budget import Storage, Workload, memory_lines, peak
from sdft.shapes import ModelShape, find_shape

OURS = ("ours", "sft", "generate")
SHARES = {"mbu_generate": "MBU generate", "mfu_score": "MFU score", "mfu_update": "MFU update"}


def in_turn(plan: Plan, repeats: int, warmup: int, trl_python: str | None) -> dict[str, list[Lap]]:
    """Interleaved steps of all contenders."""
    steps = repeats + warmup + 1
    running = {name: start(name, plan, steps) for name in OURS}
    if trl_python is not None:
        running["trl"] = start_trl(trl_python, plan, steps)
    laps: dict[str, list[Lap]] = {name: [] for name in running}
    for _ in range(warmup + repeats):
        for name, contender in running.items():
            lengths = laps["ours"][-1].completions if name == "sft" else None
            laps[name].append(contender.step(lengths))
    for contender in running.values():
        contender.close()
    return {name: steps[warmup:] for name, steps in laps.items()}


def one_by_one(plan: Plan, repeats: int, warmup: int) -> dict[str, list[Lap]]:
    """One contender after another; SFT on completions as long as ours."""
    laps = {"ours": run_alone("ours", plan, repeats, warmup).laps}
    lengths = [lap.completions for lap in laps["ours"]]
    laps["sft"] = run_alone("sft", plan, repeats, warmup, lengths).laps
    laps["generate"] = run_alone("generate", plan, repeats, warmup).laps
    return laps


def measure(plan: Plan, given: argparse.Namespace, ceilings: Ceilings | None) -> dict[str, Any]:
    """The record of one setting."""
    repeats = given.repeats or (5 if given.quick else 9)
    shape = shape_of(plan, given.model)
    alternate = given.trl_python is not None or not crowded(plan, shape, gpu_memory())
    if not alternate if given.one_by_one is None else given.one_by_one:
        laps = one_by_one(plan, repeats, given.warmup)
    else:
        laps = in_turn(plan, repeats, given.warmup, given.trl_python)
    results = {name: summary(steps) for name, steps in laps.items()}
    if ceilings is not None:
        for name in OURS:
            results[name] |= asdict(utilisation(laps[name], shape, ceilings))
    return {"plan": asdict(plan), "results": results, "ratios": ratios(results)}


def shape_of(plan: Plan, name: str | None) -> ModelShape | None:
    """The model's sizes; None where they are of no known kind."""
    try:
        if name is not None:
            return find_shape(name)
        return ModelShape.from_config(model_config(plan.setting))
    except ValueError:
        return None


def crowded(plan: Plan, shape: ModelShape | None, memory: float | None) -> bool:
    """Whether three contenders' models do not fit one GPU together, by the calculator's lines.

    Args:
        plan: Sizes and precision.
        shape: The model; None where its sizes are of no known kind.
        memory: Bytes of the GPU; None without one.
    """
    if shape is None or memory is None:
        return False
    setting, narrow = plan.setting, plan.frugal
    work = Workload(setting.batch, setting.prompt, setting.demonstration, setting.completion)
    keep = Storage(
        optimizer="adamw_bf16" if narrow else "adamw",
        teacher="bfloat16" if narrow else "float32",
        checkpointing=narrow,
    )
    lines = memory_lines(shape, replace(work, micro_batch=setting.batch), keep)
    held = sum(line.size for line in lines if line.phase == "always")
    return 2 * held + peak(lines) > memory  # only one of them is at work


def gpu_memory() -> float | None:
    """Bytes of the GPU; None without one."""
    if not torch.cuda.is_available():
        return None
    return float(torch.cuda.get_device_properties(0).total_memory)


# ---------------------------------------------------------------- what is printed


def table(record: dict[str, Any], shares: bool) -> str:
    """One setting's results as Markdown.

    Args:
        record: Of `measure`.
        shares: Whether there are columns for MBU and MFU.
    """
    titles = ["", "step, s", *PHASES, "completion tokens/s", "peak memory, MB"]
    titles += SHARES.values() if shares else []
    rows = [_cells(name, result, shares) for name, result in record["results"].items()]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    lines += [f"| {' | '.join(cells)} |" for cells in rows]
    found = record["ratios"].items()
    return "\n".join([*lines, "", *(f"{k} = {v:.2f}" for k, v in found if v is not None)])


def _cells(name: str, result: dict[str, Any], shares: bool) -> list[str]:
    phases, tokens, memory = (
        result.get(key) for key in ("phases", "completion_tokens", "peak_memory_bytes")
    )
    assert phases is not None
    cells = [name, f"{result['seconds']:.3f}"]
    cells += [f"{phases[p]:.3f}" if p in phases else "" for p in PHASES]
    cells.append(f"{tokens / phases['generate']:.0f}" if tokens else "")
    cells.append(f"{memory / 1e6:.0f}" if memory else "")
    if shares:
        cells += [f"{v:.0%}" if (v := result.get(key)) is not None else "" for key in SHARES]
    return cells


def surroundings(ceilings: Ceilings | None) -> dict[str, Any]:
    """Device, threads, versions and ceilings."""
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "ceilings": None if ceilings is None else asdict(ceilings),
    }


def report(records: Sequence[dict[str, Any]], around: dict[str, Any]) -> dict[str, Any]:
    """What `--json` writes: the first setting's results and ratios on top, all under `runs`."""
    first = records[0]
    return {
        **around,
        "setting": first["plan"]["setting"],
        "results": first["results"],
        "ratios": first["ratios"],
        "runs": list(records),
    }


def parse(args: Sequence[str] | None = None) -> argparse.Namespace:
    """Command-line arguments, checked."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    add_arguments(parser)
    parser.add_argument("--prompts", "--batch", type=int, nargs="+", help="prompts per step")
    parser.add_argument("--repeats", type=int, default=None, help="steps per contender")
    parser.add_argument("--warmup", type=int, default=2, help="steps before the first that counts")
    parser.add_argument("--trl-python", help="interpreter of an environment with TRL")
    parser.add_argument("--one-by-one", action=argparse.BooleanOptionalAction)
    parser.add_argument("--json", type=Path, help="where to write the figures as JSON")
    given = parser.parse_args(args)
    if given.one_by_one and given.trl_python:
        parser.error("--trl-python takes its turn with the others, not --one-by-one")
    if given.model and given.trl_python and not Path(given.model).is_dir():
        parser.error("--trl-python needs a model folder")
    return given


def main() -> None:
    """Run the benchmark."""
    quiet()
    given = parse()
    ceilings = measure_ceilings()
    setting = read_setting(given)
    records = []
    settings = [replace(setting, batch=batch) for batch in given.prompts or [setting.batch]]
    with plans(given, settings) as made:
        for plan in made:
            records.append(measure(plan, given, ceilings))
            if len(made) > 1:
                print(f"\n{plan.setting.batch} prompts\n")
            print(table(records[-1], ceilings is not None), flush=True)
    if ceilings is None:
        print(NOTE)
    else:
        print(
            f"ceilings: {ceilings.flops / 1e12:.0f} TFLOP/s, {ceilings.bandwidth / 1e12:.2f} TB/s"
        )
    if given.json:
        text = json.dumps(report(records, surroundings(ceilings)), indent=1)
        given.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
