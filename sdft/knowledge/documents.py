"""Documents: texts, Markdown and JSON Lines of a folder, with their checksums."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sdft.jsonl import Record, read_jsonl

TEXTS = (".txt", ".text", ".md", ".markdown")
LINES = (".jsonl",)
TEXT_FIELDS = ("text", "context", "content")
"""Fields of a JSONL line in which a text is looked for when none is named."""

_HEADING = re.compile(r"^\s{0,3}#\s+(.+?)\s*#*\s*$", re.MULTILINE)


@dataclass(frozen=True)
class Document:
    """A text.

    Attributes:
        name: Tells it from the others: its file, below the folder, and for JSONL its line.
        text: As it is in the file.
        title: What it is about; empty when unknown.
        questions: Questions that its JSONL line brings.
    """

    name: str
    text: str
    title: str = ""
    questions: tuple[tuple[str, Record], ...] = ()

    @property
    def subject(self) -> str:
        """What tells documents apart that belong together: lines of one title are one subject."""
        return self.title or self.name


@dataclass
class Library:
    """All documents of a folder.

    Attributes:
        documents: In the order of their names.
        sources: Per file: its name, SHA-256 and how many documents it holds.
        ignored: Files and lines that were left out, with the reason.
    """

    documents: list[Document] = field(default_factory=list)
    sources: list[dict[str, Any]] = field(default_factory=list)
    ignored: list[dict[str, str]] = field(default_factory=list)


def read_documents(
    place: str, text_field: str | None, title_field: str, limit: int | None = None
) -> Library:
    """Read a file, or every file of a folder and of those below it.

    Args:
        place: The file or folder.
        text_field: Field with a JSONL line's text; the first of `TEXT_FIELDS` when None.
        title_field: Field with its title, which a line may lack.
        limit: Read at most this many documents.

    Raises:
        ValueError: Nothing there, a file that is not UTF-8, a broken line, or no text at all.
    """
    root = Path(place)
    if not root.exists():
        raise ValueError(f"docs: {root.absolute()} does not exist")
    library = Library()
    for path in _files(root):
        name = path.name if root.is_file() else path.relative_to(root).as_posix()
        if path.suffix.lower() not in TEXTS + LINES:
            kinds = ", ".join(TEXTS + LINES)
            library.ignored.append({"file": name, "reason": f"not one of {kinds}"})
            continue
        if limit is not None and len(library.documents) >= limit:
            library.ignored.append({"file": name, "reason": "beyond the limit"})
            continue
        left = None if limit is None else limit - len(library.documents)
        _add(library, path, name, text_field, title_field, left)
    if not library.documents:
        raise ValueError(f"docs: {root} holds no text in {', '.join(TEXTS + LINES)} files")
    return library


def _files(root: Path) -> list[Path]:
    """The files, hidden ones left out, in an order that does not depend on the disk."""
    if root.is_file():
        return [root]
    found = (path for path in root.rglob("*") if path.is_file())
    shown = (p for p in found if not any(n.startswith(".") for n in p.relative_to(root).parts))
    return sorted(shown, key=lambda path: path.relative_to(root).as_posix())


def _add(
    library: Library,
    path: Path,
    name: str,
    text_field: str | None,
    title_field: str,
    left: int | None,
) -> None:
    content = path.read_bytes()
    if not content.strip():
        library.ignored.append({"file": name, "reason": "empty"})
        return
    found = _lines(path, name, text_field, title_field) if path.suffix.lower() in LINES else None
    documents = list(found) if found is not None else [_whole(path, name, content)]
    kept = [document for document in documents if document.text.strip()][:left]
    for document in documents:
        if not document.text.strip():
            library.ignored.append({"file": document.name, "reason": "empty"})
    if (beyond := sum(bool(d.text.strip()) for d in documents) - len(kept)) > 0:
        library.ignored.append({"file": name, "reason": f"{beyond} documents beyond the limit"})
    digest = hashlib.sha256(content).hexdigest()
    library.sources.append({"file": name, "sha256": digest, "documents": len(kept)})
    library.documents += kept


def _whole(path: Path, name: str, content: bytes) -> Document:
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: not UTF-8 at byte {error.start} (0x{content[error.start]:02x})"
        ) from error
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    heading = _HEADING.search(text) if path.suffix.lower() in (".md", ".markdown") else None
    return Document(name, text, heading[1] if heading else path.stem.replace("_", " "))


def _lines(path: Path, name: str, text_field: str | None, title_field: str) -> Iterator[Document]:
    for number, (place, record) in enumerate(read_jsonl(path), 1):
        text = _text(place, record, [text_field] if text_field else TEXT_FIELDS)
        title = record.get(title_field)
        if title is not None and not isinstance(title, str):
            raise ValueError(f"{place}: the field {title_field!r} must be a text, found {title!r}")
        questions = record.get("questions") or []
        if not isinstance(questions, list) or not all(isinstance(q, dict) for q in questions):
            raise ValueError(f"{place}: 'questions' must be a list of objects")
        given = tuple(
            (f"{name}, line {number}, question {i}", q) for i, q in enumerate(questions, 1)
        )
        yield Document(f"{name}:{number}", text, (title or "").strip(), given)


def _text(place: str, record: Record, fields: Sequence[str]) -> str:
    for name in fields:
        value = record.get(name)
        if isinstance(value, str):
            return value
        if value is not None:
            raise ValueError(f"{place}: the field {name!r} must be a text, found {value!r}")
    wanted = " or ".join(map(repr, fields))
    found = ", ".join(map(repr, record)) or "none"
    raise ValueError(f"{place}: no text in the field {wanted}; fields found: {found} (text_field)")
