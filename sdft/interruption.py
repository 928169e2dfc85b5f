"""Signals that ask a run to end: held until it can be ended without a loss.

SIGTERM and Ctrl-C ask for the end; SIGUSR1 and SIGUSR2 are what schedulers announce one with. The
first signal is noted and the step under way goes on; `StageCheckpoint` saves after it and raises
`Interrupted`. A second signal ends the process at once.
"""

from __future__ import annotations

import os
import shlex
import signal
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from lightning.pytorch.utilities.exceptions import SIGTERMException

from sdft.redaction import redacted

SIGNALS = tuple(
    getattr(signal, name)
    for name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2")
    if hasattr(signal, name)
)
_LIGHTNING = "lightning."


class Interrupted(SIGTERMException):
    """A run has ended because a signal asked it to; its exit status is 128 + the signal's number.

    Args:
        number: The signal's.
        step: Optimizer steps made.
        checkpoint: What to go on from; None where nothing has been trained yet.
        watched: Whether another process of the run watches this one, and kills all where its exit
            status is not 0: so it is 0.
    """

    def __init__(
        self, number: int, step: int, checkpoint: Path | None, watched: bool = False
    ) -> None:
        super().__init__(0 if watched else 128 + number)
        self.number = number
        self.step = step
        self.checkpoint = checkpoint

    def __str__(self) -> str:
        name = signal.Signals(self.number).name
        if self.checkpoint is None:
            return f"ended by {name} before anything was trained"
        return f"ended by {name} after step {self.step}, which is saved"


class Interruption:
    """Notes the first signal.

    Attributes:
        asked: The signal that asks for the end; None as long as none has come.
    """

    def __init__(self) -> None:
        self.asked: int | None = None
        self._before: dict[int, Any] = {}
        self._forward: Callable[[int], None] = lambda number: None

    def begin(self, forward: Callable[[int], None]) -> None:
        """Handle the signals from now on; handlers of the user's own stay, and so do ignored ones.

        Args:
            forward: Called with a second signal, just before it ends this process.
        """
        self.asked = None
        self._forward = forward
        if threading.current_thread() is not threading.main_thread():
            return
        for number in SIGNALS:
            handler = signal.getsignal(number)
            if _is_free(number, handler):
                self._before[number] = handler
                signal.signal(number, self._note)

    def end(self) -> None:
        """Give back the handlers, unless somebody else has taken them over meanwhile."""
        for number, handler in self._before.items():
            if signal.getsignal(number) == self._note:
                signal.signal(number, handler)
        self._before.clear()

    def pass_on(self, number: int) -> None:
        """Hand a scheduler's signal to Lightning's own handler, where it has one.

        Under SLURM it writes a checkpoint of its own, from which the next attempt of the job starts
        by itself, and puts the job back into the queue. Left alone it would do so in the middle of
        a step.
        """
        handler = self._before.get(number)
        if number not in (signal.SIGTERM, signal.SIGINT) and callable(handler):
            handler(number, None)

    def _note(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if self.asked is not None:
            _say(f"{name}: ending at once")
            self._forward(number)
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        self.asked = number
        for handler in _users(self._before.get(number)):
            handler(number, frame)
        _say(f"{name}: this step is finished and saved first; a second signal ends the run at once")


def farewell(ended: SIGTERMException, words: Sequence[str]) -> str:
    """What a run says that a signal has ended, with the command that goes on, but for secrets.

    Args:
        ended: What has ended it.
        words: Its command line.
    """
    if not isinstance(ended, Interrupted):
        return "terminated; go on with --ckpt_path last"
    if ended.checkpoint is None:
        return f"{ended}: start it again"
    kept, flag = [], ""
    for word in words:
        name, _, value = word.partition("=")
        if flag != "--ckpt_path" and name != "--ckpt_path":
            shown = f"{name}={redacted(value, name)}" if value else redacted(word, flag)
            kept.append(str(shown))
        flag = word if word.startswith("--") else ""
    command = ["python", "-m", "sdft", *kept, "--ckpt_path", str(ended.checkpoint)]
    return f"{ended}; go on with\n  {shlex.join(command)}"


def _is_free(number: int, handler: Any) -> bool:
    """Whether a signal is nobody's: it has the system's handler, Python's or Lightning's."""
    if number == signal.SIGINT:
        return handler is signal.default_int_handler
    own = type(handler).__module__.startswith(_LIGHTNING)
    return handler == signal.SIG_DFL or own


def _users(handler: Any) -> list[Callable[[int, FrameType | None], Any]]:
    """The handlers of the user's own that Lightning's calls, too."""
    found = getattr(handler, "signal_handlers", [])
    return [
        own
        for own in found
        if callable(own) and not str(getattr(own, "__module__", "")).startswith(_LIGHTNING)
    ]


def _say(text: str) -> None:
    """Write a line, safely even where the signal has come in the middle of another `print`."""
    os.write(2, f"sdft: {text}\n".encode())
