"""The command line: `python -m sdft fit --config configs/seq_skills.yaml`.

Built on LightningCLI: `fit`, `validate`, `test` and `predict`, every constructor argument of the
module, the data and the callbacks as a flag and a YAML key. This is the one place that knows both
the core and the callbacks.
"""

from __future__ import annotations

import logging
import os
import shlex
import signal
import sys
import warnings
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import transformers
import yaml
from lightning.fabric.utilities import rank_zero_only
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.exceptions import SIGTERMException

import sdft.methods
import sdft.mixtures
import sdft.penalties
import sdft.suites
import sdft.task_kinds  # noqa: F401 - the same
from sdft.callbacks import (
    ConfigFile,
    CostReport,
    EMATeacher,
    Filters,
    Gate,
    Guard,
    ModelExport,
    Predictions,
    Retention,
    Review,
    Samples,
    StageCheckpoint,
    StageProgressBar,
    StageWatch,
)
from sdft.callbacks.review import ReviewStop
from sdft.checkpoint_reader import check_harmless
from sdft.checkpoints import find_checkpoint, start_of_run
from sdft.configuration import Configuration
from sdft.data import ContinualDataModule
from sdft.gate.stop import GateRetry, GateStop
from sdft.guard import GuardStop
from sdft.interruption import farewell
from sdft.messages import check_yaml, clear_message
from sdft.module import SDFTModule
from sdft.ranks import part_ways
from sdft.redaction import check_filled, redacted_text
from sdft.student import StudentModule

log = logging.getLogger(__name__)

TRACEBACK = "SDFT_TRACEBACK"
"""Set this environment variable to see the Python traceback behind an error."""

COMMANDS: dict[str, str] = {
    "budget": "sdft.budget_command",
    "check": "sdft.drift.command",
    "checkpoints": "sdft.checkpoints_command",
    "compare": "sdft.comparison.command",
    "export": "sdft.export.command",
    "generate": "sdft.generate_command",
    "history": "sdft.history_command",
    "knowledge": "sdft.knowledge.command",
    "preflight": "sdft.preflight.command",
    "self_edits": "sdft.self_edits.command",
}
"""Subcommands beside Lightning's → the module whose `main(args)` returns the exit status."""

CALLBACKS: dict[str, type[Callback]] = {
    "teacher": EMATeacher,
    "guard": Guard,
    "filters": Filters,
    "review": Review,
    "gate": Gate,
    "watch": StageWatch,
    "retention": Retention,
    "samples": Samples,
    "cost": CostReport,
    "checkpoint": StageCheckpoint,
    "export": ModelExport,
}
"""Top-level keys → the callback of every run whose arguments they hold."""

GROUPS = ("trainer", *CALLBACKS)

SYNC = "It is recommended to use `self.log"  # values are those of all processes already

EPILOG = f"Beside these: {', '.join(COMMANDS)} (python -m sdft COMMAND --help)."

TRAINER_DEFAULTS: dict[str, Any] = {
    "max_epochs": -1,  # the data module sets it to the number of stages
    "devices": 1,
    "num_sanity_val_steps": 0,  # the base row of the retention matrix takes its place
    "gradient_clip_val": 1.0,
    "log_every_n_steps": 10,
    "reload_dataloaders_every_n_epochs": 1,
}


class Parser(LightningArgumentParser):
    """A parser whose errors are one clear line, without the whole usage."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print the line and exit with status 2."""
        if not self.exit_on_error:  # a parser within the parser: the outermost one speaks
            super().error(message, ex)
        print(f"sdft: error: {redacted_text(clear_message(message))}", file=sys.stderr)
        raise SystemExit(2)


