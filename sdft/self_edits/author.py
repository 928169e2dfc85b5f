"""The model that writes self-edits: one that answers prompts and never trains."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from sdft.decode import DecodeEngine
from sdft.examples import Example, as_messages
from sdft.models import DTYPES, ModelSource
from sdft.prompts import TeacherTemplate
from sdft.respondent import Respondent
from sdft.rollout import Sampling


class Author(Respondent):
    """Loads a model once and answers texts with it.

    Args:
        source: Where model and tokenizer come from.
        sampling: How it writes.
        dtype: Precision of the weights.
        device: `auto` (the GPU when there is one) or a torch device.
        chat_template_kwargs: Passed to the chat template.

    Raises:
        ValueError: An unknown device.
    """

    def __init__(
        self,
        source: ModelSource,
        sampling: Sampling,
        dtype: str = "float32",
        device: str = "auto",
        chat_template_kwargs: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.source = source
        self.greedy = self.sampling = sampling
        self.engine = DecodeEngine()
        self.template = TeacherTemplate()
        self.chat_template_kwargs = chat_template_kwargs
        self.dtype_name = dtype
        self.place = _device(device)
        self._model: list[PreTrainedModel] = []

    @property
    def model(self) -> PreTrainedModel:
        """The model, loaded on first use."""
        if not self._model:
            loaded: Any = self.source.load_model(DTYPES[self.dtype_name])
            self._model.append(loaded.to(self.place))
        return self._model[0]

    def encode(self, text: str) -> tuple[int, ...]:
        """Token ids of a user turn, ready to be answered."""
        return tuple(self.encoder.student_ids(Example(as_messages(text), answer="")))

    def count_tokens(self, text: str) -> int:
        """Tokens of a text on its own."""
        return len(self.tokenizer.encode(text, add_special_tokens=False))


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device must be auto or a torch device, found {name!r}") from error
