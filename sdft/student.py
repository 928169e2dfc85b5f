"""The module that every method builds on: the student, its prompts, its evaluation."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import Any, Literal, cast

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sdft.batch import Batch
from sdft.decode import DecodeEngine
from sdft.evaluation import Response, score_responses
from sdft.models import DTYPES, WORLD, ModelSource, eos_token_ids
from sdft.phases import PhaseClock
from sdft.prompts import DEFAULT_TEACHER_TEMPLATE, PromptEncoder, TeacherTemplate
from sdft.rollout import RolloutEngine, Sampling
from sdft.run import is_logged, task_stream
from sdft.schedule import StageSchedule
from sdft.seeding import derive_seed, run_seed
from sdft.weights import check_identity, frozen_copy, identity

log = logging.getLogger(__name__)


class StudentModule(LightningModule):
    """A student that answers prompts; a method adds `training_step`.

    Args:
        model_name: A model folder, a `.gguf` file, a hub name, `sdft:world` (the embedded tiny
            model) or `sdft:smollm2`.
        dtype: Precision of the student's weights. Keep float32 and set `trainer.precision` to
            bf16-mixed for speed: updates are lost to rounding in bfloat16 weights.
        attn_implementation: Attention of the student, for example `sdpa`; transformers decides
            when unset.
        gradient_checkpointing: Recompute activations in the backward pass to save memory.
        trust_remote_code: Run code that the model repository brings.
        revision: Branch, tag or commit of a hub name.
        max_new_tokens: Longest response in tokens, in training and evaluation.
        teacher_template: The teacher's last user turn, with `{prompt}`, `{demonstration}` and,
            where examples have one, `{context}`.
        chat_template_kwargs: Passed to the chat template of both prompts.
        optimizer: Makes the optimizer of the student's parameters.
        scheduler: Makes the learning-rate schedule, stepped after every optimizer step.
        engine: Makes rollouts; `DecodeEngine` when unset, `GenerateEngine` is the reference.
        track_base: Keep a copy of the base model to log KL(base ‖ student) and how far the weights
            moved; costs one more model in memory.

    Raises:
        ValueError: A number out of range or a template without its placeholders.
    """

    method = "student"

    def __init__(
        self,
        model_name: str = WORLD,
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
        attn_implementation: str | None = None,
        gradient_checkpointing: bool = False,
        trust_remote_code: bool = False,
        revision: str | None = None,
        max_new_tokens: int = 256,
        teacher_template: str = DEFAULT_TEACHER_TEMPLATE,
        chat_template_kwargs: dict[str, Any] | None = None,
        optimizer: OptimizerCallable = lambda parameters: torch.optim.AdamW(
            parameters, lr=2e-5, weight_decay=0.0
        ),
        scheduler: LRSchedulerCallable = StageSchedule,
        engine: RolloutEngine | None = None,
        track_base: bool = True,
    ) -> None:
        super().__init__()
        self.greedy = Sampling(max_new_tokens, temperature=0.0)
        self.model_name = model_name
        self.dtype_name = dtype
        self.attn_implementation = attn_implementation
        self.gradient_checkpointing = gradient_checkpointing
        self.template = TeacherTemplate(teacher_template)
        self.chat_template_kwargs = chat_template_kwargs
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.engine: RolloutEngine = engine or DecodeEngine()
        self.track_base = track_base
        self.phases = PhaseClock()
        self.source = ModelSource(model_name, trust_remote_code, revision)
        self.student: PreTrainedModel | None = None
        # Not a submodule: the base is neither trained, sharded nor checkpointed.
        self._base: list[PreTrainedModel] = []

    # ---------------------------------------------------------------- models and prompts

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

    @property
    def model(self) -> PreTrainedModel:
        """The student, loaded on first use."""
        if self.student is None:
            student = self.source.load_model(DTYPES[self.dtype_name], self.attn_implementation)
            self.student = cast(PreTrainedModel, student.train())
            if self.gradient_checkpointing:
                self.student.gradient_checkpointing_enable()
            self.prepare_copies(self.student)
        return self.student

    def prepare_copies(self, student: PreTrainedModel) -> None:
        """Copy the freshly loaded student where the method needs it, before anything trains."""
        if self.track_base and self._fitting:
            self._base = [frozen_copy(student)]

    @property
    def base(self) -> PreTrainedModel | None:
        """The model as it was before training, on the student's device; None when not tracked."""
        if self._base and self._base[0].device != self.device:
            self._base[0].to(self.device)  # type: ignore[arg-type]
        return self._base[0] if self._base else None

    @cached_property
    def eos_ids(self) -> list[int]:
        """Token ids that end a response."""
        return eos_token_ids(self.model, self.tokenizer)

    @property
    def pad_id(self) -> int:
        """Fills padding; masked everywhere."""
        return cast(int, self.tokenizer.pad_token_id)

    @property
    def _fitting(self) -> bool:
        return self._trainer is None or self._trainer.state.fn == "fit"

    def configure_model(self) -> None:
        """Load the student; Lightning calls this once per entry point."""
        self.model  # noqa: B018 - loads on first use

    # ---------------------------------------------------------------- training

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """The optimizer over the student's parameters alone, and its schedule."""
        optimizer = self.optimizer(p for p in self.model.parameters() if p.requires_grad)
        for group in optimizer.param_groups:
            _check_rate(float(group["lr"]))
        _check_clipping(self.trainer.gradient_clip_val)
        scheduler = self.scheduler(optimizer)
        if isinstance(scheduler, StageSchedule):
            scheduler.plan(task_stream(self.trainer).stage_steps())
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step", "name": "lr"},
        }

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Seed this batch; forget the optimizer's moments where a stage begins, if asked to."""
        # A function of the place in the run, so that a resumed run draws the same rollouts.
        torch.manual_seed(
            derive_seed(run_seed(), self.trainer.current_epoch, batch_idx, self.global_rank)
        )
        stage_begins = batch_idx == 0 and self.trainer.current_epoch > 0
        if stage_begins and task_stream(self.trainer).reset_optimizer_between_tasks:
            for optimizer in self.trainer.optimizers:
                optimizer.state.clear()

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Log the seconds that each phase of the step took."""
        self.phases.enter("")
        seconds = {f"seconds/{phase}": value for phase, value in self.phases.lap().items()}
        self.log_dict(seconds, batch_size=len(batch))

    @property
    def logs_this_step(self) -> bool:
        """Whether the step under way reaches the logger; costly metrics wait for it."""
        return is_logged(self.trainer, self.trainer.global_step + 1)

    # ---------------------------------------------------------------- evaluation

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
            rollout = self.engine.generate(self.model, prompts, sampling, self.eos_ids, self.pad_id)
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

    # ---------------------------------------------------------------- checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Record which model and method the checkpoint belongs to."""
        names = {"method": self.method, "model": self.model_name}
        checkpoint["sdft"] = {**identity(self.model), **names}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another model or method; leave out a teacher that nobody needs.

        Raises:
            ValueError: Not a checkpoint of this project, of another architecture or size, or, when
                training goes on, of another method.
        """
        found = checkpoint.get("sdft")
        if found is None:
            raise ValueError("the checkpoint was not written by sdft: it names no model")
        check_identity(self.model, self.model_name, found)
        if self._fitting and found["method"] != self.method:
            raise ValueError(
                f"the checkpoint belongs to the method {found['method']!r}, this run's is "
                f"{self.method!r}: resume with the configuration that made it"
            )
        if getattr(self, "teacher", None) is None:  # validate, test, predict
            weights = checkpoint["state_dict"]
            for key in [key for key in weights if key.startswith("teacher.")]:
                del weights[key]


def _check_rate(rate: float) -> None:
    if not (math.isfinite(rate) and rate >= 0):
        raise ValueError(f"the optimizer's lr must be a finite number, 0 or more, found {rate}")


def _check_clipping(value: float | None) -> None:
    if value is not None and not value >= 0:  # NaN, too
        raise ValueError(f"trainer.gradient_clip_val must be 0 or more, found {value}")
