"""Code in the sandbox: off by default, and without power."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from sdft.examples import Example, as_messages
from sdft.scorers import CodeTests
from sdft.scorers.code import code_in
from sdft.scorers.sandbox import Limits, run_python


def confined() -> bool:
    try:
        run_python("", Limits())
    except (ValueError, OSError):
        return False
    return True


pytestmark = pytest.mark.skipif(not confined(), reason="this system has no seccomp or Landlock")
ADD = Example(as_messages("Write add."), "assert add(2, 3) == 5")


def test_it_is_off_by_default() -> None:
    for flags in ({}, {"allow_execution": False}, {"allow_execution": 1}):
        with pytest.raises(ValueError, match="set allow_execution to true"):
            CodeTests(**flags)  # type: ignore[arg-type]


@pytest.mark.parametrize("options", [{"seconds": 0}, {"memory_mb": 1}, {"processes": 0}])
def test_bad_settings(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"CodeTests: .* must be at least"):
        CodeTests(allow_execution=True, **options)


@pytest.mark.parametrize(
    ("response", "reason"),
    [
        ("def add(a, b):\n    return a + b", None),
        ("So:\n```python\ndef add(a, b):\n    return a + b\n```\nDone.", None),
        ("```\ndef add(a, b): return 0\n```\nBetter:\n```py\nadd = lambda a, b: a + b\n```", None),
        ("def add(a, b):\n    return a - b", "AssertionError"),
        ("def add(a, b)", "SyntaxError: expected ':'"),
        ("", "NameError: name 'add' is not defined"),
        ("import sys\nsys.exit(0)", "left before its end"),
        ("import os\nos._exit(0)", "left before its end"),
    ],
)
def test_code_passes_its_tests(response: str, reason: str | None) -> None:
    scorer = CodeTests(allow_execution=True)
    assert scorer.explain(response, ADD) == reason
    assert scorer.score_all([response, "x"], [ADD, ADD]) == [float(reason is None), 0.0]


def test_a_prompt_to_be_completed() -> None:
    example = Example(as_messages("def add(a, b):\n"), "assert add(2, 3) == 5")
    assert CodeTests(allow_execution=True, prompt_first=True)("    return a + b", example) == 1.0
    assert CodeTests(allow_execution=True)("    return a + b", example) == 0.0


def test_code_in_a_response_without_a_block() -> None:
    assert code_in("x = '```'") == "x = '```'"


@pytest.mark.parametrize(
    ("program", "refusal"),
    [
        ("import socket\nsocket.socket()", "PermissionError"),
        ("import socket\nsocket.create_connection(('127.0.0.1', 9))", "PermissionError"),
        ("import subprocess\nsubprocess.run(['true'])", "PermissionError"),
        ("import os\nos.fork()", "PermissionError"),
        ("import os\nos.kill(os.getppid(), 9)", "PermissionError"),
        ("import os\nos.setsid()", "PermissionError"),
        ("x = bytearray(4 << 30)", "MemoryError"),
        ("open('big', 'wb').write(bytes(20 << 20))", "OSError: [Errno 27]"),
        ("input()", "EOFError"),
        (
            "import os\nassert set(os.environ) <= {'PATH', 'HOME', 'TMPDIR', 'OMP_NUM_THREADS', "
            "'LC_CTYPE'}, os.environ\nopen('/proc/self/environ')",
            "PermissionError",
        ),
    ],
)
def test_what_a_program_may_not_do(program: str, refusal: str) -> None:
    found = run_python(program, Limits())
    assert found is not None
    assert found.startswith(refusal)


def test_files_outside_are_out_of_reach(tmp_path: Path) -> None:
    file = tmp_path / "mine"
    file.write_text("kept")
    for deed in (
        f"open({str(file)!r}).read()",
        f"open({str(file)!r}, 'w')",
        f"import os; os.remove({str(file)!r})",
        f"import os; os.truncate({str(file)!r}, 0)",
        f"import os; os.chmod({str(file)!r}, 0)",
        f"import os; os.rename('program.py', {str(tmp_path / 'x')!r})",
        f"import os; os.listdir({str(tmp_path)!r})",
    ):
        found = run_python(deed, Limits())
        assert found is not None, deed
        assert found.startswith("PermissionError"), deed
    assert file.read_text() == "kept"
    assert os.listdir(tmp_path) == ["mine"]
    assert run_python(f"open({str(file)!r}).read()", Limits(protect_files=False)) is None


def test_what_a_program_may_do() -> None:
    program = """
import math, random, tempfile, threading, asyncio
open('a', 'w').write('x')
assert open('a').read() == 'x'
tempfile.TemporaryFile().write(b'x')
thread = threading.Thread(target=print)
thread.start()
thread.join()
asyncio.run(asyncio.sleep(0))
if __name__ == '__main__':
    raise RuntimeError
"""
    assert run_python(program, Limits()) is None


def test_a_program_that_does_not_end_is_killed() -> None:
    start = time.monotonic()
    program = "import threading\nt = threading.Thread(target=lambda: [0 for _ in iter(int, 1)])\n"
    found = run_python(f"{program}t.start()\nprint('x' * 9999)", Limits(seconds=0.5))
    assert found == "ran longer than 0.5 s"
    assert time.monotonic() - start < 5


def test_a_system_that_cannot_confine_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    bad = Path(__file__).with_name("no_such_launcher.py")
    monkeypatch.setattr("sdft.scorers.sandbox.REFUSED", 2)  # what Python says of a missing file
    monkeypatch.setattr("sdft.scorers.sandbox.LAUNCHER", bad)
    with pytest.raises(ValueError, match="the sandbox does not work here"):
        CodeTests(allow_execution=True)("x", ADD)
