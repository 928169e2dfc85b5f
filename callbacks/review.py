"""Pauses before each stage for a person to look at what the student would learn from."""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from sdft.atomic import atomic_write
from sdft.encoded import collate
from sdft.methods.offline import OfflineModule
from sdft.module import SDFTModule
from sdft.ranks import agreed
from sdft.rollout import Sampling, evaluation_mode
from sdft.rollout_filter import CheckFilter, Judged
from sdft.run import is_dry, run_folder, task_stream
from sdft.seeding import derive_seed, run_seed
from sdft.student import StudentModule

GO, STOP = "go", "stop"


class ReviewStop(RuntimeError):
    """A person has stopped the run before a stage; nothing of the stage was trained."""


class Review(Callback):
    """Shows a sample of the student's own text before each stage, and waits for a person.

    The sample is of the stage's prompts: rollouts as training would draw them, or, where a method
    trains on answers made beforehand, these; with what the checks say of each. It is printed, and
    written to `review-<stage>.jsonl`. In a terminal, Enter goes on and `s` stops. Without one, the
    run waits until the file `review-<stage>.answer` beside it holds `go` or `stop`.

    Args:
        count: Texts per stage; 0 never pauses. `--review` alone shows four.

    Raises:
        ValueError: A negative count.
    """

    def __init__(self, count: int = 0) -> None:
        if count < 0:
            raise ValueError(f"review.count must be 0 or more, found {count}")
        self.count = count

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the sample, and wait.

        Raises:
            ReviewStop: The person said so.
        """
        if not self.count or is_dry(trainer):
            return
        assert isinstance(pl_module, StudentModule)
        stage = trainer.current_epoch
        task = task_stream(trainer).tasks[stage].name
        sample = self.sample(trainer, pl_module)
        answer = GO
        if trainer.is_global_zero:
            path = run_folder(trainer) / f"review-{stage + 1}.jsonl"
            _write(path, sample)
            print(shown(task, sample))
            answer = ask(path.with_suffix(".answer"))
        if agreed(answer) == STOP:
            raise ReviewStop(
                f"stopped in review before stage {stage + 1} ({task}); what came before is kept: "
                "go on with --ckpt_path last" + (" once there is a checkpoint" if not stage else "")
            )

    @torch.no_grad()
    def sample(self, trainer: Trainer, module: StudentModule) -> list[Judged]:
        """What the stage would learn from, some of it; the same for the same seed."""
        data, stage = task_stream(trainer), trainer.current_epoch
        seed = derive_seed(run_seed(), "review", stage)
        if isinstance(module, OfflineModule) and module.book is not None:
            answers = module.book.requests_and_answers()
            chosen = random.Random(seed).sample(answers, min(self.count, len(answers)))
            return [Judged(r.example, a.text, len(a.ids), a.truncated, a.reason) for r, a in chosen]
        items = data.encoded(data.tasks[stage], "train")
        batch = collate(random.Random(seed).sample(items, min(self.count, len(items))))
        sampling = module.drawing if isinstance(module, SDFTModule) else None
        # A generator of its own, so that looking never changes what is trained.
        with torch.random.fork_rng(), module.forward_precision(), evaluation_mode(module.model):
            torch.manual_seed(seed)
            limit = Sampling(module.greedy.max_new_tokens)
            completion = module.sample(module.model, batch.student_ids, sampling or limit)
        filtering = getattr(module, "rollout_filter", None)
        if not isinstance(filtering, CheckFilter):
            filtering = CheckFilter([], module.scored_text, {})
        return filtering.judge(batch, completion)


def shown(task: str, sample: Sequence[Judged]) -> str:
    """The sample as text."""
    parts = [f"\nreview: {len(sample)} of what {task!r} would learn from"]
    for number, one in enumerate(sample, 1):
        cut = ", cut by the length limit" if one.truncated else ""
        verdict = "kept" if one.reason is None else f"DROPPED: {one.reason}"
        parts.append(
            f"--- {number}, {one.tokens} tokens{cut}, {verdict}\n"
            f"{one.example.prompt}\n>>> {one.text}"
        )
    return "\n".join(parts)


def ask(file: Path) -> str:
    """What the person says: `go` or `stop`; waits for it.

    Args:
        file: Where the answer is looked for without a terminal.
    """
    if sys.stdin is not None and sys.stdin.isatty():
        return _asked()
    print(f"review: waiting for {file} to say {GO} or {STOP}", flush=True)
    while True:
        if file.is_file():
            answer = file.read_text(encoding="utf-8", errors="replace").strip().casefold()
            if answer in (GO, STOP):
                return answer
        time.sleep(0.5)


def _asked() -> str:
    while True:
        try:
            said = input("review: Enter goes on, s stops: ").strip().casefold()
        except EOFError:
            return STOP
        if said in ("", "g", "y", GO):
            return GO
        if said in ("s", "n", "q", STOP):
            return STOP


def _write(path: Path, sample: Sequence[Judged]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".answer").unlink(missing_ok=True)  # of an earlier pause
    lines: list[dict[str, Any]] = [one.to_dict() for one in sample]
    with atomic_write(path) as file:
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        file.write_text(text, encoding="utf-8")
