"""What a run's trainer knows, typed: its folder, its task stream, its cadence.

Lightning sets some of these attributes dynamically, out of a type checker's sight.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast
from weakref import WeakKeyDictionary

from lightning.pytorch import Trainer

from sdft.data import ContinualDataModule
from sdft.ranks import ranks
from sdft.schedule import StageSchedule

_FOLDERS: WeakKeyDictionary[Trainer, Path] = WeakKeyDictionary()


def run_folder(trainer: Trainer) -> Path:
    """The logger's version directory, or the root directory of a run without a logger.

    With several processes a run's first call is a collective one; it is made as models are loaded.
    """
    if ranks() == 1:
        return Path(trainer.log_dir or trainer.default_root_dir)
    if trainer not in _FOLDERS:  # for `log_dir` asks rank 0 every time
        _FOLDERS[trainer] = Path(trainer.log_dir or trainer.default_root_dir)
    return _FOLDERS[trainer]


def task_stream(trainer: Trainer) -> ContinualDataModule:
    """The data module.

    Raises:
        ValueError: The trainer was given none, or another kind.
    """
    data = cast(Any, trainer).datamodule
    if not isinstance(data, ContinualDataModule):
        raise ValueError(
            f"pass a ContinualDataModule to the trainer (datamodule=…), found {type(data).__name__}"
        )
    return data


def method_label(trainer: Trainer) -> str:
    """What the run trains with, for reports: the method, its mixtures and its penalty."""
    module = cast(Any, trainer.lightning_module)
    data = task_stream(trainer)
    parts = [getattr(module, "method", type(module).__name__)]
    parts += [mixture.label for mixture in data.mixtures if mixture.label]
    parts += [penalty.label] if (penalty := getattr(module, "penalty", None)) else []
    parts += ["zoo"] if data.from_base_each_task else []
    return "+".join(dict.fromkeys(parts))  # the re-invoke method with its mixture is named once


def end_stage(trainer: Trainer) -> None:
    """End the stage under way: the next optimizer step is the first of the next stage.

    Call it where the optimizer has just stepped, as `AfterStep` does. The stage's validation,
    retention row and checkpoint follow as at the end of any other; at a stage's last step it
    changes nothing.
    """
    if trainer.is_last_batch:
        return
    batches = trainer.fit_loop.batch_idx + 1
    assert batches % trainer.accumulate_grad_batches == 0, "gradients would be lost"
    task_stream(trainer).end_stage()
    for config in trainer.lr_scheduler_configs:
        if isinstance(config.scheduler, StageSchedule):
            config.scheduler.end_stage(trainer.current_epoch)
    # Lightning validates at multiples of this; the next stage's loader sets it anew.
    lightning = cast(Any, trainer)
    if lightning.check_val_every_n_epoch is not None and lightning.val_check_batch is not None:
        lightning.val_check_batch = batches


def begin_after_restart(trainer: Trainer) -> None:
    """Have the next stage begin as any other, in a run resumed from a stage's last batch.

    Lightning takes that stage for one that goes on, and would not count the next one as begun: a
    checkpoint of it could not be resumed from.
    """
    progress = cast(Any, trainer.fit_loop.epoch_progress.current)
    if progress.processed == progress.ready:
        trainer.fit_loop.reset_restart_stage()


def is_logged(trainer: Trainer, step: int) -> bool:
    """Whether the logger gets an entry at the end of this optimizer step, counted from 1."""
    every = int(cast(Any, trainer).log_every_n_steps)  # 0: never
    return every > 0 and step % every == 0


def is_dry(trainer: Trainer) -> bool:
    """Whether this is a `fast_dev_run`, which leaves no files."""
    return bool(cast(Any, trainer).fast_dev_run)
