"""Hidden states of given completions under a model, without computing any padding.

Prompts and completions are laid end to end in one row, attention stays inside each sequence
(`sdft.attention`), and the backbone alone runs. What comes out are the hidden states that predicted
the completion tokens, `[N, D]`, ready for the LM head (`sdft.head`): no logits. Padding is the
reference, the way of models that cannot be packed, and of batches with hardly any padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from sdft import flash
from sdft.attention import say_once
from sdft.packable import backbone, packed_hidden, why_not_packable
from sdft.rollout import Rollout
from sdft.segments import Segments

Layout = Literal["auto", "packed", "padded"]

WORTHWHILE = 0.95
"""Sequences are packed where that is at most this share of the padded work: the rest is noise."""
GROUP_TOKENS = 8
"""What one more length costs packed attention on CPU, in tokens. Measured: 5 to 6 for 4 layers of
width 128, 2 for 4 of width 256 (one core); the wider the model, the dearer is a token."""
GPU_GROUP_TOKENS = 256
"""The same on a GPU without flash attention: an estimate, by the time of a few kernel launches."""


@dataclass(frozen=True, eq=False)
class PackedSequences:
    """Prompts with their completions, laid end to end, the shortest first.

    The last token of each completion is left out: it predicts nothing that is asked for.

    Attributes:
        ids_N: Token ids.
        segments: Where the sequences begin and end; `segments.positions_N` and, as cumulated
            lengths, `segments.starts`.
        predicting: `[N_c]`, for every completion token, row by row, where its prediction stands.
    """

    ids_N: Tensor
    segments: Segments
    predicting: Tensor

    @classmethod
    def of(cls, prompts: Sequence[Sequence[int]], completion: Rollout) -> PackedSequences:
        """Lay out B prompts, none of them empty, and their completions."""
        assert all(prompts), "an empty prompt predicts nothing"
        completions = completion.completions()
        rows = [[*p, *c[:-1]] for p, c in zip(prompts, completions, strict=True)]
        order = sorted(range(len(rows)), key=lambda row: len(rows[row]))
        ids = [token for row in order for token in rows[row]]
        first, begin = [0] * len(rows), 0
        for row in order:
            first[row] = begin + len(prompts[row]) - 1
            begin += len(rows[row])
        predicting = [
            place
            for start, tokens in zip(first, completions, strict=True)
            for place in range(start, start + len(tokens))
        ]
        device = completion.ids_BT.device
        return cls(
            torch.tensor(ids, dtype=torch.long, device=device),
            Segments.of((len(rows[row]) for row in order), device),
            torch.tensor(predicting, dtype=torch.long, device=device),
        )


# ---------------------------------------------------------------- hidden states


def completion_hidden(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    completion: Rollout,
    layout: Layout = "auto",
) -> Tensor:
    """Hidden states that predict the completion tokens: what the LM head gets for their logits.

    Args:
        model: A causal LM with a backbone of its own.
        prompts: B prompts, unpadded, none of them empty.
        completion: B completions.
        layout: "packed" end to end, "padded", or "auto": packed where that is less work
            (`packing_pays`). A model that cannot be packed is padded, and a warning says why.

    Returns:
        `[N, D]`: the rows of `completion.ids_BT[completion.mask_BT]`, in this order.
    """
    if _resolved(layout, model, prompts, completion) == "padded":
        return completion_hidden_padded(model, prompts, completion)
    sequences = PackedSequences.of(prompts, completion)
    return packed_hidden(model, sequences.ids_N, sequences.segments)[sequences.predicting]


def completion_hidden_padded(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], completion: Rollout
) -> Tensor:
    """`completion_hidden` by padding on the right, where no causal model looks: without a mask."""
    body = backbone(model)
    assert body is not None, "the model has no backbone apart from its head"
    sequences = PackedSequences.of(prompts, completion)
    segments = sequences.segments
    ids_BT = pad_sequence(sequences.ids_N.split(segments.lengths), batch_first=True)
    output = body(input_ids=ids_BT, attention_mask=torch.ones_like(ids_BT), use_cache=False)
    hidden_BTD: Tensor = output.last_hidden_state
    rows_N = torch.arange(len(ids_BT), device=ids_BT.device).repeat_interleave(
        segments.starts.diff(), output_size=segments.tokens
    )
    places_N = rows_N * segments.longest + segments.positions_N
    return hidden_BTD.flatten(0, 1)[places_N[sequences.predicting]]


def _resolved(
    layout: Layout,
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    completion: Rollout,
) -> Layout:
    """The layout that can be had and pays; logged."""
    if layout == "padded":
        return "padded"
    if layout == "auto" and not _pays(model, prompts, completion):
        say_once("scoring pads a batch: packing would save too little")
        return "padded"
    if why_not_packable(model) is not None:  # it has said why
        return "padded"
    say_once("scoring packs a batch: its sequences lie end to end, without padding")
    return "packed"


def _pays(model: PreTrainedModel, prompts: Sequence[Sequence[int]], completion: Rollout) -> bool:
    device, dtype = completion.ids_BT.device, next(model.parameters()).dtype
    group_tokens = GROUP_TOKENS
    if device.type == "cuda":
        group_tokens = GPU_GROUP_TOKENS if flash.half_dtype(device, dtype) is None else 0
    responses = completion.lengths_B.tolist()
    return packing_pays([len(prompt) for prompt in prompts], responses, group_tokens)


def packing_pays(
    prompts: Sequence[int], completions: Sequence[int], group_tokens: int = GROUP_TOKENS
) -> bool:
    """Whether laying sequences end to end is worthwhile less work than padding them.

    Packed, the work is that of the real tokens and of one call per layer for each length that
    occurs; padded, it is that of rows × columns.

    Args:
        prompts: Tokens of each prompt.
        completions: Tokens of each completion.
        group_tokens: Tokens that take as long as one more length; 0 with flash attention.
    """
    lengths = [p + max(c - 1, 0) for p, c in zip(prompts, completions, strict=True)]
    packed = sum(lengths) + group_tokens * len(set(lengths))
    return packed <= WORTHWHILE * len(lengths) * max(lengths)


# ---------------------------------------------------------------- helpers


def unpack(values: Tensor, mask_BT: Tensor, fill: float = 0.0) -> Tensor:
    """Values of the unmasked tokens back in their rows: `[N, …]` → `[B, T, …]`.

    The way there is `values[mask_BT]`.

    Args:
        values: One for each true place of the mask, row by row; the gradient goes through.
        mask_BT: `[B, T]`.
        fill: Stands at all other places.
    """
    rows = values.new_full((*mask_BT.shape, *values.shape[1:]), fill)
    mask = mask_BT.view(*mask_BT.shape, *[1] * (values.dim() - 1))
    return rows.masked_scatter(mask, values)


def micro_batches(
    lengths: Sequence[int], token_budget: int, padded: bool = False
) -> list[list[int]]:
    """Divide rows into micro-batches of at most `token_budget` tokens.

    Packed, a micro-batch costs the sum of its lengths (first-fit decreasing); padded, its number of
    rows times the longest, so rows of like length go together.

    Args:
        lengths: Tokens of each row.
        token_budget: Tokens of a micro-batch; a row with more than that stands alone.
        padded: Count the padding.

    Returns:
        The rows of each micro-batch, ascending; each row once.

    Raises:
        ValueError: A budget below 1.
    """
    if token_budget < 1:
        raise ValueError(f"token_budget must be at least 1, found {token_budget}")
    longest_first = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    batches = (_of_like_length if padded else _first_fit)(lengths, longest_first, token_budget)
    return [sorted(batch) for batch in batches]


def _first_fit(lengths: Sequence[int], rows: list[int], token_budget: int) -> list[list[int]]:
    batches: list[list[int]] = []
    room: list[int] = []
    for row in rows:
        fitting = next((i for i, tokens in enumerate(room) if lengths[row] <= tokens), None)
        if fitting is None:
            batches.append([])
            room.append(token_budget)
            fitting = -1
        batches[fitting].append(row)
        room[fitting] -= lengths[row]
    return batches


def _of_like_length(lengths: Sequence[int], rows: list[int], token_budget: int) -> list[list[int]]:
    batches: list[list[int]] = []
    for row in rows:
        if not batches or (len(batches[-1]) + 1) * lengths[batches[-1][0]] > token_budget:
            batches.append([])
        batches[-1].append(row)
    return batches
