"""Answering prompts and scoring the answers: what validation, test and prediction need."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sdft.batch import Batch
from sdft.draws import Draws, drawing
from sdft.encoded import Encoded
from sdft.evaluation import Response, score_responses
from sdft.examples import Example
from sdft.flops import ModelFlops
from sdft.models import ModelSource, eos_token_ids
from sdft.packing import completion_hidden
from sdft.phases import PhaseClock
from sdft.prompts import PromptEncoder, TeacherTemplate
from sdft.ranks import gathered
from sdft.rollout import Rollout, RolloutEngine, Sampling
from sdft.run import task_stream
from sdft.scorers import explained
from sdft.scoring import completion_logits
from sdft.sharding import forwarded, whole
from sdft.suite import Suite
from sdft.thinking import Thinking, ThoughtReader

log = logging.getLogger(__name__)


class Respondent(LightningModule):
    """A model that answers prompts.

    Attributes:
        engine: Makes the responses.
        greedy: How evaluation draws them.
        source: Where model and tokenizer come from.
        template: The teacher's last user turn.
        chat_template_kwargs: Passed to the chat template of both prompts.
        thinking: How the model thinks; None where thoughts are not told from answers.
        rest_point: Called where a run may end that was asked to: after every rollout, and with true
            where all processes call it together.
    """

    rest_point: Callable[[bool], None] = staticmethod(lambda together: None)
    engine: RolloutEngine
    greedy: Sampling
    source: ModelSource
    template: TeacherTemplate
    chat_template_kwargs: dict[str, Any] | None
    thinking: Thinking | None = None

    @property
    @abstractmethod
    def model(self) -> PreTrainedModel:
        """The model that answers."""

    @cached_property
    def phases(self) -> PhaseClock:
        """Which phase is running, and what the phases have cost."""
        return PhaseClock()

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The student's tokenizer, with a chat template and a pad token."""
        return self.source.load_tokenizer()

    @cached_property
    def encoder(self) -> PromptEncoder:
        """Turns examples into student and teacher prompts."""
        return PromptEncoder(self.tokenizer, self.template, *self.template_kwargs)

    @property
    def template_kwargs(self) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
        """Arguments of the chat template for the student's and for the teacher's prompts."""
        if self.thinking is None:
            return self.chat_template_kwargs, self.chat_template_kwargs
        return self.thinking.template_kwargs(self.tokenizer, self.chat_template_kwargs)

    @cached_property
    def thoughts(self) -> ThoughtReader | None:
        """Tells thoughts from answers; None where the model is not one that thinks."""
        return None if self.thinking is None else ThoughtReader(self.tokenizer, self.thinking)

    @cached_property
    def opens_thought(self) -> bool:
        """Whether the student's prompts end inside a thought."""
        any_prompt = Example(({"role": "user", "content": "."},), answer="")
        return self.thoughts is not None and self.thoughts.opened(
            self.encoder.student_ids(any_prompt)
        )

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
        self,
        model: PreTrainedModel,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        draws: Draws | None = None,
    ) -> Rollout:
        """One completion per encoded prompt, from any model of this architecture; counted.

        A collective call for a sharded model, whose weights are whole meanwhile.

        Args:
            model: Answers.
            prompts: B prompts, unpadded.
            sampling: How completions are drawn.
            draws: Random numbers that do not depend on how rows are dealt among processes, for
                engines that know them (`DecodeEngine`); torch's global generator when None.
        """
        with whole(model), drawing(draws):
            rollout = self.engine.generate(model, prompts, sampling, self.eos_ids, self.pad_id)
        if self.phases.current:
            read, drawn = [len(prompt) for prompt in prompts], rollout.lengths_B.tolist()
            flops = ModelFlops.of(model).sampling(read, drawn)
            self.phases.count(sum(read) + sum(drawn), flops)
        self.rest_point(False)
        return rollout

    def logits(
        self, model: PreTrainedModel, prompts: Sequence[Sequence[int]], completion: Rollout
    ) -> Tensor:
        """Next-token logits at each completion token, given its prompt: `[B, T, V]`; counted."""
        self.count_pass(model, prompts, completion)
        return completion_logits(model, prompts, completion, self.pad_id)

    def hidden(
        self, model: PreTrainedModel, prompts: Sequence[Sequence[int]], completion: Rollout
    ) -> Tensor:
        """Hidden states that predict the completion tokens, without padding: `[N, D]`; counted."""
        self.count_pass(model, prompts, completion)
        return forwarded(model, lambda: completion_hidden(model, prompts, completion))

    def count_pass(
        self, model: PreTrainedModel, prompts: Sequence[Sequence[int]], completion: Rollout
    ) -> None:
        """Count a pass over prompts and completions, the backward pass too where gradients are on.

        `logits` does it; a method with a forward pass of its own calls this beside it.

        Args:
            model: What they go through.
            prompts: B prompts, unpadded.
            completion: B completions.
        """
        if not self.phases.current:
            return
        given, wanted = [len(prompt) for prompt in prompts], completion.lengths_B.tolist()
        flops = ModelFlops.of(model).scoring(given, wanted, learns=torch.is_grad_enabled())
        self.phases.count(sum(given) + sum(wanted), flops)

    @torch.no_grad()
    def respond(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        draws: Draws | None = None,
    ) -> list[Response]:
        """Answer encoded prompts with the student.

        Args:
            prompts: B prompts, unpadded.
            sampling: `self.greedy` for evaluation.
            draws: See `sample`.

        Returns:
            B responses.
        """
        with self.forward_precision():
            rollout = self.sample(self.model, prompts, sampling, draws)
        facts = zip(rollout.completions(), rollout.truncated_B.tolist(), strict=True)
        pairs = zip(prompts, facts, strict=True)
        return [self.response(prompt, ids, cut) for prompt, (ids, cut) in pairs]

    def response(self, prompt: Sequence[int], ids: Sequence[int], truncated: bool) -> Response:
        """A completion as what is scored.

        Args:
            prompt: Token ids of its prompt.
            ids: Its token ids.
            truncated: Whether the length limit ended it.
        """
        if self.thoughts is None or self.thinking is None:
            return Response(self.decode(ids), len(ids), truncated, tuple(ids))
        found = self.thoughts.read(ids, self.thoughts.opened(prompt))
        text = found.answer if self.thinking.scored == "answer" else self.decode(ids)
        return Response(text, len(ids), truncated, tuple(ids), found)

    def scored_text(self, ids: Sequence[int]) -> str:
        """What is scored of a completion of a student's prompt."""
        if self.thoughts is None or self.thinking is None or self.thinking.scored != "answer":
            return self.decode(ids)
        return self.thoughts.read(ids, self.opens_thought).answer

    def decode(self, ids: Sequence[int]) -> str:
        """The text of a completion, without special tokens and outer white space."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True)).strip()

    def forward_precision(self) -> AbstractContextManager[Any]:
        """The trainer's precision, for forward passes outside its own steps."""
        if self._trainer is None:
            return nullcontext()
        return self._trainer.precision_plugin.forward_context()

    def on_validation_start(self) -> None:
        """Validation is evaluation; the step before it has closed its last phase."""
        self.phases.enter("evaluate")

    def on_validation_end(self) -> None:
        """The loop is over."""
        self.phases.enter("")

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
        if self.thoughts is not None:
            lengths = [r.thoughts.tokens for r in responses if r.thoughts is not None]
            values["thought_length"] = sum(lengths) / len(batch)
        try:
            scores = score_responses(task, batch.examples, responses)
            values["accuracy"] = sum(scores) / len(batch)
        except ValueError as error:
            log.warning("%s", error)
        values, count = _of_all(values, batch.count)
        self.log_dict(
            {f"{split}/{task.name}/{key}": value for key, value in values.items()},
            add_dataloader_idx=False,
            batch_size=count,
        )

    def on_test_epoch_end(self) -> None:
        """What suites measure by themselves, on their own examples."""
        data = task_stream(self.trainer)
        for suite in data.suites:
            if isinstance(suite, Suite):
                cell = suite.measure(self, data.eval_batch_size)
                if cell.score is not None:
                    self.log(f"test/{suite.name}/accuracy", cell.score, batch_size=cell.n)

    def predict_step(
        self, batch: Batch, batch_idx: int, dataloader_idx: int = 0
    ) -> list[dict[str, Any]]:
        """Greedy responses as records of task, prompt, response and answer; of all processes.

        Where the scorer can say why a response is wrong, the record has a `reason`, too.
        """
        task = task_stream(self.trainer).evaluating[dataloader_idx]
        responses = self.respond(batch.student_ids, self.greedy)
        records = [
            {
                "task": task.name,
                "prompt": [dict(message) for message in example.messages],
                "response": response.text,
                "answer": example.answer,
                "truncated": response.truncated,
                **({"thoughts": response.thoughts.text} if response.thoughts else {}),
                **_reason(explained(task.scorer, response.text, example)),
            }
            for example, response in zip(batch.examples, responses, strict=True)
        ]
        if batch.share is None:
            return records
        rows = zip(batch.share.places, batch.share.real, records, strict=True)
        own = {place: record for place, real, record in rows if real}
        found = {place: record for part in gathered(own) for place, record in part.items()}
        return [found[place] for place in sorted(found)]


def _reason(reason: str | None) -> dict[str, str]:
    return {} if reason is None else {"reason": reason}


def _of_all(values: dict[str, float], count: int) -> tuple[dict[str, float], int]:
    """Means over the rows of all processes, and how many there are; what one lacks, all lack."""
    parts = gathered((values, count))
    if len(parts) == 1:
        return values, count
    total = sum(count for _, count in parts)
    shared = [name for name in values if all(name in found for found, _ in parts)]
    return {n: sum(found[n] * count for found, count in parts) / total for n in shared}, total
