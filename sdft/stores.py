"""Folders of what was computed once: each is whole or not there, and says what it was made from.

The name of a store's folder carries a fingerprint of everything that its content depends on, so
what was made otherwise is never taken for it.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import re
import types
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from enum import Enum
from functools import partial
from pathlib import Path, PurePath
from typing import Any

from sdft.atomic import atomic_folder
from sdft.redaction import redacted

MANIFEST = "store.json"
"""What a store was made from, what it holds, and the size of its files in bytes."""


@dataclass(frozen=True)
class Store:
    """A folder that is complete.

    Attributes:
        folder: Where it stands.
        facts: What its maker said about it.
        sizes: Bytes of each file.
        reused: Whether it was there already.
    """

    folder: Path
    facts: Mapping[str, Any]
    sizes: Mapping[str, int]
    reused: bool


def open_store(
    roots: Sequence[Path],
    label: str,
    made_from: Mapping[str, Any],
    make: Callable[[Path], Mapping[str, Any]],
) -> Store:
    """The store that was made from exactly this; made in the first root where none has it.

    Two processes may ask for the same store at once: both make it, the first one's stays.

    Args:
        roots: Folders to look in; the first is where a new store goes.
        label: Begins the folder's name.
        made_from: Everything that the content depends on, as plain values.
        make: Writes the files into an empty folder and returns facts for the manifest.

    Raises:
        ValueError: A store that was changed or damaged.
    """
    found = find_store(roots, label, made_from)
    if found is not None:
        return found
    mark = fingerprint(made_from)
    name = f"{label}-{mark[:16]}"
    roots[0].mkdir(parents=True, exist_ok=True)
    with atomic_folder(roots[0] / name) as temporary:
        facts = make(temporary)
        sizes = {path.name: path.stat().st_size for path in sorted(temporary.iterdir())}
        shown = redacted(made_from)
        manifest = {"fingerprint": mark, "made_from": shown, "facts": facts, "bytes": sizes}
        text = json.dumps(manifest, indent=1, ensure_ascii=False) + "\n"
        (temporary / MANIFEST).write_text(text, encoding="utf-8")
    found = _read(roots[0] / name, mark)
    return Store(found.folder, found.facts, found.sizes, reused=False)


def find_store(roots: Sequence[Path], label: str, made_from: Mapping[str, Any]) -> Store | None:
    """The store that was made from exactly this, if a root has it.

    Raises:
        ValueError: It was changed or damaged.
    """
    mark = fingerprint(made_from)
    for root in roots:
        folder = root / f"{label}-{mark[:16]}"
        if (folder / MANIFEST).is_file():
            return _read(folder, mark)
    return None


def _read(folder: Path, mark: str) -> Store:
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        sizes: dict[str, int] = manifest["bytes"]
        facts: dict[str, Any] = manifest["facts"]
        same = manifest["fingerprint"] == mark
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{folder / MANIFEST} is missing or damaged: delete the folder {folder}"
        ) from error
    if not same:
        raise ValueError(f"{folder} was made from something else: delete it")
    for name, size in sizes.items():
        path = folder / name
        found = path.stat().st_size if path.is_file() else 0
        if found != size:
            raise ValueError(
                f"{path} was changed or damaged: it has {found} bytes and was written with {size}; "
                f"delete the folder {folder}"
            )
    return Store(folder, facts, sizes, reused=True)


def fingerprint(made_from: Mapping[str, Any]) -> str:
    """64 hexadecimal digits that depend on every value."""
    return hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()


def describe(value: Any) -> str:
    """What a configured object is and does: its class, its settings, and the code of its class.

    The same for two objects made alike, in another process too; code that it calls elsewhere does
    not enter.
    """
    if value is None or isinstance(value, str | bytes | int | float | bool | PurePath | Enum):
        return repr(value)
    if isinstance(value, re.Pattern):
        return f"regex({value.pattern!r}, {value.flags})"  # its repr is cut
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{key!r}: {describe(item)}' for key, item in value.items())}}}"
    if isinstance(value, Sequence):
        return f"[{', '.join(map(describe, value))}]"
    if isinstance(value, Set):
        return f"set({', '.join(sorted(map(describe, value)))})"
    if isinstance(value, partial):
        return f"partial({describe([value.func, value.args, value.keywords])})"
    if isinstance(value, type):
        return f"{value.__module__}.{value.__qualname__}{_source_mark(value)}"
    if isinstance(value, types.FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or ()]
        held = describe([value.__defaults__, value.__kwdefaults__, cells])
        return f"{value.__module__}.{value.__qualname__}{_source_mark(value)}{held}"
    if callable(getattr(value, "described", None)):  # it says itself what matters
        return f"{describe(type(value))}({describe(value.described())})"
    return f"{describe(type(value))}({describe(_settings(value))})"


def _settings(value: Any) -> dict[str, Any]:
    """An object's attributes, those in slots too.

    Raises:
        ValueError: It has neither, so nothing tells it from another of its class.
    """
    slots = [name for kind in type(value).__mro__ for name in getattr(kind, "__slots__", ())]
    found = {name: getattr(value, name) for name in slots if hasattr(value, name)}
    if not slots and not hasattr(value, "__dict__"):
        raise ValueError(
            f"cannot tell one {type(value).__name__} from another: give a check plain attributes"
        )
    return {**found, **getattr(value, "__dict__", {})}


def _source_mark(code: Any) -> str:
    try:
        source = inspect.getsource(code)
    except (OSError, TypeError):  # built in, or typed at a prompt
        return ""
    return f"#{hashlib.sha256(source.encode()).hexdigest()[:12]}"
