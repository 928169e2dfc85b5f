"""Secrets are used and never written: what a file shows in their place.

A value is taken for a secret by its key (`api_key`, `password`, `hf_token` …) or by its form (a hub
or API token, credentials in a URL).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

HIDDEN = "***"

_ALWAYS = re.compile(
    r"passw(or)?d|passphrase|passwd|secret|api_?key|access_?key|private_?key|credential|"
    r"authorization|bearer|(^|_)auth(_|$)|(^|_)pwd($|_)"
)
_TOKEN = re.compile(r"(^|_)tokens?$")  # counts of tokens are numbers, special tokens are marked
_SPECIAL = re.compile(
    r"(^|_)(eos|bos|pad|unk|sep|cls|mask|image|video|audio|special|additional_special|stop)_tokens?$"
)
_MARKS = re.compile(r"[<\[].*[>\]]", re.DOTALL)
_FORMS = re.compile(
    r"\b(?:hf|api_org)_[A-Za-z0-9]{16,}"  # Hugging Face
    r"|\bsk-[A-Za-z0-9_-]{16,}"  # OpenAI and its like
    r"|\bgh[pousr]_[A-Za-z0-9]{20,}|\bgithub_pat_[A-Za-z0-9_]{20,}|\bglpat-[A-Za-z0-9_-]{16,}"
    r"|\bAKIA[A-Z0-9]{16}\b|\bxox[abprs]-[A-Za-z0-9-]{10,}"
    r"|(?<=\bBearer )[A-Za-z0-9._~+/=-]{8,}"
)
_HOLE = re.compile(rf"^{re.escape(HIDDEN)}$|://{re.escape(HIDDEN)}@|={re.escape(HIDDEN)}")
_URL_LOGIN = re.compile(r"(?<=://)(?:[^/\s@'\":]*:[^/\s@'\"]+|[\w.-]{16,})(?=@)")
_URL_QUERY = re.compile(
    r"(?<=[?&])((?:access_|auth_|api_?)?(?:token|key|secret|password|signature|sig))=[^&\s'\"]+",
    re.IGNORECASE,
)
_QUOTED = re.compile(r"""(['"])(?P<key>[\w-]+)\1:\s*(?P<value>'[^']*'|"[^"]*")""")


def redacted(value: Any, key: str = "") -> Any:
    """A copy of nested plain values with `***` in place of secrets.

    Args:
        value: Mappings, lists and plain values.
        key: What it is the value of.
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, Mapping) and not _names_secret(key):
        return {name: redacted(own, str(name)) for name, own in value.items()}
    if isinstance(value, list | tuple):
        return [redacted(own, key) for own in value]
    if _names_secret(key) or (isinstance(value, str) and _is_token(key, value)):
        return HIDDEN if value != "" else value
    return redacted_text(value) if isinstance(value, str) else value


def redacted_text(text: str) -> str:
    """A text without what has the form of a secret."""
    text = _URL_LOGIN.sub(HIDDEN, _FORMS.sub(HIDDEN, text))
    return _QUOTED.sub(_hide_quoted, _URL_QUERY.sub(rf"\1={HIDDEN}", text))


def _hide_quoted(found: re.Match[str]) -> str:
    """`'key': 'value'` within a text: JSON, or how Python shows a mapping."""
    key, value = found["key"], found["value"]
    secret = len(value) > 2 and (_names_secret(key) or _is_token(key, value[1:-1]))
    return found[0].removesuffix(value) + f"{value[0]}{HIDDEN}{value[0]}" if secret else found[0]


def redacted_yaml(text: str) -> str:
    """YAML with `***` in place of secrets; without any, word for word the same."""
    content = yaml.safe_load(text)
    shown = redacted(content)
    if shown == content:
        return text
    return str(yaml.safe_dump(shown, sort_keys=False, allow_unicode=True))


def secret_keys(value: Any) -> list[str]:
    """The keys of the values that `redacted` changes, dotted."""
    return [key for key, own, shown in _pairs(value, redacted(value)) if own != shown]


def check_filled(config: Mapping[str, Any]) -> None:
    """Refuse a configuration that was written without its secrets.

    Raises:
        ValueError: A value is `***`; names its key.
    """
    for key, value, _ in _pairs(config, config):
        if isinstance(value, str) and _HOLE.search(value):
            raise ValueError(
                f"{key} is {value!r}: the configuration was written without its secrets, give "
                "this value anew"
            )


def _pairs(value: Any, shown: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    """The leaves of two structures that differ in leaves at most: dotted key and both values."""
    items: Any = None
    if isinstance(shown, Mapping):
        items = value.items()
    elif isinstance(shown, list | tuple):
        items = enumerate(value)
    if items is None:
        yield key, value, shown
        return
    for part, own in items:
        yield from _pairs(own, shown[part], f"{key}.{part}" if key else str(part))


def _words(key: str) -> str:
    """A key in lower case with `_` between its words: `apiKey`, `API-KEY` → `api_key`."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", key).replace("-", "_").replace(".", "_").lower()


def _names_secret(key: str) -> bool:
    return bool(_ALWAYS.search(_words(key)))


def _is_token(key: str, value: str) -> bool:
    words = _words(key)
    if not _TOKEN.search(words) or _SPECIAL.search(words):
        return False
    return not (value.isdecimal() or _MARKS.fullmatch(value.strip()))
