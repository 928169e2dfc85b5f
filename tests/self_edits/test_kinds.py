"""What the model is asked, and what the training example asks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import write_jsonl

from sdft.self_edits.kinds import KINDS, chosen_kinds
from sdft.self_edits.passages import Passage, read_passages

PASSAGE = Passage(1, "Braces {count} stay.", "A {passage} title")


@pytest.mark.parametrize("name", KINDS)
def test_every_request_shows_the_passage_under_its_title(name: str) -> None:
    request = KINDS[name].request(PASSAGE, 7)
    assert "A {passage} title\n\nBraces {count} stay." in request
    assert ("7" in request) is not KINDS[name].single


def test_a_training_prompt_names_the_topic() -> None:
    prompt = KINDS["implications"].training_prompt
    assert prompt(PASSAGE).endswith("A {passage} title")
    assert prompt(Passage(1, "one two")).endswith(": one two")
    assert prompt(Passage(1, "1 2 3 4 5 6 7 8 9")).endswith(": 1 2 3 4 5 6 7 8 …")


def test_templates_and_prompts_of_ones_own() -> None:
    kinds = chosen_kinds(
        ["rewrites", "questions"], {"questions": "{passage}?"}, {"rewrites": "On {title}"}
    )
    assert [kind.name for kind in kinds] == ["rewrites", "questions"]
    assert kinds[1].request(Passage(1, "x"), 2) == "x?"
    assert kinds[0].training_prompt(Passage(1, "x")) == "On x"
    assert kinds[0].template == KINDS["rewrites"].template


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], {}, {}), "kinds: give some of implications"),
        ((["questions", "questions"], {}, {}), "each once"),
        ((["poems"], {}, {}), "kinds: found 'poems', allowed are implications, questions"),
        ((["questions"], {"poems": "{passage}"}, {}), "templates: found 'poems'"),
        ((["questions"], {}, {"poems": "x"}), "prompts: found 'poems'"),
        ((["questions"], {"questions": "Write!"}, {}), r"templates.questions lacks \{passage\}"),
        ((["questions"], {}, {"questions": "x"}), "prompts.questions has no place"),
        ((["rewrites"], {}, {"rewrites": " "}), "prompts.rewrites is empty"),
    ],
)
def test_bad_kinds_are_named(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        chosen_kinds(*arguments)


def test_passages_are_read_with_and_without_a_title(tmp_path: Path) -> None:
    path = write_jsonl(
        tmp_path / "p.jsonl", [{"body": " a b ", "head": "T"}, {"body": "c"}, {"body": "d"}]
    )
    found = read_passages(path, "body", "head", limit=2)
    assert found == [Passage(1, "a b", "T"), Passage(2, "c")]
    assert (found[0].shown, found[1].shown) == ("T\n\na b", "c")


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"head": "T"}, "line 1: needs a text in the field 'body'; fields found: 'head'"),
        ({"body": " "}, "field 'body'"),
        ({"body": 3}, "field 'body'"),
        ({"body": "x", "head": 3}, "field 'head'"),
    ],
)
def test_bad_passages_are_named(tmp_path: Path, record: dict[str, Any], message: str) -> None:
    path = write_jsonl(tmp_path / "p.jsonl", [record])
    with pytest.raises(ValueError, match=message):
        read_passages(path, "body", "head")
