"""What can be wrong between both prompts of an example, and what to change.

The teacher grades the student's tokens one by one, so both have to stand at the same place of a
conversation when the answer begins. Each check looks at one example.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sdft.preflight.tokens import THINK
from sdft.preflight.views import View, Views

_ASKS_TO_THINK = re.compile(r"(?i)\bthink|\breason")


@dataclass(frozen=True)
class Problem:
    """What is wrong with prompts.

    Attributes:
        name: Short, the same for all examples.
        text: What was found in the first example that has it.
        change: What to do about it.
        count: In how many of the examples.
        of: How many were looked at.
        harmless: Whether training can go on with it.
    """

    name: str
    text: str
    change: str
    count: int = 1
    of: int = 1
    harmless: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return asdict(self)


Check = Callable[[Views, set[int], int], Iterator[Problem]]
"""Looks at one example: its views, the ids that end an answer, how many ids the model knows."""


def _repeated_start(views: Views, ends: set[int], vocabulary: int) -> Iterator[Problem]:
    start = views.encoder.tokenizer.bos_token_id
    for view in views.both:
        if start is not None and list(view.ids[:2]) == [start, start]:
            yield Problem(
                f"two beginnings ({view.name})",
                f"the {view.name}'s prompt begins with {views.encoder.tokenizer.bos_token!r} twice",
                "take the token out of the chat template, or keep the tokenizer from adding it",
            )


def _lost_turns(views: Views, ends: set[int], vocabulary: int) -> Iterator[Problem]:
    for view in views.both:
        for message in view.messages[:-1]:
            role = message["role"]
            if not view.shows(message["content"]):
                yield Problem(
                    f"lost {role} turn ({view.name})",
                    f"the {view.name}'s prompt does not contain the {role} turn "
                    f"{message['content'][:60]!r}",
                    f"use a chat template that writes {role} turns, or put its text into the "
                    "user's turn",
                )


def _lost_content(views: Views, ends: set[int], vocabulary: int) -> Iterator[Problem]:
    example, template = views.item.example, views.encoder.template
    parts = {"prompt": (example.prompt, views.both)}
    if template.sees != "text":
        parts["demonstration"] = (example.demonstration or "", (views.teacher,))  # type: ignore[assignment]
    if template.sees != "answer" and example.context:
        parts["context"] = (example.context, (views.teacher,))  # type: ignore[assignment]
    for name, (text, places) in parts.items():
        for view in places:
            if not view.shows(text):
                yield Problem(
                    f"lost {name} ({view.name})",
                    f"the {view.name}'s prompt does not contain the {name} {text[:60]!r}",
                    "the chat template changes or cuts the user's turn: use another one, or "
                    "prompts that it leaves alone",
                )


def _no_generation_prompt(views: Views, ends: set[int], vocabulary: int) -> Iterator[Problem]:
    if views.header:
        yield Problem(
            "no generation prompt",
            f"the prompts end before {views.header!r}, which the chat template writes before an "
            "answer: the model would go on with the user's turn",
            "use a chat template that heeds add_generation_prompt",
        )


def _different_frame(views: Views, ends: set[int], vocabulary: int) -> Iterator[Problem]:
    student, teacher = views.both
    if None in (student.place, teacher.place):
        return  # said by `_lost_content`, or no longer to be found
    if student.before != teacher.before:
        yield Problem(
            "another beginning",
            f"before the last user turn the student sees {_end(student.before)} and the teacher "
            f"{_end(teacher.before)}",
            "use a chat template that writes what stands before a turn whatever the turn says",
        )
    if _thinking(student) != _thinking(teacher):
        yield Problem(
            "another thinking boundary",
            f"the answer begins {_thinking(student)} for the student and {_thinking(teacher)} for "
            "the teacher",
            "set model.thinking.student and .teacher so that both begin alike, and keep "
            "switches such as /no_think out of the teacher's template",
        )
    elif student.after != teacher.after:
        yield Problem(
            "another end",
            f"behind the last user turn the student sees {_end(student.after)} and the teacher "
            f"{_end(teacher.after)}",
            "use a chat template whose generation prompt does not depend on the user's turn",
        )


def _thinking(view: View) -> str:
    marks = THINK.findall(view.after or "")
    if not marks:
        return "with no boundary of thinking before it"
    return "behind </think>" if marks[-1].startswith("</") else "inside <think>"


def _end(text: str | None) -> str:
    return repr((text or "")[-60:])


def _shifted_end(views: Views, ends: set[int], vocabulary: int) -> Iterator[Problem]:
    student, teacher = views.both
    if None in (student.place, teacher.place) or student.after != teacher.after:
        return
    common, tokenizer = _common_end(student.ids, teacher.ids), views.encoder.tokenizer
    if _reaches(tokenizer, student, common) and _reaches(tokenizer, teacher, common):
        return
    yield Problem(
        "a shifted boundary",
        f"both prompts end with {_end(student.after)}, but not in the same tokens: the last ones "
        f"are {student.ids[-common - 1 :]} and {teacher.ids[-common - 1 :]}",
        "compare the tokens below: one is missing or added where the answer begins",
    )


def _reaches(tokenizer: Any, view: View, common: int) -> bool:
    """Whether the tokens that both end with hold all that follows the user's words.

    The first of these tokens may have grown together with the user's last word.
    """
    held = _flat(tokenizer, view.ids[len(view.ids) - common :])
    wanted = "".join((view.after or "").split())
    if held.endswith(wanted):
        return True
    if not wanted.endswith(held):
        return True  # a tokenizer that does not give back what it was given: nothing can be told
    missing = wanted[: len(wanted) - len(held)]
    return _flat(tokenizer, view.ids[: len(view.ids) - common][-1:]).endswith(missing)


def _flat(tokenizer: Any, ids: Sequence[int]) -> str:
    return "".join(str(tokenizer.decode(ids, clean_up_tokenization_spaces=False)).split())


def _common_end(left: Sequence[int], right: Sequence[int]) -> int:
    count = 0
    for a, b in zip(reversed(left), reversed(right), strict=False):
        if a != b:
            break
        count += 1
    return count


def _early_end(views: Views, ends: set[int], vocabulary: int) -> Iterator[Problem]:
    """Special tokens written in the data would end the user's turn, or the whole prompt."""
    tokenizer, example = views.encoder.tokenizer, views.item.example
    watched = ends | {tokenizer.bos_token_id, tokenizer.eos_token_id} - {None}
    fields = {
        "prompt": example.prompt,
        "demonstration": example.demonstration or "",
        "context": example.context,
    }
    for name, text in fields.items():
        found = watched & set(tokenizer.encode(text, add_special_tokens=False))
        if found:
            token = tokenizer.convert_ids_to_tokens([min(found)])[0]
            yield Problem(
                f"special token in the {name}",
                f"the {name} {text[:60]!r} contains {token!r}, which ends the turn there",
                f"take it out of the {name}s",
            )


