"""A run's checkpoints on disk: order, names, what is kept, which one is taken."""

from __future__ import annotations

import logging
import os
from contextlib import suppress
from pathlib import Path

import pytest

import sdft.checkpoints
from sdft.checkpoints import (
    Checkpoint,
    CheckpointFolder,
    check_checkpoint,
    find_checkpoint,
    start_of_run,
)
from sdft.checkpoints_command import main
from sdft.folder_seal import DamagedCheckpoint, seal_folder
from sdft.seal import save_sealed

CLOCK = 1_000_000_000


def save(run: Path, name: str, written: int = 0, keep: int = 2) -> Path:
    """Write a checkpoint as a run does."""
    folder = CheckpointFolder(run / "checkpoints")
    folder.prepare()
    temporary = folder.temporary(name)
    place = {"step": written, "stage": 0, "stages": 2, "task": "a", "scores": {"a": 0.5, "b": None}}
    save_sealed({"x": [written]}, temporary, {"written": CLOCK + written, **place})
    return folder.put(temporary, name, keep)


def save_folder(run: Path, name: str, written: int) -> Path:
    """The same as several processes do that write a part each."""
    folder = CheckpointFolder(run / "checkpoints")
    folder.prepare()
    temporary = folder.temporary(name)
    temporary.mkdir()
    (temporary / ".metadata").write_bytes(b"index")
    (temporary / "__0_0.distcp").write_bytes(bytes(written))
    seal_folder(temporary, {"written": CLOCK + written})
    return folder.put(temporary, name, 2)


def cut(path: Path) -> None:
    if path.is_dir():
        path /= "__0_0.distcp"
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def refuse(*args: object) -> None:
    raise OSError("not here")


def names(run: Path) -> list[str]:
    return [one.path.name for one in CheckpointFolder(run / "checkpoints").found()]


def test_the_last_steps_and_every_stage_are_kept(tmp_path: Path) -> None:
    for number, name in enumerate(["step-1", "step-2", "stage-1-a", "step-3", "step-4", "step-5"]):
        save(tmp_path, f"{name}.ckpt", number)
        last = tmp_path / "checkpoints" / "last.ckpt"
        assert last.samefile(tmp_path / "checkpoints" / f"{name}.ckpt")
    assert names(tmp_path) == ["step-5.ckpt", "step-4.ckpt", "stage-1-a.ckpt"]
    assert len(list((tmp_path / "checkpoints").iterdir())) == 4


def test_the_newest_is_the_one_written_last_whatever_its_number(tmp_path: Path) -> None:
    """A run that went on from an earlier checkpoint leaves the later ones behind."""
    save(tmp_path, "step-90.ckpt", 1)
    save(tmp_path, "step-100.ckpt", 2)
    for number in (40, 50, 60):
        path = save(tmp_path, f"step-{number}.ckpt", number)
    os.utime(tmp_path / "checkpoints" / "step-50.ckpt")  # the file's time does not count
    assert names(tmp_path) == ["step-60.ckpt", "step-50.ckpt"]
    assert find_checkpoint("last", tmp_path) == path


def test_other_files_are_no_checkpoints(tmp_path: Path) -> None:
    path = save(tmp_path, "step-1.ckpt", 1)
    for name in ("epoch=1.ckpt", ".step-2.ckpt.node.1.abc.tmp", "step-3.ckpt.tmp", "step-x.ckpt"):
        path.with_name(name).write_bytes(path.read_bytes())
    assert names(tmp_path) == ["step-1.ckpt"]


def test_a_last_that_is_a_file_of_its_own_counts(tmp_path: Path) -> None:
    """As older versions wrote it."""
    path = save(tmp_path, "stage-1-a.ckpt", 1)
    last = path.with_name("last.ckpt")
    content = path.read_bytes()
    last.unlink()
    last.write_bytes(content)
    assert names(tmp_path) == ["stage-1-a.ckpt", "last.ckpt"]
    last.unlink()
    os.link(path, last)
    assert names(tmp_path) == ["stage-1-a.ckpt"]


def test_without_symbolic_links_last_is_a_hard_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sdft.checkpoints.Path, "symlink_to", refuse)
    path = save(tmp_path, "step-1.ckpt", 1)
    assert not path.with_name("last.ckpt").is_symlink()
    assert path.with_name("last.ckpt").samefile(path)
    path = save_folder(tmp_path / "folders", "step-1.ckpt", 1)
    assert not path.with_name("last.ckpt").exists()
    assert find_checkpoint(str(path.with_name("last.ckpt")), tmp_path) == path


@pytest.mark.parametrize("write", [save, save_folder])
@pytest.mark.parametrize("asked", ["last", "auto", "run", "run/checkpoints", "last.ckpt"])
def test_a_damaged_newest_one_is_passed_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, write: object, asked: str
) -> None:
    run = tmp_path / "run"
    for number in (1, 2, 3):
        write(run, f"step-{number}.ckpt", number * 100)  # type: ignore[operator]
    save(tmp_path / "older", "step-9.ckpt", -5)
    if asked.startswith("run"):
        asked = str(tmp_path / asked)
    elif asked == "last.ckpt":
        asked = str(run / "checkpoints" / asked)
    cut(run / "checkpoints" / "step-3.ckpt")
    with caplog.at_level(logging.WARNING):
        assert find_checkpoint(asked, tmp_path) == run / "checkpoints" / "step-2.ckpt"
    (told,) = caplog.messages
    assert "step-3.ckpt is damaged" in told
    assert "step-2.ckpt" in told
    cut(run / "checkpoints" / "step-2.ckpt")
    with pytest.raises(ValueError, match=r"step-2.ckpt is damaged") as error:
        find_checkpoint(asked, tmp_path)
    assert "step-3.ckpt is damaged" in str(error.value)
    assert "older" not in str(error.value), "another run is another matter"


