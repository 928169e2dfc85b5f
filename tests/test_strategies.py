"""The strategies for several processes read nothing that runs code."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from shards import Bomb

from sdft.strategies import FlatShardedStrategy, ShardedStrategy


@pytest.mark.parametrize("strategy", [ShardedStrategy, FlatShardedStrategy])
@pytest.mark.parametrize("form", ["file", "folder"])
def test_code_in_a_checkpoint_does_not_run(
    strategy: type[ModelParallelStrategy | FSDPStrategy], form: str, tmp_path: Path
) -> None:
    mark, path = tmp_path / "mark", tmp_path / "run.ckpt"
    if form == "folder":
        path.mkdir()
        torch.save({}, path / "meta.pt")
        (path / ".metadata").write_bytes(pickle.dumps(Bomb(mark)))
    else:
        torch.save(Bomb(mark), path)
    with pytest.raises(ValueError, match=r"run\.ckpt"):
        strategy().load_checkpoint(path)
    assert not mark.exists()
