"""Writes everything that a comparison leaves in its folder, each file atomically."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from sdft.atomic import atomic_write
from sdft.comparison.content import content
from sdft.comparison.folder import write_json
from sdft.comparison.page import page, png
from sdft.comparison.pictures import pictures
from sdft.comparison.summary import Summary
from sdft.comparison.tables import latex_table, write_cells, write_summary


def write_report(summary: Summary, folder: Path, command: str) -> None:
    """Write `compare.json`, the tables, the pictures and `report.html`; the numbers come first.

    Args:
        summary: The comparison.
        folder: Made when it is missing.
        command: What repeats it.

    Raises:
        OSError: The folder is not writable, or the disk is full.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "compare.json", content(summary, command))
    tables: dict[str, Callable[[Summary, Path], None]] = {
        "compare.csv": write_cells,
        "summary.csv": write_summary,
        "table.tex": lambda own, path: _write(path, latex_table(own)),
    }
    for name, write in tables.items():
        with atomic_write(folder / name) as file:
            write(summary, file)
    drawn = pictures(summary)
    for picture in drawn:
        with atomic_write(folder / f"{picture.name}.png") as file:
            file.write_bytes(png(picture))
    with atomic_write(folder / "report.html") as file:
        _write(file, page(summary, drawn, command))


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
