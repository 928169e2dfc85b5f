"""Steps of TRL's SDFT trainer, one at a time: the other side of `tools/bench_step.py`.

Runs in an environment that has TRL (`pip install trl==1.16.0`); the benchmark starts it as
    python tools/bench_trl.py FOLDER SETTING STEPS
and writes a line to it for each step. Each answer is a line with the step's seconds.
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from bench_material import make_texts, read_setting
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl.experimental.sdft import SDFTConfig, SDFTTrainer


class OneByOne(TrainerCallback):
    """Waits for a line before each step; reports the seconds that the step took."""

    def __init__(self, report: Any) -> None:
        self.report = report
        self.begun = 0.0

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """Wait."""
        if self.begun:
            print(time.perf_counter() - self.begun, file=self.report, flush=True)
        else:
            print("ready", file=self.report, flush=True)
        if not sys.stdin.readline().strip():
            raise SystemExit(0)
        self.begun = time.perf_counter()


def main() -> None:
    """Serve the steps."""
    folder, setting, steps = Path(sys.argv[1]), read_setting(sys.argv[2]), int(sys.argv[3])
    report = sys.stdout
    with contextlib.redirect_stdout(sys.stderr), tempfile.TemporaryDirectory() as output:
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
        trainer = SDFTTrainer(
            model=model,
            args=arguments,
            train_dataset=data,
            processing_class=AutoTokenizer.from_pretrained(folder),
            callbacks=[OneByOne(report)],
        )
        trainer.train()


if __name__ == "__main__":
    main()
