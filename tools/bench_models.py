"""Which model a benchmark runs on, from the command line to a process of its own."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from bench_material import TEMPLATE, Setting, make_model, make_tokenizer, random_model
from transformers import PreTrainedModel

from sdft import StudentModule
from sdft.models import ModelSource
from sdft.optim import AdamWBF16
from sdft.shapes import SHAPES, ModelShape

QUICK = Setting()
FULL = Setting(layers=6, hidden=512, intermediate=2048, vocab=32000, batch=16, completion=128)
SHAPED: dict[str, Any] = {"batch": 32, "prompt": 128, "demonstration": 128, "completion": 256}
"""Work of a step on a known shape or a model from elsewhere."""
FRUGAL_PARAMETERS = 3_000_000_000
"""Models with more are trained frugally, unless asked otherwise."""


@dataclass(frozen=True)
class Plan:
    """What is trained on what; travels to other processes as JSON.

    Attributes:
        setting: Sizes.
        model: Folder or name of tokenizer and, unless they are random, weights.
        random: Whether the weights are made at random, on the device, from the setting.
        frugal: bfloat16 for the optimizer's moments and the teacher, and activations computed anew
            in the backward pass: what fits a 7B model into 141 GB (`python -m sdft budget`).
    """

    setting: Setting
    model: str
    random: bool = False
    frugal: bool = False

    def dumps(self) -> str:
        """As JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def loads(cls, text: str) -> Plan:
        """The inverse of `dumps`."""
        values = json.loads(text)
        return cls(**{**values, "setting": Setting(**values["setting"])})

    @property
    def teacher_storage(self) -> Any:
        """Of `EMATeacher`."""
        return "bfloat16" if self.frugal else "float32"


class RandomSource(ModelSource):
    """A model that is made at random, on the device: nothing of it is ever on disk.

    Args:
        plan: Its sizes and the folder of its tokenizer.
        device: Where it is made.
    """

    def __init__(self, plan: Plan, device: torch.device) -> None:
        super().__init__(plan.model)
        self.setting, self.device = plan.setting, device

    def load_model(
        self,
        dtype: torch.dtype = torch.float32,
        attn_implementation: str | None = None,
        quantization: str | None = None,
    ) -> PreTrainedModel:
        """Make the weights."""
        return random_model(self.setting, self.device, dtype)


def make_module(kind: type[StudentModule], plan: Plan, **options: Any) -> Any:
    """A method's module, on the terms that all of ours share.

    Args:
        kind: The method.
        plan: Its model.
        options: Further arguments of the method.
    """
    optimizer: Any = AdamWBF16 if plan.frugal else torch.optim.AdamW
    module = kind(
        model_name=plan.model,
        max_new_tokens=plan.setting.completion,
        teacher_template=TEMPLATE,
        optimizer=partial(optimizer, lr=1e-5, weight_decay=0.0),
        gradient_checkpointing=plan.frugal,
        track_base=False,
        **options,
    )
    if plan.random:
        module.source = RandomSource(plan, device())
    return module


def device() -> torch.device:
    """What benchmarks run on."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def shaped(shape: ModelShape, **work: Any) -> Setting:
    """The setting of a known shape."""
    return Setting(
        layers=shape.layers,
        hidden=shape.hidden,
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        intermediate=shape.intermediate,
        tied=shape.tied,
        biases=shape.qkv_bias,
        vocab=shape.vocab,
        **work,
    )


# ---------------------------------------------------------------- the command line


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those by which the benchmarks of a step choose their model and its work."""
    parser.add_argument("--quick", action="store_true", help="a small model: minutes on 2 cores")
    parser.add_argument(
        "--shape", choices=sorted(SHAPES), help="random weights of this shape, made on the device"
    )
    parser.add_argument(
        "--model",
        help="a folder, a .gguf file or a name of sdft's, for example "
        "sdft:smollm2, in place of random weights",
    )
    parser.add_argument(
        "--frugal",
        action=argparse.BooleanOptionalAction,
        help="bfloat16 for "
        "moments and teacher, activations computed anew; default above "
        f"{FRUGAL_PARAMETERS / 1e9:.0f} billion parameters",
    )
    parser.add_argument("--completion", type=int, help="longest completion")
    parser.add_argument("--prompt-tokens", type=int, help="longest prompt")
    parser.add_argument("--demonstration-tokens", type=int, help="every demonstration")
    parser.add_argument("--vocab", type=int, help="tokens in the vocabulary of random weights")
    parser.add_argument("--ragged", type=float, help="share of completions that end early")


def read_setting(given: argparse.Namespace) -> Setting:
    """The sizes that the arguments ask for.

    Raises:
        ValueError: Both a model and a shape.
    """
    if given.shape and given.model:
        raise ValueError("--shape makes random weights and --model loads some: give one of them")
    setting = QUICK if given.quick else FULL
    if given.shape:
        setting = shaped(SHAPES[given.shape], **SHAPED)
    if given.model:
        setting = Setting(**SHAPED, english=True)
    asked = {key: getattr(given, key) for key in ("completion", "vocab", "ragged")}
    asked |= {key: getattr(given, f"{key}_tokens") for key in ("prompt", "demonstration")}
    return replace(setting, **{key: value for key, value in asked.items() if value is not None})


def is_frugal(given: argparse.Namespace) -> bool:
    """As asked for, or by the size of the shape."""
    if given.frugal is not None:
        return bool(given.frugal)
    return bool(given.shape and SHAPES[given.shape].parameters > FRUGAL_PARAMETERS)


@contextmanager
def plans(given: argparse.Namespace, settings: Sequence[Setting]) -> Iterator[list[Plan]]:
    """Plans of these settings, whose folders last as long as the context.

    Args:
        given: The command line.
        settings: Sizes; those that differ in their model alone get a folder of their own.
    """
    frugal = is_frugal(given)
    with TemporaryDirectory() as folder:
        made: list[Plan] = []
        for number, setting in enumerate(settings):
            place, random = given.model, False
            if place is None:
                own = Path(folder) / str(number)
                # Weights on disk are for trainers of others, which read a folder.
                random = bool(given.shape) and not getattr(given, "trl_python", None)
                place = str((make_tokenizer if random else make_model)(setting, own))
            made.append(Plan(setting, str(place), random, frugal))
        yield made
