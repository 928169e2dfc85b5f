"""What an object computes, told by its class, its code and its state.

Stricter than `sdft.stores.describe`, which a run's own store is found by: what runs share must not
be taken for something else, so whatever cannot be told is refused.
"""

from __future__ import annotations

import hashlib
import re
import sys
import sysconfig
from collections.abc import Callable, Mapping, Sequence, Set
from enum import Enum
from functools import cache, partial
from importlib.metadata import distributions
from pathlib import Path
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

import torch

import sdft

_DEEPEST = 12


class Undescribed(Exception):
    """What an object computes cannot be told; the message says of which."""


def described(value: Any, depth: int = 0) -> Any:
    """A value as JSON that differs wherever what it computes may differ.

    An object that has `described()` is what that returns; any other is its class and its
    attributes. The code of classes and functions is in `code_digest`.

    Raises:
        Undescribed: A lambda or nested function, an object without attributes, or one too deep.
    """
    if value is None or isinstance(value, bool | int | str):
        return value
    if depth > _DEEPEST:
        raise Undescribed(f"{type(value).__name__} is nested too deeply")
    for kinds, tell in _WAYS:
        if isinstance(value, kinds):
            return tell(value, depth + 1)
    return _object(value, depth + 1)


def _object(value: Any, depth: int) -> Any:
    own = getattr(value, "described", None)
    if callable(own):
        return [_name(type(value)), described(own(), depth)]
    if not hasattr(value, "__dict__"):
        raise Undescribed(f"a {type(value).__name__} does not say what it holds")
    return [_name(type(value)), described(vars(value), depth)]


def _function(value: Any, depth: int) -> Any:
    if value.__closure__ or "<" in value.__qualname__:
        raise Undescribed(f"the function {value.__qualname__} is nested or has no name")
    return _name(value)


def _name(value: Any) -> str:
    """The place of a class or function whose code is in a file, or in an installed package."""
    home = sys.modules.get(value.__module__)
    if home is None or not (hasattr(home, "__file__") or home.__name__ in sys.builtin_module_names):
        raise Undescribed(f"{value.__qualname__} was not written in a file")
    return f"{value.__module__}.{value.__qualname__}"


_WAYS: tuple[tuple[Any, Callable[[Any, int], Any]], ...] = (
    (Enum, lambda v, d: [_name(type(v)), v.name]),
    (float, lambda v, d: ["float", v.hex()]),
    (bytes, lambda v, d: ["bytes", v.hex()]),
    (Path, lambda v, d: ["path", str(v)]),
    (re.Pattern, lambda v, d: ["pattern", v.pattern, v.flags]),
    ((torch.dtype, torch.device), lambda v, d: str(v)),
    (torch.Tensor, lambda v, d: ["tensor", str(v.dtype), v.tolist()]),
    (type, lambda v, d: _name(v)),
    (FunctionType, _function),
    (BuiltinFunctionType, lambda v, d: _name(v)),
    (MethodType, lambda v, d: [described(v.__func__, d), described(v.__self__, d)]),
    (partial, lambda v, d: [described(one, d) for one in (v.func, v.args, v.keywords)]),
    (Mapping, lambda v, d: ["map", [[described(k, d), described(o, d)] for k, o in v.items()]]),
    (Set, lambda v, d: ["set", sorted(map(repr, (described(one, d) for one in v)))]),
    (Sequence, lambda v, d: [type(v).__name__, [described(one, d) for one in v]]),
)


def code_digest() -> str:
    """A digest of all code that may have a part in a score.

    That is this package, every file of Python that the process has imported from outside the
    installed packages, and the names and versions of those.
    """
    digest = hashlib.sha256(_installed().encode())
    for file in sorted({*_package(), *_imported()}):
        digest.update(f"{file.name}\n".encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()


@cache
def _installed() -> str:
    found = {f"{one.metadata['Name']}=={one.version}" for one in distributions()}
    return "\n".join([sys.version, *sorted(found)])


@cache
def _package() -> tuple[Path, ...]:
    return tuple(file for folder in sdft.__path__[:1] for file in Path(folder).rglob("*.py"))


def _imported() -> set[Path]:
    paths = sysconfig.get_paths()
    installed = [Path(paths[key]).resolve() for key in ("stdlib", "platstdlib", "purelib")]
    found = set()
    for module in list(sys.modules.values()):
        file = getattr(module, "__file__", None)
        if not isinstance(file, str) or not file.endswith(".py"):
            continue
        path = Path(file).resolve()
        away = any(path.is_relative_to(folder) for folder in installed)
        if not away and "site-packages" not in path.parts and path.is_file():
            found.add(path)
    return found
