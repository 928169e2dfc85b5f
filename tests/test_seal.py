"""Seals: nothing that was cut off or changed passes for what was written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from sdft.folder_seal import FOLDER_SEAL, DamagedCheckpoint, is_folder_checkpoint, seal_folder
from sdft.seal import check_content, read_label, save_sealed, seal

CONTENT = {"weights": torch.arange(3000.0), "empty": torch.zeros(0), "plain": [1, 2.5, "x", None]}
LABEL = {"step": 7, "task": "näme"}


@pytest.fixture(scope="module")
def sealed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sealed") / "a.ckpt"
    save_sealed(CONTENT, path, LABEL)
    return path


@pytest.mark.parametrize("mmap", [True, False])
def test_a_sealed_file_is_an_ordinary_checkpoint(sealed: Path, mmap: bool) -> None:
    check_content(sealed)
    assert read_label(sealed) == LABEL
    found = torch.load(sealed, weights_only=True, mmap=mmap)
    assert torch.equal(found["weights"], CONTENT["weights"])
    assert found["plain"] == CONTENT["plain"]


def test_a_file_that_something_else_wrote_is_sealed_alike(sealed: Path, tmp_path: Path) -> None:
    other = tmp_path / "a.ckpt"
    torch.save(CONTENT, other)
    assert read_label(other) is None
    check_content(other)
    seal(other, LABEL)
    check_content(other)
    assert read_label(other) == LABEL


def is_damaged(path: Path, content: bytes | bytearray) -> bool:
    path.write_bytes(content)
    try:
        check_content(path)
    except DamagedCheckpoint:
        return True
    return False


def test_no_cut_and_no_changed_byte_passes(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    save_sealed({"w": torch.arange(9.0)}, path, LABEL)
    whole = path.read_bytes()
    assert not is_damaged(path, whole)
    assert [size for size in range(len(whole)) if not is_damaged(path, whole[:size])] == []
    for place in range(len(whole)):
        content = bytearray(whole)
        content[place] ^= 255 if place % 2 else 1
        assert is_damaged(path, content), place


def test_an_unsealed_file_is_judged_by_its_archive(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    torch.save(CONTENT, path)
    content = bytearray(path.read_bytes())
    place = content.find(CONTENT["weights"].numpy().tobytes())
    content[place + 1000] ^= 1
    path.write_bytes(content)
    with pytest.raises(DamagedCheckpoint, match="not what was written"):
        check_content(path)
    path.write_bytes(b"PK no archive")
    with pytest.raises(DamagedCheckpoint, match="has no end"):
        check_content(path)


def test_a_label_that_is_too_long_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    save_sealed(CONTENT, path, {"scores": "x" * 70_000})
    check_content(path)
    assert read_label(path) == {}


def test_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "a.ckpt"
    (folder / "sub").mkdir(parents=True)
    (folder / ".metadata").write_bytes(b"index")
    (folder / "sub" / "__0_0.distcp").write_bytes(bytes(5000))
    check_content(folder)  # one that Lightning wrote alone: nothing to compare it with
    seal_folder(folder, LABEL)
    check_content(folder)
    assert is_folder_checkpoint(folder)
    assert read_label(folder) == LABEL
    for damage in ("cut", "changed", "gone", "seal"):
        bad = shutil.copytree(folder, tmp_path / f"{damage}.ckpt")
        shard = bad / "sub" / "__0_0.distcp"
        if damage == "gone":
            shard.unlink()
        elif damage == "seal":
            (bad / FOLDER_SEAL).write_text(json.dumps({"files": 3}))
        else:
            shard.write_bytes(bytes(4999) + b"x" * (damage == "changed"))
        with pytest.raises(DamagedCheckpoint):
            check_content(bad)
