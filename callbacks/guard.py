"""Watches every step for the ways in which self-distillation fails, and acts in time."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch.optim import Optimizer

from sdft.callbacks.after_step import AfterStep
from sdft.flat_sharding import is_flat
from sdft.guard.diary import Judged, tell
from sdft.guard.gradients import drop_gradients, gradient_norm
from sdft.guard.judge import Alarm, Judge
from sdft.guard.numbers import check_counts, check_factors
from sdft.guard.rates import scale_rates
from sdft.guard.rules import Action, Rule
from sdft.guard.signals import GRADIENT, LOGGED, NONFINITE, RULES
from sdft.guard.standing import Standing
from sdft.guard.stop import GuardStop
from sdft.ranks import Scalar, agreed
from sdft.run import is_dry, run_folder
from sdft.student import StudentModule
from sdft.weights import GOOD_TEACHER, set_weights


class Guard(AfterStep):
    """Compares signals of every optimizer step with what was normal so far, and acts.

    A signal is what the step has logged, the mean over its batches and over all processes; the norm
    of the gradient is that before clipping. What is normal is learnt anew in each stage. Rules are
    given by signal; a part of a rule that is left out is the default's.

    Every alarm is a line of `<run>/guard.jsonl`, printed, and logged as `guard/…`, with its reason
    and what followed: `warn`, nothing else; `skip_step`, the optimizer does not step (weights,
    moments and teacher stay; counters and schedule go on, the batch is used up) for as long as the
    signal is out of order; `freeze_teacher`, the teacher stands still for the rest of the stage;
    `reset_teacher`, it becomes what it was at the end of the last stage without an alarm, or the
    base; `lower_lr`, all rates are multiplied by `lr_factor` for the rest of the run;
    `stop_and_save`, the step is skipped, `checkpoints/guard-step-<n>.ckpt` written, and the run
    ends with an error.

    Args:
        enabled: Watch at all.
        nonfinite: What follows a loss or gradient that is no finite number.
        divergence: Rule of the loss: the per-token divergence, or another method's loss.
        entropy: Rule of the student's entropy, as often as it is measured.
        length: Rule of the completions' length, in tokens.
        truncated: Rule of the share of completions that the length limit ended.
        repetition: Rule of the share of 4-grams that a completion has said before.
        kl_base: Rule of KL(base ‖ student) along the completions, as often as it is measured.
        gradient: Rule of the gradient's norm before clipping.
        window: Measurements that make a baseline.
        warmup: Measurements of a stage before deviations are judged.
        reference: Measurements at a stage's beginning that ratios are taken to.
        again: An alarm that lasts is raised again after so many measurements.
        measure_every_n_steps: Measure entropy and KL this often; 0 leaves it to
            `trainer.log_every_n_steps`.
        lr_factor: What `lower_lr` multiplies the learning rates by.
        min_lr_factor: They are never lowered below this share of what they were.
        max_skipped: Stop and save after so many skipped steps in a row.

    Raises:
        ValueError: A number out of range, an unknown action; as `fit` starts: an action on a
            teacher that the method does not have, or that would undo it in the same step.
    """

    def __init__(
        self,
        enabled: bool = True,
        nonfinite: Sequence[Action] = ("skip_step",),
        divergence: Rule = RULES["divergence"],
        entropy: Rule = RULES["entropy"],
        length: Rule = RULES["length"],
        truncated: Rule = RULES["truncated"],
        repetition: Rule = RULES["repetition"],
        kl_base: Rule = RULES["kl_base"],
        gradient: Rule = RULES[GRADIENT],
        window: int = 50,
        warmup: int = 8,
        reference: int = 5,
        again: int = 20,
        measure_every_n_steps: int = 0,
        lr_factor: float = 0.5,
        min_lr_factor: float = 0.01,
        max_skipped: int = 10,
    ) -> None:
        rules = {
            "divergence": divergence,
            "entropy": entropy,
            "length": length,
            "truncated": truncated,
            "repetition": repetition,
            "kl_base": kl_base,
            GRADIENT: gradient,
        }
        for name, rule in rules.items():
            rule.check(f"guard.{name}")
        replace(RULES["divergence"], actions=nonfinite).check("guard.nonfinite")
        counts = {"window": window, "warmup": warmup, "reference": reference, "again": again}
        check_counts({**counts, "max_skipped": max_skipped}, measure_every_n_steps)
        check_factors(lr_factor, min_lr_factor)
        self.enabled = enabled
        self.nonfinite = tuple(nonfinite)
        self.measure_every_n_steps = measure_every_n_steps
        self.lr_factor, self.min_lr_factor = lr_factor, min_lr_factor
        self.max_skipped = max_skipped
        self.judge = Judge(rules, window, warmup, reference, again)
        self.standing = Standing()
        self._seen: dict[str, list[Scalar]] = {}
        self._stop: str | None = None
        self._run: tuple[Trainer, StudentModule] | None = None

    # ---------------------------------------------------------------- when

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Have a copy of the teacher kept, where one may be gone back to.

        Raises:
            ValueError: An action on a teacher that there is not, or that always is the student.
        """
        if not self.enabled or stage != "fit":
            return
        assert isinstance(pl_module, StudentModule)
        wanted = {action for rule in self._rules for action in rule}
        on_teacher = wanted & {"freeze_teacher", "reset_teacher"}
        if on_teacher and "teacher" not in pl_module.copies:
            raise ValueError(
                f"guard: {min(on_teacher)} needs a teacher, and the method {pl_module.method!r} "
                "has none: choose other actions"
            )
        live = any(getattr(c, "kind", None) == "live" for c in trainer.callbacks)  # type: ignore[attr-defined]
        if live and any("reset_teacher" in r and "freeze_teacher" not in r for r in self._rules):
            raise ValueError(
                "guard: reset_teacher alone would not last with teacher.kind 'live', whose teacher "
                "becomes the student after every step: add freeze_teacher to the same actions"
            )
        if "reset_teacher" in wanted:
            pl_module.add_copy(GOOD_TEACHER)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Be told of every step."""
        if self.enabled:
            assert isinstance(pl_module, StudentModule)
            self._run = trainer, pl_module
            pl_module.overseer = self
            pl_module.measure_every_n_steps = self.measure_every_n_steps

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let go of the run."""
        if self._run is not None:
            self._run[1].overseer = None
            self._run[1].holds_teacher = False
            self._run = None

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Begin a stage: keep the teacher that a good one has left."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if not self.enabled or batch_idx > 0:
            return
        kept, stage = getattr(pl_module, GOOD_TEACHER, None), trainer.current_epoch
        if kept is not None and stage > 0 and not self.standing.alarmed:
            set_weights(kept, pl_module.teacher)  # type: ignore[arg-type]
        self.standing.begin_stage()

    def after_step(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> None:
        """Stop here if the step has asked for it."""
        if self._stop is not None:
            reason, self._stop = self._stop, None
            raise GuardStop(reason, trainer.global_step, self._save(trainer))

    # ---------------------------------------------------------------- the step

    def see(self, values: Mapping[str, Scalar]) -> None:
        """Keep what a batch has logged, if it is watched."""
        for name, logged in LOGGED.items():
            found = next((values[key] for key in logged if key in values), None)
            if found is not None:
                self._seen.setdefault(name, []).append(found)

    def decide(self, optimizer: Optimizer) -> None:
        """Judge the step, and act before the optimizer does."""
        assert self._run is not None
        trainer, module = self._run
        self.judge.begin(trainer.current_epoch)
        values = self._measured(optimizer, is_flat(module.model))
        alarms = [*self._broken_numbers(trainer, values), *self.judge.judge(values)]
        new = [alarm for alarm in alarms if alarm.new]
        skip = any({"skip_step", "stop_and_save"} & {*alarm.actions} for alarm in alarms)
        # A loss scaler skips this step, too, and lowers its factor: that is no alarm.
        skip = skip or (NONFINITE in values and _scales(trainer))
        done = self._act(optimizer, trainer, module, new)
        if skip:
            drop_gradients(optimizer)
        self._count(skip, len(new))
        if self.standing.in_a_row >= self.max_skipped and self._stop is None:
            self._stop = f"{self.standing.in_a_row} steps in a row were skipped"
        module.holds_teacher = skip or self.standing.frozen
        if (new or skip) and trainer.is_global_zero:
            tell(trainer, Judged(new, values, skip, done), self.standing)

    def _measured(self, optimizer: Optimizer, in_parts: bool) -> dict[str, float]:
        """The step's signals, the same in all processes; `NONFINITE` only where something is."""
        seen, self._seen = self._seen, {}
        norm = float(gradient_norm(optimizer, in_parts))
        values = {name: sum(map(float, found)) / len(found) for name, found in seen.items()}
        values[GRADIENT] = norm
        if not all(math.isfinite(values[n]) for n in ("divergence", GRADIENT) if n in values):
            values[NONFINITE] = 1.0
        return agreed(values)

    def _broken_numbers(self, trainer: Trainer, values: Mapping[str, float]) -> list[Alarm]:
        if NONFINITE not in values or _scales(trainer):
            return []
        which = [n for n in ("divergence", GRADIENT) if not math.isfinite(values.get(n, 0.0))]
        reason, lasted = f"no finite number ({' and '.join(which)})", self.standing.in_a_row + 1
        new = (lasted - 1) % self.judge.again == 0
        value = values[which[0]]
        return [Alarm(NONFINITE, value, reason, lasted, self.nonfinite, new)]

    def _act(
        self, optimizer: Optimizer, trainer: Trainer, module: StudentModule, new: Sequence[Alarm]
    ) -> dict[str, Any]:
        """Do what new alarms ask for, each action once; what came of it."""
        actions = {action for alarm in new for action in alarm.actions}
        done: dict[str, Any] = {}
        if "lower_lr" in actions:
            factor = max(self.lr_factor, self.min_lr_factor / self.standing.lr_factor)
            if factor < 1.0:
                schedules = [config.scheduler for config in trainer.lr_scheduler_configs]
                scale_rates(optimizer, schedules, factor)
                self.standing.lr_factor *= factor
            done["lr_factor"] = self.standing.lr_factor
        if "freeze_teacher" in actions:
            self.standing.frozen = done["teacher_frozen"] = True
        if "reset_teacher" in actions:
            set_weights(module.teacher, getattr(module, GOOD_TEACHER))  # type: ignore[arg-type]
            done["teacher_reset"] = True
        for alarm in new:
            if "stop_and_save" in alarm.actions:
                self._stop = str(alarm)
        return done

    def _count(self, skip: bool, alarms: int) -> None:
        self.standing.in_a_row = self.standing.in_a_row + 1 if skip else 0
        self.standing.skipped += skip
        self.standing.alarms += alarms
        self.standing.alarmed |= alarms > 0

    def _save(self, trainer: Trainer) -> Path | None:
        if is_dry(trainer):
            return None
        path = run_folder(trainer) / "checkpoints" / f"guard-step-{trainer.global_step}.ckpt"
        temporary = path.with_name(f".{path.name}.tmp")
        trainer.save_checkpoint(temporary, weights_only=False)
        if trainer.is_global_zero:
            os.replace(temporary, path)
        return path

    # ---------------------------------------------------------------- resume

    @property
    def _rules(self) -> list[tuple[Action, ...]]:
        """The actions of every rule."""
        return [self.nonfinite, *(tuple(rule.actions) for rule in self.judge.rules.values())]

    def state_dict(self) -> dict[str, Any]:
        """Baselines and what was done, as plain values."""
        return {"judge": self.judge.state_dict(), "standing": asdict(self.standing)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint; its learning rates are lowered already."""
        self.judge.load_state_dict(state_dict["judge"])
        self.standing = Standing(**state_dict["standing"])


def _scales(trainer: Trainer) -> bool:
    """Whether a loss scaler (precision 16-mixed) looks after gradients that are no numbers."""
    return getattr(trainer.precision_plugin, "scaler", None) is not None
