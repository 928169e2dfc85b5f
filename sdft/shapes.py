"""The shape of a decoder: what decides its memory and its time, known before a weight is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from sdft.hub import load_failure
from sdft.models import ModelSource


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a Llama-type decoder (gated MLP, grouped key-value heads).

    Attributes:
        hidden: Width of the residual stream, D.
        layers: Number of decoder layers.
        heads: Query heads.
        kv_heads: Key-value heads.
        head_dim: Width of a head.
        intermediate: Width of the MLP.
        vocab: Tokens in the vocabulary, V.
        tied: Whether the head shares its weights with the embedding.
        qkv_bias: Whether query, key and value have biases.
    """

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    tied: bool
    qkv_bias: bool = False

    @property
    def parameters(self) -> int:
        """All parameters."""
        return self.matrix_parameters + (0 if self.tied else self.vocab * self.hidden)

    @property
    def matrix_parameters(self) -> int:
        """Parameters that every token is multiplied with: all but an untied embedding."""
        query, key = self.heads * self.head_dim, self.kv_heads * self.head_dim
        attention = self.hidden * (2 * query + 2 * key)
        attention += query + 2 * key if self.qkv_bias else 0
        mlp = 3 * self.hidden * self.intermediate
        norms = 2 * self.hidden
        return self.layers * (attention + mlp + norms) + self.hidden + self.vocab * self.hidden

    def adapter_parameters(self, rank: int) -> int:
        """Parameters of adapters of that rank on all linear layers but the head."""
        query, key = self.heads * self.head_dim, self.kv_heads * self.head_dim
        attention = 2 * (self.hidden + query) + 2 * (self.hidden + key)
        return self.layers * rank * (attention + 3 * (self.hidden + self.intermediate))

    @property
    def linear_parameters(self) -> int:
        """Entries of all linear layers' weights but the head's: what a quantised base packs."""
        query, key = self.heads * self.head_dim, self.kv_heads * self.head_dim
        attention = self.hidden * (2 * query + 2 * key)
        return self.layers * (attention + 3 * self.hidden * self.intermediate)

    @property
    def root_parameters(self) -> int:
        """Parameters outside the decoder layers: embedding, last norm, and a head of its own."""
        return self.hidden + (1 if self.tied else 2) * self.vocab * self.hidden

    @property
    def layer_parameters(self) -> int:
        """Parameters of one decoder layer."""
        return (self.parameters - self.root_parameters) // self.layers

    @property
    def tensors(self) -> int:
        """Parameters as the optimizer counts them: matrices, biases and norms."""
        return self.layers * (12 if self.qkv_bias else 9) + (2 if self.tied else 3)

    @property
    def kv_values(self) -> int:
        """Numbers that the key-value cache holds per token."""
        return 2 * self.layers * self.kv_heads * self.head_dim

    @property
    def layer_activations(self) -> int:
        """Numbers per token and layer that the backward pass needs, with flash attention.

        Inputs and outputs of both norms, query, key, value and attention output, and the MLP's
        gate, its activation, up-projection and product (Korthikanti et al. 2022, section 4, for
        a gated MLP).
        """
        query, key = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return 4 * self.hidden + 2 * query + 2 * key + 4 * self.intermediate

    @classmethod
    def from_config(cls, config: Any) -> ModelShape:
        """The shape that a Hugging Face configuration describes.

        Raises:
            ValueError: It lacks the sizes of a decoder with a gated MLP.
        """
        config = config.get_text_config()
        try:
            heads = int(config.num_attention_heads)
            head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
            return cls(
                hidden=config.hidden_size,
                layers=config.num_hidden_layers,
                heads=heads,
                kv_heads=getattr(config, "num_key_value_heads", None) or heads,
                head_dim=head_dim,
                intermediate=config.intermediate_size,
                vocab=config.vocab_size,
                tied=bool(getattr(config, "tie_word_embeddings", False)),
                qkv_bias=bool(getattr(config, "attention_bias", config.model_type == "qwen2")),
            )
        except AttributeError as error:
            raise ValueError(
                f"the calculator knows decoders with a gated MLP; a configuration of type "
                f"{config.model_type!r} lacks {error.name!r}"
            ) from error


def _qwen2(
    hidden: int, layers: int, heads: int, kv_heads: int, intermediate: int, vocab: int, tied: bool
) -> ModelShape:
    return ModelShape(
        hidden, layers, heads, kv_heads, hidden // heads, intermediate, vocab, tied, qkv_bias=True
    )


SHAPES: dict[str, ModelShape] = {
    "smollm2-135m": ModelShape(576, 30, 9, 3, 64, 1536, 49152, True),
    "qwen2.5-0.5b": _qwen2(896, 24, 14, 2, 4864, 151936, True),
    "qwen2.5-1.5b": _qwen2(1536, 28, 12, 2, 8960, 151936, True),
    "qwen2.5-3b": _qwen2(2048, 36, 16, 2, 11008, 151936, True),
    "qwen2.5-7b": _qwen2(3584, 28, 28, 4, 18944, 152064, False),
    "qwen2.5-14b": _qwen2(5120, 48, 40, 8, 13824, 152064, False),
    "qwen2.5-32b": _qwen2(5120, 64, 40, 8, 27648, 152064, False),
    "olmo-3-7b": ModelShape(4096, 32, 32, 32, 128, 11008, 100278, False),
    "llama-3.1-70b": ModelShape(8192, 80, 64, 8, 128, 28672, 128256, False),
}
"""Shapes by name, so that nothing need be on disk to reckon with them."""


def find_shape(name: str) -> ModelShape:
    """The shape of a known name, of a `config.json`, or of what `model_name` could load.

    Args:
        name: A key of `SHAPES`, a model folder, a `config.json`, a hub name or one of ours.

    Raises:
        ValueError: Nothing of that name, or no decoder that the calculator knows.
    """
    if name.lower() in SHAPES:
        return SHAPES[name.lower()]
    place = str(Path(name).parent) if name.endswith("config.json") else name
    source = ModelSource(place)
    try:
        config = AutoConfig.from_pretrained(source.location, **source.options)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"model {name!r}: no configuration there ({load_failure(error)}); known shapes: "
            + ", ".join(SHAPES)
        ) from error
    return ModelShape.from_config(config)
