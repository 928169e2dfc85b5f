"""The module that every method builds on: the student, its copies, its optimizer."""

from __future__ import annotations

from typing import Any, Literal, cast

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor
from torch.optim import Optimizer
from transformers import PreTrainedModel

from sdft.batch import Batch, Origin
from sdft.configured import Configured
from sdft.decode import DecodeEngine
from sdft.losses import sequence_mean, token_divergence, token_entropy
from sdft.models import DTYPES, WORLD, ModelSource
from sdft.optim import check_rates
from sdft.penalties import Penalty
from sdft.prompts import Sees, TeacherTemplate
from sdft.respondent import Respondent
from sdft.rollout import Rollout, RolloutEngine, Sampling
from sdft.run import begin_after_restart, is_logged, task_stream
from sdft.schedule import StageSchedule
from sdft.seeding import derive_seed, run_seed
from sdft.weights import (
    check_identity,
    check_training,
    frozen_copy,
    identity,
    set_weights,
    split_copies,
)


class StudentModule(Respondent):
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
            where examples have one, `{context}`; one that fits `teacher_sees` when unset.
        teacher_sees: What of an example the teacher's prompt shows: its context and its
            demonstration (`text_and_answer`), the context alone (`text`), or the demonstration
            alone (`answer`).
        chat_template_kwargs: Passed to the chat template of both prompts.
        optimizer: Makes the optimizer of the student's parameters.
        scheduler: Makes the learning-rate schedule, stepped after every optimizer step.
        engine: Makes rollouts; `DecodeEngine` when unset, `GenerateEngine` is the reference.
        track_base: Keep a copy of the base model to log KL(base ‖ student) and how far the weights
            moved; costs one more model in memory.
        penalty: Holds the weights near where they were (`sdft.penalties`: L2ToStart, EWC); its
            gradient joins the loss's once per optimizer step, before clipping.

    Raises:
        ValueError: A number out of range or a template without its placeholders.
    """

    method = "student"
    trains = True
    """Whether training changes the student; where not, its evaluation is not repeated."""
    learns_from: frozenset[Origin] = frozenset(("new", "past"))
    """Rows of a batch that the method can be trained on."""
    needs_rows: Origin | None = None
    """Rows without which the method would be another: some mixture has to add them."""
    needs_base = False
    """Whether the method itself works with the base model, tracked or not."""
    copies: tuple[str, ...] = ()
    """Submodules that are frozen fp32 copies of the student and exist in `fit` alone."""

    def __init__(
        self,
        model_name: str = WORLD,
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
        attn_implementation: str | None = None,
        gradient_checkpointing: bool = False,
        trust_remote_code: bool = False,
        revision: str | None = None,
        max_new_tokens: int = 256,
        teacher_template: str | None = None,
        teacher_sees: Sees = "text_and_answer",
        chat_template_kwargs: dict[str, Any] | None = None,
        optimizer: OptimizerCallable = lambda parameters: torch.optim.AdamW(
            parameters, lr=2e-5, weight_decay=0.0
        ),
        scheduler: LRSchedulerCallable = StageSchedule,
        engine: RolloutEngine | None = None,
        track_base: bool = True,
        penalty: Penalty | None = None,
    ) -> None:
        super().__init__()
        self.greedy = Sampling(max_new_tokens, temperature=0.0)
        self.model_name = model_name
        self.dtype_name = dtype
        self.attn_implementation = attn_implementation
        self.gradient_checkpointing = gradient_checkpointing
        self.template = TeacherTemplate(teacher_template, teacher_sees)
        self.chat_template_kwargs = chat_template_kwargs
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.engine: RolloutEngine = engine or DecodeEngine()
        self.track_base = track_base
        self.penalty = penalty
        self.source = ModelSource(model_name, trust_remote_code, revision)
        self.student: PreTrainedModel | None = None
        # Not a submodule: the base is neither trained, sharded nor checkpointed.
        self._base: list[PreTrainedModel] = []
        self._restored: dict[str, dict[str, Tensor]] = {}
        self.configured: Configured | None = None
        self._configured_then: dict[str, Any] | None = None

    # ---------------------------------------------------------------- models and prompts

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
        if not self._fitting:
            return
        if self.track_base or self.needs_base or self._restarts:
            self._base = [frozen_copy(student)]
        for name in self.copies:
            setattr(self, name, frozen_copy(student))
        if self.penalty is not None:
            self.penalty.attach(student)

    @property
    def base(self) -> PreTrainedModel | None:
        """The model as it was before training, on the student's device; None when not tracked."""
        if self._base and self._base[0].device != self.device:
            self._base[0].to(self.device)  # type: ignore[arg-type]
        return self._base[0] if self._base else None

    @property
    def _fitting(self) -> bool:
        return self._trainer is None or self._trainer.state.fn == "fit"

    @property
    def _restarts(self) -> bool:
        return self._trainer is not None and task_stream(self.trainer).from_base_each_task

    def configure_model(self) -> None:
        """Load the student; Lightning calls this once per entry point."""
        self.model  # noqa: B018 - loads on first use

    # ---------------------------------------------------------------- training

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """The optimizer over the student's parameters alone, and its schedule."""
        optimizer = self.optimizer(p for p in self.model.parameters() if p.requires_grad)
        check_rates(optimizer, self.trainer.gradient_clip_val)
        scheduler = self.scheduler(optimizer)
        if isinstance(scheduler, StageSchedule):
            scheduler.plan(task_stream(self.trainer).schedule_parts())
        self.configured = Configured.of(optimizer, scheduler)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step", "name": "lr"},
        }

    def on_fit_start(self) -> None:
        """Keep copies and penalty in fp32, as they were saved; check what the penalty needs."""
        # Between loading and here, the precision `bf16-true` has rounded the whole module.
        for name in (*self.copies, *(["penalty"] if self.penalty else [])):
            kept = getattr(self, name).float()
            if name in self._restored:
                kept.load_state_dict(self._restored.pop(name))
        if self.penalty is not None:
            self.penalty.check(task_stream(self.trainer))

    def on_train_start(self) -> None:
        """Have this run's settings of optimizer and schedule win over a checkpoint's."""
        begin_after_restart(self.trainer)
        then, self._configured_then = self._configured_then, None
        if then is not None and self.configured is not None:
            self.configured.win(then, self.trainer)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Seed this batch; begin a stage with its first one."""
        # A function of the place in the run, so that a resumed run draws the same rollouts.
        place = (run_seed(), self.trainer.current_epoch, batch_idx, self.global_rank)
        torch.manual_seed(derive_seed(*place))
        self.phases.lap()
        if batch_idx == 0:
            self.phases.enter("prepare")
            self.begin_stage(self.trainer.current_epoch)
            self.phases.enter("")
            torch.manual_seed(derive_seed(*place))

    def begin_stage(self, stage: int) -> None:
        """What changes between two stages; a stage that is resumed in its middle has had it."""
        data = task_stream(self.trainer)
        if self.penalty is not None:
            self.penalty.consolidate(self, data, stage - 1)
        if stage > 0 and data.from_base_each_task:
            self.restart()
        if stage > 0 and (data.reset_optimizer_between_tasks or data.from_base_each_task):
            for optimizer in self.trainer.optimizers:
                optimizer.state.clear()

    def restart(self) -> None:
        """Make the student, and its copies, the base again."""
        assert self.base is not None
        for model in (self.model, *(getattr(self, name) for name in self.copies)):
            set_weights(model, self.base)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Add the penalty's gradient, once per optimizer step, before clipping."""
        if self.penalty is not None:
            self.log("train/penalty", self.penalty.add_gradient(self.model), batch_size=1)

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Log how long each phase of the step took, and how many tokens a second it did."""
        self.phases.enter("")
        self.log_dict(self.phases.lap().scalars(), batch_size=len(batch))

    @property
    def logs_this_step(self) -> bool:
        """Whether the step under way reaches the logger; costly metrics wait for it."""
        return is_logged(self.trainer, self.trainer.global_step + 1)

    @torch.no_grad()
    def track(
        self,
        values: dict[str, Tensor],
        prompts: list[list[int]],
        completion: Rollout,
        student_logits_BTV: Tensor,
    ) -> None:
        """Log a step's values; now and then the student's entropy and its distance to the base.

        Args:
            values: Named scalars.
            prompts: B prompts, unpadded.
            completion: The B completions that were trained on.
            student_logits_BTV: The student's, detached.
        """
        if self.logs_this_step:
            entropy_BT = token_entropy(student_logits_BTV)
            values["train/entropy"] = sequence_mean(entropy_BT, completion.mask_BT)
            if self.base is not None and self.track_base:
                kl = self.kl_to_base(prompts, completion, student_logits_BTV)
                values["train/kl_base_student"] = kl
        self.log_dict(values, batch_size=len(prompts))

    def kl_to_base(
        self, prompts: list[list[int]], completion: Rollout, student_logits_BTV: Tensor
    ) -> Tensor:
        """KL(base ‖ student) per token on completions of bare prompts."""
        assert self.base is not None
        base_logits_BTV = self.logits(self.base, prompts, completion)
        per_token_BT = token_divergence(student_logits_BTV, base_logits_BTV)
        return sequence_mean(per_token_BT, completion.mask_BT)

    # ---------------------------------------------------------------- checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Record which model and method the checkpoint belongs to."""
        names = {"method": self.method, "model": self.model_name, "penalty": self._penalty_label}
        checkpoint["sdft"] = {**identity(self.model), **names}
        if self.configured is not None:
            checkpoint["configured"] = self.configured.to_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another model or method; leave out copies that nobody needs.

        Raises:
            ValueError: Not a checkpoint of this project, of another architecture or size, or, when
                training goes on, of another method or penalty.
        """
        found = checkpoint.get("sdft")
        if found is None:
            raise ValueError("the checkpoint was not written by sdft: it names no model")
        check_identity(self.model, self.model_name, found)
        if self._fitting:
            check_training({"method": self.method, "penalty": self._penalty_label}, found)
            self._configured_then = checkpoint.get("configured")
        self._restored = split_copies(checkpoint["state_dict"], self.state_dict().keys())

    @property
    def _penalty_label(self) -> str:
        return "" if self.penalty is None else self.penalty.label
