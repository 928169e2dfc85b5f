"""Carries a plan out: some runs at a time; what is finished is not run again."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from statistics import fmean

from sdft.comparison.folder import RunFolder
from sdft.comparison.plan import Plan, Run
from sdft.comparison.process import Launch, Process, status_text
from sdft.comparison.settings import Settings, run_settings

_POLL = 0.1  # seconds between two looks at the processes
_GRACE = 5.0  # seconds that they have to end


@dataclass
class Job:
    """A run that has to be done.

    Attributes:
        run: The run.
        folder: Where.
        settings: Its whole configuration.
        resumed: Whether it goes on from a checkpoint.
        process: While it is under way.
        started: When, by the clock.
    """

    run: Run
    folder: RunFolder
    settings: Settings
    resumed: bool = False
    process: Process | None = None
    started: float = 0.0


@dataclass
class Outcome:
    """What became of the runs.

    Attributes:
        reused: Runs that were finished before.
        finished: Runs that finished now.
        failed: Runs that did not end well.
    """

    reused: list[Run] = field(default_factory=list)
    finished: list[Run] = field(default_factory=list)
    failed: list[Run] = field(default_factory=list)


class Runner:
    """Carries a plan out.

    Args:
        plan: What to run.
        settings: Configuration of each method.
        launch: Starts a run.
        say: Prints a line.
        clock: Seconds, rising.
        sleep: Waits.
    """

    def __init__(
        self,
        plan: Plan,
        settings: Mapping[str, Settings],
        launch: Launch,
        say: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.plan = plan
        self.settings = settings
        self.launch = launch
        self.say = say
        self.clock = clock
        self.sleep = sleep
        self.outcome = Outcome()
        self.waiting: deque[Job] = deque()
        self.working: list[Job] = []
        self.seconds: dict[str, list[float]] = {}
        self.began = clock()

    def execute(self) -> Outcome:
        """Run what is not finished; ends all that is under way when it is interrupted."""
        self._take_stock()
        try:
            while self.waiting or self.working:
                while self.waiting and len(self.working) < self.plan.values.jobs:
                    self._start(self.waiting.popleft())
                self.sleep(_POLL)
                self._collect()
        finally:
            self._stop()
        return self.outcome

    # ---------------------------------------------------------------- steps

    def _take_stock(self) -> None:
        for run in self.plan.runs:
            folder = RunFolder(self.plan.folder(run))
            settings = run_settings(self.settings[run.method.name], run, folder.path)
            state = folder.state(settings)
            if state == "finished":
                self.outcome.reused.append(run)
                continue
            if state == "changed":
                told = "; ".join(folder.differences(settings))
                place = folder.set_aside()
                self.say(f"{run.title} has another configuration now and is run again ({told})")
                self.say(f"  what was there is kept in {place}")
            self.waiting.append(Job(run, folder, settings))
        reused = len(self.outcome.reused)
        self.say(f"{len(self.plan.runs)} runs, {reused} of them finished before")

    def _start(self, job: Job) -> None:
        job.resumed = job.folder.prepare(job.settings)
        arguments = ["fit", "--config", str(job.folder.settings_file)]
        if job.resumed:
            self.say(f"{job.run.title} goes on from its checkpoint")
            arguments += ["--ckpt_path", str(job.folder.checkpoint)]
        job.started = self.clock()
        job.process = self.launch(arguments, job.folder.log)
        self.working.append(job)

    def _collect(self) -> None:
        for job in list(self.working):
            assert job.process is not None
            status = job.process.poll()
            if status is not None:
                self.working.remove(job)
                self._end(job, status)

    def _end(self, job: Job, status: int) -> None:
        seconds = self.clock() - job.started
        reason = status_text(status) if status != 0 else job.folder.shortfall()
        if reason is None:
            keep = self.plan.values.keep_checkpoints
            job.folder.finish(job.settings, seconds, job.resumed, keep)
            self.outcome.finished.append(job.run)
            self.seconds.setdefault(job.run.method.name, []).append(seconds)
            self._progress(f"{job.run.title}: done in {duration(seconds)}")
            return
        job.folder.fail(reason, job.resumed)
        self.outcome.failed.append(job.run)
        self._progress(f"{job.run.title}: FAILED, it {reason}; its log is {job.folder.log}")

    def _stop(self) -> None:
        for job in self.working:
            assert job.process is not None
            job.process.stop()
        deadline = self.clock() + _GRACE
        for job in self.working:
            assert job.process is not None
            while job.process.poll() is None and self.clock() < deadline:
                self.sleep(_POLL)
            job.process.kill()
        self.working.clear()

    # ---------------------------------------------------------------- progress

    def _progress(self, news: str) -> None:
        ended = [*self.outcome.reused, *self.outcome.finished, *self.outcome.failed]
        line = f"[{len(ended)}/{len(self.plan.runs)}] {news}"
        elapsed = duration(self.clock() - self.began)
        left = self._left()
        self.say(f"{line} ({elapsed} so far{'' if left is None else f', about {left} left'})")

    def _left(self) -> str | None:
        """The time left, by the mean of what the method's runs took, or of all runs."""
        remaining = [job.run for job in self.waiting] + [job.run for job in self.working]
        taken = [seconds for own in self.seconds.values() for seconds in own]
        if not remaining or not taken:
            return None
        spent = sum(self.clock() - job.started for job in self.working)
        means = [fmean(self.seconds.get(run.method.name) or taken) for run in remaining]
        return duration(max(sum(means) - spent, 0.0) / self.plan.values.jobs)


def duration(seconds: float) -> str:
    """Seconds as `41 s`, `2 min 05 s` or `1 h 04 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
