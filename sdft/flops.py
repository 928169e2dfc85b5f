"""Floating-point operations of a decoder's passes, estimated from its size and the tokens.

One token forward costs 2 per parameter that multiplies it, and attention 4·L·D per token that it
attends to, with L layers and attention of width D = heads × head dimension: 2 for the scores, 2 for
the weighted sum of the values (Kaplan et al. 2020, arXiv 2001.08361, section 2.1; Chowdhery et al.
2022, "PaLM", arXiv 2204.02311, appendix B). A backward pass costs 2 per parameter for the gradients
of the activations, 2 more for those of the parameter where it is trained, and 8·L·D of attention:
6 per parameter and token in all when everything is trained, about 8 when the activations are
computed anew (gradient checkpointing).

Padding does not count. Within one pass every token attends to all tokens of its sequence, as in the
sources and in most kernels, which compute the masked half as well. Element-wise work, optimizer and
averages are left out; of a mixture of experts, all experts are counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel


@dataclass(frozen=True)
class Multipliers:
    """Parameters that multiply every token they meet.

    Attributes:
        all: How many.
        trained: How many of them get a gradient.
    """

    all: int
    trained: int

    @classmethod
    def of(cls, weights: Sequence[Tensor]) -> Multipliers:
        """Count the entries of some matrices."""
        trained = sum(weight.numel() for weight in weights if weight.requires_grad)
        return cls(sum(weight.numel() for weight in weights), trained)


@dataclass(frozen=True)
class ModelFlops:
    """What the formulas need to know of a causal LM.

    Attributes:
        body: Matrices that every token goes through: neither vectors (norms, biases) nor tables
            that are only looked up (input embedding, learned positions).
        head: The matrix that makes the logits, also where it is the input embedding (tied); it is
            applied only where logits are wanted, at the completion's tokens.
        layers: L.
        width: D, heads × head dimension; 0 for a model without attention.
        recomputes: Whether its activations are computed anew in the backward pass.
    """

    body: Multipliers
    head: Multipliers
    layers: int
    width: int
    recomputes: bool

    @classmethod
    def of(cls, model: PreTrainedModel) -> ModelFlops:
        """Read a model as it is now: what is trained may change."""
        known = getattr(model, "sdft_flops", None)
        if isinstance(known, ModelFlops):  # of a model whose parameters no longer show their shape
            return known
        modules = list(model.modules())  # once: it is what takes the time
        weights = {id(p): p for m in modules for p in m.parameters(recurse=False) if p.dim() > 1}
        head = getattr(model.get_output_embeddings(), "weight", None)
        apart = {id(head), *(id(m.weight) for m in modules if isinstance(m, nn.Embedding))}
        checkpoints = any(vars(m).get("gradient_checkpointing") for m in modules)
        config = model.config.get_text_config()
        return cls(
            body=Multipliers.of([p for i, p in weights.items() if i not in apart]),
            head=Multipliers.of([] if head is None else [head]),
            layers=_number(config, "num_hidden_layers"),
            width=_attention_width(config),
            recomputes=checkpoints and model.training,
        )

    def scoring(self, prompts: Sequence[int], completions: Sequence[int], learns: bool) -> int:
        """One pass over prompts and completions, with the logits of the completions.

        Args:
            prompts: Tokens of B prompts.
            completions: Tokens of B completions.
            learns: Whether a backward pass follows; it is counted with the forward pass.
        """
        lengths = [p + c for p, c in zip(prompts, completions, strict=True)]
        tokens, attended = sum(lengths), sum(length**2 for length in lengths)
        flops = self._forward(tokens, sum(completions), attended)
        trained = self.body.trained + self.head.trained
        if not learns or not trained:
            return flops
        weights = 2 * self.body.trained * tokens + 2 * self.head.trained * sum(completions)
        activations = flops + self._attention(attended)
        again = self._forward(tokens, 0, attended) if self.recomputes else 0
        return flops + activations + weights + again

    def sampling(self, prompts: Sequence[int], completions: Sequence[int]) -> int:
        """Prompts and completions token by token, with a key-value cache.

        The last token of a completion is drawn and not read.

        Args:
            prompts: Tokens of B prompts.
            completions: Tokens of B completions.
        """
        tokens = attended = 0
        for prompt, completion in zip(prompts, completions, strict=True):
            read = max(completion - 1, 0)
            tokens += prompt + read
            attended += prompt**2 + read * prompt + read * (read + 1) // 2
        return self._forward(tokens, sum(completions), attended)

    def _forward(self, tokens: int, logits: int, attended: int) -> int:
        products = self.body.all * tokens + self.head.all * logits
        return 2 * products + self._attention(attended)

    def _attention(self, attended: int) -> int:
        return 4 * self.layers * self.width * attended


def _attention_width(config: Any) -> int:
    heads = _number(config, "num_attention_heads")
    size = _number(config, "head_dim")
    return heads * size if size else (_number(config, "hidden_size") if heads else 0)


def _number(config: Any, name: str) -> int:
    """0 where the architecture has no such thing, or one per layer."""
    value = getattr(config, name, 0)
    return value if isinstance(value, int) else 0
