"""Logits of given completions under a model: the scoring pass of student and teacher."""

from __future__ import annotations

import inspect
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sdft.batch import pad
from sdft.rollout import Rollout


def completion_logits(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], completion: Rollout, pad_id: int
) -> Tensor:
    """Next-token logits at each completion token, given its prompt.

    Prompts are padded on the left and completions on the right, so all completions stand in the
    same columns and only those columns' logits are computed.

    Args:
        model: A causal LM.
        prompts: B prompts, unpadded.
        completion: B completions of T tokens.
        pad_id: Fills the padding.

    Returns:
        `[B, T, V]`; entry `[b, t]` is the distribution that predicted `completion.ids_BT[b, t]`.
    """
    prompt_ids, prompt_mask = pad(prompts, pad_id, "left", completion.ids_BT.device)
    ids = torch.cat([prompt_ids, completion.ids_BT], dim=1)
    mask = torch.cat([prompt_mask, completion.mask_BT], dim=1).long()
    tokens = completion.ids_BT.shape[1]
    optional = {
        "position_ids": (mask.cumsum(-1) - 1).clamp(min=0),
        "logits_to_keep": tokens + 1,
    }
    accepted = inspect.signature(model.forward).parameters
    logits: Tensor = model(
        input_ids=ids,
        attention_mask=mask,
        use_cache=False,
        **{name: value for name, value in optional.items() if name in accepted},
    ).logits
    return logits[:, -tokens - 1 : -1]
