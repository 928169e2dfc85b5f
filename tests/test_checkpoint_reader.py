"""Checkpoints as values: nothing in them runs, and damage is told."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import run_fit
from shards import Bomb, as_shards

import sdft.report
from sdft.checkpoint_reader import check_harmless, open_checkpoint

READERS: list[Callable[[Path], Any]] = [
    lambda path: open_checkpoint(path).weights("student"),
    check_harmless,
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> Path:
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sdft.report.RetentionReport, "write", lambda *args: None)
        trainer, _ = run_fit(folder, model_dir)
    return Path(trainer.log_dir) / "checkpoints" / "last.ckpt"


@pytest.fixture
def sharded(whole: Path, tmp_path: Path) -> Path:
    return as_shards(whole, tmp_path / "sharded.ckpt")


# ---------------------------------------------------------------- what is read


@pytest.mark.parametrize("root", ["state_dict", "model"])
def test_shards_hold_what_the_whole_file_holds(whole: Path, tmp_path: Path, root: str) -> None:
    expected = torch.load(whole, weights_only=True)
    for path in (whole, as_shards(whole, tmp_path / "sharded.ckpt", root)):
        checkpoint = open_checkpoint(path)
        assert checkpoint.parts == ["student", "teacher"]
        assert checkpoint.facts["sdft"] == expected["sdft"]
        assert checkpoint.facts["global_step"] == 6
        for part in ("student", "teacher"):
            weights = checkpoint.weights(part)
            own = {k: v for k, v in expected["state_dict"].items() if k.startswith(f"{part}.")}
            assert {f"{part}.{name}" for name in weights} == set(own)
            assert all(torch.equal(own[f"{part}.{name}"], v) for name, v in weights.items())
        check_harmless(path)


def test_a_part_that_is_not_there(whole: Path, tmp_path: Path) -> None:
    content = torch.load(whole, weights_only=True)
    state = content["state_dict"]
    content["state_dict"] = {k: v for k, v in state.items() if k.startswith("student.")}
    torch.save(content, tmp_path / "sft.ckpt")
    for path in (tmp_path / "sft.ckpt", as_shards(tmp_path / "sft.ckpt", tmp_path / "shards")):
        with pytest.raises(ValueError, match=r"holds no teacher, only: student \(method 'sdft'\)"):
            open_checkpoint(path).weights("teacher")


def test_the_digest(whole: Path, sharded: Path) -> None:
    assert open_checkpoint(whole).sha256() == hashlib.sha256(whole.read_bytes()).hexdigest()
    lines = "".join(
        f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}\n"
        for file in sorted(sharded.iterdir(), key=lambda file: file.name)
    )
    assert open_checkpoint(sharded).sha256() == hashlib.sha256(lines.encode()).hexdigest()


def test_a_checkpoint_of_something_else(tmp_path: Path) -> None:
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match="was not written by sdft"):
        open_checkpoint(tmp_path / "other.ckpt")
    torch.save([1], tmp_path / "list.ckpt")
    with pytest.raises(ValueError, match="it holds a list, no checkpoint"):
        open_checkpoint(tmp_path / "list.ckpt")
    with pytest.raises(ValueError, match="there is no checkpoint"):
        open_checkpoint(tmp_path / "none.ckpt")
    with pytest.raises(ValueError, match=r"without \.metadata and meta\.pt"):
        open_checkpoint(tmp_path)


# ---------------------------------------------------------------- what would run


@pytest.mark.parametrize("reader", READERS, ids=["open", "check"])
@pytest.mark.parametrize("place", ["whole", "legacy", "meta", "index", "within", "value"])
def test_nothing_runs(
    sharded: Path, whole: Path, tmp_path: Path, place: str, reader: Callable[[Path], Any]
) -> None:
    mark = tmp_path / "exploded"
    bomb, path = Bomb(mark), sharded
    if place == "whole":
        path = tmp_path / "bad.ckpt"
        torch.save({**torch.load(whole, weights_only=True), "callbacks": {"Own": bomb}}, path)
    elif place == "legacy":
        path = tmp_path / "bad.ckpt"
        path.write_bytes(pickle.dumps(bomb))
    elif place == "meta":
        torch.save({"sdft": {}, "x": bomb}, sharded / "meta.pt")
    elif place == "index":
        (sharded / ".metadata").write_bytes(pickle.dumps(bomb))
    elif place == "within":
        index = pickle.loads((sharded / ".metadata").read_bytes())
        index.planner_data["extra"] = bomb
        (sharded / ".metadata").write_bytes(pickle.dumps(index))
    elif place == "value":
        put_value(sharded, bomb)
        if reader is READERS[0]:
            pytest.skip("the optimizer's values are not read for a model")
    with pytest.raises(ValueError, match=f"{path.name}.*(could run|no checkpoint)") as error:
        reader(path)
    assert "\n" not in str(error.value)
    assert place == "legacy" or "posix.system" in str(error.value)
    assert not mark.exists()


def put_value(folder: Path, value: Any) -> None:
    """Put a pickle in the place of a value that is no tensor, which torch reads without care."""
    index = pickle.loads((folder / ".metadata").read_bytes())
    key = next(k for k in index.storage_data if k.fqn.startswith("optimizer_0.param_groups"))
    file = io.BytesIO()
    torch.save(value, file)
    (folder / "bomb.distcp").write_bytes(file.getvalue())
    place = index.storage_data[key]
    place.relative_path, place.offset, place.length = "bomb.distcp", 0, len(file.getvalue())
    (folder / ".metadata").write_bytes(pickle.dumps(index))


def test_the_bomb_is_a_real_one(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Bomb(tmp_path / "exploded")))
    assert (tmp_path / "exploded").exists()


@pytest.mark.parametrize("name", ["../other.distcp", "/etc/passwd", "a/b"])
def test_an_index_that_points_elsewhere(sharded: Path, name: str) -> None:
    index = pickle.loads((sharded / ".metadata").read_bytes())
    next(iter(index.storage_data.values())).relative_path = name
    (sharded / ".metadata").write_bytes(pickle.dumps(index))
    for reader in READERS:
        with pytest.raises(ValueError, match=f"points to '{name}'"):
            reader(sharded)


# ---------------------------------------------------------------- damage


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.999])
def test_a_truncated_file(whole: Path, tmp_path: Path, share: float) -> None:
    content = whole.read_bytes()
    path = tmp_path / "cut.ckpt"
    path.write_bytes(content[: int(share * len(content))])
    for reader in READERS:
        with pytest.raises(ValueError, match=r"cut\.ckpt is damaged or no checkpoint"):
            reader(path)


def test_flipped_bits_are_found(whole: Path, tmp_path: Path) -> None:
    """Wherever they are: in a weight, in the pickle, in the archive's own records."""
    content, draw = whole.read_bytes(), random.Random(0)
    for _ in range(20):
        place = draw.randrange(len(content))
        path = tmp_path / "flipped.ckpt"
        path.write_bytes(content[:place] + bytes([content[place] ^ 0x55]) + content[place + 1 :])
        found = weights_of(path)
        if isinstance(found, str):
            assert "flipped.ckpt is damaged or no checkpoint" in found
        else:  # what lies between two records bears on nothing
            expected = weights_of(whole)
            assert found.keys() == expected.keys()
            assert all(torch.equal(found[name], value) for name, value in expected.items())


