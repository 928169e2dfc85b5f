"""Answering prompts and scoring the answers: what validation, test and prediction need."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sdft.batch import Batch
from sdft.encoded import Encoded
from sdft.evaluation import Response, score_responses
from sdft.models import ModelSource, eos_token_ids
from sdft.prompts import PromptEncoder, TeacherTemplate
from sdft.rollout import Rollout, RolloutEngine, Sampling
from sdft.run import task_stream

log = logging.getLogger(__name__)


class Respondent(LightningModule):
    """A model that answers prompts.

    Attributes:
        engine: Makes the responses.
        greedy: How evaluation draws them.
        source: Where model and tokenizer come from.
        template: The teacher's last user turn.
        chat_template_kwargs: Passed to the chat template of both prompts.
    """

    engine: RolloutEngine
    greedy: Sampling
    source: ModelSource
    template: TeacherTemplate
    chat_template_kwargs: dict[str, Any] | None

    @property
    @abstractmethod
    def model(self) -> PreTrainedModel:
        """The model that answers."""

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The student's tokenizer, with a chat template and a pad token."""
        return self.source.load_tokenizer()

    @cached_property
    def encoder(self) -> PromptEncoder:
        """Turns examples into student and teacher prompts."""
        return PromptEncoder(self.tokenizer, self.template, self.chat_template_kwargs)

    @property
    def prompt_room(self) -> int | None:
        """Tokens that the model's context leaves for a prompt."""
        config = self.model.config.get_text_config()
        context = getattr(config, "max_position_embeddings", None)
        return None if context is None else int(context) - self.greedy.max_new_tokens

    def takes(self, prompt: Encoded) -> bool:
        """Whether mixtures may draw this general prompt; all of them by default."""
        return True

    @cached_property
    def eos_ids(self) -> list[int]:
        """Token ids that end a response."""
        return eos_token_ids(self.model, self.tokenizer)

    @property
    def pad_id(self) -> int:
        """Fills padding; masked everywhere."""
        return cast(int, self.tokenizer.pad_token_id)

    def sample(
        self, model: PreTrainedModel, prompts: Sequence[Sequence[int]], sampling: Sampling
    ) -> Rollout:
        """One completion per encoded prompt, from any model of this architecture."""
        return self.engine.generate(model, prompts, sampling, self.eos_ids, self.pad_id)

    @torch.no_grad()
    def respond(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[Response]:
        """Answer encoded prompts with the student.

        Args:
            prompts: B prompts, unpadded.
            sampling: `self.greedy` for evaluation.

        Returns:
            B responses.
        """
        with self.forward_precision():
            rollout = self.sample(self.model, prompts, sampling)
        texts = [self.decode(ids) for ids in rollout.completions()]
        facts = zip(texts, rollout.lengths_B.tolist(), rollout.truncated_B.tolist(), strict=True)
        return [Response(*fact) for fact in facts]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of a completion, without special tokens and outer white space."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True)).strip()

    def forward_precision(self) -> AbstractContextManager[Any]:
        """The trainer's precision, for forward passes outside its own steps."""
        if self._trainer is None:
            return nullcontext()
        return self._trainer.precision_plugin.forward_context()

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Greedy accuracy and response length on the validation split."""
        self._evaluation_step(batch, dataloader_idx, "validation")

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Greedy accuracy and response length on the test split."""
        self._evaluation_step(batch, dataloader_idx, "test")

    def _evaluation_step(self, batch: Batch, dataloader_idx: int, split: str) -> None:
        task = task_stream(self.trainer).evaluating[dataloader_idx]
        responses = self.respond(batch.student_ids, self.greedy)
        values = {"length": sum(r.tokens for r in responses) / len(batch)}
        try:
            scores = score_responses(task, batch.examples, responses)
            values["accuracy"] = sum(scores) / len(batch)
        except ValueError as error:
            log.warning("%s", error)
        self.log_dict(
            {f"{split}/{task.name}/{key}": value for key, value in values.items()},
            add_dataloader_idx=False,
            batch_size=len(batch),
        )

    def predict_step(
        self, batch: Batch, batch_idx: int, dataloader_idx: int = 0
    ) -> list[dict[str, Any]]:
        """Greedy responses as records of task, prompt, response and answer."""
        task = task_stream(self.trainer).evaluating[dataloader_idx]
        responses = self.respond(batch.student_ids, self.greedy)
        return [
            {
                "task": task.name,
                "prompt": [dict(message) for message in example.messages],
                "response": response.text,
                "answer": example.answer,
                "truncated": response.truncated,
            }
            for example, response in zip(batch.examples, responses, strict=True)
        ]
