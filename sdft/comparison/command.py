"""`python -m sdft compare --config configs/compare_quick.yaml`: methods on one stream.

Runs every method × learning rate × seed that is not there yet, and writes the report. A killed
comparison goes on where it was: the same command again.
"""

from __future__ import annotations

import contextlib
import io
import shlex
import signal
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from types import FrameType
from typing import Any

import yaml
from jsonargparse import Namespace

from sdft import cli
from sdft.comparison.lock import folder_lock
from sdft.comparison.plan import Comparison, Plan
from sdft.comparison.process import Launcher
from sdft.comparison.report import write_report
from sdft.comparison.results import Results, load_results
from sdft.comparison.runner import Runner
from sdft.comparison.settings import Settings, method_settings
from sdft.comparison.summary import Summary
from sdft.comparison.verdict import headline
from sdft.redaction import redacted_text


def main(args: list[str]) -> int:
    """Run the comparison that a command line asks for; returns the exit status.

    Args:
        args: What stands behind `compare`.

    Returns:
        0; 1 when a run failed; 130 when interrupted.

    Raises:
        ValueError: Bad input, another comparison at work in the folder, or runs that do not belong
            to one comparison.
        SystemExit: Terminated (143), or a command line that does not parse (2).
    """
    options = _parser().parse_args(args)
    given = {field.name: _plain(options[field.name]) for field in fields(Comparison)}
    plan = Plan(Comparison(**given), Path(str(options["config"][0])))
    command = redacted_text(shlex.join(["python", "-m", "sdft", "compare", *args]))
    if options["report_only"]:  # needs no lock: it may look at a comparison that is under way
        if not plan.out.is_dir():
            raise ValueError(f"--report_only: there is no folder {plan.out}")
        return _report(plan, method_settings(plan, effective_settings), command)
    try:
        with folder_lock(plan.out) as lock, _termination():
            settings = method_settings(plan, effective_settings)
            _run(plan, settings, lock)
            return _report(plan, settings, command)
    except KeyboardInterrupt:
        print("sdft: interrupted; the same command goes on", file=sys.stderr)
        return 130


def _plain(value: Any) -> Any:
    """What a YAML file holds: the parser makes namespaces of what has a class path."""
    if isinstance(value, Namespace):
        return _plain(vars(value))
    if isinstance(value, dict):
        return {key: _plain(own) for key, own in value.items()}
    return [_plain(own) for own in value] if isinstance(value, list) else value


def _parser() -> cli.Parser:
    parser = cli.Parser(prog="sdft compare", description=str(Comparison.__doc__).split("\n")[0])
    parser.add_argument("-c", "--config", action="config", required=True, help="The comparison.")
    parser.add_class_arguments(Comparison, None)
    parser.add_argument(
        "--report_only",
        action="store_true",
        help="Run nothing: report on the runs that are there.",
    )
    return parser


def _run(plan: Plan, settings: dict[str, Settings], lock: int) -> None:
    launcher = Launcher(plan.values.threads, [lock])
    Runner(plan, settings, launcher, lambda line: print(line, flush=True)).execute()


def effective_settings(files: list[Path]) -> dict[str, Any]:
    """The configuration that `fit` would run with.

    Args:
        files: Configuration files; later ones win.

    Raises:
        ValueError: They do not make a valid configuration.
    """
    flags = [word for file in files for word in ("--config", str(file))]
    printed, complaint = io.StringIO(), io.StringIO()
    status: int | str | None
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(complaint):
        try:
            status = cli.main(["fit", *flags, "--print_config"])
        except SystemExit as stop:
            status = stop.code
    if status != 0:
        lines = complaint.getvalue().strip().splitlines() or ["the configuration is not valid"]
        told = [line for line in lines if line.startswith("sdft: error: ")] or lines[-1:]
        raise ValueError(told[0].removeprefix("sdft: error: "))
    found = yaml.safe_load(printed.getvalue())
    assert isinstance(found, dict)
    return found


def _report(plan: Plan, settings: dict[str, Settings], command: str) -> int:
    results = load_results(plan, settings)
    summary = Summary(plan, results)
    write_report(summary, plan.out, command)
    print(f"\n{headline(summary)}\nreport: {plan.out / 'report.html'}")
    _complain(results)
    return 1 if results.failed else 0


def _complain(results: Results) -> None:
    for failure in results.failed:
        print(f"\nsdft: {failure.run.title} {failure.reason}:", file=sys.stderr)
        for line in failure.log:
            print(f"    {line}", file=sys.stderr)


@contextlib.contextmanager
def _termination() -> Iterator[None]:
    """SIGTERM ends the comparison as Ctrl-C does: its runs are ended, too."""

    def end(number: int, frame: FrameType | None) -> None:
        print("sdft: terminated; the same command goes on", file=sys.stderr)
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
