"""Turns the parser's nested complaints into one line that names the key and what to do.

jsonargparse tries every type that a value could have and reports each attempt; what the user needs
is the innermost reason, and the keys on the way to it.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Collection, Iterator
from difflib import get_close_matches
from pathlib import Path

import yaml
from jsonargparse._util import import_object

_NOISE = re.compile(
    r"Does not validate against|Subtypes:|Errors:|Expected a <class 'NoneType'>|Given value|"
    r"Expected a path but|Type typing\.Callable.* expects a function or a callable class:\s*$"
)
_GIVEN = re.compile(
    r"Given value: (?:NestedArg\(key=.+, val='(.{1,60})'\)|(.{1,60}))$", re.MULTILINE
)
_KEY = re.compile(r'(?:Type typing\.Callable.*class: )?Parser key "(.+?)":\s*(.*)')
_CLASS = re.compile(r"Problem with given class_path '(.+?)':\s*(.*)")
_OPTION = re.compile(r"Option '(.+?)' is not accepted")
_IMPORT = re.compile(r"Expected a dot import path string: (.+)")
_TYPE = re.compile(
    r"Expected a (?:<class '(\w+)'>|typing\.Literal\[(.+?)\])(?:\. Got value: (.+))?"
)


def clear_message(text: str) -> str:
    """The keys on the way to the problem, and the reasons found there, on one line.

    A text that is no complaint of the parser's comes back as it is.
    """
    if "Parser key" not in text and "Does not validate" not in text:
        return text
    found = _GIVEN.search(text)
    path, reasons = [], []
    for line in _lines(text):
        if match := _KEY.match(line):
            path.append(match[1])
            line = match[2]
        if match := _CLASS.match(line):
            path.append(match[1])
            line = match[2]
        if line:
            reasons.append(_reason(line, path[-1] if path else ""))
    typed = [reason for reason in reasons if reason.startswith("must be")]
    reason = " or ".join(dict.fromkeys(typed or reasons))
    value = f", found {found[1] or found[2]}" if found and typed and "found" not in reason else ""
    return f"{': '.join([*path, reason])}{value}"


def check_yaml(path: Path, groups: Collection[str] = ()) -> None:
    """Read a configuration file, for its syntax alone.

    Args:
        path: The file.
        groups: Keys that hold keys and values of their own.

    Raises:
        ValueError: It is no YAML, or no mapping; names the file and the line, or the key.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 at byte {error.start}") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ValueError(f"{path}{where}: no valid YAML: {error.problem}") from error
    except yaml.YAMLError as error:  # a character that has no place in a text
        raise ValueError(f"{path}: no valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected keys and values, found {type(content).__name__}")
    for key in groups:
        if key in content and not isinstance(content[key], dict):
            found = repr(content[key])[:60]
            raise ValueError(f"{path}: {key} must hold keys and values, found {found}")


def _lines(text: str) -> Iterator[str]:
    for line in text.splitlines():
        line = line.strip().removeprefix("- ")
        if line and not _NOISE.match(line):
            yield line


def _reason(line: str, owner: str) -> str:
    if match := _OPTION.search(line):
        return f"there is no option {match[1]!r}{_suggestion(match[1], owner)}"
    if match := _IMPORT.search(line):
        return f"no class named {match[1]!r} (give a class of sdft, or an import path)"
    if match := _TYPE.match(line):
        wanted = {"int": "a whole number", "float": "a number", "bool": "true or false"}
        kind = wanted.get(match[1], match[1]) if match[1] else f"one of {match[2]}"
        return f"must be {kind}" + (f", found {match[3]}" if match[3] else "")
    return line


def _suggestion(option: str, class_path: str) -> str:
    try:
        bases = inspect.getmro(import_object(class_path))
    except Exception:  # only a hint is at stake
        return ""
    names = {name for base in bases for name in _parameters(base)}
    close = get_close_matches(option, sorted(names), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _parameters(base: type) -> list[str]:
    try:
        return list(inspect.signature(base).parameters)
    except (TypeError, ValueError):
        return []
