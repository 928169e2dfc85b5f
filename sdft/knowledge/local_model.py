"""A model on this machine that writes questions: by chance, but the same for the same seed."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property

import torch

from sdft.examples import Message
from sdft.rollout import Sampling
from sdft.scorers.endpoint import ChatEndpoint
from sdft.scorers.judge_model import JudgeModel, Reply
from sdft.scorers.local_judge import LocalJudge
from sdft.seeding import derive_seed


class LocalWriter(LocalJudge):
    """A model on this machine, loaded on first use; it may draw what it writes.

    What is drawn is a function of the seed and the batch of requests.

    Args:
        model_name: A folder (a run's `model/`, too), a hub name, a `.gguf` file, or one of ours.
        max_reply: Longest reply, in tokens.
        temperature: Divides the logits; 0 is greedy.
        top_p: Keep the smallest set of tokens with this probability.
        seed: Of the random numbers; that of the build when unset.
        batch_size: Requests at once.
        dtype: Precision of the weights: float32, bfloat16 or float16.
        device: `auto` (the GPU when there is one) or a torch device.
        revision: Branch, tag or commit of a hub name.

    Raises:
        ValueError: A number out of range.
    """

    def __init__(
        self,
        model_name: str,
        max_reply: int = 512,
        temperature: float = 0.7,
        top_p: float = 0.95,
        seed: int | None = None,
        batch_size: int = 16,
        dtype: str = "bfloat16",
        device: str = "auto",
        revision: str | None = None,
    ) -> None:
        super().__init__(model_name, max_reply, batch_size, dtype, device, revision)
        self.sampling = Sampling(max_reply, temperature, top_p)
        self.seed = seed

    @cached_property
    def identity(self) -> str:
        """That of the model, and how it draws."""
        return f"{super().identity} {self.sampling} {self.seed}"

    def replies(self, conversations: Sequence[Sequence[Message]]) -> Iterator[tuple[int, Reply]]:
        """Batches of like lengths; the process's random numbers are left as they were."""
        self._author.sampling = self.sampling
        said = [message["content"] for talk in conversations for message in talk]
        with torch.random.fork_rng():
            torch.manual_seed(derive_seed(self.seed or 0, "knowledge", *said))
            # All within: a generator that is left open would keep the numbers changed.
            found = list(super().replies(conversations))
        yield from found


def greedy(model: JudgeModel) -> JudgeModel:
    """The same model, but its likeliest reply: who writes by chance does not check by chance.

    A model on this machine is loaded once for both; a temperature that is not sent stays so.
    """
    if isinstance(model, LocalWriter):
        _ = model._author  # both have it
    found = copy.copy(model)
    if isinstance(found, ChatEndpoint) and found.fields.get("temperature") is not None:
        found.fields = {**found.fields, "temperature": 0.0}
    if isinstance(found, LocalWriter):
        found.sampling = replace(found.sampling, temperature=0.0)
        vars(found).pop("identity", None)
    return found
