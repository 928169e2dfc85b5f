"""Student and teacher prompts: the same conversation, one turn apart."""

from __future__ import annotations

import json
from typing import Any

import pytest
from conftest import make_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from sdft.examples import Example, as_messages
from sdft.prompts import (
    DEFAULT_TEACHER_TEMPLATE,
    PLAIN_CHAT_TEMPLATE,
    TEXT_TEACHER_TEMPLATE,
    PromptEncoder,
    TeacherTemplate,
)

SYSTEM = {"role": "system", "content": "a b"}
EARLIER = ({"role": "user", "content": "c"}, {"role": "assistant", "content": "d"})


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def example(prompt: str = "a", demonstration: str | None = "b", context: str = "") -> Example:
    return Example((user(prompt),), "answer", demonstration, context)


# ---------------------------------------------------------------- the template


def test_the_default_template_in_full() -> None:
    assert TeacherTemplate().render(example("Q?", "A!")) == (
        "Q?\n\nThis is an example of a response to the question above:\n\nA!\n\n"
        "Now answer the question with a response of your own."
    )
    assert TeacherTemplate().render(example("Q?", "A!", "facts")).startswith("Q?\n\nfacts\n\nThis")


BRACES = [
    json.dumps({"name": "f", "arguments": {"x": [1, {"y": "{z}"}]}}),
    "{prompt}",
    "{demonstration} {context}",
    "{{prompt}}",
    "{",
    "}}{",
    "{0} {} %s $x \\1 \\g<0>",
]


@pytest.mark.parametrize("text", BRACES)
def test_braces_in_the_data_mean_nothing(text: str) -> None:
    template = TeacherTemplate("<{prompt}|{demonstration}|{context}>")
    assert template.render(example(text, text, text)) == f"<{text}|{text}|{text}>"


TEXTS = st.text("{}promtdensainx \\\n")


@settings(max_examples=200)
@given(TEXTS, TEXTS, TEXTS.filter(bool))
def test_any_text_passes_unchanged(prompt: str, demonstration: str, context: str) -> None:
    rendered = TeacherTemplate("P{prompt}D{demonstration}C{context}E").render(
        example(prompt, demonstration, context)
    )
    assert rendered == f"P{prompt}D{demonstration}C{context}E"


def test_other_braces_of_the_template_stay() -> None:
    template = TeacherTemplate('{prompt} {demonstration} {"json": {word}} {{x}}')
    assert template.render(example()) == 'a b {"json": {word}} {{x}}'


def test_a_placeholder_may_stand_twice() -> None:
    assert TeacherTemplate("{prompt} {demonstration} {prompt}").render(example()) == "a b a"


@pytest.mark.parametrize(
    ("text", "without", "with_context"),
    [
        ("{prompt}\n{context}\n{demonstration}", "a\nb", "a\nc\nb"),
        ("{prompt}\n\n{context}\n\n{demonstration}", "a\n\nb", "a\n\nc\n\nb"),
        ("{context}\n\n{prompt} {demonstration}", "a b", "c\n\na b"),
        ("{prompt} {demonstration}\n  {context}  \n", "a b\n", "a b\n  c  \n"),
        ("{prompt} {demonstration}\n\n{context}", "a b", "a b\n\nc"),
        ("{prompt} ({context}) {demonstration}", "a () b", "a (c) b"),
    ],
)
def test_a_line_of_context_alone_vanishes_without_one(
    text: str, without: str, with_context: str
) -> None:
    template = TeacherTemplate(text)
    assert template.render(example()) == without
    assert template.render(example(context="c")) == with_context


@pytest.mark.parametrize("needed", ["{prompt}", "{demonstration}"])
def test_a_missing_placeholder_is_named(needed: str) -> None:
    with pytest.raises(ValueError, match=f"lacks {needed}"):
        TeacherTemplate(DEFAULT_TEACHER_TEMPLATE.replace(needed, ""))


def test_a_context_without_a_place_is_an_error() -> None:
    template = TeacherTemplate("{prompt} {demonstration}")
    assert template.render(example()) == "a b"
    with pytest.raises(ValueError, match=r"no \{context\}"):
        template.render(example(context="c"))


def test_an_example_without_demonstration_names_its_prompt() -> None:
    with pytest.raises(ValueError, match=r"no demonstration.*'what is it'"):
        TeacherTemplate().render(example("what is it", None))


def test_only_the_last_user_turn_changes() -> None:
    messages = (SYSTEM, *EARLIER, {**user("a"), "name": "Ann"})
    given_ = Example(messages, "answer", "b")
    found = TeacherTemplate("{prompt} then {demonstration}").messages(given_)
    assert found[:-1] == messages[:-1]
    assert found[-1] == {"role": "user", "content": "a then b", "name": "Ann"}
    assert given_.messages == messages


# ---------------------------------------------------------------- what the teacher sees


def test_text_and_answer_is_the_default() -> None:
    assert TeacherTemplate().sees == "text_and_answer"
    shown = TeacherTemplate(sees="text_and_answer").render(example("Q?", "A!", "facts"))
    assert shown == TeacherTemplate().render(example("Q?", "A!", "facts"))
    assert "facts" in shown
    assert "A!" in shown


