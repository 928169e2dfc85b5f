"""How large the pages of keys and values, and the passes over them, are for a rollout."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils.import_utils import is_flash_attn_2_available, is_flash_attn_3_available

from sdft.rollout import Sampling

_PAGES = {"cpu": 32}  # tokens; elsewhere what flash attention's paged kernels take:
_PAGE = 256
_SPARE = 1.25  # of the blocks needed: below a fifth of free ones no waiting row is let in
_MASK = 2**27  # entries of the mask that attention needs where it is not flash attention
_MOST_ROWS = 1024  # in a pass, so that their logits stay small


def paging(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    memory_share: float,
    max_batch_tokens: int,
) -> dict[str, Any]:
    """Settings of transformers' continuous batching, under the names of all its versions.

    Args:
        model: What decodes.
        prompts: B prompts.
        sampling: How many tokens may follow.
        memory_share: Largest share of a GPU's free memory for keys and values.
        max_batch_tokens: Most tokens of a forward pass.
    """
    page = _PAGES.get(model.device.type, _PAGE)
    pages = sum(-(-(len(prompt) + sampling.max_new_tokens) // page) for prompt in prompts)
    blocks = int(pages * _SPARE) + 1
    if not _attends_by_flash(model):
        max_batch_tokens = max(min(max_batch_tokens, _MASK // (blocks * page)), 1)
    fits = _fits(model, blocks * page, memory_share)
    return {
        "num_blocks": blocks if fits else None,  # as many as do
        "max_batch_tokens": min(max(sum(map(len, prompts)), len(prompts)), max_batch_tokens),
        "max_requests_per_batch": min(len(prompts), _MOST_ROWS),
        "max_memory_percent": memory_share,
        "max_memory": memory_share,
        "allow_block_sharing": False,
        "page_size": page,
        "block_size": page,
        "auto_switch_to_flash": _is_half(model),
    }


def _fits(model: PreTrainedModel, tokens: int, share: float) -> bool:
    if model.device.type != "cuda":
        return True
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None)
    width = width or config.hidden_size // config.num_attention_heads
    numbers = 2 * config.num_hidden_layers * heads * width * tokens
    free, _ = torch.cuda.mem_get_info(model.device)
    return bool(numbers * model.dtype.itemsize <= share * free)


def _is_half(model: PreTrainedModel) -> bool:
    return model.dtype in (torch.bfloat16, torch.float16)


def _attends_by_flash(model: PreTrainedModel) -> bool:
    """Whether flash attention is chosen, or continuous batching will choose it."""
    if "flash" in str(model.config._attn_implementation):
        return True
    installed = is_flash_attn_2_available() or is_flash_attn_3_available()
    return model.device.type == "cuda" and _is_half(model) and installed
