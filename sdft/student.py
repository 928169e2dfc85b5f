"""The module that every method builds on: the student, its copies, its optimizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor
from torch.optim import Optimizer
from transformers import PreTrainedModel

from sdft.adapter_training import AdapterTraining
from sdft.batch import Batch, Origin, counted
from sdft.configured import Configured
from sdft.decode import DecodeEngine
from sdft.flat_sharding import is_flat
from sdft.lora import LoRA
from sdft.losses import sequence_mean, token_entropy
from sdft.model_copies import Models
from sdft.models import WORLD, ModelSource
from sdft.optim import check_rates, fuse_on_cpu
from sdft.penalties import Penalty
from sdft.prompts import Sees, TeacherTemplate
from sdft.rollout import Rollout, RolloutEngine, Sampling
from sdft.run import begin_after_restart, task_stream
from sdft.schedule import StageSchedule
from sdft.thinking import Thinking
from sdft.weights import (
    check_identity,
    check_training,
    convert,
    identity,
    split_copies,
)


class StudentModule(Models):
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
        thinking: Of a reasoning model (`student`, `teacher`: on or off; `scored`, `learnt`, …);
            thoughts and answers are one when unset.
        optimizer: Makes the optimizer of the student's parameters.
        scheduler: Makes the learning-rate schedule, stepped after every optimizer step.
        engine: Makes rollouts; `DecodeEngine` when unset, `GenerateEngine` is the reference.
        track_base: Keep a copy of the base model to log KL(base ‖ student) and how far the weights
            moved; costs one more model in memory.
        base_storage: Precision of that copy, and of the base that a method works with. bfloat16
            halves it and is refused unless it holds the weights exactly, as it does where a model
            is published in bfloat16.
        lora: Train low-rank adapters (`rank`, `alpha`, …) in place of all weights; the teacher and
            the base then share the student's base weights, and checkpoints leave these out.
        quantization: Keep the base's linear layers in 4 bits (`nf4`, by bitsandbytes); needs
            `lora`.
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
    masks_thoughts = False
    """Whether the loss can leave thoughts out."""

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
        lora: LoRA | None = None,
        quantization: Literal["nf4"] | None = None,
        base_storage: Literal["float32", "bfloat16"] = "float32",
        thinking: Thinking | None = None,
    ) -> None:
        super().__init__()
        self.greedy = Sampling(max_new_tokens, temperature=0.0)
        self.model_name = model_name
        self.dtype_name = dtype
        self.attn_implementation = attn_implementation
        self.gradient_checkpointing = gradient_checkpointing
        self.template = TeacherTemplate(teacher_template, teacher_sees)
        self.chat_template_kwargs = chat_template_kwargs
        self.thinking = thinking
        if thinking is not None and thinking.learnt != "everything" and not self.masks_thoughts:
            raise ValueError(
                f"model.thinking.learnt must be 'everything' for the method {self.method!r}, found "
                f"{thinking.learnt!r}: it has no mask on its loss"
            )
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.engine: RolloutEngine = engine or DecodeEngine()
        self.track_base = track_base
        self.penalty = penalty
        if lora is not None and base_storage != "float32":
            raise ValueError(
                "model.base_storage must be float32 with model.lora: nothing is copied"
            )
        self.base_storage = base_storage
        self.adapters = AdapterTraining(lora, quantization)
        self.strict_loading = lora is None  # a checkpoint of adapters leaves out their base
        self.source = ModelSource(model_name, trust_remote_code, revision)
        self.student: PreTrainedModel | None = None
        # Not a submodule: the base is neither trained, sharded nor checkpointed.
        self._base: list[PreTrainedModel] = []
        self._restored: dict[str, dict[str, Tensor]] = {}
        self.configured: Configured | None = None
        self._configured_then: dict[str, Any] | None = None

    # ---------------------------------------------------------------- training

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """The optimizer over the student's parameters alone, and its schedule."""
        trained = [p for p in self.model.parameters() if p.requires_grad]
        try:
            optimizer = self.optimizer(trained)
        except TypeError as error:
            raise ValueError(f"model.optimizer cannot be made of its settings: {error}") from error
        check_rates(optimizer, self.trainer.gradient_clip_val)
        fuse_on_cpu(optimizer)
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
            kept = getattr(self, name)
            if not is_flat(kept):
                convert(kept, torch.float32)
            if name in self._restored:
                kept.load_state_dict(self._restored.pop(name), strict=self.strict_loading)
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
        seed = self.seed_of_batch(batch_idx, self.global_rank)
        torch.manual_seed(seed)
        self.phases.lap()
        if batch_idx == 0:
            self.phases.enter("prepare")
            self.begin_stage(self.trainer.current_epoch)
            self.phases.enter("")
            torch.manual_seed(seed)

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

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Add the penalty's gradient, once per optimizer step, before clipping; have it judged."""
        if self.penalty is not None:
            self.log("train/penalty", self.penalty.add_gradient(self.model), batch_size=1)
        if self.overseer is not None:
            self.overseer.decide(optimizer)

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Log how long each phase of the step took, and how many tokens a second it did."""
        self.phases.enter("")
        self.log_dict(self.phases.lap().scalars(), batch_size=len(batch))

    @torch.no_grad()
    def track(
        self,
        values: dict[str, Tensor],
        prompts: list[list[int]],
        completion: Rollout,
        student_logits_BTV: Tensor,
        real: Sequence[bool] | None = None,
    ) -> None:
        """Log a step's values; now and then the student's entropy and its distance to the base.

        Args:
            values: Named scalars: means over the rows.
            prompts: B prompts, unpadded.
            completion: The B completions that were trained on.
            student_logits_BTV: The student's, detached.
            real: Whether each row counts (see `Batch.real`); all do when None.
        """
        mask_BT = counted(completion.mask_BT, real)
        if self.logs_this_step:
            entropy_BT = token_entropy(student_logits_BTV)
            values["train/entropy"] = sequence_mean(entropy_BT, mask_BT)
            if self.base is not None and self.track_base:
                kl = self.kl_to_base(prompts, completion, student_logits_BTV, mask_BT)
                values["train/kl_base_student"] = kl
        self.log_means(values, len(prompts) if real is None else sum(real))

    # ---------------------------------------------------------------- checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Record which model and method the checkpoint belongs to."""
        names = {"method": self.method, "model": self.model_name, "penalty": self._penalty_label}
        checkpoint["sdft"] = {**identity(self.model), **names}
        if self.configured is not None:
            checkpoint["configured"] = self.configured.to_dict()
        self.adapters.on_save(checkpoint, ("student", *self.copies))

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another model or method; leave out copies that nobody needs.

        Raises:
            ValueError: Not a checkpoint of this project, of another architecture or size, or, when
                training goes on, of another method or penalty.
        """
        self.check_checkpoint(checkpoint)
        if "state_dict" in checkpoint:  # a sharded model has taken its weights already
            self._restored = split_copies(checkpoint["state_dict"], self.state_dict().keys())
        self._configured_then = checkpoint.get("configured") if self.fitting else None

    def check_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another model or method (see `on_load_checkpoint`)."""
        found = checkpoint.get("sdft")
        if found is None:
            raise ValueError("the checkpoint was not written by sdft: it names no model")
        self.model  # noqa: B018 - loads on first use
        self.adapters.check(found, self.model_name)
        check_identity(self.model, self.model_name, found)
        if self.fitting:
            check_training({"method": self.method, "penalty": self._penalty_label}, found)
            if self.configured is not None and "configured" in checkpoint:
                self.configured.check(checkpoint["configured"])  # as early as there is one

    @property
    def _penalty_label(self) -> str:
        return "" if self.penalty is None else self.penalty.label
