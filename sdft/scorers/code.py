"""Code that passes its tests: the one scorer that runs what a model has written."""

from __future__ import annotations

import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from sdft.examples import Example
from sdft.scorers.sandbox import Limits, run_python
from sdft.scorers.scorer import Scorer

_BLOCK = re.compile(r"^[ \t]*```[\w+-]*[ \t]*\n(.*?)^[ \t]*```", re.MULTILINE | re.DOTALL)


class CodeTests(Scorer):
    """1 when the response's Python passes the answer's tests in a sandbox, else 0. Off by default.

    The response's last fenced block is taken, or all of it when it has none. The answer is Python
    that runs behind it and raises where the code is wrong (`assert add(2, 3) == 5`); to pass, the
    program has to come to its end. `sdft.scorers.sandbox` says what the program may do.

    Args:
        allow_execution: Say `true` to have model-written code run on this machine.
        seconds: Longest run of one program.
        memory_mb: Most memory of one program.
        prompt_first: Put the prompt before the response, for prompts that are code to be completed.
        protect_files: Confine the program to its own folder; needs Landlock (Linux 5.13). Without
            it, code may read and change whatever you may.
        processes: Programs that run at the same time.

    Raises:
        ValueError: Execution is not allowed, or a number is out of range.
    """

    def __init__(
        self,
        allow_execution: bool = False,
        seconds: float = 10.0,
        memory_mb: int = 1024,
        prompt_first: bool = False,
        protect_files: bool = True,
        processes: int = 4,
    ) -> None:
        if allow_execution is not True:
            raise ValueError(
                "CodeTests runs code that the model has written: set allow_execution to true to "
                "have it run on this machine"
            )
        for name, value, least in (
            ("seconds", seconds, 0.1),
            ("memory_mb", memory_mb, 64),
            ("processes", processes, 1),
        ):
            if not value >= least:
                raise ValueError(f"CodeTests: {name} must be at least {least}, found {value}")
        self.allow_execution = allow_execution
        self.limits = Limits(seconds, memory_mb, protect_files=protect_files)
        self.prompt_first = prompt_first
        self.processes = processes

    def __call__(self, response: str, example: Example) -> float:
        """Run the code with its tests.

        Raises:
            ValueError: This system cannot confine a program.
        """
        return float(self.explain(response, example) is None)

    def explain(self, response: str, example: Example) -> str | None:
        """How the program failed; None where it passes."""
        code = code_in(response)
        if self.prompt_first:
            code = f"{example.prompt}{code}"
        return run_python(f"{code}\n\n{example.answer}", self.limits)

    def score_all(self, responses: Sequence[str], examples: Sequence[Example]) -> list[float]:
        """Several programs at a time."""
        with ThreadPoolExecutor(self.processes) as pool:
            return list(pool.map(self, responses, examples))


def code_in(response: str) -> str:
    """The last fenced block of a response, or all of it."""
    blocks = _BLOCK.findall(response)
    return str(blocks[-1]) if blocks else response
