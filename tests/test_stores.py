"""Stores: whole or not there, found by what they were made from."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_model

from sdft.checks import LengthCheck, RegexCheck, ScoreCheck
from sdft.scorers import ExactMatch, RegexMatch
from sdft.stores import Store, describe, open_store
from sdft.weights import weights_digest


class Maker:
    """Writes one file and counts how often it is asked."""

    def __init__(self, text: str = "content") -> None:
        self.text = text
        self.calls = 0

    def __call__(self, folder: Path) -> dict[str, Any]:
        self.calls += 1
        (folder / "file.txt").write_text(self.text)
        return {"words": 1}


def store(root: Path, maker: Any, **made_from: Any) -> Store:
    return open_store([root], "answers", {"seed": 0, **made_from}, maker)


def test_what_was_made_from_the_same_is_made_once(tmp_path: Path) -> None:
    maker = Maker()
    first, second = store(tmp_path, maker), store(tmp_path, maker)
    assert maker.calls == 1
    assert (first.reused, second.reused) == (False, True)
    assert first.folder == second.folder
    assert first.facts == second.facts == {"words": 1}
    assert (second.folder / "file.txt").read_text() == "content"


def test_sizes_are_those_on_disk(tmp_path: Path) -> None:
    found = store(tmp_path, Maker("ä" * 5))
    assert found.sizes == {"file.txt": 10}
    assert (found.folder / "file.txt").stat().st_size == 10


@pytest.mark.parametrize("change", [{"seed": 1}, {"model": "other"}, {"temperature": 0.5}])
def test_what_was_made_from_something_else_is_made_anew(
    tmp_path: Path, change: dict[str, Any]
) -> None:
    maker = Maker()
    folders = {store(tmp_path, maker).folder, store(tmp_path, maker, **change).folder}
    assert maker.calls == len(folders) == 2


def test_a_half_made_store_is_never_used(tmp_path: Path) -> None:
    def fails(folder: Path) -> dict[str, Any]:
        (folder / "file.txt").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store(tmp_path, fails)
    assert list(tmp_path.iterdir()) == []
    maker = Maker()
    store(tmp_path, maker)
    assert maker.calls == 1


def test_what_a_killed_process_left_is_no_store(tmp_path: Path) -> None:
    made = store(tmp_path, Maker())
    left = made.folder.with_name(f".{made.folder.name}.0123.tmp")
    made.folder.rename(left)
    (left / "store.json").unlink()
    maker = Maker()
    assert not store(tmp_path, maker).reused
    assert maker.calls == 1


def test_of_two_that_race_one_stays_and_both_use_it(tmp_path: Path) -> None:
    together, found = threading.Barrier(2), []

    def make(folder: Path) -> dict[str, Any]:
        together.wait(timeout=10)  # both have found nothing
        (folder / "file.txt").write_text(folder.name)
        return {}

    def work() -> None:
        found.append(store(tmp_path, make))

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found[0].folder == found[1].folder
    assert [path.name for path in tmp_path.iterdir()] == [found[0].folder.name]


def test_the_roots_are_searched_in_order_and_the_first_gets_a_new_store(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    maker = Maker()
    old = open_store([two], "answers", {"seed": 0}, maker)
    assert open_store([one, two], "answers", {"seed": 0}, maker).folder == old.folder
    assert open_store([one, two], "answers", {"seed": 1}, maker).folder.parent == one


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "file.txt").write_text("changed content"),
        lambda folder: (folder / "file.txt").unlink(),
        lambda folder: (folder / "store.json").write_text("{"),
        lambda folder: (folder / "store.json").write_text("[]"),
    ],
)
def test_a_changed_store_is_refused(tmp_path: Path, damage: Any) -> None:
    folder = store(tmp_path, Maker()).folder
    damage(folder)
    with pytest.raises(ValueError, match="delete the folder") as error:
        store(tmp_path, Maker())
    assert str(folder) in str(error.value)


def test_a_store_under_a_wrong_name_is_refused(tmp_path: Path) -> None:
    one, other = store(tmp_path, Maker()), store(tmp_path, Maker(), seed=1)
    text = (other.folder / "store.json").read_text()
    (one.folder / "store.json").write_text(text)
    with pytest.raises(ValueError, match="made from something else"):
        store(tmp_path, Maker())


def test_the_manifest_says_what_it_was_made_from(tmp_path: Path) -> None:
    manifest = json.loads((store(tmp_path, Maker()).folder / "store.json").read_text())
    assert manifest["made_from"] == {"seed": 0}
    assert manifest["bytes"] == {"file.txt": 7}


def partial_of(number: int) -> Callable[[], int]:
    """The same code with another captured value."""
    return lambda: number


class Slotted:
    """A check without a dictionary."""

    __slots__ = ("number",)

    def __init__(self, number: int) -> None:
        self.number = number


def test_what_nothing_tells_apart_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot tell one object from another"):
        describe(object())


def test_a_description_tells_settings_and_classes_apart() -> None:
    assert describe([LengthCheck(2), RegexCheck("a")]) == describe(
        [LengthCheck(2), RegexCheck("a")]
    )
    different = [
        LengthCheck(),
        LengthCheck(2),
        RegexCheck("a"),
        RegexCheck(None, "a"),
        RegexCheck("a" * 300 + "b"),
        RegexCheck("a" * 300 + "c"),
        {"a", "b"},
        {"a", "c"},
        Path("a"),
        Path("b"),
        partial(describe, 1),
        partial(describe, 2),
        *(partial_of(number) for number in (1, 2)),
        *(Slotted(number) for number in (1, 2)),
        ScoreCheck(),
        ExactMatch(),
        RegexMatch("a"),
        describe,
        lambda *_: None,
        None,
        [],
        {"a": LengthCheck()},
    ]
    described = [describe(item) for item in different]
    assert len(set(described)) == len(described)
    assert not any(" at 0x" in text for text in described)


def test_a_digest_is_that_of_the_weights() -> None:
    model = make_model()
    digest = weights_digest(model)
    assert digest == weights_digest(make_model())
    assert digest != weights_digest(model.bfloat16())
    assert weights_digest(make_model()) == digest
    changed = make_model()
    with torch.no_grad():
        list(changed.parameters())[-1].view(-1)[-1] += 1e-6
    assert weights_digest(changed) != digest
