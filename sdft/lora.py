"""Low-rank adapters in place of training all weights (Hu et al. 2021, arXiv 2106.09685)."""

from __future__ import annotations

import importlib.util
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from sdft.seeding import derive_seed, run_seed

ADAPTER = "default"
"""Name of the one adapter, as peft keeps it."""


@dataclass(frozen=True)
class LoRA:
    """Adapters on the student's linear layers: W + (alpha / rank)·B·A; B and A are trained.

    The base stays as it was loaded, whatever its precision; the adapters are fp32.

    Args:
        rank: Of the student's adapters.
        alpha: Its quotient by the rank scales the product.
        dropout: Of the adapters' input while the student trains.
        target_modules: Names of the layers to adapt, or `all-linear`: all but the head.
        teacher_rank: Of the teacher's adapters, whose product is the average of the student's;
            4 × `rank` when unset. What does not fit in is logged as `teacher/discarded`.

    Raises:
        ValueError: A number out of range.
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    target_modules: str | list[str] = "all-linear"
    teacher_rank: int | None = None

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"lora.rank must be at least 1, found {self.rank}")
        if not self.alpha > 0:
            raise ValueError(f"lora.alpha must be above 0, found {self.alpha}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"lora.dropout must lie in [0, 1), found {self.dropout}")
        if self.teacher_rank is not None and self.teacher_rank < self.rank:
            raise ValueError(
                f"lora.teacher_rank must be at least the student's {self.rank}, "
                f"found {self.teacher_rank}"
            )

    @property
    def label(self) -> str:
        """Names the adapters in messages and checkpoints."""
        return f"lora of rank {self.rank}"

    def inject(self, model: PreTrainedModel) -> None:
        """Put adapters into the model, in place; nothing else of it trains from here on.

        Drawn from the run's seed alone, so that every process and a resumed run have the same.

        Raises:
            ValueError: peft is not installed, or no layer has such a name.
        """
        if importlib.util.find_spec("peft") is None:
            raise ValueError("lora needs the package peft: pip install 'sdft[lora]'")
        from peft import inject_adapter_in_model

        try:
            with torch.random.fork_rng(), warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="fan_in_fan_out")  # as GPT-2 needs it
                torch.manual_seed(derive_seed(run_seed(), "lora"))
                inject_adapter_in_model(self.config(), model, ADAPTER)
        except ValueError as error:
            raise ValueError(f"lora.target_modules {self.target_modules!r}: {error}") from error
        for name, parameter in model.named_parameters():
            trains = ".lora_" in name
            parameter.requires_grad_(trains)
            if trains:
                parameter.data = parameter.data.float()

    def config(self) -> Any:
        """The same as peft's own configuration."""
        from peft import LoraConfig

        return LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,  # type: ignore[arg-type]
            lora_dropout=self.dropout,
            target_modules=self.target_modules,
            task_type="CAUSAL_LM",
        )
