"""A tiny real Hugging Face model and tiny tasks, made locally: the tests need no network."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # also of the processes that tests start

import hypothesis
import pytest
import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.loggers import TensorBoardLogger
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

import sdft.report
from sdft import ContinualDataModule, Example, PythonTask, SDFTModule, StudentModule
from sdft.callbacks import EMATeacher, Retention, Samples, StageCheckpoint

torch.set_num_threads(1)
hypothesis.settings.register_profile("here", database=None, deadline=None, derandomize=True)
hypothesis.settings.load_profile("here")

MethodT = TypeVar("MethodT", bound=StudentModule)
LETTERS = "abcdefgh"
WORDS = ["<pad>", "</s>", "<unk>", "user", "assistant", "system", ":", "shown", "now", *LETTERS]
IDS: dict[str, Any] = {
    "vocab_size": len(WORDS),
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": None,
}
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} : {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}assistant :{% endif %}"
)
TEMPLATE = "{prompt} shown {demonstration} now"


def make_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def make_model(seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    shape = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 128,
    }
    return LlamaForCausalLM(LlamaConfig(**IDS | shape | changes)).eval()


def make_gpt2(seed: int = 0, **changes: Any) -> GPT2LMHeadModel:
    """Learned absolute positions, and dropout (0.1) while it trains."""
    torch.manual_seed(seed)
    shape = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 128}
    return GPT2LMHeadModel(GPT2Config(**IDS | shape | changes)).eval()


def make_qwen2(seed: int = 0, **changes: Any) -> Qwen2ForCausalLM:
    """Grouped key-value heads, biases, tied embeddings."""
    torch.manual_seed(seed)
    shape = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "tie_word_embeddings": True,
    }
    return Qwen2ForCausalLM(Qwen2Config(**IDS | shape | changes)).eval()


FAMILIES: dict[str, Callable[..., PreTrainedModel]] = {
    "llama": make_model,
    "gpt2": make_gpt2,
    "qwen2": make_qwen2,
}


def sharpen(model: PreTrainedModel, factor: float = 8.0) -> PreTrainedModel:
    """Scale every matrix: a fresh model's logits are so flat that few mistakes would show."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(factor)
    return model


def save_model(folder: Path, seed: int = 0, family: str = "llama", **changes: Any) -> Path:
    FAMILIES[family](seed, **changes).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("tiny-model"))


@pytest.fixture(scope="session")
def gpt2_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("tiny-gpt2"), family="gpt2")


@pytest.fixture
def no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Empty plots: drawing takes longer than a tiny run."""
    monkeypatch.setattr(sdft.report, "save_figure", lambda figure, path: Path(path).touch())
    for name in ("plot_matrix", "plot_curves"):
        monkeypatch.setattr(sdft.report, name, lambda *args: None)


def echo_examples(count: int, offset: int = 0) -> list[Example]:
    """Prompts of three letters; the answer repeats them in reverse."""
    examples = []
    for i in range(offset, offset + count):
        letters = [LETTERS[(i * step) % len(LETTERS)] for step in (1, 3, 5)]
        answer = " ".join(reversed(letters))
        prompt = {"role": "user", "content": " ".join(letters)}
        examples.append(Example((prompt,), answer, demonstration=answer))
    return examples


def make_task(name: str, train: int = 6, test: int = 4, **options: Any) -> PythonTask:
    return PythonTask(
        name,
        train=echo_examples(train),
        validation=echo_examples(2, offset=50),
        test=echo_examples(test, offset=100),
        **options,
    )


def make_data(names: Sequence[str] = ("first", "second"), **options: Any) -> ContinualDataModule:
    settings: dict[str, Any] = {"batch_size": 4, "steps": 3}
    return ContinualDataModule(
        [make_task(name) for name in names], suites=[make_task("prior")], **settings | options
    )


def make_module(model_dir: Path, **options: Any) -> SDFTModule:
    settings: dict[str, Any] = {
        "model_name": str(model_dir),
        "max_new_tokens": 6,
        "teacher_template": TEMPLATE,
        "skip_first_tokens": 1,
        "optimizer": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2),
    }
    return SDFTModule(**settings | options)


def make_method(method: type[MethodT], model_dir: Path, **options: Any) -> MethodT:
    """A module of a method beside SDFT, on the same terms as `make_module`."""
    settings: dict[str, Any] = {
        "model_name": str(model_dir),
        "max_new_tokens": 6,
        "teacher_template": TEMPLATE,
        "optimizer": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2),
    }
    return method(**settings | options)


def run_fit(
    folder: Path,
    model_dir: Path,
    root: str = "run",
    module: StudentModule | None = None,
    data: ContinualDataModule | None = None,
    teacher: EMATeacher | None = None,
    retention: Retention | None = None,
    callbacks: Sequence[Any] = (),
    ckpt_path: str | Path | None = None,
    **options: Any,
) -> tuple[Trainer, StudentModule]:
    """Run a whole tiny fit below `folder`; returns the trainer and the trained module."""
    seed_everything(7, verbose=False)
    module = module or make_module(model_dir)
    trainer = Trainer(
        accelerator="cpu",
        logger=TensorBoardLogger(folder / root, default_hp_metric=False),
        callbacks=[
            teacher or EMATeacher(rate=0.1),
            retention or Retention(),
            Samples(2),
            StageCheckpoint(every_n_steps=1),
            *callbacks,
        ],
        **{
            "max_epochs": -1,
            "num_sanity_val_steps": 0,
            "log_every_n_steps": 1,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            **options,
        },
    )
    trainer.fit(module, datamodule=data or make_data(), ckpt_path=ckpt_path)
    return trainer, module


@pytest.fixture
def fit(tmp_path: Path, model_dir: Path) -> Callable[..., tuple[Trainer, StudentModule]]:
    """`run_fit` below the test's own folder."""
    return partial(run_fit, tmp_path, model_dir)


def write_jsonl(path: Path, records: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path
