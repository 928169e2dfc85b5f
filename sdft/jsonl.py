"""Records: read from JSON Lines and turned into examples, with errors that name the place.

`read_jsonl` reads a file; `RecordFields.example` is the one conversion from a record (a JSON
object, a row of a `datasets` table) to an `Example`.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from sdft.examples import Example, Message, as_messages

Record = Mapping[str, Any]


def read_jsonl(path: str | PathLike[str]) -> Iterator[tuple[str, Record]]:
    """Read a JSONL file lazily as pairs (place, record); blank lines at the end are ignored.

    The place, "FILE, line N", opens the error messages about a record.

    Raises:
        ValueError: A missing or empty file; a line that is not UTF-8, not JSON, or no object.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path.absolute()}: no such file (working directory: {Path.cwd()})")
    blank, count = 0, 0
    for number, line in _lines(path):
        if not line:
            blank = blank or number
            continue
        if blank:
            raise ValueError(f"{path}, line {blank}: the line is blank")
        count += 1
        yield f"{path}, line {number}", _record(f"{path}, line {number}", line)
    if not count:
        raise ValueError(f"{path}: the file is empty")


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    offset = 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                text = line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{path}, line {number}: not UTF-8 at byte offset {offset + error.start} "
                    f"of the file (byte 0x{line[error.start]:02x})"
                ) from error
            offset += len(line)
            yield number, text.removeprefix(codecs.BOM_UTF8.decode()).strip()


def _record(place: str, line: str) -> Record:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{place}: broken JSON: {error.msg} (character {error.colno})") from error
    except RecursionError as error:
        raise ValueError(f"{place}: lists or objects within one another too deeply") from error
    if not isinstance(record, dict):
        raise ValueError(f"{place}: not a JSON object but {_shown(record)}")
    return record


@dataclass(frozen=True)
class RecordFields:
    """Which fields of a record hold what. A field with the value null counts as absent.

    Attributes:
        prompt: A text, or messages (a list of `{"role", "content"}` that ends with the user's).
            When it is absent, a field named `messages` is read.
        answer: A text, what the scorer compares with. A training record may leave it out when it
            has a demonstration, which then is the answer as well.
        demonstration: A text. Records to evaluate never need one.
        context: A text for the teacher alone, optional.
        prompt_template: The prompt as a text with `{field}` placeholders, in place of `prompt`.
        demonstration_from_answer: The answer is the demonstration of a record that has none.
    """

    prompt: str = "prompt"
    answer: str = "answer"
    demonstration: str = "demonstration"
    context: str = "context"
    prompt_template: str | None = None
    demonstration_from_answer: bool = True

    def example(self, record: Record, place: str, training: bool) -> Example:
        """Turn a record into an example.

        Raises:
            ValueError: A field is missing, of the wrong type or an empty prompt; the message opens
                with `place`.
        """
        try:
            messages = self._messages(record)
            answer = _text(record, self.answer)
            demonstration = _text(record, self.demonstration)
            if demonstration is None and self.demonstration_from_answer:
                demonstration = answer
            if training:
                self._check_demonstration(record, demonstration)
                answer = demonstration if answer is None else answer
            if answer is None:
                raise ValueError(_missing(record, repr(self.answer)))
            context = _text(record, self.context) or ""
            return Example(messages, answer, demonstration, context)
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from error

    def _messages(self, record: Record) -> tuple[Message, ...]:
        if self.prompt_template is not None:
            return as_messages(fill_template(self.prompt_template, record))
        field = self.prompt if record.get(self.prompt) is not None else "messages"
        prompt = record.get(field)
        if prompt is None:
            raise ValueError(_missing(record, f"{self.prompt!r} (or 'messages')"))
        if not isinstance(prompt, str | list):
            raise ValueError(
                f"field {field!r} must be a text or a list of messages, found {_shown(prompt)}"
            )
        return as_messages(prompt)

    def _check_demonstration(self, record: Record, demonstration: str | None) -> None:
        if demonstration is None:
            instead = f" or {self.answer!r}" if self.demonstration_from_answer else ""
            reason = _missing(record, repr(self.demonstration) + instead)
            raise ValueError(f"a training example needs a demonstration: {reason}")
        if not demonstration.strip():
            raise ValueError("a training example needs a demonstration: it is empty")


def fill_template(template: str, record: Record) -> str:
    """Replace every `{field}` of `template` by the field's value, in one pass.

    Only a word between braces is a placeholder, so JSON may stand in the template; `{{word}}` gives
    a literal `{word}`. Braces in the values are left alone. Values that are not texts are written
    as JSON.

    Raises:
        ValueError: A placeholder names a field that the record does not have.
    """

    def value(found: re.Match[str]) -> str:
        literal, field = found.groups()
        if literal:
            return f"{{{literal}}}"
        if record.get(field) is None:
            raise ValueError(f"the prompt template: {_missing(record, repr(field))}")
        content = record[field]
        return content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)

    return re.sub(r"\{\{(\w+)\}\}|\{(\w+)\}", value, template)


def _text(record: Record, field: str) -> str | None:
    value = record.get(field)
    if value is not None and not isinstance(value, str):
        raise ValueError(f"field {field!r} must be a text, found {_shown(value)}")
    return value


def _missing(record: Record, wanted: str) -> str:
    found = ", ".join(repr(field) for field, value in record.items() if value is not None)
    return f"no field {wanted}; fields found: {found or 'none'}"


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=repr)
    return text if len(text) <= 60 else text[:59] + "…"
