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
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}assistant{% endif %}"
)
WORDS = ("<pad>", "<unk>", "user", "assistant", "shown", "now")
TEMPLATE = "{prompt} shown {demonstration} now"


@dataclass(frozen=True)
class Setting:
    """Sizes of the model and of one optimizer step.

    Attributes:
        layers: Decoder layers.
        hidden: Width, D.
        heads: Query heads; a quarter of them hold keys and values.
        intermediate: Width of the MLP.
        vocab: Tokens in the vocabulary, V.
        batch: Prompts per step.
        prompt: Tokens of a prompt.
        demonstration: Tokens of a demonstration.
        completion: Longest completion.
        ragged: Share of the completions that end before the limit; 0 has all run to it.
    """

    layers: int = 4
    hidden: int = 256
    heads: int = 8
    intermediate: int = 1024
    vocab: int = 8192
    batch: int = 16
    prompt: int = 32
    demonstration: int = 32
    completion: int = 64
    ragged: float = 0.9

    @property
    def eos_ids(self) -> list[int]:
        """Tokens that end a response: as many as make `ragged` come out on average."""
        per_token = 1 - (1 - self.ragged) ** (1 / self.completion)
        count = round(per_token * self.vocab)
        return list(range(self.vocab - max(count, 1), self.vocab)) if self.ragged else []


def make_model(setting: Setting, folder: Path) -> Path:
    """Write a Llama-type model with a word-level tokenizer."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=setting.vocab,
        hidden_size=setting.hidden,
        num_hidden_layers=setting.layers,
        num_attention_heads=setting.heads,
        num_key_value_heads=max(1, setting.heads // 4),
        intermediate_size=setting.intermediate,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        pad_token_id=0,
        eos_token_id=setting.eos_ids or None,
        bos_token_id=None,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(
        pad_token_id=0, eos_token_id=setting.eos_ids or None, bos_token_id=None
    )
    model.save_pretrained(folder)
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

    def words(number: int) -> str:
        top = setting.vocab - max(len(setting.eos_ids), 1)
        return " ".join(f"w{rng.randrange(len(WORDS), top)}" for _ in range(number))

    return [
        (words(rng.randint(setting.prompt // 2, setting.prompt)), words(setting.demonstration))
        for _ in range(count)
    ]


def read_setting(text: str) -> Setting:
    """The inverse of `json.dumps(asdict(setting))`."""
    values: dict[str, Any] = json.loads(text)
    return Setting(**values)