class SDFTCLI(LightningCLI):
    """LightningCLI with the run's callbacks as top-level keys."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the keys `teacher`, `guard`, `watch`, `retention`, `samples` and the others."""
        for key, kind in CALLBACKS.items():
            parser.add_lightning_class_args(kind, key)
        parser.set_defaults(
            {
                "model": {"class_path": "sdft.module.SDFTModule"},
                "data": {"class_path": "sdft.data.ContinualDataModule"},
            }
        )

    def before_instantiate_classes(self) -> None:
        """Check the output folder, resolve `ckpt_path`, load checkpoints without pickle."""
        config = self.config[self.subcommand]
        check_filled(config.as_dict())
        root = Path(config["trainer"]["default_root_dir"] or os.getcwd())
        check_writable(root)
        if config.get("ckpt_path"):
            found = start_of_run(config["ckpt_path"], root, verify=_is_first())
            config["ckpt_path"] = None if found is None else str(found)
        if config.get("weights_only") is None:
            config["weights_only"] = True
        if not config["weights_only"]:
            log.warning("weights_only is off: a checkpoint may run code of its own")
        elif config.get("ckpt_path") and _is_first():
            check_harmless(Path(config["ckpt_path"]))
        clip = config["trainer"]["gradient_clip_val"]
        if clip is not None and not clip >= 0:
            raise ValueError(f"trainer.gradient_clip_val must be 0 or more, found {clip}")

    def _parse_ckpt_path(self) -> None:
        """Command line and YAML win: a checkpoint overrides no setting."""

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Our progress bar, and TensorBoard in `trainer.default_root_dir` unless configured."""
        config = self._get(self.config_init, "trainer")
        bars = [] if config["enable_progress_bar"] is False else [StageProgressBar()]
        self.trainer_defaults["callbacks"] = [Predictions(), *bars]
        if config["logger"] in (None, True):
            root = config["default_root_dir"] or os.getcwd()
            kwargs["logger"] = TensorBoardLogger(root, default_hp_metric=False)
        trainer = super().instantiate_trainer(**kwargs)
        tree = yaml.safe_load(self._parser(self.subcommand).dump(self.config[self.subcommand]))
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        for callback in callbacks:
            if isinstance(callback, StageCheckpoint):
                callback.command = Configuration.of_command(tree)
        own = tuple(CALLBACKS.values())  # first, so that a user's callback finds their work done
        callbacks.sort(key=lambda one: (isinstance(one, Checkpoint), not isinstance(one, own)))
        return trainer


CLIT = TypeVar("CLIT", bound=SDFTCLI)


def check_writable(root: Path) -> None:
    """Make the folder and write a probe into it, before anything is computed.

    Raises:
        ValueError: It cannot be made or written.
    """
    probe = root / f".sdft-write-probe-{os.getpid()}"  # several processes may ask at once
    try:
        root.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise ValueError(
            f"cannot write to trainer.default_root_dir {str(root)!r}: {error.strerror or error}"
        ) from error


def config_files(args: list[str]) -> list[Path]:
    """The configuration files that a command line names and that exist."""
    flags = ("-c", "--config")
    names = [value for flag, value in pairwise(args) if flag in flags]
    names += [arg.split("=", 1)[1] for arg in args if arg.startswith("--config=")]
    return [Path(name) for name in names if Path(name).is_file()]


def main(args: list[str] | None = None) -> int:
    """Run the command line; returns the exit status.

    Args:
        args: Command-line arguments; those of the process when None.
    """
    _quiet()
    words = [
        # An option of its own for a person at a terminal.
        "--review.count=4" if word == "--review" else word
        for word in (sys.argv[1:] if args is None else args)
    ]
    try:
        groups = () if words and words[0] in COMMANDS else GROUPS
        for path in config_files(words):
            check_yaml(path, groups)
        if words and words[0] in COMMANDS:
            return int(import_module(COMMANDS[words[0]]).main(words[1:]))
        _fit_until_accepted(None if args is None and words == sys.argv[1:] else words)
        part_ways()
    except SIGTERMException as ended:
        if _is_first():
            print(f"sdft: {farewell(ended, words)}", file=sys.stderr)
        return ended.code if isinstance(ended.code, int) else 128 + signal.SIGTERM
    except (GateStop, GuardStop, ReviewStop) as stop:
        print(f"sdft: {stop}", file=sys.stderr)
        return 3
    except (ValueError, OSError, MisconfigurationException) as error:
        if os.environ.get(TRACEBACK):
            raise
        told = redacted_text(clear_message(str(error)))
        print(f"sdft: error: {told}\n(set {TRACEBACK}=1 for the traceback)", file=sys.stderr)
        return 2
    return 0


def _is_first() -> bool:
    """Whether this is the process that speaks for all of its run, as far as is known already."""
    return not getattr(rank_zero_only, "rank", None)


def _fit_until_accepted(args: list[str] | None) -> None:
    """Do what the command line says, again where the gate wants it otherwise."""
    while True:
        try:
            lightning_cli(SDFTCLI, args)
            return
        except GateRetry as retry:
            args = retry.command_line(sys.argv[1:] if args is None else args)
            command = redacted_text(shlex.join(["python", "-m", "sdft", *args]))
            print(f"{retry}; trying again:\n  {command}")


def lightning_cli(kind: type[CLIT], args: list[str] | None) -> CLIT:
    """Parse a command line of Lightning's and do what it says.

    Args:
        kind: Does it.
        args: Command-line arguments; those of the process when None.
    """
    return kind(
        StudentModule,
        ContinualDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        auto_configure_optimizers=False,
        save_config_callback=ConfigFile,
        seed_everything_default=0,
        trainer_defaults=dict(TRAINER_DEFAULTS),
        save_config_kwargs={"overwrite": True},
        parser_kwargs={"description": __doc__.splitlines()[0], "epilog": EPILOG},
        parser_class=Parser,
        args=args,
    )


def _quiet() -> None:
    """Silence what is no news here: the teacher is in eval mode on purpose, and advertisements."""
    for noise in (
        "does not have many workers",
        "in eval mode at the start",
        "isinstance.treespec",
        SYNC,
    ):
        warnings.filterwarnings("ignore", message=f".*{noise}")
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
        lambda record: "Tip: For seamless" not in record.getMessage()
    )
    transformers.utils.logging.disable_progress_bar()
    if not _is_first():
        logging.getLogger("sdft").setLevel(logging.ERROR)


__all__ = ["SDFTCLI", "SDFTModule", "find_checkpoint", "main"]
