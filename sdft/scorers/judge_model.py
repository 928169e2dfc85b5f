"""What a judge asks: a model that replies to conversations, and what asking has cost."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from sdft.examples import Message


@dataclass
class Usage:
    """What replies have cost.

    Attributes:
        calls: Requests that were answered.
        retries: Requests that failed and were sent again.
        prompt_tokens: Tokens read, as the model reports them.
        completion_tokens: Tokens written.
    """

    calls: int = 0
    retries: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0

    def add(self, other: Usage) -> None:
        """Count another's."""
        for name in vars(self):
            setattr(self, name, getattr(self, name) + getattr(other, name))


@dataclass(frozen=True)
class Reply:
    """One reply.

    Attributes:
        text: What the model says.
        usage: What it cost.
    """

    text: str
    usage: Usage


@dataclass
class JudgeError(ValueError):
    """The judge cannot be had: nothing is scored in its place.

    Attributes:
        reason: What happened, in a sentence.
        usage: What was spent in vain.
    """

    reason: str
    usage: Usage = field(default_factory=Usage)

    def __str__(self) -> str:
        return self.reason


class JudgeModel(ABC):
    """A model that can be asked to judge."""

    @property
    @abstractmethod
    def name(self) -> str:
        """Names it to the user."""

    @property
    @abstractmethod
    def identity(self) -> str:
        """Tells its verdicts from another model's, in the cache too."""

    @abstractmethod
    def replies(self, conversations: Sequence[Sequence[Message]]) -> Iterator[tuple[int, Reply]]:
        """Reply to each conversation, in any order, as replies come.

        Yields:
            The index of a conversation, and the reply to it.

        Raises:
            JudgeError: One cannot be had; those that could were yielded before.
        """

    def price(self, usage: Usage) -> float | None:
        """What that much costs in money; None where no prices are known."""
        return None
