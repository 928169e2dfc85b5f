"""`python -m sdft check --model my_model --baseline run/retention.json`: has it fallen since?

Evaluates a model on the tasks and suites of a run, as the run did, and compares every score with
the run's own. Made for a schedule and for CI: nothing is trained, and the exit status says it.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

from sdft.adapter_training import AdapterTraining
from sdft.atomic import atomic_write
from sdft.data import ContinualDataModule
from sdft.drift.baseline import LAST, Baseline
from sdft.drift.junit import junit
from sdft.drift.verdict import Verdict, table
from sdft.evaluator import Evaluator
from sdft.metrics import Cell
from sdft.preflight.command import configure
from sdft.redaction import redacted_text

STATUS = "Exit status: 0 all is kept, 1 something fell, 2 an error or a column without a score."


def main(args: list[str]) -> int:
    """Check the model that a command line names; returns the exit status.

    Args:
        args: What stands behind `check`.

    Returns:
        0 when every column is kept, 1 when one fell, 2 when one could not be scored.

    Raises:
        ValueError: No baseline, a configuration without its columns, or a model that is not there.
        SystemExit: A command line that does not parse (2).
    """
    options, rest = _parser().parse_known_args(args)
    baseline = Baseline.read(options.baseline, options.row)
    check = Check(options, rest, baseline)
    try:
        verdicts = [check.verdict(name) for name in baseline.chosen(options.columns)]
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    _report(options, baseline, verdicts, shlex.join(["python", "-m", "sdft", "check", *args]))
    outcomes = {verdict.outcome for verdict in verdicts}
    return 2 if "unscored" in outcomes else int("fell" in outcomes)


class Check:
    """A model beside a baseline, on the configuration of the baseline's run.

    Args:
        options: The command line's own.
        rest: What else it has: options of `fit`.
        baseline: What the model is held to.

    Raises:
        ValueError: A configuration that `fit` would refuse, or that lacks a column.
    """

    def __init__(self, options: argparse.Namespace, rest: list[str], baseline: Baseline) -> None:
        self.baseline, self.allowed, self.limit = baseline, options.allow, options.limit
        files = options.config or [_beside(baseline.path)]
        configs = [word for file in files for word in ("--config", str(file))]
        named = ["--model.model_name", options.model]
        self.configured = configure([*configs, *named, *rest])
        if not any(word.startswith(("--model.lora", "--model.quantization")) for word in rest):
            # What the run added to its base is in the weights by now.
            self.configured.module.adapters = AdapterTraining(None, None)
        self.tasks = {task.name: task for task in self.configured.data.evaluated}
        for name in baseline.chosen(options.columns):
            if name not in self.tasks:
                raise ValueError(
                    f"the configuration has no task or suite {name!r}, which is in the baseline "
                    f"{str(baseline.path)!r}; it has {', '.join(map(repr, self.tasks))}: give the "
                    "run's own --config, or choose with --columns"
                )
        self.configured.put_in_place()
        limit = self.configured.measured.limit if self.limit is None else self.limit
        self.evaluator = Evaluator(self.configured.measured.artifacts, None, None, limit)

    def verdict(self, name: str) -> Verdict:
        """Measure a column."""
        print(f"evaluating {name} …", flush=True)
        begin = time.perf_counter()
        now = self._cell(name)
        return Verdict(
            name,
            name in self.baseline.suites,
            self.baseline.cells[name],
            now,
            self.allowed,
            time.perf_counter() - begin,
        )

    def _cell(self, name: str) -> Cell:
        data: ContinualDataModule = self.configured.data
        measured, task = self.configured.measured, self.tasks[name]
        try:
            found = data.encoded(task, measured.split) or data.encoded(task, "validation")
        except (ValueError, OSError) as error:  # the other columns can still be told
            return Cell(None, 0, error=str(error))
        limit = measured.limit if self.limit is None else self.limit
        return self.evaluator.score(
            self.configured.module, task, found[:limit], data.eval_batch_size
        )


def _beside(report: Path) -> Path:
    file = report.parent / "config.yaml"
    if not file.is_file():
        raise ValueError(
            f"there is no config.yaml beside {str(report)!r}: give the run's with --config"
        )
    return file


def _report(
    options: argparse.Namespace, baseline: Baseline, verdicts: list[Verdict], command: str
) -> None:
    print(f"\n{options.model} against {baseline.path} (row {baseline.row})\n{table(verdicts)}\n")
    for remark in [remark for verdict in verdicts for remark in verdict.remarks]:
        print(f"note: {remark}")
    for verdict in verdicts:
        if verdict.outcome != "kept":
            print(f"{verdict.outcome.upper()}: {verdict.reason}")
    facts = {
        "model": options.model,
        "baseline": str(baseline.path),
        "row": baseline.row,
        "command": redacted_text(command),
    }
    if options.json is not None:
        columns = {verdict.name: verdict.to_dict() for verdict in verdicts}
        content = json.dumps({**facts, "columns": columns}, indent=1, allow_nan=False)
        _write(options.json, content + "\n")
    if options.junit is not None:
        _write(options.junit, junit(verdicts, facts))


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
        prog="sdft check",
        description=" ".join(lines[2:]),
        epilog=f"{STATUS} All other options are those of `python -m sdft fit --help`.",
        allow_abbrev=False,
    )
    add: Any = parser.add_argument
    add("--model", required=True, help="a model folder, .gguf file, hub name or sdft:…")
    add("--baseline", type=Path, required=True, help="a run's retention.json, or its folder")
    add(
        "-c",
        "--config",
        type=Path,
        action="append",
        help="the run's configuration; config.yaml beside the baseline when unset",
    )
    add("--row", default=LAST, help="last, base, or the task that a stage ended with")
    add("--columns", nargs="+", help="tasks and suites to look at; all when unset")
    add("--allow", type=_share, default=0.0, help="how far below its interval a score may fall")
    add("--limit", type=_count, help="examples per column; as in the run when unset")
    add("--json", type=Path, help="JSON file; none when unset")
    add("--junit", type=Path, help="JUnit XML file; none when unset")
    return parser


def _share(given: str) -> float:
    try:
        value = float(given)
    except ValueError:
        value = -1.0
    if not 0.0 <= value <= 1.0:
        raise argparse.ArgumentTypeError(f"must lie in [0, 1], found {given!r}")
    return value


def _count(given: str) -> int:
    if not given.isdigit() or int(given) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, found {given!r}")
    return int(given)
