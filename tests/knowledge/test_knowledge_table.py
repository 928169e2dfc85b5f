"""The table of strict, lenient and indirect scores."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sdft.cli import main


def report(
    strict: float, lenient: float, ood: float | None, method: str = "sdft"
) -> dict[str, Any]:
    def row(*scores: float | None) -> list[dict[str, Any]]:
        details = {n: {"score": s} for n, s in zip(("strict", "lenient"), scores, strict=False)}
        return [{"score": scores[0], "details": details}, {"score": scores[2]}]

    matrix = [row(0.0, 0.1, 0.2), row(0.5, 0.5, 0.5), row(strict, lenient, ood)]
    return {"method": method, "tasks": ["knowledge"], "suites": ["ood"], "matrix": matrix}


def test_a_comparison(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [
        {"method": m, "learning_rate": rate, "seed": 0, "chosen": chosen, "retention": found}
        for m, rate, chosen, found in (
            ("sdft", 1e-5, True, report(0.8, 0.9, 0.7)),
            ("sdft", 1e-5, True, report(0.6, 0.9, 0.7)),
            ("sdft", 5e-5, False, report(0.1, 0.1, 0.1)),
            ("rag", None, True, report(1.0, 1.0, None)),
            ("sft", 1e-5, True, None),
        )
    ]
    summary = {name: {"label": name.upper()} for name in ("sdft", "rag", "sft")}
    (tmp_path / "compare.json").write_text(json.dumps({"runs": runs, "summary": summary}))
    assert main(["knowledge", "table", "--runs", str(tmp_path)]) == 0
    head, _, *rows = capsys.readouterr().out.splitlines()
    assert head == "| method | rate | seeds | knowledge strict | knowledge lenient | ood |"
    assert rows[0] == "| base |  |  | 0.00 | 0.10 | 0.20 |"
    assert rows[1].startswith("| SDFT | 1e-05 | 2 | 0.70 (0.00–1.00) | 0.90 (")
    assert rows[2] == "| RAG |  | 1 | 1.00 | 1.00 | undefined |"
    assert len(rows) == 3


def test_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, method in (("a", "sdft"), ("b", "sft")):
        (tmp_path / name / "version_0").mkdir(parents=True)
        file = tmp_path / name / "version_0" / "retention.json"
        file.write_text(json.dumps(report(0.5, 0.6, 0.7, method)))
    assert main(["knowledge", "table", "--runs", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    rows = capsys.readouterr().out.splitlines()[2:]
    assert [row.split(" | ")[0] for row in rows] == ["| base", "| sdft", "| sft"]
    (tmp_path / "none").mkdir()
    assert main(["knowledge", "table", "--runs", str(tmp_path / "none")]) == 2
    assert "holds neither a compare.json nor a retention.json" in capsys.readouterr().err