def test_the_text_alone() -> None:
    template = TeacherTemplate(sees="text")
    expected = "Q?\n\nfacts\n\nNow answer the question with a response of your own."
    assert template.text == TEXT_TEACHER_TEMPLATE
    assert template.render(example("Q?", "A!", "facts")) == expected
    assert template.render(example("Q?", None, "facts")) == expected, "no demonstration is needed"
    with pytest.raises(ValueError, match=r"'text', but an example has no context: 'Q\?'"):
        template.render(example("Q?", "A!"))


def test_the_answer_alone() -> None:
    template = TeacherTemplate(sees="answer")
    with_context = template.render(example("Q?", "A!", "facts"))
    assert with_context == TeacherTemplate().render(example("Q?", "A!"))
    assert "facts" not in with_context
    bare = TeacherTemplate("{prompt} {demonstration}", sees="answer")
    assert bare.render(example(context="c")) == "a b", "a context without a place is no error"
    with pytest.raises(ValueError, match="no demonstration"):
        template.render(example(demonstration=None, context="facts"))


@pytest.mark.parametrize(
    ("text", "sees", "reason"),
    [
        ("{prompt} {demonstration}", "text", r"lacks \{context\}"),
        ("{context}", "text", r"lacks \{prompt\}"),
        ("{prompt} {context} {demonstration}", "text", r"shows the \{demonstration\}"),
        ("{prompt} {context}", "answer", r"lacks \{demonstration\}"),
        ("{prompt} {context}", "text_and_answer", r"lacks \{demonstration\}"),
        (None, "everything", "teacher_sees must be one of .*found 'everything'"),
    ],
)
def test_a_template_that_does_not_fit_what_is_seen(
    text: str | None, sees: Any, reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        TeacherTemplate(text, sees)


@pytest.mark.parametrize("sees", ["text_and_answer", "text", "answer"])
def test_the_student_sees_neither_whatever_the_teacher_sees(sees: Any) -> None:
    encode = PromptEncoder(make_tokenizer(), TeacherTemplate(sees=sees))
    bare, full = example("a", "b", ""), example("a", "b", "c")
    assert encode.student_ids(full) == encode.student_ids(bare)
    assert encode.teacher_ids(full) != encode.student_ids(full)


# ---------------------------------------------------------------- through the chat template


def encoder(template: str = "{prompt} shown {demonstration} now", **options: Any) -> PromptEncoder:
    return PromptEncoder(make_tokenizer(), TeacherTemplate(template), options or None)


def test_both_prompts_keep_system_and_earlier_turns() -> None:
    encode = encoder()
    case = Example((SYSTEM, *EARLIER, user("a")), "answer", "b")
    decode = encode.tokenizer.decode
    before = "system : a b user : c assistant : d "
    assert decode(encode.student_ids(case)) == before + "user : a assistant :"
    assert decode(encode.teacher_ids(case)) == before + "user : a shown b now assistant :"


def test_the_student_never_sees_the_demonstration() -> None:
    encode = encoder()
    one, other = example("a", "b"), example("a", "c d e")
    assert encode.student_ids(one) == encode.student_ids(other)
    assert encode.teacher_ids(one) != encode.teacher_ids(other)


def test_chat_template_kwargs_reach_both_prompts() -> None:
    thinking, plain = encoder(enable_thinking=True), encoder(enable_thinking=False)
    for encode in (thinking, plain):
        encode.tokenizer.chat_template = (
            "{{ 'g' if enable_thinking else 'h' }} {{ messages[-1]['content'] }}"
        )
    decode = plain.tokenizer.decode
    assert decode(thinking.student_ids(example())) == "g a"
    assert decode(plain.student_ids(example())) == "h a"
    assert decode(thinking.teacher_ids(example())) == "g a shown b now"
    assert decode(plain.teacher_ids(example())) == "h a shown b now"


def test_the_templates_special_tokens_are_not_doubled() -> None:
    encode = encoder()
    tokenizer = encode.tokenizer
    tokenizer.chat_template = "</s> {{ messages[-1]['content'] }}"
    assert encode.student_ids(example("a b")) == tokenizer.convert_tokens_to_ids(["</s>", "a", "b"])


def test_the_plain_chat_template() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = PLAIN_CHAT_TEMPLATE
    text = tokenizer.apply_chat_template(
        [SYSTEM, user("c")], tokenize=False, add_generation_prompt=True
    )
    assert text == "System: a b\n\nUser: c\n\nAssistant:"


# ---------------------------------------------------------------- conversations


def test_a_text_is_one_user_turn() -> None:
    assert as_messages("hello") == (user("hello"),)
    assert as_messages([SYSTEM, user("a")]) == (SYSTEM, user("a"))


@pytest.mark.parametrize(
    ("prompt", "reason"),
    [
        ("", "the prompt is empty"),
        (" \n\t", "the prompt is empty"),
        ([], "the prompt is empty"),
        ([user(" ")], "the prompt is empty"),
        ([user("a"), EARLIER[1]], "last message must be the user's, found role 'assistant'"),
        ([{"role": "user"}], "needs the texts 'role' and 'content'"),
        ([{"role": "user", "content": 3}], "needs the texts 'role' and 'content'"),
        (["hello"], "needs the texts 'role' and 'content'"),
    ],
)
def test_a_bad_prompt_says_why(prompt: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        as_messages(prompt)
