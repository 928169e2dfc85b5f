"""Prompts token by token: what each token says, and two prompts side by side."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

Kind = Literal["text", "special", "think"]
Side = Literal["both", "student", "teacher"]

THINK = re.compile(r"</?think(?:ing)?>")
"""Where reasoning begins and ends, in the templates of reasoning models."""


@dataclass(frozen=True)
class Token:
    """One token of a prompt.

    Attributes:
        id: Its number.
        text: What it says.
        kind: `special`, part of a `think` boundary, or plain text.
    """

    id: int
    text: str
    kind: Kind = "text"

    @property
    def shown(self) -> str:
        """The text with its white space to be seen; special tokens in brackets."""
        text = self.text.replace("\n", "⏎").replace("\t", "⇥").replace("\r", "␍")
        text = text or "∅"
        return text if self.kind == "text" else f"⟦{text}⟧"


@dataclass(frozen=True)
class Block:
    """Tokens that both prompts have, or one of them alone.

    Attributes:
        side: Which.
        tokens: In their order.
    """

    side: Side
    tokens: list[Token]


def tokens_of(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[Token]:
    """The tokens of a prompt; a boundary such as `<think>` may span several."""
    special = set(tokenizer.all_special_ids)
    texts = [_text(tokenizer, id_) for id_ in ids]
    thinking = _within(texts)
    return [
        Token(id_, text, "think" if place in thinking else "special" if id_ in special else "text")
        for place, (id_, text) in enumerate(zip(ids, texts, strict=True))
    ]


def _text(tokenizer: PreTrainedTokenizerBase, id_: int) -> str:
    text = str(tokenizer.decode([id_], clean_up_tokenization_spaces=False))
    if text and "�" not in text:
        return text
    known = tokenizer.convert_ids_to_tokens([id_])[0]  # a part of a character, or no token at all
    return text if known is None else str(known)


def _within(texts: Sequence[str]) -> set[int]:
    """Places of the tokens that are part of a boundary of reasoning."""
    ends: list[int] = []
    for text in texts:
        ends.append((ends[-1] if ends else 0) + len(text))
    found = [match.span() for match in THINK.finditer("".join(texts))]
    return {
        place
        for place, end in enumerate(ends)
        if any(end - len(texts[place]) < stop and start < end for start, stop in found)
    }


def side_by_side(student: Sequence[Token], teacher: Sequence[Token]) -> list[Block]:
    """Both prompts as one sequence of blocks: in both, in the student's alone, the teacher's."""
    ids = [token.id for token in student], [token.id for token in teacher]
    blocks: list[Block] = []
    for tag, a, b, c, d in SequenceMatcher(None, *ids, autojunk=False).get_opcodes():
        if tag == "equal":
            blocks.append(Block("both", list(student[a:b])))
            continue
        if b > a:
            blocks.append(Block("student", list(student[a:b])))
        if d > c:
            blocks.append(Block("teacher", list(teacher[c:d])))
    return blocks


def tokens_dict(tokens: Sequence[Token]) -> list[dict[str, Any]]:
    """Ready for JSON; plain text needs no kind."""
    return [
        {"id": token.id, "text": token.text}
        | ({} if token.kind == "text" else {"kind": token.kind})
        for token in tokens
    ]
