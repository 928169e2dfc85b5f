"""What drawn tokens are checked against: exact distributions, and settings that must stay out."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

PAD, EOS = 0, 1


@torch.no_grad()
def next_probs(model: PreTrainedModel, prompt: list[int], temperature: float = 1.0) -> Tensor:
    """The exact distribution of the first token."""
    probs: Tensor = (model(torch.tensor([prompt])).logits[0, -1] / temperature).softmax(-1)
    return probs


def assert_drawn_from(counts: Counter[int], probs: Tensor) -> None:
    """Chi-square at about six standard deviations: never flaky, still sharp with 4,000 draws."""
    draws = sum(counts.values())
    expected = {token: draws * p for token, p in enumerate(probs.tolist()) if p > 0}
    assert set(counts) <= set(expected), "a token outside the support was drawn"
    often = {token: count for token, count in expected.items() if count >= 5}
    chi = sum((counts[token] - count) ** 2 / count for token, count in often.items())
    freedom = max(len(often) - 1, 1)
    assert chi < freedom + 6 * math.sqrt(2 * freedom), (chi, freedom)


def leaky(model: PreTrainedModel, **settings: Any) -> PreTrainedModel:
    model.generation_config = GenerationConfig(eos_token_id=EOS, pad_token_id=PAD, **settings)
    return model


LEAKS: list[dict[str, Any]] = [
    {"repetition_penalty": 5.0},
    {"top_k": 1, "do_sample": True},
    {"temperature": 0.1, "do_sample": True},
    {"top_p": 0.1, "do_sample": True},
    {"forced_eos_token_id": EOS},
    {"forced_bos_token_id": 11},
    {"suppress_tokens": [9, 10, 11, 12]},
    {"begin_suppress_tokens": [9, 10, 11, 12]},
    {"bad_words_ids": [[9], [10], [11]]},
    {"no_repeat_ngram_size": 1},
    {"min_new_tokens": 8},
    {"max_length": 5},
    {"num_beams": 3},
    {"min_p": 0.9, "do_sample": True},
    {"typical_p": 0.1, "do_sample": True},
    {"eta_cutoff": 0.5, "do_sample": True},
    {"num_return_sequences": 2, "do_sample": True},
]
