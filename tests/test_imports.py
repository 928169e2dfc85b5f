"""Imports point one way, and `import sdft` stays light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import sdft
import sdft.callbacks

ROOT = Path(__file__).resolve().parent.parent
CORE = [path for path in sorted((ROOT / "sdft").rglob("*.py")) if path.name not in ("cli.py",)]
ENTRY = {
    "sdft/__main__.py",
    "sdft/comparison/command.py",
    "sdft/export/command.py",
    "sdft/generate_command.py",
    "sdft/preflight/command.py",
}


def imported(path: Path) -> set[str]:
    """Every module that a file imports, at any depth of it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
    return names


def python(code: str, folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize("path", CORE, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_core_knows_neither_the_callbacks_nor_the_command_line(path: Path) -> None:
    if str(path.relative_to(ROOT)) in ENTRY:
        return
    forbidden = [
        name
        for name in imported(path)
        if name.startswith(("sdft.callbacks", "callbacks", "sdft.cli"))
    ]
    assert forbidden == []


def test_the_check_sees_imports() -> None:
    assert "sdft.callbacks" in imported(ROOT / "sdft" / "cli.py")


def test_the_bare_package_imports_nothing_heavy() -> None:
    found = python(
        "import sys, sdft; sdft.__version__; "
        "print([m for m in ('torch', 'transformers', 'lightning', 'datasets') if m in sys.modules])"
    )
    assert found.stdout.strip() == "[]", found.stderr


def test_the_public_names_are_there() -> None:
    for name in sdft.__all__:
        assert getattr(sdft, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        sdft.Nothing  # noqa: B018
    for name in sdft.callbacks.__all__:
        assert getattr(sdft.callbacks, name).__module__.startswith("sdft.callbacks.")


def test_the_callbacks_folder_is_no_package_of_its_own() -> None:
    found = python("import callbacks")
    assert found.returncode != 0
    last = found.stderr.strip().splitlines()[-1]
    assert last == "ImportError: this folder is imported as `sdft.callbacks`, not as `callbacks`"
