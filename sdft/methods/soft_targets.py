"""Offline soft-target self-distillation: new examples, and the base's own answers beside them.

The base answers general prompts once, before training. The student then learns the new examples by
cross-entropy and keeps to the base's distribution on those answers: the loss is
(1 − w) · task + w · KL(base ‖ student).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from sdft.batch import Batch, Origin
from sdft.checks import AnyCheck
from sdft.encoded import Encoded
from sdft.generated import ANSWERS, Request, read_answers
from sdft.head_losses import head_topk_divergence, head_topk_targets
from sdft.losses import sequence_weights, token_divergence, zero_loss
from sdft.methods.offline import OfflineModule
from sdft.ranks import part_of_mean
from sdft.rollout import Rollout, Sampling
from sdft.run import task_stream
from sdft.states import Lesson, States, heads_known, learnt, states, taught_by
from sdft.stores import Store
from sdft.target_file import SOFT_TARGETS, SoftTargets, write_soft_targets
from sdft.topk import TopK, topk_divergence, topk_targets

Targets = Literal["stored", "snapshot"]


class SoftTargetModule(OfflineModule):
    """Supervised fine-tuning beside distillation of the base's behaviour on general prompts.

    Needs `data.general` and a mixture that draws from it (`sdft.mixtures.GeneralPrompts`, whose
    ratio is that of soft-target prompts to new examples). A prompt all of whose answers the checks
    dropped is never drawn.

    Args:
        weight: Share w of the distillation in the loss, in [0, 1]; 0 is SFT.
        targets_per_token: Likeliest tokens kept of each stored target; the mass of all others is
            kept as one number.
        targets: `stored`: the base's soft targets are computed once and kept on disk, and training
            holds no second model (but the tracked base, with `track_base`). `snapshot`: the base
            stays in memory as a frozen teacher and gives the targets over the whole vocabulary.
        temperature: Samples the base's answers and divides the logits of both sides.
        answers_per_prompt: Answers sampled of each prompt; a row of a batch takes one of those
            kept, drawn anew each time.
        checks: Which answers are kept (`sdft.checks`, or one's own); all when unset.
        store: Folder for answers and targets that several runs share; `<run>/generated` when
            unset.
        kwargs: See `StudentModule`.

    Raises:
        ValueError: A number out of range or an unknown kind of targets.
    """

    method = "soft_targets"
    needs_rows: Origin | None = "general"
    learns_from: frozenset[Origin] = frozenset(("new", "past", "general"))

    def __init__(
        self,
        weight: float = 0.3,
        targets_per_token: int = 20,
        targets: Targets = "stored",
        temperature: float = 1.0,
        answers_per_prompt: int = 1,
        checks: list[AnyCheck] | None = None,
        store: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(answers_per_prompt, checks, store, **kwargs)
        if targets not in get_args(Targets):
            raise ValueError(f"model.targets must be one of {get_args(Targets)}, found {targets!r}")
        if targets_per_token < 1:
            raise ValueError(
                f"model.targets_per_token must be at least 1, found {targets_per_token}"
            )
        if temperature == 0:
            raise ValueError("model.temperature must be above 0 in training, found 0")
        self.sampling = Sampling(self.greedy.max_new_tokens, temperature)
        self.targets_per_token = targets_per_token
        self.targets_from = targets
        self.weight = self.distil_weight = weight
        self._stored: SoftTargets | None = None

    @property
    def distil_weight(self) -> float:
        """Share of the distillation in the loss; may be changed while the run goes on."""
        return self._distil_weight

    @distil_weight.setter
    def distil_weight(self, value: float) -> None:
        if not 0.0 <= value <= 1.0:  # NaN, too
            raise ValueError(f"model.weight must lie in [0, 1], found {value}")
        self._distil_weight = value

    @property
    def trains_with_base(self) -> bool:
        """A snapshot takes part in every step."""
        return self.targets_from == "snapshot"

    # ---------------------------------------------------------------- before training

    def requests(self) -> list[Request]:
        """The general prompts, each once."""
        prompts = task_stream(self.trainer).general_prompts()
        return [_request(item) for item in {_key(item): item for item in prompts}.values()]

    def takes(self, prompt: Encoded) -> bool:
        """Whether the prompt has an answer that was kept; any may have one before they are made."""
        return self.book is None or _key(prompt) in self.book

    def made_from(self, requests: Sequence[Request]) -> dict[str, Any]:
        """The answers' sources, and how many tokens of a target are stored."""
        kept = self.targets_per_token if self.targets_from == "stored" else None
        return {**super().made_from(requests), "targets_per_token": kept}

    def make(self, folder: Path, requests: Sequence[Request]) -> dict[str, Any]:
        """Write the answers and, where they are to be stored, the targets."""
        facts = super().make(folder, requests)
        if self.targets_from == "snapshot":
            return facts
        answers = read_answers(folder / ANSWERS)
        kept = [place for place, answer in enumerate(answers) if answer.kept]
        kept.sort(key=lambda place: len(requests[place].ids) + len(answers[place].ids))
        targets: list[TopK | None] = [None] * len(answers)
        size = task_stream(self.trainer).batch_size
        for start in range(0, len(kept), size):
            places = kept[start : start + size]
            prompts = [requests[place].ids for place in places]
            completion = self.padded([answers[place] for place in places])
            for place, target in zip(places, self._soft(prompts, completion), strict=True):
                targets[place] = target
        write_soft_targets(folder / SOFT_TARGETS, targets)
        return facts

    @torch.no_grad()
    def _soft(self, prompts: Sequence[Sequence[int]], completion: Rollout) -> list[TopK]:
        """The base's targets of each completion, without its padding, on the CPU."""
        assert self.base is not None
        k, temperature = self.targets_per_token, self.sampling.temperature
        with self.forward_precision():
            if self.takes_states and heads_known(self.base):
                base = states(self, self.base, prompts, completion)
                target_N = head_topk_targets(*base, k, temperature)
            else:
                logits_BTV = self.logits(self.base, prompts, completion)
                target_N = topk_targets(logits_BTV[completion.mask_BT], k, temperature)
        lengths = completion.lengths_B.tolist()
        parts = zip(*(part.cpu().split(lengths) for part in target_N), strict=True)
        return [TopK(*part) for part in parts]

    def use(self, store: Store, requests: Sequence[Request]) -> None:
        """Train on a store's answers and targets; say how large the targets are."""
        super().use(store, requests)
        self._stored = None
        if self.targets_from == "stored":
            self._stored = SoftTargets(store.folder / SOFT_TARGETS)
            if self.trainer.is_global_zero:
                print(f"{self.method}: soft targets take {store.sizes[SOFT_TARGETS]:,} bytes")

    # ---------------------------------------------------------------- one step

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """(1 − w) · task + w · distillation; a part without rows adds nothing."""
        self.phases.enter("update")
        weight = self.distil_weight
        task, general = batch.of("new", "past"), batch.of("general")
        terms = []
        if weight < 1 and len(task):
            terms.append((1 - weight) * self.supervised(task))
        if weight > 0 and len(general):
            terms.append(weight * self.distillation(general, batch_idx))
        self.log("train/distil_weight", weight, batch_size=len(batch))
        return torch.stack(terms).sum() if terms else zero_loss(self.model.parameters())

    def distillation(self, batch: Batch, batch_idx: int) -> Tensor:
        """KL(base ‖ student) on stored answers: per token, then over answers; logged.

        Args:
            batch: General rows.
            batch_idx: Place of the whole batch in its stage.
        """
        rows, places = self.answered(batch, batch.student_ids, batch_idx)
        assert len(rows) == len(batch), "mixtures draw no prompt without an answer"
        completion = self.completions(places)
        mask_BT = rows.counted(completion.mask_BT)
        sequences = mask_BT.any(-1).sum()
        distil = self._distil_states if self.distils_states else self._distil_logits
        loss = distil(rows, places, completion, sequence_weights(mask_BT))
        self.log_means({"train/distillation": loss.detach()}, sequences)
        return part_of_mean(loss, sequences)

    @property
    def distils_states(self) -> bool:
        """Whether the distillation is taken from hidden states (see `fits_states`)."""
        return self.takes_states and (self._stored is not None or heads_known(self.base))

    def _distil_states(
        self, batch: Batch, places: list[int], completion: Rollout, weights_BT: Tensor
    ) -> Tensor:
        temperature = self.sampling.temperature
        prompts, weights_N = batch.student_ids, weights_BT[completion.mask_BT]
        if self._stored is not None:
            target = self._stored.rows(places, weights_N.device)

            def divergence(student: States) -> Tensor:
                return head_topk_divergence(
                    *student, target, temperature=temperature, weights_N=weights_N
                ).sum()

            return learnt(self, prompts, completion, divergence)[0]
        assert self.base is not None
        lesson = Lesson(prompts, self.base, prompts, completion, weights_BT)
        return taught_by(self, lesson, temperature)[0]

    def _distil_logits(
        self, batch: Batch, places: list[int], completion: Rollout, weights_BT: Tensor
    ) -> Tensor:
        logits_BTV = self.logits(self.model, batch.student_ids, completion)
        per_token_BT = self._divergence(batch, places, completion, logits_BTV)
        return (weights_BT * per_token_BT)[completion.mask_BT].sum()

    def _divergence(
        self, batch: Batch, places: list[int], completion: Rollout, logits_BTV: Tensor
    ) -> Tensor:
        temperature = self.sampling.temperature
        if self._stored is not None:
            target = self._stored.batch(places, logits_BTV.device)
            return topk_divergence(logits_BTV, target, temperature)
        assert self.base is not None
        self.phases.enter("score")
        with torch.no_grad():
            base_BTV = self.logits(self.base, batch.student_ids, completion)
        self.phases.enter("update")
        scaled_BTV = logits_BTV.float() / temperature
        return token_divergence(scaled_BTV, base_BTV.float() / temperature)

    # ---------------------------------------------------------------- checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the weight as it is now."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["sdft"]["weights"] = [self.weight, self.distil_weight]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the weight back, unless the configuration has set another one since."""
        super().on_load_checkpoint(checkpoint)
        configured, current = checkpoint["sdft"].get("weights", (None, None))
        if configured == self.weight:
            self.distil_weight = current


def _key(item: Encoded) -> tuple[int, ...]:
    return tuple(item.student_ids)


def _request(item: Encoded) -> Request:
    return Request(item.example, _key(item), item.scorer)
