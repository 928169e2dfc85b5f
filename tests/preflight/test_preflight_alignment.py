"""Prompts side by side: every way in which teacher and student can be out of step."""

from __future__ import annotations

from typing import Any

import pytest
from conftest import CHAT_TEMPLATE, TEMPLATE, make_tokenizer
from transformers import PreTrainedTokenizerFast

from sdft.encoded import Encoded
from sdft.examples import Example
from sdft.preflight.alignment import align
from sdft.preflight.tokens import side_by_side, tokens_of
from sdft.prompts import PromptEncoder, TeacherTemplate

TURNS = "{% for m in messages %}{{ m['role'] }} : {{ m['content'] }} {% endfor %}"
PROMPT = "{% if add_generation_prompt %}assistant :{% endif %}"


def item(encoder: PromptEncoder, system: str = "", demonstration: str = "c b a") -> Encoded:
    turns = ({"role": "system", "content": system},) if system else ()
    example = Example((*turns, {"role": "user", "content": "a b c"}), "c b a", demonstration)
    return Encoded(example, encoder.student_ids(example), encoder.teacher_ids(example))


def encoder(chat: str = CHAT_TEMPLATE, template: str = TEMPLATE, **options: Any) -> PromptEncoder:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = chat
    tokenizer.add_tokens(["<think>", "</think>", "<s>", "quick"])
    return PromptEncoder(tokenizer, TeacherTemplate(template), **options)


def found(own: PromptEncoder, vocabulary: int = 99, **options: Any) -> dict[str, Any]:
    alignment = align(own, [item(own, **options)], [1], vocabulary)
    return {problem.name: problem for problem in alignment.problems}


def test_prompts_in_step_have_no_problem() -> None:
    assert found(encoder()) == {}
    assert found(encoder(), system="d e") == {}


@pytest.mark.parametrize(
    ("chat", "name"),
    [
        (f"<s> <s> {CHAT_TEMPLATE}", "two beginnings (teacher)"),
        (CHAT_TEMPLATE.replace("if add_generation_prompt", "if false"), "no generation prompt"),
        (
            "{% for m in messages if m['role'] != 'system' %}user : {{ m['content'] }} "
            f"{{% endfor %}}{PROMPT}",
            "lost system turn (student)",
        ),
        (f"{TURNS.replace('] }} ', '][:6] }} ')}{PROMPT}", "lost demonstration (teacher)"),
        (
            f"{TURNS}{{% if messages[-1]['content']|length > 6 %}}now {{% endif %}}{PROMPT}",
            "another end",
        ),
        (
            f"{{% if messages[-1]['content']|length > 6 %}}now {{% endif %}}{TURNS}{PROMPT}",
            "another beginning",
        ),
        (
            f"{TURNS}{PROMPT}{{% if messages[-1]['content']|length > 6 %}} <think>{{% endif %}}",
            "another thinking boundary",
        ),
    ],
)
def test_what_a_chat_template_does_wrong(chat: str, name: str) -> None:
    own = encoder(chat)
    own.tokenizer.bos_token = "<s>"
    assert name in found(own, system="d e")


def test_a_short_content_is_not_taken_for_the_generation_prompt() -> None:
    own = encoder()
    example = Example(({"role": "user", "content": "a"},), "a", "a")
    pair = Encoded(example, own.student_ids(example), own.teacher_ids(example))
    assert align(own, [pair], [1], 99).problems == []


class Shifted(PromptEncoder):
    """Its teacher's prompt has one token more at the end."""

    def teacher_ids(self, example: Example) -> list[int]:
        return [*super().teacher_ids(example), 6]


def test_a_boundary_shifted_by_one_token() -> None:
    own = encoder()
    assert "a shifted boundary" in found(Shifted(own.tokenizer, own.template))


def test_special_tokens_in_the_data_and_unknown_ones() -> None:
    assert "special token in the demonstration" in found(encoder(), demonstration="c </s>")
    unknown = found(encoder(), demonstration="zebra")["unknown words (teacher)"]
    assert unknown.harmless
    assert "a token that the model does not know" in found(encoder(), vocabulary=8)


def test_asking_to_think_where_thinking_is_closed() -> None:
    closed = f"{TURNS}{{% if add_generation_prompt %}}assistant : <think> </think>{{% endif %}}"
    text = "{prompt} shown {demonstration} including the thinking process"
    assert "asked to think with thinking off" in found(encoder(closed, text))
    assert found(encoder(closed)) == {}


def test_tokens_side_by_side_give_back_both_prompts() -> None:
    own = encoder()
    pair = item(own, system="d e")
    left, right = (tokens_of(own.tokenizer, ids) for ids in (pair.student_ids, pair.teacher_ids))
    blocks = side_by_side(left, right)
    assert [t for b in blocks if b.side != "teacher" for t in b.tokens] == left
    assert [t for b in blocks if b.side != "student" for t in b.tokens] == right
    assert [block.side for block in blocks] == ["both", "teacher", "both"]


def test_marks() -> None:
    tokenizer: PreTrainedTokenizerFast = encoder().tokenizer  # type: ignore[assignment]
    ids = tokenizer.encode("a </s> <think> b")
    tokens = tokens_of(tokenizer, ids)
    assert [token.kind for token in tokens] == ["text", "special", "think", "text"]
    assert tokens[1].shown == "⟦</s>⟧"


def test_a_boundary_of_several_tokens_is_marked() -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<thi", "nk>", "x"])
    kinds = [token.kind for token in tokens_of(tokenizer, tokenizer.encode("x <thi nk> x"))]
    assert kinds == ["text", "think", "think", "text"]
