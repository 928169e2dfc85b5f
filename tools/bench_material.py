"""What the step benchmark runs on: randomly initialised models, prompts and demonstrations.

Weights do not matter for speed. Some tokens of the vocabulary end a response, so that completions
are ragged as real ones are. Imported by `tools/bench_step.py` and `tools/bench_trl.py`, which may
run in another environment: nothing here needs sdft.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}assistant{% endif %}"
)
WORDS = ("<pad>", "<unk>", "user", "assistant", "shown", "now")
TEMPLATE = "{prompt} shown {demonstration} now"
SKIPPED = 3
"""First tokens of each completion that SDFT leaves out of the loss."""
_ENGLISH = (
    "time year people way day man thing woman life child world school state family student group "
    "country problem hand part place case week company system program question work government "
    "number night point home water room mother area money story fact month lot right study book"
)


@dataclass(frozen=True)
class Setting:
    """Sizes of the model and of one optimizer step.

    Attributes:
        layers: Decoder layers.
        hidden: Width, D.
        heads: Query heads.
        kv_heads: Key-value heads; 0: a quarter of the query heads.
        intermediate: Width of the MLP.
        tied: Whether the head shares its weights with the embedding.
        biases: Of query, key and value, as in Qwen2; without them it is a Llama.
        vocab: Tokens in the vocabulary, V.
        batch: Prompts per step.
        prompt: Tokens of a prompt.
        demonstration: Tokens of a demonstration.
        completion: Longest completion.
        ragged: Share of the completions that end before the limit; 0 has all run to it.
        english: The texts are English words, for a tokenizer that is not made here.
    """

    layers: int = 4
    hidden: int = 256
    heads: int = 8
    kv_heads: int = 0
    intermediate: int = 1024
    tied: bool = True
    biases: bool = False
    vocab: int = 8192
    batch: int = 16
    prompt: int = 32
    demonstration: int = 32
    completion: int = 64
    ragged: float = 0.9
    english: bool = False

    @property
    def eos_ids(self) -> list[int]:
        """Tokens that end a response: as many as make `ragged` come out on average."""
        per_token = 1 - (1 - self.ragged) ** (1 / self.completion)
        count = round(per_token * self.vocab)
        return list(range(self.vocab - max(count, 1), self.vocab)) if self.ragged else []


def model_config(setting: Setting) -> LlamaConfig | Qwen2Config:
    """The configuration of a decoder of these sizes."""
    kind = Qwen2Config if setting.biases else LlamaConfig
    return kind(
        vocab_size=setting.vocab,
        hidden_size=setting.hidden,
        num_hidden_layers=setting.layers,
        num_attention_heads=setting.heads,
        num_key_value_heads=setting.kv_heads or max(1, setting.heads // 4),
        intermediate_size=setting.intermediate,
        max_position_embeddings=4096,
        tie_word_embeddings=setting.tied,
        pad_token_id=0,
        eos_token_id=setting.eos_ids or None,
        bos_token_id=None,
    )


def random_model(
    setting: Setting, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """A randomly initialised model, made where it will be used."""
    torch.manual_seed(0)
    with torch.device(device):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            model_config(setting), dtype=dtype
        )
    model.generation_config = GenerationConfig(
        pad_token_id=0, eos_token_id=setting.eos_ids or None, bos_token_id=None
    )
    model.eval()
    return model


def make_model(setting: Setting, folder: Path) -> Path:
    """Write a model with a word-level tokenizer."""
    random_model(setting).save_pretrained(folder)
    return make_tokenizer(setting, folder)


def make_tokenizer(setting: Setting, folder: Path) -> Path:
    """Write a word-level tokenizer."""
    words = [*WORDS, *(f"w{i}" for i in range(len(WORDS), setting.vocab))]
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", unk_token="<unk>", eos_token=words[-1]
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


def make_texts(setting: Setting, count: int) -> list[tuple[str, str]]:
    """Prompts and demonstrations of random words; prompts between half and the whole length."""
    rng = random.Random(0)
    top, english = setting.vocab - max(len(setting.eos_ids), 1), _ENGLISH.split()

    def word() -> str:
        return rng.choice(english) if setting.english else f"w{rng.randrange(len(WORDS), top)}"

    def words(number: int) -> str:
        return " ".join(word() for _ in range(number))

    return [
        (words(rng.randint(setting.prompt // 2, setting.prompt)), words(setting.demonstration))
        for _ in range(count)
    ]


def read_setting(text: str) -> Setting:
    """The inverse of `json.dumps(asdict(setting))`."""
    values: dict[str, Any] = json.loads(text)
    return Setting(**values)
