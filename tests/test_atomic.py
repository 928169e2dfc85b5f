"""Atomic writes: all or nothing."""

import os
import stat
from pathlib import Path

import pytest

from sdft.atomic import atomic_folder, atomic_write


def test_a_finished_block_replaces_the_file_and_leaves_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("old")
    with atomic_write(file) as temporary:
        temporary.write_text("new")
        assert file.read_text() == "old"
        assert temporary.parent == tmp_path  # os.replace is atomic only within a file system
    assert file.read_text() == "new"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_a_failed_block_keeps_the_old_file_and_removes_the_temporary_one(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("old")

    def fail() -> None:
        with atomic_write(file) as temporary:
            temporary.write_text("half")
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        fail()
    assert file.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_the_file_has_the_permissions_of_any_new_file(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("")
    with atomic_write(tmp_path / "atomic") as temporary:
        temporary.write_text("")
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("plain", "atomic")}
    assert len(modes) == 1


def test_two_writers_do_not_share_a_temporary_file(tmp_path: Path) -> None:
    with atomic_write(tmp_path / "a") as one, atomic_write(tmp_path / "a") as two:
        assert one != two
        one.write_text("one")
        two.write_text("two")
    assert (tmp_path / "a").read_text() == "one"  # the outer block ends last


def test_a_missing_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), atomic_write(tmp_path / "no" / "a") as temporary:
        temporary.write_text("x")


def test_a_folder_appears_whole(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "store") as temporary:
        (temporary / "file").write_text("new")
        assert not (tmp_path / "store").exists()
    assert (tmp_path / "store" / "file").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_a_folder_that_failed_leaves_nothing(tmp_path: Path) -> None:
    def fail() -> None:
        with atomic_folder(tmp_path / "store") as temporary:
            (temporary / "file").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_of_two_folders_of_one_name_the_first_stays(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "store") as slow:
        (slow / "file").write_text("second")
        with atomic_folder(tmp_path / "store") as quick:
            (quick / "file").write_text("first")
    assert (tmp_path / "store" / "file").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_a_folder_in_a_missing_place_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(OSError), atomic_folder(tmp_path / "nowhere" / "store"):  # noqa: PT011
        pass


def test_a_folder_in_the_place_of_another(tmp_path: Path) -> None:
    for content in ("first", "second"):
        with atomic_folder(tmp_path / "store", replace=True) as temporary:
            (temporary / content).mkdir()
            (temporary / content / "file").touch()
    assert [path.name for path in (tmp_path / "store").iterdir()] == ["second"]
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_a_replacement_that_fails_leaves_the_old_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "old").touch()
    rename = os.rename

    def failing(source: Path, target: Path) -> None:
        if str(source).endswith(".tmp"):
            raise OSError("no")
        rename(source, target)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(OSError, match="no"), atomic_folder(tmp_path / "store", replace=True):
        pass
    assert [path.name for path in (tmp_path / "store").iterdir()] == ["old"]
    assert [path.name for path in tmp_path.iterdir()] == ["store"]
