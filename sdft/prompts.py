"""Student and teacher prompts: one conversation, seen without and with the demonstration."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Protocol, cast

from transformers import PreTrainedTokenizerBase

from sdft.examples import Example, Message

DEFAULT_TEACHER_TEMPLATE = """{prompt}

{context}

This is an example of a response to the question above:

{demonstration}

Now answer the question with a response of your own."""

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
        text: Needs `{prompt}` and `{demonstration}`.

    Raises:
        ValueError: A placeholder that is needed is missing.
    """

    def __init__(self, text: str = DEFAULT_TEACHER_TEMPLATE) -> None:
        for needed in ("{prompt}", "{demonstration}"):
            if needed not in text:
                raise ValueError(f"the teacher template lacks {needed}: {text!r}")
        self.text = text

    def render(self, example: Example) -> str:
        """The content of the teacher's last user turn.

        Raises:
            ValueError: No demonstration, or a context that the template has no place for.
        """
        if example.demonstration is None:
            raise ValueError(f"an example has no demonstration: prompt {example.prompt[:80]!r}")
        if example.context and "{context}" not in self.text:
            raise ValueError(
                "the examples have a context but the teacher template has no {context}: "
                f"{self.text!r}"
            )
        text = self.text if example.context else _CONTEXT_LINE.sub("", self.text)
        values = {
            "prompt": example.prompt,
            "demonstration": example.demonstration,
            "context": example.context,
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
        chat_template_kwargs: Passed to the chat template for both prompts, for example
            `{"enable_thinking": False}`.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: TeacherTemplate,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.template = template
        self.chat_template_kwargs = dict(chat_template_kwargs or {})

    def student_ids(self, example: Example) -> list[int]:
        """Token ids of the prompt that the student answers."""
        return self._encode(example.messages)

    def teacher_ids(self, example: Example) -> list[int]:
        """Token ids of the same prompt with the demonstration."""
        return self._encode(self.template.messages(example))

    def _encode(self, messages: tuple[Message, ...]) -> list[int]:
        ids = self.tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=False,
            **self.chat_template_kwargs,
        )
        assert isinstance(ids, list)
        return cast(list[int], ids)
