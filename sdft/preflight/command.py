"""`python -m sdft preflight --config run.yaml`: will it work here, before the run is paid for.

Takes the options of `fit` and its own, listed here. Measures a sample of each task on the model
before training, times a few steps at a learning rate of 0, and judges each task: go, weak or no.
Nothing is trained, and nothing is written but the page and the JSON.
"""

from __future__ import annotations

import argparse
import json
import logging
import shlex
import sys
import tempfile
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import torch
from lightning.pytorch import Trainer

from sdft import cli
from sdft.atomic import atomic_write
from sdft.preflight.configured import HERE, Configured
from sdft.preflight.estimate import estimate
from sdft.preflight.facts import TaskFacts
from sdft.preflight.footprint import footprint
from sdft.preflight.measure import Probe, has_teacher
from sdft.preflight.page import page
from sdft.preflight.report import Report
from sdft.preflight.text import text
from sdft.preflight.trial import Trial, run_trial
from sdft.preflight.verdict import Reason, Verdict
from sdft.redaction import check_filled, redacted_text

PAGE = "preflight.html"


class PreflightCLI(cli.SDFTCLI):
    """`fit` up to the moment before it runs; writes nothing."""

    def before_instantiate_classes(self) -> None:
        """Refuse what a run before training cannot have."""
        config = self.config[self.subcommand]
        check_filled(config.as_dict())
        if config.get("ckpt_path"):
            raise ValueError(
                "preflight looks at the model before training: leave out ckpt_path, found "
                f"{config['ckpt_path']!r}; model.model_name may be an exported folder"
            )
        clip = config["trainer"]["gradient_clip_val"]
        if clip is not None and not clip >= 0:
            raise ValueError(f"trainer.gradient_clip_val must be 0 or more, found {clip}")

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """The run's trainer, in one process, which leaves nothing behind.

        Args:
            kwargs: Override what is configured.
        """
        given = {**self._get(self.config_init, "trainer"), **HERE}
        given["default_root_dir"] = self.scratch
        return Trainer(**{**given, **kwargs})

    @property
    def scratch(self) -> str:
        """A folder for what must be written somewhere; it goes with the process."""
        if not hasattr(self, "_scratch"):
            self._scratch = tempfile.TemporaryDirectory(prefix="sdft-preflight-")
        return self._scratch.name

    def _run_subcommand(self, subcommand: str) -> None:
        """Nothing runs."""


def main(args: list[str]) -> int:
    """Look at the run that a command line describes; returns the exit status.

    Args:
        args: What stands behind `preflight`.

    Returns:
        0 when every task is go or weak, 1 when any is no.

    Raises:
        ValueError: A configuration that `fit` would refuse, or a number out of range.
        SystemExit: A command line that does not parse (2).
    """
    options, rest = _parser().parse_known_args(args)
    _quiet()
    try:
        return _look(options, rest, args)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130


def configure(args: list[str]) -> Configured:
    """The run that a command line behind `fit` describes, not begun.

    Raises:
        ValueError: A configuration that `fit` would refuse.
    """
    return Configured(cli.lightning_cli(PreflightCLI, ["fit", *args]))


def _look(options: argparse.Namespace, rest: list[str], args: list[str]) -> int:
    configured = configure(rest)
    report = _report(configured, options, shlex.join(["python", "-m", "sdft", "preflight", *args]))
    print(text(report))
    path = options.page or configured.root / PAGE
    _write(path, page(report))
    print(f"\npage: {path}")
    if options.json is not None:
        _write(options.json, json.dumps(report.to_dict(), indent=1, allow_nan=False) + "\n")
    return 1 if report.grade == "no" else 0


def _report(configured: Configured, options: argparse.Namespace, command: str) -> Report:
    seed = configured.seed if options.seed is None else options.seed
    configured.put_in_place()
    module, data = configured.module, configured.data
    probe = Probe(
        module,
        data.limits,
        options.examples,
        seed,
        data.eval_batch_size,
        configured.measured.artifacts,
    )
    facts = [probe.facts(task) for task in data.tasks]
    device = _device_name(configured)  # once the timed steps are over the model is on the CPU
    place = footprint(configured, facts, _optimizer_name(module))
    trials = _trials(configured, facts, options.timed_steps, seed)
    peaks = [trial.peak_bytes for trial in trials.values() if trial.peak_bytes]
    if peaks:
        place = replace(place, measured_bytes=max(peaks))
    return Report(
        module.model_name,
        module.method,
        seed,
        facts,
        [_judged(fact, trials.get(fact.name)) for fact in facts],
        estimate(configured, facts, trials, place, device),
        has_teacher(module),
        redacted_text(command),
    )


def _trials(
    configured: Configured, facts: list[TaskFacts], steps: int, seed: int
) -> dict[str, Trial]:
    """Timed batches of every task that has examples."""
    trials = {}
    tasks = {task.name: task for task in configured.data.tasks}
    for fact in facts:
        if fact.fitting is None or not fact.fitting.items:
            continue
        items = fact.fitting.sample(fact.name, steps * configured.data.batch_size, seed)
        trials[fact.name] = run_trial(configured, tasks[fact.name], items, steps)
    return trials


def _judged(facts: TaskFacts, trial: Trial | None) -> Verdict:
    verdict = Verdict.of(facts)
    if trial is None or trial.finite:
        return verdict
    broken = Reason(
        "no",
        "the gradient is not a finite number",
        "look for infinite logits, and train in fp32 or bf16-mixed",
    )
    return Verdict([broken, *verdict.reasons])


def _optimizer_name(module: Any) -> str:
    try:
        return type(module.optimizer([torch.nn.Parameter(torch.zeros(1))])).__name__
    except (RuntimeError, TypeError, ValueError):  # one that is particular about its parameters
        return ""


def _device_name(configured: Configured) -> str:
    device = configured.module.device
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    return f"{device} ({torch.get_num_threads()} threads)"


def _write(path: Path, content: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        file.write_text(content, "utf-8")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        print(f"sdft: error: {message}", file=sys.stderr)
        raise SystemExit(2)


def _parser() -> argparse.ArgumentParser:
    lines = str(__doc__).strip().splitlines()
    parser = _Parser(
        prog="sdft preflight",
        description=" ".join(lines[2:]),
        epilog="Exit status: 0 all tasks are go or weak, 1 a task is no, 2 an error. All other "
        "options are those of `python -m sdft fit --help`.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--examples", type=_count, default=64, help="per task, at most (default: 64)")
    add("--seed", type=int, help="chooses them and draws rollouts; seed_everything when unset")
    add("--page", type=Path, help=f"HTML file; <trainer.default_root_dir>/{PAGE} when unset")
    add("--json", type=Path, help="JSON file; none when unset")
    add("--timed_steps", type=_count, default=3, help="batches timed per task (default: 3)")
    return parser


def _count(given: str) -> int:
    if not given.isdigit() or int(given) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, found {given!r}")
    return int(given)


def _quiet() -> None:
    """Lightning's remarks about trainers that nobody configured."""
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric.utilities.seed").setLevel(logging.WARNING)
    for noise in (
        "LightningCLI's args parameter",
        "`max_epochs` was not set",
        "The number of training",
    ):
        warnings.filterwarnings("ignore", message=f".*{noise}")
