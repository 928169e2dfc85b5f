"""A run in a process of its own survives what may happen to it: kills, signals, a full disk."""

from __future__ import annotations

import json
import os
import random
import resource
import shlex
import signal
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
import torch.distributed.checkpoint.filesystem
import yaml
from conftest import TEMPLATE, echo_examples, write_jsonl

import sdft.checkpoints
import sdft.folder_seal
import sdft.seal
import sdft.sealed_io
from sdft import Example
from sdft.checkpoints import CheckpointFolder, find_checkpoint
from sdft.cli import main
from sdft.scorers import Scorer
from sdft.shard_reader import read_whole

pytestmark = pytest.mark.usefixtures("no_plots")


@pytest.fixture
def config(tmp_path: Path, model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.chdir(tmp_path)
    for name, offset in (("train", 0), ("test", 100)):
        rows = [{"prompt": e.prompt, "answer": e.answer} for e in echo_examples(7, offset)]
        write_jsonl(tmp_path / f"{name}.jsonl", rows)
    files = {"train": "train.jsonl", "test": "test.jsonl", "validation": "test.jsonl"}
    tasks = [
        {"class_path": "JSONLTask", "init_args": {"name": name, **files}} for name in ("a", "b")
    ]
    return {
        "seed_everything": 3,
        "trainer": {
            "accelerator": "cpu",
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "log_every_n_steps": 5,
        },
        "model": {
            "class_path": "sdft.SDFTModule",
            "init_args": {
                "model_name": str(model_dir),
                "max_new_tokens": 5,
                "teacher_template": TEMPLATE,
                "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}},
            },
        },
        "data": {"batch_size": 4, "steps": 25, "tasks": tasks},
        "checkpoint": {"every_n_steps": 3},
        "retention": {"kl_to_base": False},
        "samples": {"count": 1},
        "export": {"enabled": False},
    }


def command(config: dict[str, Any], root: str, *flags: str) -> list[str]:
    Path("run.yaml").write_text(yaml.safe_dump(config))
    return ["fit", "-c", "run.yaml", "--trainer.default_root_dir", root, *flags]


class Child:
    """A command in a process of its own, forked: it need not import everything anew.

    Args:
        words: The command line behind `python -m sdft`.
        before: Called in the child first.
    """

    def __init__(self, words: list[str], before: Callable[[], object] | None = None) -> None:
        self.log = Path(f"log-{len(list(Path().glob('log-*')))}")
        self.log.touch()
        self._status: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            self._run(words, before)

    def _run(self, words: list[str], before: Callable[[], object] | None) -> NoReturn:
        status = 99
        try:
            with self.log.open("wb", buffering=0) as file:
                for number in (1, 2):
                    os.dup2(file.fileno(), number)
            sys.stdout = sys.stderr = os.fdopen(2, "w", buffering=1)
            for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
                signal.signal(number, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            if before is not None:
                before()
            status = main(words)
        except SystemExit as stop:
            status = stop.code if isinstance(stop.code, int) else 98
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(status)

    def status(self) -> int | None:
        """None while it runs; below 0 the signal that ended it."""
        if self._status is None:
            pid, found = os.waitpid(self.pid, os.WNOHANG)
            self._status = os.waitstatus_to_exitcode(found) if pid else None
        return self._status

    def wait(self, seconds: float = 300) -> int:
        wait_for(lambda: self.status() is not None, seconds)
        assert self._status is not None
        return self._status

    def kill(self, number: int) -> None:
        os.kill(self.pid, number)

    def told(self) -> str:
        return self.log.read_text(errors="replace")


def run(words: list[str], status: int = 0) -> str:
    child = Child(words)
    assert child.wait() == status, child.told()
    return child.told()


def die_in_write(dice: random.Random) -> None:
    """Have SIGKILL come in the middle of a checkpoint file, after some whole ones."""
    size, saves = dice.choice([50, 5000, 100_000, 400_000]), dice.randrange(6)
    left = {"saves": saves, "bytes": size}
    real_save, real_write = sdft.sealed_io.save_sealed, sdft.seal._Digesting.write

    def save(content: Any, path: Path, label: Any) -> None:
        left["saves"] -= 1
        real_save(content, path, label)

    def write(self: Any, data: Any) -> int:
        if left["saves"] < 0:
            left["bytes"] -= len(data)
            if left["bytes"] < 0:
                self.file.write(data[: len(data) // 2])
                self.file.flush()
                os.kill(os.getpid(), signal.SIGKILL)
        return real_write(self, data)

    sdft.sealed_io.save_sealed = save
    sdft.seal._Digesting.write = write  # type: ignore[method-assign]


def die_in_folder(dice: random.Random) -> None:
    """Have SIGKILL come among the tensors of a folder, or as it is sealed or gets its name."""
    module, name, most = dice.choice(
        [
            (torch.distributed.checkpoint.filesystem, "_write_item", 500),
            (sdft.folder_seal, "_facts", 15),
            (sdft.checkpoints, "replace_checkpoint", 6),
        ]
    )
    real, left = getattr(module, name), dice.randrange(most)

    def dying(*args: Any, **kwargs: Any) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)

    setattr(module, name, dying)


FOLDERS = {
    "strategy": {
        "class_path": "sdft.strategies.ShardedStrategy",
        "init_args": {"save_distributed_checkpoint": True},
    },
    "inference_mode": False,
}
"""Has one process write folders, as several do."""


def outcome(root: str) -> tuple[dict[str, Any], Any]:
    """The newest checkpoint below `root`, and the report beside it."""
    path = find_checkpoint("last", Path(root))
    assert path is not None
    found = read_whole(path) if path.is_dir() else torch.load(path, weights_only=True)
    kept = ("state_dict", "optimizer_states", "lr_schedulers", "global_step")
    state = {key: found[key] for key in kept} | {"retention": found["callbacks"]["Retention"]}
    return state, json.loads((path.parents[1] / "retention.json").read_text())


def assert_same(found: Any, expected: Any, path: str = "") -> None:
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), path
        for key in expected:
            assert_same(found[key], expected[key], f"{path}/{key}")
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected), path
        for number, (one, other) in enumerate(zip(found, expected, strict=True)):
            assert_same(one, other, f"{path}/{number}")
    elif isinstance(expected, torch.Tensor):
        assert torch.equal(found, expected), path
    else:
        assert found == expected, path


def wait_for(there: Callable[[], Any], seconds: float = 120, child: Child | None = None) -> None:
    deadline = time.monotonic() + seconds
    while not there():
        if child is not None:
            assert child.status() is None, child.told()
        assert time.monotonic() < deadline, "it took too long"
        time.sleep(0.005)


def leftovers(root: str) -> list[Path]:
    return list(Path(root).rglob(".*.tmp"))


# ---------------------------------------------------------------- killed


@pytest.mark.slow
@pytest.mark.parametrize("form", ["file", "folder"])
def test_killed_again_and_again_it_ends_as_if_nothing_had_happened(
    config: dict[str, Any], form: str
) -> None:
    if form == "folder":
        config["trainer"] |= FOLDERS
        config["data"]["steps"] = 10
    die = die_in_folder if form == "folder" else die_in_write
    run(command(config, "whole"))
    dice = random.Random(os.getpid())
    resume: list[str] = []
    story: list[str] = []
    kills = half_written = 0
    child = None
    for attempt in range(30):
        words = command(config, "killed", *resume)
        if attempt % 2 == 0:  # in the middle of a write
            child = Child(words, partial(die, random.Random(dice.random())))
        else:
            files = "resumed.jsonl" if resume else "*.ckpt"
            old = set(Path("killed").rglob(files))
            child = Child(words)
            wait_for(partial(newer, files, old), child=child)
            time.sleep(dice.random())
            child.kill(signal.SIGKILL)
        if child.wait() == 0:
            break
        assert child.status() == -signal.SIGKILL, child.told()
        kills += 1
        place = [line for line in child.told().splitlines() if "Restored" in line]
        left = sorted(str(path) for path in Path("killed").rglob("*.ckpt"))
        story.append(f"{attempt} {place[-1:]} {left}")
        half_written += bool(leftovers("killed"))
        if list(Path("killed").rglob("*.ckpt")):
            resume = ["--ckpt_path", "last"]
    if child is None or child.status() != 0:
        run(command(config, "killed", *resume))
    assert kills >= 2
    assert half_written >= 1, "a kill that left half a checkpoint was among them"
    assert leftovers("killed") == [], "what it left was removed at the next start"
    print("\n".join(story))
    assert_same(outcome("killed"), outcome("whole"))


def newer(files: str, old: set[Path]) -> bool:
    return set(Path("killed").rglob(files)) > old


# ---------------------------------------------------------------- signals


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT"])
def test_a_signal_saves_first_and_says_how_to_go_on(config: dict[str, Any], name: str) -> None:
    config["checkpoint"] = {"every_n_steps": 0}
    config["data"]["steps"] = 40
    if name == "SIGTERM":
        config["trainer"]["accumulate_grad_batches"] = 2
    if name == "SIGUSR1":
        config["trainer"] |= FOLDERS
    run(command(config, "whole"))
    child = Child(command(config, "ended"))
    # The base is evaluated, training has begun.
    wait_for(Path("ended/lightning_logs/version_0/retention.json").exists, child=child)
    time.sleep(0.3)
    number = getattr(signal, name)
    child.kill(number)
    assert child.wait(60) == 128 + number, child.told()
    (path,) = Path("ended").rglob("step-*.ckpt")
    step = int(path.stem.removeprefix("step-"))
    assert 0 < step < 40
    assert f"ended by {name} after step {step}, which is saved; go on with" in child.told()
    go_on = shlex.split(child.told().strip().splitlines()[-1])
    assert go_on[:4] == ["python", "-m", "sdft", "fit"]
    assert go_on[-2:] == ["--ckpt_path", str(path)]
    assert "no settings differ" in run(go_on[3:])
    assert_same(outcome("ended"), outcome("whole"))


class Slow(Scorer):
    """Takes its time, once the file `from_here` is there: so signals find it at work."""

    def __call__(self, response: str, example: Example) -> float:
        if Path("from_here").exists():
            Path("evaluating").touch()
            time.sleep(0.1)
        return len(response) % 7 / 7


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_signal_in_an_evaluation_loses_nothing(config: dict[str, Any], stage: int) -> None:
    """Of the base, and after each stage; what is missing is made up for."""
    config["data"] |= {"steps": 3, "eval_batch_size": 2}
    for task in config["data"]["tasks"]:
        task["init_args"]["scorer"] = {"class_path": f"{__name__}.Slow"}
        del task["init_args"]["validation"]
    run(command(config, "whole"))
    if stage == 0:
        Path("from_here").touch()
    child = Child(command(config, "ended"), None if stage == 0 else partial(slow_from, 3 * stage))
    wait_for(Path("evaluating").exists, child=child)
    child.kill(signal.SIGTERM)
    assert child.wait(60) == 143, child.told()
    Path("from_here").unlink()
    if stage == 0:
        assert "ended by SIGTERM before anything was trained: start it again" in child.told()
        return
    assert f"after step {3 * stage}, which is saved" in child.told()
    rows = json.loads(Path("ended/lightning_logs/version_0/retention.json").read_text())
    assert len(rows["matrix"]) == stage, "the row was under way"
    run(command(config, "ended", "--ckpt_path", "last"))
    assert_same(outcome("ended"), outcome("whole"))
    assert list(Path("ended").rglob(f"stage-{stage}-*.ckpt")), "the stage has its checkpoint"
    assert list(Path("ended").rglob("samples.jsonl")), "and its samples"


def slow_from(step: int) -> None:
    """Have scorers take their time once this step's checkpoint is written."""
    real = CheckpointFolder.put

    def put(self: CheckpointFolder, temporary: Path, name: str, keep_steps: int) -> Path:
        if name == f"step-{step}.ckpt":
            Path("from_here").touch()
        return real(self, temporary, name, keep_steps)

    CheckpointFolder.put = put  # type: ignore[method-assign]


def test_a_second_signal_ends_at_once(config: dict[str, Any]) -> None:
    """A method without rollouts, in the middle of a long optimizer step."""
    config["data"]["steps"] = 1
    config["model"]["class_path"] = "sdft.methods.SFTModule"
    config["trainer"]["accumulate_grad_batches"] = 100_000
    child = Child(command(config, "ended"))
    wait_for(Path("ended/lightning_logs/version_0/retention.json").exists, child=child)
    time.sleep(0.3)
    child.kill(signal.SIGTERM)
    time.sleep(0.5)
    assert child.status() is None, "the step under way is long"
    child.kill(signal.SIGTERM)
    assert child.wait(20) == -signal.SIGTERM
    assert "ending at once" in child.told()


# ---------------------------------------------------------------- no room


@pytest.mark.slow
@pytest.mark.parametrize("form", ["file", "folder"])
def test_a_full_disk_is_named_and_keeps_what_there_was(config: dict[str, Any], form: str) -> None:
    config["checkpoint"] = {"every_n_steps": 0}
    if form == "folder":
        config["trainer"] |= FOLDERS
    run(command(config, "whole"))
    files = [path for path in Path("whole").rglob("*") if ".ckpt" in str(path) and path.is_file()]
    size = max(path.stat().st_size for path in files)
    # The first checkpoint fits; then the rows make them grow.
    limits = (size - 200, size - 200)
    limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, limits)
    child = Child(command(config, "full"), limit)
    assert child.wait() == 2, child.told()
    assert "Traceback" not in child.told()
    (told,) = [line for line in child.told().splitlines() if "sdft: error: " in line]
    assert "cannot write the checkpoint: File too large" in told
    assert leftovers("full") == []
    kept = [one.path for one in CheckpointFolder(next(Path("full").rglob("checkpoints"))).found()]
    if form == "folder":  # its parts do not grow: there was no room for any
        assert kept == []
        return
    assert f"{kept[0]} and the reports so far are as they were" in told
    assert json.loads(next(Path("full").rglob("retention.json")).read_text())["matrix"]
    run(command(config, "full", "--ckpt_path", "last"))
    assert_same(outcome("full"), outcome("whole"))


def test_a_folder_that_cannot_be_written_is_named_before_training(config: dict[str, Any]) -> None:
    run_folder = Path("out/lightning_logs/version_0")
    run_folder.mkdir(parents=True)
    (run_folder / "checkpoints").write_text("a file in the way")
    config["trainer"]["logger"] = {
        "class_path": "lightning.pytorch.loggers.TensorBoardLogger",
        "init_args": {"save_dir": "out", "version": 0},
    }
    told = run(command(config, "out"), status=2)
    assert f"cannot write the checkpoint: File exists: '{run_folder / 'checkpoints'}'" in told
    assert not list(run_folder.glob("retention.json"))
