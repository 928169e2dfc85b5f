"""The world's tokenizer: one token per word, a plain chat template, padding apart from the end."""

from __future__ import annotations

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from sdft.world.language import vocabulary

SPECIAL = ("<pad>", "<unk>", "<eos>", "<system>", "<user>", "<assistant>")
"""Special tokens, in the order of their ids."""
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<' + message['role'] + '> ' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ ' ' + eos_token }}{% endif %}"
    "{% if not loop.last %}{{ ' ' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ ' <assistant>' }}{% endif %}"
)
"""`<user> … <assistant> … <eos>`, with an optional `<system> …` in front."""


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer of everything the world can say."""
    ids = {token: i for i, token in enumerate((*SPECIAL, *vocabulary()))}
    backend = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="<eos>",
        additional_special_tokens=list(SPECIAL[3:]),
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
