"""Whatever a task file or a template holds: examples, or one error that says where."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import make_tokenizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sdft.encoded import encode_all
from sdft.examples import Example
from sdft.prompts import PromptEncoder, TeacherTemplate
from sdft.tasks import JSONLTask

scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=6,
)
roles = st.sampled_from(["user", "assistant", "system", "tool", ""]) | scalars
messages = st.lists(
    st.dictionaries(st.sampled_from(["role", "content", "x"]), roles | st.text(), max_size=3),
    max_size=4,
)
texts = st.text(max_size=30)
records = st.fixed_dictionaries(
    {},
    optional={
        "prompt": texts | messages | values,
        "messages": messages | values,
        "answer": texts | values,
        "demonstration": texts | values,
        "context": texts | values,
        "extra": values,
    },
)
lines = st.one_of(
    records.map(lambda one: json.dumps(one).encode()),
    records.map(lambda one: json.dumps(one, ensure_ascii=False).encode("utf-8", "surrogatepass")),
    values.map(lambda one: json.dumps(one).encode()),
    st.binary(max_size=30),
    st.sampled_from([b"", b"   ", b"{", b"\xef\xbb\xbf{}", b"[" * 2000, b'{"prompt": 1e999}']),
)
quick = settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])


@quick
@given(st.lists(lines, max_size=4), st.sampled_from([b"\n", b"\r\n"]), st.booleans())
def test_any_file_is_read_or_refused_by_line(
    tmp_path: Path, content: list[bytes], end: bytes, training: bool
) -> None:
    file = tmp_path / "task.jsonl"
    file.write_bytes(end.join(content))
    split: Any = "train" if training else "test"
    task = JSONLTask("any", train=str(file), test=str(file))
    try:
        found = list(task.examples(split))
    except ValueError as error:
        told = str(error)
        assert "task.jsonl" in told
        assert len(told) < 2000
        assert ", line " in told or "empty" in told
    else:
        assert found
        for example in found:
            assert isinstance(example.answer, str)
            assert example.messages[-1]["role"] == "user"
            assert not training or (example.demonstration or "").strip()


@quick
@given(
    st.lists(
        st.sampled_from(
            ["{prompt}", "{demonstration}", "{context}", "{", "}", "{{", "{x}", "\n", "a"]
        )
    ),
    st.sampled_from(["text_and_answer", "text", "answer"]),
    texts,
    texts,
)
def test_any_teacher_template_renders_or_is_refused(
    parts: list[str], sees: Any, demonstration: str, context: str
) -> None:
    example = Example(({"role": "user", "content": "ask {context}"},), "b", demonstration, context)
    told = ""
    try:
        shown = TeacherTemplate("".join(parts), sees).render(example)
    except ValueError as error:
        told = str(error)
    if told:
        assert "template" in told or "context" in told
    else:
        assert "ask {context}" in shown
        assert sees == "text" or demonstration in shown


@quick
@given(
    st.lists(
        st.sampled_from(
            [
                "{% for m in messages %}",
                "{% endfor %}",
                "{{ m['content'] }}",
                "{{ m.role }} : ",
                "{{ messages[0].content }}",
                "{{ undefined.thing }}",
                "{{ 1 / 0 }}",
                "{{ raise_exception('no') }}",
                "{% if add_generation_prompt %}assistant :{% endif %}",
                "{% while %}",
                "{{ ''.__class__.__mro__ }}",
                "a b c",
            ]
        ),
        max_size=6,
    )
)
def test_any_chat_template_encodes_or_is_refused(parts: list[str]) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "".join(parts)
    encoder = PromptEncoder(tokenizer, TeacherTemplate())
    example = Example(({"role": "user", "content": "a b"},), "b", "b")
    for encode in (encoder.student_ids, encoder.teacher_ids):
        told, ids = "", []
        try:
            ids = encode(example)
        except ValueError as error:
            told = str(error)
        assert all(isinstance(token, int) for token in ids)
        assert not told or ("chat template failed" in told and not ids)


@settings(max_examples=60)
@given(st.lists(st.text(max_size=60), min_size=1, max_size=3))
def test_any_text_becomes_tokens(prompts: list[str]) -> None:
    class Texts(JSONLTask):
        def examples(self, split: Any) -> list[Example]:
            return [
                Example(({"role": "user", "content": text},), text, demonstration=text or "a")
                for text in prompts
            ]

    encoder = PromptEncoder(make_tokenizer(), TeacherTemplate())
    task = Texts("texts", train="none.jsonl")
    encoded = encode_all(encoder, task, "train", with_teacher=True)
    assert len(encoded) == len(prompts)
    for item in encoded:
        assert item.student_ids
        assert len(item.teacher_ids) > len(item.student_ids)


def test_a_deep_record_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "deep.jsonl"
    file.write_text('{"prompt": ' + "[" * 100_000 + "]" * 100_000 + "}")
    with pytest.raises(ValueError, match=r"deep\.jsonl, line 1"):
        list(JSONLTask("deep", train=str(file)).examples("train"))
