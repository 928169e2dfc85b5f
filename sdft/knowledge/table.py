"""What runs on a data set came to: strict, lenient and indirect scores of each method.

python -m sdft knowledge table --runs runs/compare_knowledge
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdft.comparison.estimate import Estimate, estimate
from sdft.self_edits.command import Parser

Scores = dict[str, float | None]


@dataclass(frozen=True)
class Line:
    """A method.

    Attributes:
        name: Its name.
        rate: Learning rate, in words; empty for the base.
        columns: Score → one value per seed.
    """

    name: str
    rate: str
    columns: Mapping[str, Estimate]


def main(args: list[str]) -> int:
    """Print the table of a comparison's folder, or of folders of runs; returns the exit status.

    Raises:
        ValueError: A folder without reports.
    """
    parser = Parser(prog="python -m sdft knowledge table", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--runs", nargs=argparse.ONE_OR_MORE, required=True, help="a comparison's folder, or runs"
    )
    print(shown(table([Path(name) for name in parser.parse_args(args).runs])))
    return 0


def table(folders: Sequence[Path]) -> list[Line]:
    """The base, then each method at its chosen rate, in the order of the folders.

    Args:
        folders: A comparison's folder (`compare.json`), or folders that hold a `retention.json`.

    Raises:
        ValueError: A folder without reports.
    """
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for folder in folders:
        for name, rate, report in _reports(folder):
            groups.setdefault((name, rate), []).append(report)
    everything = [report for found in groups.values() for report in found]
    return [
        _line("base", "", [_scores(report, 0) for report in everything[:1]]),
        *(_line(*key, [_scores(r, -1) for r in found]) for key, found in groups.items()),
    ]


def _reports(folder: Path) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """Method, rate and `retention.json` of every run that counts."""
    if (folder / "compare.json").is_file():
        content = json.loads((folder / "compare.json").read_text("utf-8"))
        labels = {name: own["label"] for name, own in content["summary"].items()}
        for run in content["runs"]:
            if run["chosen"] and run["retention"] is not None:
                rate = "" if run["learning_rate"] is None else f"{run['learning_rate']:g}"
                yield labels[run["method"]], rate, run["retention"]
        return
    found = sorted(folder.rglob("retention.json"))
    if not found:
        raise ValueError(f"runs: {folder} holds neither a compare.json nor a retention.json")
    for path in found:
        report = json.loads(path.read_text("utf-8"))
        yield str(report["method"]), "", report


def _scores(report: Mapping[str, Any], row: int) -> Scores:
    """The last or first row of a run's matrix: every column, and what its scorer knows beside."""
    scores: Scores = {}
    for name, cell in zip(
        [*report["tasks"], *report["suites"]], report["matrix"][row], strict=True
    ):
        details = cell.get("details") or {}
        if not details:
            scores[name] = cell["score"]
        for level, found in details.items():
            scores[f"{name} {level}"] = found["score"]
    return scores


def _line(name: str, rate: str, scores: Sequence[Scores]) -> Line:
    columns = dict.fromkeys(column for own in scores for column in own)
    return Line(
        name,
        rate,
        {c: estimate([own.get(c) for own in scores], low=0.0, high=1.0) for c in columns},
    )


def shown(lines: Sequence[Line]) -> str:
    """A table in Markdown: means over seeds, with 95 % intervals where there are several."""
    columns = list(dict.fromkeys(column for line in lines for column in line.columns))
    head = ["method", "rate", "seeds", *columns]
    rows = [head, ["---"] * len(head)]
    for line in lines:
        seeds = max((len(own.values) for own in line.columns.values()), default=0)
        cells = [_cell(line.columns.get(column)) for column in columns]
        rows.append([line.name, line.rate, "" if line.name == "base" else str(seeds), *cells])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _cell(found: Estimate | None) -> str:
    if found is None or found.mean is None:
        return "undefined"
    if found.ci95 is None:
        return f"{found.mean:.2f}"
    return f"{found.mean:.2f} ({found.ci95[0]:.2f}–{found.ci95[1]:.2f})"
