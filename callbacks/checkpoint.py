"""Checkpoints: of the last steps, of every finished stage, and where a signal ends the run."""

from __future__ import annotations

import errno
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch.distributed.checkpoint.api import CheckpointException

from sdft.atomic import remove, remove_leftovers
from sdft.callbacks.after_step import AfterStep
from sdft.callbacks.beginning import Beginning
from sdft.callbacks.retention import Retention
from sdft.checkpoints import FOLDER, CheckpointFolder
from sdft.configuration import Configuration, difference_table
from sdft.interruption import Interrupted, Interruption
from sdft.ranks import agreed, gathered
from sdft.run import is_dry, run_folder, settle_progress, task_stream
from sdft.sealed_io import PLACE, SealedIO, seal_unsealed
from sdft.seeding import random_states
from sdft.student import StudentModule

SETTINGS = "settings"
"""What the run was started with: the key in a checkpoint."""


class StageCheckpoint(AfterStep, Checkpoint):
    """Saves all that a run goes on from to `<run>/checkpoints/`.

    That is the student and its copies (the teacher), optimizer, schedule, place in the data, random
    generators, retention so far and costs. `step-<steps>.ckpt` is written on the way and where a
    stage's training ends, before its evaluation; `stage-<number>-<task>.ckpt` after it; `last.ckpt`
    is another name of the newest. Each is written under a temporary name, sealed with a digest of
    its content, and renamed: a name never holds half a checkpoint, and a damaged one is found
    before it is loaded.

    Args:
        every_n_steps: Optimizer steps between two step checkpoints; 0 writes one only where a
            stage ends.
        stages: Keep one checkpoint per stage.
        keep_last: Step checkpoints that are kept; there is room for one more while one is written.
        signals: At the first SIGTERM, Ctrl-C, SIGUSR1 or SIGUSR2, finish the optimizer step under
            way, save, and end with status 128 + the signal's number; at a second one end at once.

    Raises:
        ValueError: A negative cadence, or nothing kept.
    """

    def __init__(
        self,
        every_n_steps: int = 50,
        stages: bool = True,
        keep_last: int = 2,
        signals: bool = True,
    ) -> None:
        if every_n_steps < 0:
            raise ValueError(f"checkpoint.every_n_steps must be 0 or more, found {every_n_steps}")
        if keep_last < 1:
            raise ValueError(f"checkpoint.keep_last must be at least 1, found {keep_last}")
        self.every_n_steps = every_n_steps
        self.stages = stages
        self.keep_last = keep_last
        self.signals = signals
        self.command: Configuration | None = None
        self._before: Configuration | None = None
        self._beginning = Beginning(self._begin)
        self._interruption = Interruption()
        self._saved_step = 0
        self._saved: Path | None = None
        self._stages_saved = 0

    # ---------------------------------------------------------------- when

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Have checkpoints sealed, whoever writes them; be the first where training starts."""
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = SealedIO()
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        if self._beginning not in callbacks:
            trainer.callbacks = [self._beginning, *callbacks]  # type: ignore[attr-defined]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make sure that there is a place to write to; remove what killed runs have left there.

        Raises:
            OSError: There is none.
        """
        if is_dry(trainer) or not trainer.is_global_zero:
            return
        own = run_folder(trainer)
        folder = CheckpointFolder(own / FOLDER)
        with _naming(folder.path, folder):
            folder.prepare()
        for run in {own, *(path.parent for path in own.parent.glob(f"*/{FOLDER}"))}:
            for place in (run, run / FOLDER):
                remove_leftovers(place)

    def _begin(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._saved_step, self._saved = trainer.global_step, None
        if trainer.ckpt_path is not None:
            self._saved = Path(trainer.ckpt_path)
        if self._before is not None:
            self._tell_differences(trainer, self._before)
        if self.signals and isinstance(pl_module, StudentModule):
            launcher = trainer.strategy.launcher
            kill = getattr(launcher, "kill", lambda number: None)
            self._interruption.begin(forward=kill)
            pl_module.rest_point = lambda together: self._rest(trainer, together)

    def after_step(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> None:
        """Save every so many optimizer steps, where the stage ends, and where the run has to."""
        due = self.every_n_steps > 0 and trainer.global_step % self.every_n_steps == 0
        ends = trainer.is_last_batch or task_stream(trainer).stage_ended
        asked = self._is_asked(trainer)
        if due or ends or asked:
            if isinstance(pl_module, StudentModule):
                pl_module.phases.enter("")  # writing is no part of the update
            self._save(trainer, f"step-{trainer.global_step}.ckpt")
        if asked:
            self._end(trainer)

    def on_validation_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        """Evaluation may end with the batch, which all processes share."""
        self._rest(trainer, together=True)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make up for a stage that was evaluated only now, after the run had ended meanwhile."""
        if trainer.current_epoch > self._stages_saved:
            self._save_stage(trainer, trainer.current_epoch - 1)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the stage with its evaluation."""
        self._save_stage(trainer, trainer.current_epoch)

    def _save_stage(self, trainer: Trainer, stage: int) -> None:
        self._stages_saved = stage + 1
        task = re.sub(r"[^\w.-]", "_", task_stream(trainer).tasks[stage].name)
        name = f"stage-{stage + 1}-{task}" if self.stages else f"step-{trainer.global_step}"
        self._save(trainer, f"{name}.ckpt")

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Give the signals back."""
        self.teardown(trainer, pl_module, "fit")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the signals back."""
        self._interruption.end()
        if isinstance(pl_module, StudentModule):
            pl_module.rest_point = StudentModule.rest_point

    # ---------------------------------------------------------------- signals

    def _is_asked(self, trainer: Trainer) -> bool:
        """Whether any process was asked to end; a collective call."""
        asked = self._interruption.asked is not None
        return self.signals and trainer.strategy.reduce_boolean_decision(asked, all=False)

    def _rest(self, trainer: Trainer, together: bool) -> None:
        """End here if asked to, and if all that was trained is saved."""
        if trainer.world_size > 1 and not together:
            return
        if trainer.global_step == self._saved_step and self._is_asked(trainer):
            self._end(trainer)

    def _end(self, trainer: Trainer) -> None:
        number = max(gathered(self._interruption.asked or 0))  # perhaps another process's
        self._interruption.pass_on(number)
        trainer.strategy.barrier("StageCheckpoint")  # the one that writes has written
        own = getattr(trainer.strategy, "cluster_environment", None)
        watched = isinstance(own, LightningEnvironment) and trainer.local_rank > 0
        raise Interrupted(number, trainer.global_step, self._saved, watched)

    # ---------------------------------------------------------------- writing

    def _save(self, trainer: Trainer, name: str) -> Path | None:
        if is_dry(trainer):
            return None
        folder = CheckpointFolder(run_folder(trainer) / FOLDER)
        temporary = agreed(folder.temporary(name))
        with _naming(folder.path / name, folder):
            try:
                trainer.save_checkpoint(temporary, weights_only=False)
                seal_unsealed(temporary, _place(trainer))
                if trainer.is_global_zero:
                    folder.put(temporary, name, self.keep_last)
            except BaseException:
                with suppress(OSError):
                    remove(temporary)
                raise
        self._saved_step, self._saved = trainer.global_step, folder.path / name
        return self._saved

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add where the run stands and what it was started with."""
        settle_progress(checkpoint["loops"])
        checkpoint[PLACE] = _place(trainer)
        checkpoint[SETTINGS] = Configuration.of_run(trainer, self.command).to_dict()

    # ---------------------------------------------------------------- resume

    def state_dict(self) -> dict[str, Any]:
        """The random generators of every process, and which stages are saved; a collective call."""
        return {"random": gathered(random_states()), "stages": self._stages_saved}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Have the generators restored as training starts."""
        self._stages_saved = state_dict["stages"]
        self._beginning.states = list(state_dict["random"])

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Note what the checkpoint's run was started with."""
        self._stages_saved = 10**9  # an older checkpoint does not tell; `load_state_dict` follows
        saved = checkpoint.get(SETTINGS)
        if saved is not None and trainer.state.fn == "fit":
            self._before = Configuration.from_dict(saved)

    def _tell_differences(self, trainer: Trainer, before: Configuration) -> None:
        """Print what this run has otherwise, and append it to `<run>/resumed.jsonl`."""
        self._before = None
        found = Configuration.of_run(trainer, self.command).differences(before)
        if not trainer.is_global_zero:
            return
        place = f"resumed after step {trainer.global_step}"
        told = f"; this run's settings count:\n{difference_table(found)}" if found else ""
        print(f"{place}: {len(found) or 'no'} settings differ from the checkpoint's{told}")
        if is_dry(trainer):
            return
        record = {
            "checkpoint": str(trainer.ckpt_path),
            "step": trainer.global_step,
            "stage": trainer.current_epoch,
            "differences": {one.key: [one.before, one.now] for one in found},
        }
        with (run_folder(trainer) / "resumed.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


@contextmanager
def _naming(path: Path, folder: CheckpointFolder) -> Iterator[None]:
    """Turn a failed write into an error that names what could not be written and what is whole."""
    try:
        yield
    except (OSError, RuntimeError, CheckpointException) as error:
        cause = _cause(error)
        if cause is None:
            raise
        found = folder.found()
        kept = f"; {found[0].path} and the reports so far are as they were" if found else ""
        told = f"cannot write the checkpoint: {cause.strerror or cause}{kept}"
        raise OSError(cause.errno or errno.EIO, told, str(path)) from error


def _cause(error: BaseException) -> OSError | None:
    """The system's own error behind one."""
    if isinstance(error, OSError):
        return error
    if isinstance(error, CheckpointException):  # of several processes, by their ranks
        return next(filter(None, (_cause(found) for found, _ in error.failures.values())), None)
    # A disk that is full in the middle of a tensor is a RuntimeError of torch's own.
    cause = error.__cause__ or error.__context__
    return None if cause is None else _cause(cause)


def _place(trainer: Trainer) -> dict[str, Any]:
    """Where the run stands, as plain values, and when."""
    data, stage = task_stream(trainer), trainer.current_epoch
    retention = [c for c in trainer.callbacks if isinstance(c, Retention)]  # type: ignore[attr-defined]
    row = retention[0].rows[-1] if retention and retention[0].rows else []
    names = retention[0].columns if retention else []
    return {
        "written": CheckpointFolder(run_folder(trainer) / FOLDER).now(),
        "step": trainer.global_step,
        "stage": stage,
        "stages": len(data.tasks),
        "task": data.tasks[min(stage, len(data.tasks) - 1)].name,
        "measured": len(retention[0].rows) if retention else 0,
        "scores": {name: cell.score for name, cell in zip(names, row, strict=False)},
    }
