"""What training adapters changes for the module around it: loading, restarts, checkpoints."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sdft.adapters import MARK, own_parameters, widen, without_adapters
from sdft.lora import LoRA
from sdft.quantization import check_quantization
from sdft.weights import GOOD_TEACHER, frozen_copy

_SAMPLES = 256


class AdapterTraining:
    """Adapters of a student, or none: then everything is as without this class.

    Args:
        lora: What to train; None for all weights.
        quantization: How the base is kept.

    Raises:
        ValueError: A quantised base without adapters: its weights cannot be trained.
    """

    def __init__(self, lora: LoRA | None, quantization: str | None) -> None:
        check_quantization(quantization, lora is not None)
        self.lora = lora
        self.quantization = quantization
        self._digest = self._dtype = ""
        self._start: list[Tensor] = []

    @property
    def label(self) -> str:
        """Names the adapters in messages and checkpoints; empty for none."""
        return "" if self.lora is None else self.lora.label

    def inject(self, student: PreTrainedModel) -> None:
        """Put the adapters into a freshly loaded student."""
        if self.lora is not None:
            self._digest = base_digest(student)
            self._dtype = str(student.dtype).removeprefix("torch.")
            self.lora.inject(student)
            self._start = [p.detach().clone() for p in own_parameters(student)]

    def base(self, student: PreTrainedModel) -> PreTrainedModel:
        """The model before training: a copy, or the adapted one's base itself."""
        return frozen_copy(student) if self.lora is None else without_adapters(student)

    def copy(self, student: PreTrainedModel, name: str) -> PreTrainedModel:
        """A copy of the student; teachers have room for averages."""
        other = frozen_copy(student)
        if self.lora is not None and name in ("teacher", GOOD_TEACHER):
            widen(other, self.lora.teacher_rank or 4 * self.lora.rank)
        return other

    @torch.no_grad()
    def restart(self, model: PreTrainedModel) -> None:
        """Adapters as they began: the student's as drawn, a teacher's zero; products are zero."""
        for own, start in zip(own_parameters(model), self._start, strict=True):
            if own.shape == start.shape:
                own.copy_(start)
            else:
                own.zero_()

    # ---------------------------------------------------------------- checkpoints

    def on_save(self, checkpoint: dict[str, Any], models: Sequence[str]) -> None:
        """Leave the base out of a checkpoint, which notes whose adapters it holds.

        Args:
            checkpoint: Lightning's, with our part `sdft`.
            models: The submodules that are models.
        """
        if self.lora is None:
            return
        checkpoint["sdft"] |= {
            "adapters": self.label,
            "base": self._digest,
            "dtype": self._dtype,
            "lora": asdict(self.lora),
            "quantization": self.quantization,
        }
        weights = checkpoint["state_dict"]
        for key in [k for k in weights if k.split(".")[0] in models and MARK not in k]:
            del weights[key]

    def check(self, found: Mapping[str, Any], model_name: str) -> None:
        """Compare with what a checkpoint says of itself.

        Raises:
            ValueError: It was trained with other adapters, or over another base; names both.
        """
        if found.get("adapters", "") != self.label:
            raise ValueError(
                f"the checkpoint was trained with {found.get('adapters') or 'no adapters'}, this "
                f"run with {self.label or 'no adapters'}: set model.lora as it was"
            )
        if self.lora is not None and found.get("base") != self._digest:
            raise ValueError(
                f"the checkpoint's adapters belong to another base ({found.get('model')!r}): the "
                f"weights, the precision or the quantization of {model_name!r} differ from it"
            )


@torch.no_grad()
def base_digest(model: nn.Module) -> str:
    """A hash of every parameter's name, shape, type and of values spread over it."""
    digest = hashlib.sha256()
    for name, value in sorted(model.named_parameters()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        flat = value.detach().reshape(-1)
        some = flat[:: max(1, flat.numel() // _SAMPLES)].double().cpu()
        digest.update(some.numpy().tobytes())
    return digest.hexdigest()[:16]