def weights_of(path: Path) -> Any:
    """All weights by name, or the error."""
    try:
        checkpoint = open_checkpoint(path)
        parts = {part: checkpoint.weights(part) for part in ("student", "teacher")}
    except ValueError as error:
        return str(error)
    return {f"{part}.{n}": v for part, weights in parts.items() for n, v in weights.items()}


def test_damaged_shards(sharded: Path) -> None:
    (shard,) = sharded.glob("*.distcp")
    content = shard.read_bytes()
    weight = open_checkpoint(sharded).weights("student")["lm_head.weight"]
    place = content.index(weight.numpy().tobytes()[:16])
    shard.write_bytes(content[:place] + b"\x00" * 8 + content[place + 8 :])
    with pytest.raises(ValueError, match="does not fit its checksum"):
        open_checkpoint(sharded).weights("student")
    shard.write_bytes(content[: len(content) // 3])
    with pytest.raises(ValueError, match=r"sharded\.ckpt is damaged"):
        open_checkpoint(sharded).weights("teacher")
    shard.unlink()
    with pytest.raises(ValueError, match=r"sharded\.ckpt is damaged"):
        open_checkpoint(sharded).weights("student")
    os.truncate(sharded / ".metadata", 100)
    with pytest.raises(ValueError, match=r"sharded\.ckpt is damaged"):
        open_checkpoint(sharded).weights("student")


@pytest.mark.slow
def test_shards_of_two_processes(tmp_path: Path) -> None:
    """Each holds a part of every tensor: what is read is the whole."""
    torch.multiprocessing.spawn(save_part, args=(tmp_path,), nprocs=2)
    folder = tmp_path / "two.ckpt"
    torch.save({"sdft": {"method": "sdft"}}, folder / "meta.pt")
    assert len(list(folder.glob("*.distcp"))) == 2
    found = open_checkpoint(folder).weights("teacher")
    assert torch.equal(found["weight"], torch.arange(35.0).reshape(7, 5))
    assert torch.equal(found["bias"], torch.arange(3.0))


def save_part(rank: int, folder: Path) -> None:
    from torch.distributed import destroy_process_group, init_process_group
    from torch.distributed.checkpoint.state_dict_saver import save
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    init_process_group("gloo", f"file://{folder / 'meeting'}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    tensors = {"weight": torch.arange(35.0).reshape(7, 5), "bias": torch.arange(3.0)}
    state = {f"teacher.{n}": distribute_tensor(t, mesh, [Shard(0)]) for n, t in tensors.items()}
    save({"state_dict": state}, checkpoint_id=folder / "two.ckpt")
    destroy_process_group()
