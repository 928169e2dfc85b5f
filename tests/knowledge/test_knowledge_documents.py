"""Reading documents and given questions."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
from conftest import write_jsonl

from sdft.knowledge.documents import read_documents
from sdft.knowledge.given import NO_PASSAGE, GivenQuestions
from sdft.knowledge.passages import Passage, cut_documents
from sdft.knowledge.questions import Question, Reject


def words(text: str) -> int:
    return len(text.split())


def test_texts_markdown_and_lines_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "rhine_falls.txt").write_bytes("\ufeffOne\r\ntwo.".encode())
    (tmp_path / "a.md").write_text("Intro\n\n# The Title #\n\ntext")
    (tmp_path / "photo.png").write_bytes(b"\x89PNG")
    (tmp_path / "none.txt").write_text("  \n")
    (tmp_path / ".hidden.txt").write_text("secret")
    rows = [{"text": "three", "title": "T"}, {"context": "four"}, {"text": " "}]
    write_jsonl(tmp_path / "z.jsonl", rows)
    library = read_documents(str(tmp_path), None, "title")
    assert [(d.name, d.title, d.text) for d in library.documents] == [
        ("a.md", "The Title", "Intro\n\n# The Title #\n\ntext"),
        ("below/rhine_falls.txt", "rhine falls", "One\ntwo."),
        ("z.jsonl:1", "T", "three"),
        ("z.jsonl:2", "", "four"),
    ]
    assert library.ignored == [
        {"file": "none.txt", "reason": "empty"},
        {"file": "photo.png", "reason": "not one of .txt, .text, .md, .markdown, .jsonl"},
        {"file": "z.jsonl:3", "reason": "empty"},
    ]
    digest = hashlib.sha256((tmp_path / "z.jsonl").read_bytes()).hexdigest()
    assert library.sources[2] == {"file": "z.jsonl", "sha256": digest, "documents": 2}


def test_a_limit_leaves_out_and_says_so(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [{"text": str(i)} for i in range(5)])
    (tmp_path / "b.txt").write_text("b")
    library = read_documents(str(tmp_path), None, "title", limit=3)
    assert [d.text for d in library.documents] == ["0", "1", "2"]
    assert [own["reason"] for own in library.ignored] == [
        "2 documents beyond the limit",
        "beyond the limit",
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"ok \xff", r"a\.txt: not UTF-8 at byte 3 \(0xff\)"),
        ("a.jsonl", b'{"title": "x"}', r"a\.jsonl, line 1: no text in the field 'text' or"),
        ("a.jsonl", b'{"text": 3}', "line 1: the field 'text' must be a text, found 3"),
        ("a.jsonl", b'{"text": "x", "title": 3}', "the field 'title' must be a text"),
        ("a.jsonl", b'{"text": "x", "questions": {}, "q": 1}\n{', "line 2: broken JSON"),
        ("a.jsonl", b'{"text": "x", "questions": [1]}', "'questions' must be a list of objects"),
        ("a.pdf", b"x", r"holds no text in \.txt"),
    ],
)
def test_what_cannot_be_read(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_documents(str(tmp_path), None, "title")


def test_a_folder_that_is_not_there() -> None:
    with pytest.raises(ValueError, match=r"docs: .*nowhere does not exist"):
        read_documents("nowhere", None, "title")


# ---------------------------------------------------------------- given questions


@pytest.fixture
def passages(tmp_path: Path) -> list[Passage]:
    folder = tmp_path / "docs"
    folder.mkdir()
    (folder / "rhine.md").write_text(
        "# Rhine\n\nThe Rhine rises in Switzerland.\n\nIt ends at sea."
    )
    (folder / "tin.txt").write_text("Tin melts at 232 degrees. It is soft.")
    library = read_documents(str(folder), None, "title")
    return cut_documents(library.documents, 7, words)


def given(passages: list[Passage], path: Path, **record: Any) -> Question | Reject:
    file = write_jsonl(path / "questions.jsonl", [record])
    (found,) = GivenQuestions(passages).of_file(str(file))
    return found


def passage_texts(found: Question | Reject) -> list[str]:
    assert isinstance(found, Question)
    return [passage.text for passage in found.passages]


def test_a_given_question_finds_its_passage(passages: list[Passage], tmp_path: Path) -> None:
    texts = [passage.text for passage in passages]
    assert texts == [
        "# Rhine\n\nThe Rhine rises in Switzerland.",
        "It ends at sea.",
        "Tin melts at 232 degrees.",
        "It is soft.",
    ]
    sea = {"question": "Where does it end?", "answer": "sea"}
    assert passage_texts(given(passages, tmp_path, **sea)) == texts[1:2]
    assert passage_texts(given(passages, tmp_path, **sea, document="Rhine")) == texts[1:2]
    soft = {"prompt": "How is tin?", "answer": "soft", "context": "Tin melts. It is soft. Yes."}
    assert passage_texts(given(passages, tmp_path, **soft)) == texts[3:]
    both = {"question": "Rhine or tin?", "answer": "tin", "documents": ["rhine.md", "tin.txt"]}
    assert passage_texts(given(passages, tmp_path, **both)) == [texts[0], texts[2]]


def test_a_question_without_its_passage_is_left_out(
    passages: list[Passage], tmp_path: Path
) -> None:
    found = given(passages, tmp_path, question="Who?", answer="Ann", document="tin.txt")
    assert isinstance(found, Reject)
    assert (found.reason, found.detail) == (NO_PASSAGE, "questions.jsonl, line 1")


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"question": "?"}, "line 1: no text in the field 'answer'; fields found: 'question'"),
        ({"answer": "a", "question": " "}, "no text in the field 'question'"),
        ({"question": "q", "answer": "a", "document": "zinc"}, "no document has the name .*zinc"),
    ],
)
def test_questions_that_cannot_be_used(
    passages: list[Passage], tmp_path: Path, record: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        given(passages, tmp_path, **record)
