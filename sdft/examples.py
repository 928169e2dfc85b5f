"""One example: a prompt, the demonstration that only the teacher sees, and the answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Message = Mapping[str, str]  # {"role": "system" | "user" | "assistant", "content": text}


@dataclass(frozen=True)
class Example:
    """A prompt with what is known about it.

    Attributes:
        messages: The conversation to answer; its last turn is the user's.
        answer: What the scorer compares a response with.
        demonstration: A response to this very prompt, shown to the teacher alone. Needed to
            train, not to evaluate.
        context: Extra text for the teacher (an article, documentation), empty when unused.
    """

    messages: tuple[Message, ...]
    answer: str
    demonstration: str | None = None
    context: str = ""

    @property
    def prompt(self) -> str:
        """The content of the last user turn."""
        return self.messages[-1]["content"]


def as_messages(prompt: str | Sequence[Message]) -> tuple[Message, ...]:
    """Turn a prompt into a conversation whose last turn is a non-empty user turn.

    Raises:
        ValueError: An empty prompt, a malformed message, or a last turn that is not the user's.
    """
    messages: Sequence[Message] = (
        [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    )
    if not messages:
        raise ValueError("the prompt is empty: give a text or a list of messages")
    for message in messages:
        if not isinstance(message, Mapping) or not all(
            isinstance(message.get(key), str) for key in ("role", "content")
        ):
            raise ValueError(f"a message needs the texts 'role' and 'content', found {message!r}")
    last = messages[-1]
    if last["role"] != "user":
        raise ValueError(f"the last message must be the user's, found role {last['role']!r}")
    if not last["content"].strip():
        raise ValueError("the prompt is empty: the last user turn has no text")
    return tuple(messages)
