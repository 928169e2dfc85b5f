"""Rollouts drawn ahead: one call of the engine for the batches of several optimizer steps.

A larger decode batch costs hardly more time than a small one. The price is that all but the first
step's rollouts are stale: an older student drew them. Each carries the version of the policy that
did, the number of optimizer steps made until then.

A window covers the batches of `updates` optimizer steps, counted from the stage's beginning, and
never reaches into the next stage. Drawing it does not move the loader. Its unused part is the one
thing that a step hands to the next: a checkpoint carries it, so that a resumed run uses the very
rollouts of the uninterrupted one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch

from sdft.batch import Batch
from sdft.ranks import gathered
from sdft.rollout import Rollout
from sdft.run import task_stream
from sdft.seeding import derive_seed

if TYPE_CHECKING:
    from sdft.module import SDFTModule

Stale = Literal["correct", "ignore", "recompute"]


def check_window(updates: int, stale: str) -> None:
    """Raise ValueError unless there can be such a window."""
    if updates < 1:
        raise ValueError(f"updates_per_generation must be at least 1, found {updates}")
    if stale not in get_args(Stale):
        raise ValueError(f"stale must be one of {', '.join(get_args(Stale))}, found {stale!r}")


@dataclass(frozen=True)
class Draw:
    """The completions of one batch.

    Attributes:
        completion: One per row and rollout.
        version: Optimizer steps that the policy had made when it drew them.
        limit: Tokens that the longest was allowed.
    """

    completion: Rollout
    version: int
    limit: int


class Window:
    """Draws not used yet, by the index of their batch in the stage.

    Attributes:
        stage: The stage that they belong to.
    """

    def __init__(self) -> None:
        self.stage = -1
        self._draws: dict[int, tuple[int, Draw]] = {}  # with the digest of the prompts

    def __len__(self) -> int:
        return len(self._draws)

    def put(self, stage: int, index: int, batch: Batch, draw: Draw) -> None:
        """Keep the draw of a batch; those of another stage are dropped."""
        if stage != self.stage:
            self._draws.clear()
            self.stage = stage
        self._draws[index] = (_digest(batch), draw)

    def take(self, stage: int, index: int, batch: Batch) -> Draw | None:
        """The draw of a batch, which is then no longer there; earlier ones go, too.

        None where there is none, or only one for other prompts: a run may be resumed with another
        batch size.
        """
        if stage != self.stage:
            self._draws.clear()
        digest, draw = self._draws.pop(index, (None, None))
        self._draws = {place: kept for place, kept in self._draws.items() if place > index}
        return draw if digest == _digest(batch) else None

    def clear(self) -> None:
        """Drop everything."""
        self._draws.clear()

    # ---------------------------------------------------------------- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Tensors on the CPU and plain numbers, of this process."""
        draws = {index: _saved(digest, draw) for index, (digest, draw) in self._draws.items()}
        return {"stage": self.stage, "draws": draws}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """What `state_dict` gave."""
        self.stage = state["stage"]
        self._draws = {index: _restored(saved) for index, saved in state["draws"].items()}


def window_end(index: int, updates: int, accumulate_batches: int) -> int:
    """Index behind the last batch of the window that a batch lies in."""
    span = updates * accumulate_batches
    return (index // span + 1) * span


def look_ahead(module: SDFTModule, index: int) -> None:
    """Draw the batches from `index` to the end of its window, and keep the draws in the window.

    One call of the engine draws them all. Those that will be stale when their turn comes get their
    log-probabilities now, under the policy that drew them, where they are to be corrected.
    """
    trainer, policy = module.trainer, module.global_step
    accumulate_batches = trainer.accumulate_grad_batches
    updates = 1 if module.stale == "recompute" else module.updates_per_generation
    end = min(window_end(index, updates, accumulate_batches), trainer.num_training_batches)
    coming = task_stream(trainer).coming(index, int(end))
    batches = [batch.repeat(module.rollouts_per_prompt) for batch in coming]
    completions = _split(module.rollout(Batch.joined(batches)), batches)
    step, limit = index // accumulate_batches, module.drawing.max_new_tokens
    module.phases.enter("score")
    for place, (batch, completion) in enumerate(zip(batches, completions, strict=True), index):
        fresh = place // accumulate_batches == step
        if not fresh and module.stale == "correct" and completion.logps_BT is None:
            completion = replace(completion, logps_BT=module.log_probs(batch, completion))
        module.window.put(module.current_epoch, place, batch, Draw(completion, policy, limit))
    module.phases.enter("generate")


def _split(completion: Rollout, batches: Sequence[Batch]) -> list[Rollout]:
    ends = accumulate(map(len, batches), initial=0)
    return [completion.rows(range(start, end)).trimmed() for start, end in pairwise(ends)]


def of_all_ranks(state: dict[str, Any]) -> list[dict[str, Any]]:
    """The state of every process: each draws its own rollouts, and one writes the checkpoint."""
    return gathered(state)


def _digest(batch: Batch) -> int:
    return derive_seed(repr(batch.student_ids))


def _saved(digest: int, draw: Draw) -> dict[str, Any]:
    completion = draw.completion
    return {
        "prompts": digest,
        "version": draw.version,
        "limit": draw.limit,
        "ids": completion.ids_BT.cpu().clone(),
        "mask": completion.mask_BT.cpu().clone(),
        "truncated": completion.truncated_B.cpu().clone(),
        "logps": None if completion.logps_BT is None else completion.logps_BT.cpu().clone(),
    }


def _restored(saved: dict[str, Any]) -> tuple[int, Draw]:
    completion = Rollout(saved["ids"], saved["mask"], saved["truncated"], saved["logps"])
    return saved["prompts"], Draw(completion, saved["version"], saved["limit"])


def on_device(draw: Draw, device: torch.device) -> Draw:
    """The draw on the device, from which a restored one was taken."""
    c = draw.completion
    logps_BT = None if c.logps_BT is None else c.logps_BT.to(device)
    moved = Rollout(c.ids_BT.to(device), c.mask_BT.to(device), c.truncated_B.to(device), logps_BT)
    return replace(draw, completion=moved)
