"""How a run ends at a gate."""

from __future__ import annotations

import json
from pathlib import Path


class GateStop(RuntimeError):
    """A stage was rejected, and the run has gone back to the last one that was accepted.

    Args:
        message: What happened, and what to do.
    """


class GateRetry(GateStop):
    """A stage was rejected and is to be trained again, otherwise.

    Args:
        message: What happened.
        checkpoint: What to go on from; None to begin anew.
        attempts: Failed attempts by stage, from 0.
    """

    def __init__(self, message: str, checkpoint: Path | None, attempts: dict[int, int]) -> None:
        super().__init__(message)
        self.checkpoint = checkpoint
        self.attempts = attempts

    def command_line(self, words: list[str]) -> list[str]:
        """The command line that tries again.

        Args:
            words: That of the run.
        """
        kept, skip = [], False
        for word in words:
            if not skip and word != "--ckpt_path" and not word.startswith("--ckpt_path="):
                kept.append(word)
            skip = word == "--ckpt_path"
        start = [] if self.checkpoint is None else ["--ckpt_path", str(self.checkpoint)]
        return [*kept, *start, "--gate.attempts", json.dumps(self.attempts)]


def advice(good: Path | None) -> str:
    """What to do after a rollback.

    Args:
        good: What the run has gone back to; None for the start.
    """
    kept = "Nothing was deleted: python -m sdft history lists what there is"
    if good is None:
        return f"No stage was accepted before: begin anew with other settings. {kept}"
    return (
        f"The run is back at {good}: go on with other settings and --ckpt_path {good}, or take it "
        f"as it is (python -m sdft export --ckpt {good}). {kept}"
    )
