"""How long a training step takes: ours, SFT on the same tokens, `generate`-based SDFT, and TRL's.

    python tools/bench_step.py --quick --json step.json
    python tools/bench_step.py --trl-python path/to/venv/bin/python     # pip install trl==1.16.0

All contenders make their steps in turn, in one process (TRL in a process of its own that waits for
its turn), on one randomly initialised model and the same prompts; the table shows medians. Memory
is each contender's alone, from a process of its own. Compare ratios, not seconds.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import warnings
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from bench_contenders import (
    Contender,
    RecordingSDFT,
    SameTokensSFT,
    TRLContender,
    options,
)
from bench_material import Setting, make_model

from sdft.memory import process_peak
from sdft.rollout import GenerateEngine

QUICK = Setting()
FULL = Setting(layers=6, hidden=512, intermediate=2048, vocab=32000, batch=16, completion=128)
PHASES = ("generate", "score", "update")


def contenders(
    names: list[str], folder: Path, setting: Setting, steps: int, trl_python: str | None
) -> dict[str, Any]:
    """The contenders by name, each ready for its first step."""
    shared = options(folder, setting)
    found: dict[str, Any] = {}
    if "ours" in names or "sft" in names:
        found["ours"] = Contender(RecordingSDFT(**shared), setting, steps)
    if "sft" in names:
        found["sft"] = Contender(SameTokensSFT(found["ours"].module, **shared), setting, steps)
    if "generate" in names:
        module = RecordingSDFT(engine=GenerateEngine(), **shared)
        found["generate"] = Contender(module, setting, steps)
    if "trl" in names and trl_python is not None:
        found["trl"] = TRLContender(trl_python, folder, setting, steps)
    return found


def measure(running: dict[str, Any], repeats: int, warmup: int) -> dict[str, dict[str, Any]]:
    """Interleaved steps; medians of seconds, of phases and of completion tokens."""
    seconds: dict[str, list[float]] = {name: [] for name in running}
    phases: dict[str, list[dict[str, float]]] = {name: [] for name in running}
    tokens: dict[str, list[int]] = {name: [] for name in running}
    for repeat in range(warmup + repeats):
        for name, contender in running.items():
            taken = contender.step()
            if repeat < warmup:
                continue
            seconds[name].append(taken)
            phases[name].append(contender.phases)
            module = getattr(contender, "module", None)
            if isinstance(module, RecordingSDFT):
                tokens[name].append(int(module.completion.lengths_B.sum()))
    return {
        name: {
            "seconds": statistics.median(seconds[name]),
            "all_seconds": seconds[name],
            "phases": {
                phase: statistics.median(lap.get(phase, 0.0) for lap in phases[name])
                for phase in PHASES
                if any(phase in lap for lap in phases[name])
            },
            "completion_tokens": statistics.median(tokens[name]) if tokens[name] else None,
        }
        for name in running
    }


def ratios(results: dict[str, dict[str, Any]]) -> dict[str, float | None]:
    """What the table is about; null where a contender did not run."""

    def over(first: str, second: str) -> float | None:
        if first not in results or second not in results:
            return None
        pairs = zip(results[first]["all_seconds"], results[second]["all_seconds"], strict=True)
        return statistics.median(a / b for a, b in pairs)

    return {
        "sdft_over_sft": over("ours", "sft"),
        "generate_over_ours": over("generate", "ours"),
        "trl_over_ours": over("trl", "ours"),
    }


def peak_memory(name: str, folder: Path, setting: Setting) -> int:
    """Peak resident bytes (CUDA: allocated bytes) of one contender in a process of its own."""
    command = [sys.executable, __file__, "--alone", name, "--folder", str(folder)]
    command += ["--setting", json.dumps(asdict(setting))]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return int(output.strip().splitlines()[-1])


def run_alone(name: str, folder: Path, setting: Setting) -> None:
    """Three steps of one contender; prints its peak memory."""
    running = contenders([name], folder, setting, 4, None)
    for _ in range(3):
        for contender in running.values():
            contender.step()
    if torch.cuda.is_available():
        print(torch.cuda.max_memory_allocated())
    else:
        print(process_peak())
    sys.stdout.flush()
    os._exit(0)  # the loop's thread still waits for its next step


def table(results: dict[str, dict[str, Any]], found: dict[str, float | None]) -> str:
    """The results as Markdown."""
    lines = [
        "| | step, s | generate | score | update | completion tokens/s | peak memory, MB |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, result in results.items():
        cells = [f"{result['phases'][p]:.3f}" if p in result["phases"] else "" for p in PHASES]
        rate = result["completion_tokens"]
        speed = f"{rate / result['phases']['generate']:.0f}" if rate else ""
        memory = result.get("peak_memory_bytes")
        size = f"{memory / 1e6:.0f}" if memory else ""
        lines.append(
            f"| {name} | {result['seconds']:.3f} | {' | '.join(cells)} | {speed} | {size} |"
        )
    lines += ["", *(f"{key} = {value:.2f}" for key, value in found.items() if value is not None)]
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    """Command-line arguments."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a small model: minutes on 2 cores")
    parser.add_argument("--repeats", type=int, default=None, help="steps per contender")
    parser.add_argument("--warmup", type=int, default=2, help="steps before the first that counts")
    parser.add_argument("--trl-python", help="interpreter of an environment with TRL")
    parser.add_argument("--json", type=Path, help="where to write the figures as JSON")
    parser.add_argument("--batch", type=int, help="prompts per step")
    parser.add_argument("--completion", type=int, help="longest completion")
    parser.add_argument("--vocab", type=int, help="tokens in the vocabulary")
    parser.add_argument("--ragged", type=float, help="share of completions that end early")
    parser.add_argument("--model", type=Path, help="a model folder in place of random weights")
    parser.add_argument("--alone", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--setting", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Run the benchmark."""
    for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    transformers.utils.logging.disable_progress_bar()
    given = parse()
    if given.alone:
        run_alone(given.alone, given.folder, Setting(**json.loads(given.setting)))
        return
    sizes = {key: getattr(given, key) for key in ("batch", "completion", "vocab", "ragged")}
    chosen = {key: value for key, value in sizes.items() if value is not None}
    setting = replace(QUICK if given.quick else FULL, **chosen)
    repeats = given.repeats or (5 if given.quick else 9)
    with tempfile.TemporaryDirectory() as folder:
        place = given.model or make_model(setting, Path(folder))
        names = ["ours", "sft", "generate", "trl"]
        steps = repeats + given.warmup + 1
        running = contenders(names, place, setting, steps, given.trl_python)
        results = measure(running, repeats, given.warmup)
        for contender in running.values():
            contender.close()
        for name in ("ours", "generate"):
            results[name]["peak_memory_bytes"] = peak_memory(name, place, setting)
    found = ratios(results)
    print(table(results, found))
    if given.json:
        record = {
            "setting": asdict(setting),
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
            "threads": torch.get_num_threads(),
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
            "results": results,
            "ratios": found,
        }
        given.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
