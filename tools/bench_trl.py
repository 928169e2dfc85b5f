"""Steps of TRL's SDFT trainer, one at a time: the other side of `tools/bench_step.py`.

Runs in an environment that has TRL (`pip install trl==1.16.0`); the benchmark starts it as
    python tools/bench_trl.py FOLDER SETTING STEPS
and writes a line to it for each step. `update` is all that is neither sampling nor the teacher's
pass.
"""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from bench_laps import Lap, forget_peak, held_memory, peak_memory
from bench_material import SKIPPED, make_texts, read_setting
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl.experimental.sdft import SDFTConfig, SDFTTrainer


class TimedTrainer(SDFTTrainer):
    """The trainer, with a look at its watch around sampling and the teacher's pass."""

    phases: dict[str, float]
    sampled: list[list[int]]

    def begin_step(self) -> None:
        """Nothing measured yet."""
        self.phases = {"generate": 0.0, "score": 0.0}

    def _generate(self, *args: Any, **kwargs: Any) -> Any:
        with self._timed("generate"):
            prompt_ids, self.sampled = super()._generate(*args, **kwargs)
        return prompt_ids, self.sampled

    def _forward_logits(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        with self._timed("score" if model is self.teacher_model else ""):
            return super()._forward_logits(model, *args, **kwargs)

    @contextlib.contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        begun = time.perf_counter()
        yield
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        if phase:
            self.phases[phase] += time.perf_counter() - begun


class OneByOne(TrainerCallback):
    """Waits for a line before each step; reports what the step was like."""

    def __init__(self, report: Any) -> None:
        self.report = report
        self.begun = 0.0
        self.held = 0
        self.trainer: TimedTrainer | None = None

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """Report the step before, which ends here; wait for the next."""
        assert self.trainer is not None
        if self.begun:
            taken = time.perf_counter() - self.begun
            phases = dict(self.trainer.phases)
            phases["update"] = taken - sum(phases.values())
            lap = Lap(
                taken,
                phases,
                completions=[len(ids) for ids in self.trainer.sampled],
                held=self.held,
                peak=peak_memory(),
            )
            print(json.dumps(asdict(lap)), file=self.report, flush=True)
        else:
            print("ready", file=self.report, flush=True)
        if not sys.stdin.readline().strip():
            raise SystemExit(0)
        self.trainer.begin_step()
        self.held = held_memory()
        forget_peak()
        self.begun = time.perf_counter()


def main() -> None:
    """Serve the steps."""
    folder, setting, steps = Path(sys.argv[1]), read_setting(sys.argv[2]), int(sys.argv[3])
    report = sys.stdout
    with (
        contextlib.redirect_stdout(sys.stderr),
        contextlib.suppress(SystemExit),
        tempfile.TemporaryDirectory() as output,
    ):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        texts = make_texts(setting, setting.batch * steps)
        data = Dataset.from_list(
            [
                {"prompt": [{"role": "user", "content": prompt}], "privileged_context": shown}
                for prompt, shown in texts
            ]
        )
        cuda = torch.cuda.is_available()
        arguments = SDFTConfig(
            output_dir=output,
            per_device_train_batch_size=setting.batch,
            gradient_accumulation_steps=1,
            num_generations=1,
            max_prompt_length=None,
            max_completion_length=setting.completion,
            num_loss_tokens_to_skip=SKIPPED,
            teacher_model_kind="ema",
            teacher_update_rate=0.01,
            distillation_alpha=0.0,
            distillation_mode="full_logits",
            teacher_prompt_template="{prompt} shown {privileged_context} now",
            learning_rate=1e-5,
            max_steps=steps,
            bf16=cuda,
            use_cpu=not cuda,
            gradient_checkpointing=False,
            logging_strategy="no",
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        one_by_one = OneByOne(report)
        trainer = TimedTrainer(
            model=model,
            args=arguments,
            train_dataset=data,
            processing_class=AutoTokenizer.from_pretrained(folder),
            callbacks=[one_by_one],
        )
        one_by_one.trainer = trainer
        trainer.train()


if __name__ == "__main__":
    main()
