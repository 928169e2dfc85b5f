"""Kinds of self-edits: what the model is asked to write, and what is made of it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from sdft.self_edits.parsing import Item, as_list, as_pairs, as_whole
from sdft.self_edits.passages import Passage


@dataclass(frozen=True)
class Kind:
    """One kind of self-edit.

    Attributes:
        name: Stands in the edits' field `kind`.
        template: What the model is asked, with `{passage}` and `{count}`.
        parse: Reads the items out of what it wrote.
        prompt: Prompt of the training example, with `{title}`, for items that bring none.
        single: Whether the model writes one item at a time, and is asked as often as needed.
    """

    name: str
    template: str
    parse: Callable[[str], list[Item]]
    prompt: str | None = None
    single: bool = False

    def request(self, passage: Passage, count: int) -> str:
        """What the model is asked."""
        return _filled(self.template, passage=passage.shown, count=str(count))

    def training_prompt(self, passage: Passage) -> str:
        """The prompt of the training example of an item that has none of its own."""
        assert self.prompt is not None
        return _filled(self.prompt, title=passage.topic)


IMPLICATIONS = Kind(
    "implications",
    """Read the text below and write {count} facts that follow from it. Write each fact as one \
complete sentence that is clear without the text: say the names of people, places and things \
instead of "he", "it" or "this". Write a numbered list and nothing else.

Text:
{passage}""",
    as_list,
    "Tell me one fact about this topic: {title}",
)
QUESTIONS = Kind(
    "questions",
    """Read the text below and write {count} questions about it, each with its answer. A question \
must be clear to somebody who has not read the text; an answer is short and complete. Use exactly \
this form:

Q: the question
A: the answer

Text:
{passage}""",
    as_pairs,
)
REWRITES = Kind(
    "rewrites",
    """Rewrite the text below in your own words. Keep every fact: names, numbers, dates and \
places. Write the new text and nothing else.

Text:
{passage}""",
    as_whole,
    "Tell me what you know about this topic: {title}",
    single=True,
)
EXAMPLES = Kind(
    "examples",
    """Here is the description of a task:

{passage}

Write {count} different examples of this task, each a request and the right response to it. Use \
exactly this form:

Request: what the user says
Response: the right response""",
    as_pairs,
)
KINDS: dict[str, Kind] = {k.name: k for k in (IMPLICATIONS, QUESTIONS, REWRITES, EXAMPLES)}
"""Every kind, by name."""


def chosen_kinds(
    names: Sequence[str], templates: Mapping[str, str], prompts: Mapping[str, str]
) -> list[Kind]:
    """The kinds of these names, with templates and prompts of one's own.

    Raises:
        ValueError: No kind or an unknown one; a template without `{passage}`; a prompt for a kind
            that brings its own.
    """
    allowed = ", ".join(KINDS)
    if not names or len(set(names)) != len(names):
        raise ValueError(f"kinds: give some of {allowed}, each once; found {list(names)}")
    for key, given in (("kinds", names), ("templates", templates), ("prompts", prompts)):
        unknown = [name for name in given if name not in KINDS]
        if unknown:
            raise ValueError(f"{key}: found {unknown[0]!r}, allowed are {allowed}")
    for name, template in templates.items():
        if "{passage}" not in template:
            raise ValueError(f"templates.{name} lacks {{passage}}: {template!r}")
    for name, prompt in prompts.items():
        if KINDS[name].prompt is None or not prompt.strip():
            reason = "is empty" if KINDS[name].prompt else "has no place: the model writes them"
            raise ValueError(f"prompts.{name} {reason}")
    kinds = [KINDS[name] for name in names]
    return [
        replace(
            kind,
            template=templates.get(kind.name, kind.template),
            prompt=prompts.get(kind.name, kind.prompt),
        )
        for kind in kinds
    ]


def _filled(template: str, **values: str) -> str:
    pattern = "|".join(f"{{({name})}}" for name in values)
    return re.sub(pattern, lambda match: values[match[match.lastindex or 1]], template)
