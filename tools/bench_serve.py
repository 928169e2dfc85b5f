"""The process behind `bench_remote.start`: a step for every line.

python tools/bench_serve.py NAME PLAN STEPS
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from dataclasses import asdict, replace

import transformers
from bench_contenders import make_contender, replayed
from bench_laps import forget_peak, held_memory, peak_memory
from bench_models import Plan

from sdft.rollout import Rollout


class Given:
    """The completions that SFT learns, as long as the latest line says."""

    def __init__(self, plan: Plan) -> None:
        self.setting = plan.setting
        self.lengths: list[int] | None = None

    def __call__(self) -> Rollout:
        """The completions."""
        full = [self.setting.completion] * self.setting.batch
        return next(replayed([self.lengths or full], self.setting.vocab))


def quiet() -> None:
    """Silence what would stand between the figures."""
    for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    transformers.utils.logging.disable_progress_bar()


def answers(name: str, plan: Plan, steps: int) -> Iterator[str]:
    """That the loop is ready, then a lap for every line."""
    given = Given(plan)
    contender = make_contender(name, plan, steps, given)
    yield "ready"
    for line in sys.stdin:
        given.lengths = json.loads(line)
        held = held_memory()
        forget_peak()
        lap = contender.step()
        yield json.dumps(asdict(replace(lap, held=held, peak=peak_memory())))


def main() -> None:
    """Serve until no line follows."""
    quiet()
    name, plan, steps = sys.argv[1], Plan.loads(sys.argv[2]), int(sys.argv[3])
    report = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):
        for answer in answers(name, plan, steps):
            print(answer, file=report, flush=True)
    os._exit(0)  # the loop's thread still waits for its next step


if __name__ == "__main__":
    main()
