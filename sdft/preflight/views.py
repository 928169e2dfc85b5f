"""Both prompts of an example, as text and as tokens: what the checks of their alignment look at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from sdft.encoded import Encoded
from sdft.examples import Message
from sdft.prompts import PromptEncoder

_ANSWER = "PREFLIGHT ANSWER"
_CONTENT = "PREFLIGHT CONTENT"


@dataclass(frozen=True)
class View:
    """One prompt.

    Attributes:
        name: `student` or `teacher`.
        messages: The conversation, whose last turn is the user's.
        ids: Its token ids.
        text: As the chat template writes it, with the generation prompt.
        start: Where the template begins the last user turn's content, were it another.
    """

    name: str
    messages: Sequence[Message]
    ids: list[int]
    text: str
    start: int

    @cached_property
    def place(self) -> tuple[int, int] | None:
        """Where the last user turn's content stands in the text; None where it is not there."""
        content = self.messages[-1]["content"].strip()
        start = self.start  # a short content may stand in the template's own words, too
        if not self.text[start:].lstrip().startswith(content):
            start = self.text.rfind(content)
        else:
            start += len(self.text[start:]) - len(self.text[start:].lstrip())
        return None if start < 0 else (start, start + len(content))

    @property
    def before(self) -> str | None:
        """The text before the last user turn's content."""
        return None if self.place is None else self.text[: self.place[0]].rstrip()

    @property
    def after(self) -> str | None:
        """The text behind the last user turn's content: the end of the turn, generation prompt."""
        return None if self.place is None else self.text[self.place[1] :].strip()

    def shows(self, text: str) -> bool:
        """Whether some text stands in the prompt, whatever the white space."""
        return " ".join(text.split()) in " ".join(self.text.split())


@dataclass(frozen=True)
class Views:
    """An example as the student and the teacher see it.

    Attributes:
        item: The example.
        encoder: Made its prompts.
        student: The student's.
        teacher: The teacher's.
    """

    item: Encoded
    encoder: PromptEncoder
    student: View
    teacher: View

    @classmethod
    def of(cls, encoder: PromptEncoder, item: Encoded) -> Views:
        """Both prompts of an encoded example."""
        example = item.example
        given = {"student": example.messages, "teacher": encoder.template.messages(example)}
        ids = {"student": item.student_ids, "teacher": item.teacher_ids}
        return cls(item, encoder, *(_view(encoder, k, given[k], ids[k]) for k in given))

    @property
    def both(self) -> tuple[View, View]:
        """The student's, the teacher's."""
        return self.student, self.teacher

    @cached_property
    def header(self) -> str:
        """What the chat template writes between a prompt and its answer; empty as it should be.

        Empty, too, for a template that writes finished conversations in another way altogether.
        """
        answered = [*self.student.messages, {"role": "assistant", "content": _ANSWER}]
        try:
            whole = written(self.encoder, "student", answered, generation=False)
        except Exception:  # templates raise what they like at conversations they do not foresee
            return ""
        start = whole.find(_ANSWER)
        if start < 0 or not whole.startswith(self.student.text):
            return ""
        return whole[len(self.student.text) : start].strip()


def _view(encoder: PromptEncoder, name: str, messages: Sequence[Message], ids: list[int]) -> View:
    other = [*messages[:-1], {**messages[-1], "content": _CONTENT}]
    start = max(written(encoder, name, other).find(_CONTENT), 0)
    return View(name, messages, ids, written(encoder, name, messages), start)


def written(
    encoder: PromptEncoder, name: str, messages: Sequence[Message], generation: bool = True
) -> str:
    """A conversation as the chat template writes it.

    Args:
        encoder: Has tokenizer and arguments of the template.
        name: Whose prompt: `student` or `teacher`.
        messages: The conversation.
        generation: With the generation prompt.
    """
    return str(
        encoder.tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            add_generation_prompt=generation,
            tokenize=False,
            **(encoder.teacher_kwargs if name == "teacher" else encoder.chat_template_kwargs),
        )
    )
