"""Comparisons whose runs are made up: a plan's file, and what finished runs leave behind."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import yaml

from sdft.comparison.folder import RunFolder, write_json
from sdft.comparison.plan import Comparison, Plan, Run
from sdft.comparison.results import Results, load_results
from sdft.comparison.settings import Settings, run_settings
from sdft.comparison.summary import Summary

TASKS, SUITES = ["garden", "forest"], ["named", "basic"]
SETTINGS: Settings = {
    "seed_everything": 0,
    "trainer": {"default_root_dir": None, "logger": None, "accumulate_grad_batches": 1},
    "model": {
        "class_path": "sdft.SDFTModule",
        "init_args": {
            "model_name": "sdft:world",
            "max_new_tokens": 16,
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-5}},
        },
    },
    "data": {
        "class_path": "sdft.ContinualDataModule",
        "init_args": {
            "tasks": [{"class_path": "WorldSkill", "init_args": {"name": n}} for n in TASKS],
            "suites": [{"class_path": "WorldSuite", "init_args": {"name": n}} for n in SUITES],
            "batch_size": 32,
            "steps": 60,
        },
    },
    "retention": {
        "split": "test",
        "limit": None,
        "enabled": True,
        "selection_split": "validation",
    },
    "samples": {"count": 4},
    "checkpoint": {"every_n_steps": 50, "stages": True},
    "export": {"enabled": True},
}
"""What `--print_config` says of every method here."""

Rows = Sequence[Sequence[float | None]]


def write_plan(
    folder: Path, methods: Mapping[str, Any], overlays: Sequence[str] = (), **keys: Any
) -> Path:
    """A comparison's file, its base, and an overlay for each method (and for others)."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "base.yaml").write_text("data: {steps: 60}\n")
    (folder / "methods").mkdir(exist_ok=True)
    for name in overlays or methods:
        (folder / "methods" / f"{name}.yaml").write_text(f"# {name}\nmodel: {{}}\n")
    content = {
        "base": "base.yaml",
        "out": str(folder / "out"),
        "seeds": [0, 1],
        "baseline": next(iter(methods), "sft"),
        "methods": dict(methods),
    }
    file = folder / "compare.yaml"
    file.write_text(yaml.safe_dump({**content, **keys}, sort_keys=False))
    return file


def make_plan(folder: Path, methods: Mapping[str, Any], **keys: Any) -> Plan:
    file = write_plan(folder, methods, **keys)
    return Plan(Comparison(**yaml.safe_load(file.read_text())), file)


def retention(
    rows: Rows,
    tasks: Sequence[str] = TASKS,
    suites: Sequence[str] = SUITES,
    selection: Mapping[str, float | None] | None = None,
    kl: float | None = None,
    length: float = 10.0,
    steps: int = 60,
) -> dict[str, Any]:
    """The content of a `retention.json`."""
    cells = [[{**cell(s, length), "kl_base": kl and kl * i} for s in r] for i, r in enumerate(rows)]
    report: dict[str, Any] = {"tasks": list(tasks), "suites": list(suites), "matrix": cells}
    if selection is not None:
        scores = {name: cell(score, length) for name, score in selection.items()}
        report["selection"] = {"split": "validation", "cells": scores}
    return {**report, "metrics": {}, "seed": 0, "method": "m", "stage_steps": [steps] * len(tasks)}


def cell(score: float | None, length: float) -> dict[str, Any]:
    ends = None if score is None else [max(0.0, score - 0.05), min(1.0, score + 0.05)]
    return {"score": score, "n": 100, "ci95": ends, "mean_length": length, "truncated": 0.0}


def cost(seconds: float, flops: float = 1e12) -> dict[str, Any]:
    training = {"seconds": seconds, "tokens": 1000, "flops": flops}
    return {"training": training, "total": training, "device": "cpu", "threads": 1}


def finish(
    plan: Plan,
    run: Run,
    report: Mapping[str, Any],
    spent: Mapping[str, Any] | None = None,
    settings: Settings | None = None,
) -> RunFolder:
    """Leave what a finished run leaves."""
    folder = RunFolder(plan.folder(run))
    own = run_settings(deepcopy(settings or SETTINGS), run, folder.path)
    folder.prepare(own)
    (folder.path / "retention.json").write_text(json.dumps(report))
    if spent is not None:
        write_json(folder.path / "cost.json", dict(spent))
    folder.finish(own, 12.0, resumed=False, keep=False)
    return folder


def loaded(plan: Plan, settings: Settings | None = None) -> Results:
    """The plan's runs, all methods with one configuration."""
    own = settings or SETTINGS
    return load_results(plan, {method.name: own for method in plan.methods})


def summarise(plan: Plan) -> Summary:
    return Summary(plan, loaded(plan))