def test_a_damaged_one_that_was_named_is_an_error_that_offers_another(tmp_path: Path) -> None:
    for number in (1, 2):
        path = save(tmp_path, f"step-{number}.ckpt", number)
    cut(path)
    offer = f"take the one before it: {path.with_name('step-1.ckpt')}"
    with pytest.raises(ValueError, match="is damaged") as error:
        find_checkpoint(str(path), tmp_path)
    assert offer in str(error.value)
    cut(path.with_name("step-1.ckpt"))
    with pytest.raises(DamagedCheckpoint, match="none beside it is whole"):
        check_checkpoint(path)


def test_one_that_is_damaged_after_it_was_checked_is_checked_again(tmp_path: Path) -> None:
    path = save(tmp_path, "step-1.ckpt", 1)
    check_checkpoint(path)
    cut(path)
    with pytest.raises(DamagedCheckpoint):
        check_checkpoint(path)


def test_last_is_of_the_newest_run(tmp_path: Path) -> None:
    save(tmp_path / "a" / "version_1", "step-1.ckpt", 9)
    path = save(tmp_path / "b" / "version_0", "stage-2-x.ckpt", 10)
    (tmp_path / "c" / "checkpoints").mkdir(parents=True)
    assert find_checkpoint("last", tmp_path) == path
    assert start_of_run("auto", tmp_path) == path


def test_auto_means_none_where_there_is_no_run(tmp_path: Path) -> None:
    assert start_of_run("auto", tmp_path) is None
    with pytest.raises(ValueError, match=r"--ckpt_path last: no checkpoints/\*.ckpt below"):
        find_checkpoint("last", tmp_path)
    for name in ("nowhere", str(tmp_path / "no.ckpt")):
        with pytest.raises(ValueError, match="there is no checkpoint"):
            find_checkpoint(name, tmp_path)
    with pytest.raises(ValueError, match="there is no checkpoint in"):
        find_checkpoint(str(tmp_path), tmp_path)


def test_a_folder_takes_a_folder_s_place(tmp_path: Path) -> None:
    save_folder(tmp_path, "step-1.ckpt", 10)
    path = save_folder(tmp_path, "step-1.ckpt", 20)
    assert (path / "__0_0.distcp").stat().st_size == 20
    assert sorted(p.name for p in path.parent.iterdir()) == ["last.ckpt", "step-1.ckpt"]
    assert find_checkpoint(str(path), tmp_path) == path
    assert Checkpoint(path, {}).size > 20


def test_a_kill_as_a_folder_takes_another_one_s_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is a checkpoint at every moment, and one of a name in the end."""
    old = save_folder(tmp_path, "step-1.ckpt", 10)
    for function in ("replace", "unlink"):
        with monkeypatch.context() as patch:
            if function == "replace":
                patch.setattr(os, "replace", refuse)
            else:
                patch.setattr(sdft.checkpoints, "remove", lambda path: None)
            with suppress(OSError):
                save_folder(tmp_path, "step-1.ckpt", 20)
        replaced = old.with_name("step-1.old.ckpt")
        assert replaced.exists()
        found = CheckpointFolder(old.parent).newest()
        assert found.damage() is None
        assert (found.path == replaced) == (function == "replace")
        assert Checkpoint(replaced, {}).is_step
    save_folder(tmp_path, "step-2.ckpt", 5)
    assert sorted(p.name for p in old.parent.glob("[!.]*")) == [
        "last.ckpt",
        "step-1.ckpt",
        "step-2.ckpt",
    ]


def test_a_file_and_a_folder_take_each_other_s_place(tmp_path: Path) -> None:
    for written, write in enumerate([save, save_folder, save], 1):
        path = write(tmp_path, "step-1.ckpt", written)
        assert path.is_dir() == (write is save_folder)
        assert find_checkpoint("last", tmp_path) == path
        assert names(tmp_path) == ["step-1.ckpt"]


# ---------------------------------------------------------------- the command


def test_the_list(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--dir", str(tmp_path)]) == 2
    assert f"no checkpoints/*.ckpt in {tmp_path}" in capsys.readouterr().err
    whole = save(tmp_path / "run", "stage-1-a.ckpt", 1)
    cut(save(tmp_path / "run", "step-2.ckpt", 2))
    assert main(["--dir", str(tmp_path)]) == 0
    folder, heads, newest, older = capsys.readouterr().out.splitlines()
    assert folder == str(tmp_path / "run" / "checkpoints")
    assert heads.split() == [
        "checkpoint",
        "written",
        "stage",
        "step",
        "size",
        "content",
        "scores",
    ]
    assert newest.split()[0] == "step-2.ckpt"
    assert "damaged: its archive has no end" in newest
    assert older.split()[0] == "stage-1-a.ckpt"
    assert "1/2 a" in older
    assert older.endswith("whole      a 0.50, b –") or "a 0.50, b –" in older
    cut(whole)
    assert main(["--dir", str(tmp_path / "run")]) == 1
    assert main(["--dir", str(tmp_path / "run" / "checkpoints"), "--check", "false"]) == 0
