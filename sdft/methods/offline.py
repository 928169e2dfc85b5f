"""What methods share that train on answers which the base wrote before training."""

from __future__ import annotations

import tempfile
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from sdft.batch import Batch, pad
from sdft.checks import AnyCheck, count_reasons, shown_reasons
from sdft.generated import (
    ANSWERS,
    Answer,
    AnswerBook,
    Request,
    answer_all,
    read_answers,
    write_answers,
)
from sdft.methods.sft import SFTModule
from sdft.ranks import gathered
from sdft.rollout import Rollout, Sampling
from sdft.run import is_dry, run_folder, task_stream
from sdft.seeding import derive_seed, run_seed
from sdft.stores import Store, describe, find_store, fingerprint, open_store
from sdft.weights import weights_digest


class OfflineModule(SFTModule):
    """Has the base answer prompts when `fit` begins, and keeps the answers in a store.

    A store is found again by what it was made from: the base's weights, prompts, sampling, checks,
    seed. It stands in `<run>/generated/`, or in `store`; a resumed run takes the one of the run
    that it continues, or makes the same again.

    Args:
        answers_per_prompt: Answers sampled of each prompt; a row of a batch takes one of those
            kept, drawn anew each time.
        checks: Which answers are kept (`sdft.checks`, or one's own); all when unset.
        store: Folder for answers that several runs share.
        kwargs: See `StudentModule`.

    Attributes:
        sampling: How the base's answers are drawn.
        book: The answers; None until `fit` has prepared them.

    Raises:
        ValueError: A number out of range.
    """

    needs_base = True
    sampling: Sampling

    def __init__(
        self,
        answers_per_prompt: int = 1,
        checks: list[AnyCheck] | None = None,
        store: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if answers_per_prompt < 1:
            raise ValueError(
                f"model: answers and samples per prompt must be at least 1, found "
                f"{answers_per_prompt}"
            )
        self.answers_per_prompt = answers_per_prompt
        self.checks = list(checks or [])
        self.store = store
        self.book: AnswerBook | None = None
        self._folder: Path | None = None
        self._earlier: str | None = None
        self._temporary: tempfile.TemporaryDirectory[str] | None = None

    @abstractmethod
    def requests(self) -> list[Request]:
        """The prompts that the base answers, each once."""

    @property
    def trains_with_base(self) -> bool:
        """Whether training steps run the base, too."""
        return False

    # ---------------------------------------------------------------- before training

    def on_fit_start(self) -> None:
        """Have the prompts answered, or find the answers.

        Raises:
            ValueError: The checks drop every answer, a check raised, or a store is damaged.
        """
        super().on_fit_start()
        self.phases.enter("prepare")
        self.book = None
        requests = [r for r in self.requests() for _ in range(self.answers_per_prompt)]
        source = (self._roots(), self.method, self.made_from(requests))
        check_same_stores(gathered(find_store(*source) is not None), source[0])
        store = open_store(*source, lambda folder: self.make(folder, requests))
        self.use(store, requests)
        self.phases.enter("")
        if not (self.trains_with_base or self.track_base or self._restarts):
            self._base = []  # its memory is needed no longer

    def made_from(self, requests: Sequence[Request]) -> dict[str, Any]:
        """Everything that the answers depend on."""
        assert self.base is not None
        scorers = {id(request.scorer): describe(request.scorer) for request in requests}
        prompts = [(r.ids, repr(r.example), scorers[id(r.scorer)]) for r in requests]
        return {
            "model": weights_digest(self.base),
            "prompts": fingerprint({"prompts": prompts}),
            "sampling": asdict(self.sampling),
            "ends": self.eos_ids,
            "checks": describe(self.checks),
            "engine": describe(type(self.engine)),
            "batch_size": task_stream(self.trainer).eval_batch_size,
            "precision": str(self.trainer.precision),
            "seed": run_seed(),
        }

    def make(self, folder: Path, requests: Sequence[Request]) -> dict[str, Any]:
        """Fill an empty folder; returns what is worth knowing about it."""
        assert self.base is not None
        batch_size = task_stream(self.trainer).eval_batch_size
        arguments = (self.sampling, self.checks, batch_size, run_seed())
        answers = answer_all(self, self.base, requests, *arguments)
        write_answers(folder / ANSWERS, requests, answers)
        return {
            "answers": len(answers),
            "kept": sum(answer.kept for answer in answers),
            "truncated": sum(answer.truncated for answer in answers),
            "tokens": sum(len(answer.ids) for answer in answers if answer.kept),
            "dropped": count_reasons([answer.reason for answer in answers]),
        }

    def use(self, store: Store, requests: Sequence[Request]) -> None:
        """Train on what a store holds."""
        answers = read_answers(store.folder / ANSWERS)
        self.book = AnswerBook(requests, answers)
        self._folder = store.folder.absolute()
        if self.trainer.is_global_zero:
            print(f"{self.method}: {_summary(store)}")

    def _roots(self) -> list[Path]:
        """Where a store may stand; a new one goes into the first."""
        if self.store is not None:
            return [Path(self.store)]
        if is_dry(self.trainer):
            self._temporary = tempfile.TemporaryDirectory()
            return [Path(self._temporary.name)]
        own = run_folder(self.trainer) / "generated"
        return [own, *([Path(self._earlier)] if self._earlier else [])]

    # ---------------------------------------------------------------- in a step

    def answered(
        self, batch: Batch, prompts: Sequence[Sequence[int]], batch_idx: int
    ) -> tuple[Batch, list[int]]:
        """The rows that have a kept answer, and the place of the one drawn for each.

        Args:
            batch: B rows.
            prompts: The B prompts that were answered.
            batch_idx: Place of the batch in its stage.
        """
        assert self.book is not None, "answers are made when fit begins"
        place = (self.trainer.current_epoch, batch_idx)
        rows = None if batch.share is None else batch.share.places
        drawn = self.book.choose(prompts, derive_seed(run_seed(), "answers", *place), rows)
        found = {row: answer for row, answer in enumerate(drawn) if answer is not None}
        return batch.rows(list(found)), list(found.values())

    def completions(self, places: Sequence[int]) -> Rollout:
        """The answers at these places, as completions."""
        assert self.book is not None
        return self.padded([self.book.answers[place] for place in places])

    def padded(self, answers: Sequence[Answer]) -> Rollout:
        """Answers as completions, padded on the right."""
        ids_BT, mask_BT = pad([a.ids for a in answers], self.pad_id, "right", self.device)
        return Rollout(ids_BT, mask_BT, torch.tensor([a.truncated for a in answers]))

    # ---------------------------------------------------------------- checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Note where the answers are."""
        super().on_save_checkpoint(checkpoint)
        if self._folder is not None and self._temporary is None:
            checkpoint["sdft"]["generated"] = str(self._folder.parent)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Look for the answers where the checkpoint's run had them."""
        super().on_load_checkpoint(checkpoint)
        self._earlier = checkpoint["sdft"].get("generated")


def check_same_stores(found: Sequence[bool], roots: Sequence[Path]) -> None:
    """What is to be made is made by all processes together, or by none.

    Raises:
        ValueError: Some processes see the store, others do not.
    """
    if any(found) and not all(found):
        raise ValueError(
            f"model.store: {found.count(True)} of {len(found)} processes see the answers in "
            f"{', '.join(map(str, roots))}: put the folder where all machines see it"
        )


def _summary(store: Store) -> str:
    facts: Mapping[str, Any] = store.facts
    dropped = f" ({shown_reasons(facts['dropped'])})" if facts["dropped"] else ""
    return (
        f"{facts['kept']} of {facts['answers']} answers of the base kept{dropped}, "
        f"{facts['tokens']} tokens, {'found' if store.reused else 'written'} in {store.folder}"
    )