def _unknown(views: Views, ends: set[int], vocabulary: int) -> Iterator[Problem]:
    top, size = max((*views.student.ids, *views.teacher.ids)), vocabulary
    if top >= size:
        yield Problem(
            "a token that the model does not know",
            f"the prompts use the token id {top}, and the model has {size} of them",
            "take the tokenizer that belongs to the model",
        )
    unknown = views.encoder.tokenizer.unk_token_id
    for view in views.both:
        if unknown is not None and unknown in view.ids:
            yield Problem(
                f"unknown words ({view.name})",
                f"{view.ids.count(unknown)} of {len(view.ids)} tokens of the {view.name}'s prompt "
                f"are {views.encoder.tokenizer.unk_token!r}: the model cannot see what they say",
                "write prompts and template in what the tokenizer knows",
                harmless=True,
            )


def _asks_to_think(views: Views, ends: set[int], vocabulary: int) -> Iterator[Problem]:
    """It made answers grow from 63 to 246 tokens in 12 steps."""
    closed = _thinking(views.teacher).startswith("behind")
    if closed and _ASKS_TO_THINK.search(views.encoder.template.text):
        yield Problem(
            "asked to think with thinking off",
            "the teacher's template asks for thinking, and the chat template has closed it before "
            "the answer begins: answers grow without bound",
            "leave the request out of model.teacher_template, or turn thinking on in "
            "model.thinking",
            harmless=True,
        )


CHECKS: tuple[Check, ...] = (
    _repeated_start,
    _lost_turns,
    _lost_content,
    _no_generation_prompt,
    _different_frame,
    _shifted_end,
    _early_end,
    _unknown,
    _asks_to_think,
)
"""What is looked for, in this order."""
