"""The student of a training run and what it is compared with: the base, the teacher, snapshots."""

from __future__ import annotations

from typing import cast

from torch import Tensor
from transformers import PreTrainedModel

from sdft.adapter_training import AdapterTraining
from sdft.models import DTYPES
from sdft.penalties import Penalty
from sdft.placement import spread
from sdft.run import task_stream
from sdft.shared_steps import SharedSteps
from sdft.weights import halved, set_weights


class Models(SharedSteps):
    """Loads the student, and copies it before anything trains.

    The attributes without a value are set by the constructor of `StudentModule`.
    """

    needs_base = False
    """Whether the method itself works with the base model, tracked or not."""
    copies: tuple[str, ...] = ()
    """Submodules that are frozen fp32 copies of the student and exist in `fit` alone."""

    student: PreTrainedModel | None
    dtype_name: str
    attn_implementation: str | None
    gradient_checkpointing: bool
    adapters: AdapterTraining
    penalty: Penalty | None
    track_base: bool
    base_storage: str
    _base: list[PreTrainedModel]  # no submodule: neither trained, sharded nor checkpointed
    _restored: dict[str, dict[str, Tensor]]

    @property
    def model(self) -> PreTrainedModel:
        """The student, loaded on first use."""
        if self.student is None:
            student = self.source.load_model(
                DTYPES[self.dtype_name], self.attn_implementation, self.adapters.quantization
            )
            self.adapters.inject(student)
            self.student = cast(PreTrainedModel, student.train())
            if self.gradient_checkpointing:
                self.student.gradient_checkpointing_enable()
            self.prepare_copies(self.student)
        return self.student

    def prepare_copies(self, student: PreTrainedModel) -> None:
        """Copy the freshly loaded student where the method needs it, before anything trains."""
        if not self.fitting:
            return
        if self.track_base or self.needs_base or self._restarts:
            base = self.adapters.base(student)
            self._base = [halved(base) if self.base_storage == "bfloat16" else base]
        for name in self.copies:
            setattr(self, name, self.adapters.copy(student, name))
        if self.penalty is not None:
            self.penalty.attach(student)

    def add_copy(self, name: str) -> None:
        """Keep one more copy; to be asked for before training, while the student is the base."""
        self.copies = tuple(dict.fromkeys((*self.copies, name)))
        if self.student is not None and getattr(self, name, None) is None:
            setattr(self, name, self.adapters.copy(self.student, name))

    @property
    def base(self) -> PreTrainedModel | None:
        """The model as it was before training, on the student's device; None when not tracked."""
        if self._base and self._base[0].device != self.device:
            self._base[0].to(self.device)  # type: ignore[arg-type]
        return self._base[0] if self._base else None

    @property
    def fitting(self) -> bool:
        """Whether this is training, or no trainer is there to tell."""
        return self._trainer is None or self._trainer.state.fn == "fit"

    @property
    def _restarts(self) -> bool:
        return self._trainer is not None and task_stream(self.trainer).from_base_each_task

    def configure_model(self) -> None:
        """Load the student and spread it over processes; called once per entry point."""
        self.model  # noqa: B018 - loads on first use
        copies = [getattr(self, name) for name in self.copies if self.fitting]
        spread(self, copies, self._base)

    def restart(self) -> None:
        """Make the student, and its copies, the base again."""
        models = (self.model, *(getattr(self, name) for name in self.copies))
        assert self.base is not None
        for model in models:
            if self.adapters.lora is None:
                set_weights(model, self.base)
            else:
                self.adapters.restart(model)
