"""Names become files: none of them leads anywhere else."""

from __future__ import annotations

import pytest
from conftest import make_task

from sdft.metrics import METRICS
from sdft.names import LONGEST, name_problem


@pytest.mark.parametrize("name", ["a", "tool.v2", "_x", "0", "Über"[1:], "a..b", "x" * LONGEST])
def test_good_names(name: str) -> None:
    assert name_problem(name) is None
    assert make_task(name).name == name


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "../up",
        "/etc/passwd",
        "a/b",
        "a\\b",
        "a\0b",
        "a b",
        "a\n",
        "\na",
        "~",
        "-rf",
        ".hidden",
        "ü",
        "a:b",
        "CON",
        "nul.txt",
        "COM1",
        "x" * (LONGEST + 1),
        "x" * 100_000,
        *METRICS,
    ],
    ids=lambda name: repr(name)[:12],
)
def test_bad_names(name: str) -> None:
    with pytest.raises(ValueError, match="task name") as error:
        make_task(name)
    assert len(str(error.value)) < 400
    assert "\n" not in str(error.value)
