"""Carrying a plan out, with processes that are made up."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml
from fake_runs import SETTINGS, make_plan, retention

from sdft.comparison.folder import RunFolder
from sdft.comparison.lock import folder_lock
from sdft.comparison.results import load_results
from sdft.comparison.runner import Runner, duration
from sdft.comparison.settings import Settings

ROWS = [[0.0, 0.1, 1.0, 1.0], [0.8, 0.1, 0.9, 0.9], [0.7, 0.9, 0.9, 0.8]]
SWEEP = {"learning_rates": [1e-4, 3e-4]}


class FakeProcess:
    """Ends after a few looks at it."""

    def __init__(self, ending: Callable[[], int], looks: int = 2) -> None:
        self.ending, self.looks = ending, looks
        self.status: int | None = None
        self.stopped = self.killed = False

    def poll(self) -> int | None:
        self.looks -= 1
        if self.status is None and self.looks <= 0:
            self.status = self.ending()
        return self.status

    def stop(self) -> None:
        self.stopped = True
        self.status = -15

    def kill(self) -> None:
        self.killed = True


class FakeLaunch:
    """Records what is started; a run leaves a whole report unless it is told to do otherwise."""

    def __init__(self) -> None:
        self.started: list[Path] = []
        self.arguments: list[list[str]] = []
        self.processes: list[FakeProcess] = []
        self.endings: dict[str, Callable[[Path], int]] = {}
        self.most = 0

    def __call__(self, arguments: Sequence[str], log: Path) -> FakeProcess:
        folder = log.parent
        self.started.append(folder)
        self.arguments.append(list(arguments))
        ending = self.endings.get(f"{folder.parent.name}/{folder.name}", well)
        self.processes.append(FakeProcess(lambda: ending(folder)))
        self.most = max(self.most, sum(p.status is None for p in self.processes))
        return self.processes[-1]


def well(folder: Path) -> int:
    (folder / "retention.json").write_text(json.dumps(retention(ROWS)))
    (folder / "checkpoints").mkdir(exist_ok=True)
    (folder / "checkpoints" / "last.ckpt").write_text("weights")
    return 0


def badly(folder: Path) -> int:
    (folder / "log.txt").write_text("starting\n\nsdft: error: no such word\n")
    return 2


class Work:
    """A plan, and what carries it out."""

    def __init__(self, folder: Path, **keys: Any) -> None:
        self.plan = make_plan(folder, {"sdft": SWEEP, "sft": SWEEP}, **{"seeds": [0, 1], **keys})
        self.launch = FakeLaunch()
        self.said: list[str] = []
        self.settings: dict[str, Settings] = {name: deepcopy(SETTINGS) for name in ("sdft", "sft")}
        self.time = 0.0

    def runner(self) -> Runner:
        return Runner(
            self.plan, self.settings, self.launch, self.said.append, lambda: self.time, self.sleep
        )

    def sleep(self, seconds: float) -> None:
        self.time += 1.0

    def folder(self, place: int) -> RunFolder:
        return RunFolder(self.plan.folder(self.plan.runs[place]))


@pytest.fixture
def work(tmp_path: Path) -> Work:
    return Work(tmp_path)


def test_every_run_once_each_with_a_file_that_repeats_it(work: Work) -> None:
    outcome = work.runner().execute()
    assert work.launch.started == [work.plan.folder(run) for run in work.plan.runs]
    assert len(outcome.finished) == 8
    for folder, arguments in zip(work.launch.started, work.launch.arguments, strict=True):
        assert arguments == ["fit", "--config", str(folder / "run.yaml")]
        own = yaml.safe_load((folder / "run.yaml").read_text())
        assert own["trainer"]["default_root_dir"] == str(folder)
    assert "[8/8]" in work.said[-1]


def test_finished_runs_are_not_run_again(work: Work) -> None:
    work.runner().execute()
    again = work.runner().execute()
    assert len(work.launch.started) == 8
    assert len(again.reused) == 8
    assert "8 runs, 8 of them finished before" in work.said


def test_a_killed_comparison_does_only_what_is_left(work: Work) -> None:
    work.runner().execute()
    work.folder(3).finished_file.unlink()
    (work.folder(5).path / "retention.json").write_text(json.dumps(retention(ROWS[:2])))
    before = len(work.launch.started)
    work.runner().execute()
    assert work.launch.started[before:] == [work.folder(3).path, work.folder(5).path]


def test_a_damaged_report_is_not_finished(work: Work) -> None:
    work.runner().execute()
    (work.folder(2).path / "retention.json").write_text('{"tasks": [')
    assert work.runner().execute().finished == [work.plan.runs[2]]


def test_an_unfinished_run_goes_on_from_its_checkpoint(work: Work) -> None:
    work.runner().execute()
    folder = work.folder(0)
    folder.finished_file.unlink()
    folder.checkpoint.parent.mkdir()
    folder.checkpoint.write_text("weights")
    (folder.path / "retention.csv").write_text("kept")
    work.runner().execute()
    assert work.launch.arguments[-1][-2:] == ["--ckpt_path", str(folder.checkpoint)]
    assert (folder.path / "retention.csv").exists()
    mark = folder.mark()
    assert mark is not None
    assert mark["resumed"] is True


def test_without_a_checkpoint_it_starts_afresh_in_an_empty_folder(work: Work) -> None:
    work.runner().execute()
    folder = work.folder(0)
    folder.finished_file.unlink()
    (folder.path / "cost.json").write_text("{}")
    work.runner().execute()
    assert "--ckpt_path" not in work.launch.arguments[-1]
    assert not (folder.path / "cost.json").exists()


def test_a_mark_of_another_configuration_counts_for_nothing(work: Work) -> None:
    work.runner().execute()
    folder = work.folder(0)
    own = yaml.safe_load(folder.settings_file.read_text())
    own["data"]["init_args"]["steps"] = 80
    folder.settings_file.write_text(yaml.safe_dump(own))
    assert folder.state(own) == "unfinished"


@pytest.mark.parametrize("keep", [True, False])
def test_checkpoints_of_finished_runs_are_deleted_unless_kept(tmp_path: Path, keep: bool) -> None:
    work = Work(tmp_path, keep_checkpoints=keep)
    work.runner().execute()
    assert work.folder(0).checkpoint.exists() is keep


def test_a_changed_configuration_is_run_again_and_the_old_runs_are_kept(work: Work) -> None:
    work.runner().execute()
    work.settings["sft"]["data"]["init_args"]["steps"] = 80
    before = len(work.launch.started)
    outcome = work.runner().execute()
    assert {run.method.name for run in outcome.finished} == {"sft"}
    assert len(work.launch.started) == before + 4
    told = [line for line in work.said if "another configuration" in line]
    assert len(told) == 4
    assert "data.init_args.steps: 60 → 80" in told[0]
    folder = work.folder(2).path
    old = folder.with_name(f"{folder.name}.old-1")
    assert yaml.safe_load((old / "run.yaml").read_text())["data"]["init_args"]["steps"] == 60
    work.settings["sft"]["data"]["init_args"]["steps"] = 90
    work.runner().execute()
    assert folder.with_name(f"{folder.name}.old-2").exists()


def test_another_place_is_no_other_configuration(tmp_path: Path) -> None:
    work = Work(tmp_path)
    work.runner().execute()
    (tmp_path / "out").rename(tmp_path / "moved")
    moved = Work(tmp_path, out=str(tmp_path / "moved"))
    assert len(moved.runner().execute().reused) == 8


def test_a_failed_run_stops_no_other(work: Work) -> None:
    name = work.plan.runs[1].name
    work.launch.endings[name] = badly
    outcome = work.runner().execute()
    assert outcome.failed == [work.plan.runs[1]]
    assert len(outcome.finished) == 7
    (line,) = [line for line in work.said if "FAILED" in line]
    assert "ended with status 2" in line
    results = load_results(work.plan, work.settings)
    (failure,) = results.failed
    assert failure.log == ["starting", "sdft: error: no such word"]
    assert failure.reason == "ended with status 2"


def test_a_failed_run_is_tried_again(work: Work) -> None:
    name = work.plan.runs[1].name
    work.launch.endings[name] = badly
    work.runner().execute()
    del work.launch.endings[name]
    assert work.runner().execute().finished == [work.plan.runs[1]]
    assert load_results(work.plan, work.settings).failed == []


def test_an_end_without_a_whole_report_is_a_failure(work: Work) -> None:
    def short(folder: Path) -> int:
        (folder / "retention.json").write_text(json.dumps(retention(ROWS[:2])))
        return 0

    work.launch.endings[work.plan.runs[0].name] = short
    assert work.runner().execute().failed == [work.plan.runs[0]]
    assert "2 rows of 3" in load_results(work.plan, work.settings).failed[0].reason


def test_a_run_that_fails_when_resumed_starts_afresh_next_time(work: Work) -> None:
    work.runner().execute()
    folder = work.folder(0)
    folder.finished_file.unlink()
    folder.checkpoint.parent.mkdir()
    folder.checkpoint.write_text("damaged")
    work.launch.endings[work.plan.runs[0].name] = badly
    work.runner().execute()
    assert "--ckpt_path" in work.launch.arguments[-1]
    del work.launch.endings[work.plan.runs[0].name]
    work.runner().execute()
    assert "--ckpt_path" not in work.launch.arguments[-1]


def test_so_many_at_a_time(tmp_path: Path) -> None:
    for jobs in (1, 3):
        work = Work(tmp_path / str(jobs), jobs=jobs)
        work.runner().execute()
        assert work.launch.most == jobs


def test_an_interruption_ends_what_is_under_way(tmp_path: Path) -> None:
    work = Work(tmp_path, jobs=2)
    runner = work.runner()

    def interrupted(seconds: float) -> None:
        raise KeyboardInterrupt

    runner.sleep = interrupted
    with pytest.raises(KeyboardInterrupt):
        runner.execute()
    assert len(work.launch.processes) == 2
    assert all(process.stopped and process.killed for process in work.launch.processes)
    assert not work.folder(0).finished_file.exists()
    assert not work.folder(0).failed_file.exists(), "it was ended, it did not fail"
    assert len(work.runner().execute().finished) == 8


def test_the_progress_says_how_much_is_left(work: Work) -> None:
    work.runner().execute()
    # A run takes two looks, a second each; seven are left after the first.
    assert "done in 2 s (2 s so far, about 14 s left)" in work.said[1]
    assert work.said[-1].endswith("(16 s so far)")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59.4, "59 s"), (59.6, "1 min 00 s"), (125, "2 min 05 s"), (3840, "1 h 04 min")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


# ---------------------------------------------------------------- the lock


def test_two_comparisons_in_one_folder(tmp_path: Path) -> None:
    with (
        folder_lock(tmp_path),
        pytest.raises(ValueError, match=r"another comparison \(process \d+\).* is at work in"),
        folder_lock(tmp_path, patience=0.0),
    ):
        pass
    with folder_lock(tmp_path, patience=0.0):  # it is free again
        pass


def test_the_state_of_a_folder_that_is_not_ours(tmp_path: Path, work: Work) -> None:
    folder = work.folder(0)
    folder.path.mkdir(parents=True)
    (folder.path / "notes.txt").write_text("mine")
    assert folder.state(SETTINGS) == "changed"
    work.runner().execute()
    kept = folder.path.with_name(f"{folder.path.name}.old-1")
    assert (kept / "notes.txt").read_text() == "mine"
