"""Student and teacher prompts: one conversation, seen without and with the demonstration."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal, Protocol, cast, get_args

from transformers import PreTrainedTokenizerBase

from sdft.examples import Example, Message

DEFAULT_TEACHER_TEMPLATE = """{prompt}

{context}

This is an example of a response to the question above:

{demonstration}

Now answer the question with a response of your own."""

TEXT_TEACHER_TEMPLATE = """{prompt}

{context}

Now answer the question with a response of your own."""

Sees = Literal["text_and_answer", "text", "answer"]
"""What of an example the teacher's prompt shows: context and demonstration, or one of them."""

PLAIN_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] | capitalize }}: {{ message['content'] }}\n\n"
    "{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)
"""For tokenizers that bring no chat template."""

_PLACEHOLDER = re.compile(r"\{(prompt|demonstration|context)\}")
# With the blank line after it; at the end of the template with those before it.
_CONTEXT_LINE = re.compile(
    r"^[ \t]*\{context\}[ \t]*\n(?:[ \t]*\n)?|\s*^[ \t]*\{context\}[ \t]*\Z", re.MULTILINE
)


class Encoder(Protocol):
    """What turns examples into prompts; the data module asks the LightningModule for one."""

    def student_ids(self, example: Example) -> list[int]:
        """Token ids of the prompt that the student answers."""

    def teacher_ids(self, example: Example) -> list[int]:
        """Token ids of the same prompt with the demonstration."""


class TeacherTemplate:
    """The teacher's last user turn, built around the original one.

    `{prompt}`, `{demonstration}` and `{context}` are replaced in one pass over the template, so
    braces in the data or elsewhere in the template mean nothing. A line that holds only
    `{context}` vanishes for an example without one.

    Args:
        text: Needs `{prompt}` and what `sees` asks for; a default that does when unset.
        sees: What of an example it shows.

    Raises:
        ValueError: A placeholder that is needed is missing, or one stands there that must not.
    """

    def __init__(self, text: str | None = None, sees: Sees = "text_and_answer") -> None:
        if sees not in get_args(Sees):
            raise ValueError(f"teacher_sees must be one of {get_args(Sees)}, found {sees!r}")
        if text is None:
            text = TEXT_TEACHER_TEMPLATE if sees == "text" else DEFAULT_TEACHER_TEMPLATE
        for needed in ("{prompt}", "{context}" if sees == "text" else "{demonstration}"):
            if needed not in text:
                raise ValueError(f"the teacher template lacks {needed}: {text!r}")
        if sees == "text" and "{demonstration}" in text:
            raise ValueError(
                "teacher_sees is 'text', but the teacher template shows the {demonstration}: "
                f"{text!r}"
            )
        self.text = text
        self.sees = sees

    def render(self, example: Example) -> str:
        """The content of the teacher's last user turn.

        Raises:
            ValueError: What the template shows is missing, or a context that it has no place for.
        """
        if self.sees != "text" and example.demonstration is None:
            raise ValueError(f"an example has no demonstration: prompt {example.prompt[:80]!r}")
        context = "" if self.sees == "answer" else example.context
        if self.sees == "text" and not context:
            raise ValueError(
                f"teacher_sees is 'text', but an example has no context: {example.prompt[:80]!r}"
            )
        if context and "{context}" not in self.text:
            raise ValueError(
                "the examples have a context but the teacher template has no {context}: "
                f"{self.text!r} (or set teacher_sees to 'answer')"
            )
        text = self.text if context else _CONTEXT_LINE.sub("", self.text)
        values = {
            "prompt": example.prompt,
            "demonstration": example.demonstration or "",
            "context": context,
        }
        return _PLACEHOLDER.sub(lambda match: values[match[1]], text)

    def messages(self, example: Example) -> tuple[Message, ...]:
        """The conversation with only its last user turn changed."""
        turn = {**example.messages[-1], "content": self.render(example)}
        return (*example.messages[:-1], turn)


class PromptEncoder:
    """Encodes both prompts through the tokenizer's chat template.

    Args:
        tokenizer: With a chat template.
        template: The teacher's last user turn.
        chat_template_kwargs: Passed to the chat template, for example
            `{"enable_thinking": False}`.
        teacher_kwargs: The same for the teacher's prompts, where they differ.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: TeacherTemplate,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        teacher_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.template = template
        self.chat_template_kwargs = dict(chat_template_kwargs or {})
        self.teacher_kwargs = dict(
            self.chat_template_kwargs if teacher_kwargs is None else teacher_kwargs
        )

    def student_ids(self, example: Example) -> list[int]:
        """Token ids of the prompt that the student answers."""
        return self._encode(example.messages)

    def teacher_ids(self, example: Example) -> list[int]:
        """Token ids of the same prompt with the demonstration."""
        return self._encode(self.template.messages(example), self.teacher_kwargs)

    def _encode(
        self, messages: tuple[Message, ...], kwargs: Mapping[str, Any] | None = None
    ) -> list[int]:
        try:
            ids = self.tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=False,
                **(self.chat_template_kwargs if kwargs is None else kwargs),
            )
        except Exception as error:  # a template is a program: it raises anything
            raise ValueError(
                f"the model's chat template failed: {type(error).__name__}: {error} (last message: "
                f"{messages[-1]['content'][:80]!r}); see the tokenizer's chat_template, and "
                "model.chat_template_kwargs"
            ) from error
        assert isinstance(ids, list)
        return cast(list[int], ids)
