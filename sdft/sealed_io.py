"""How Lightning writes and reads checkpoints: whole, sealed, without running code in them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.types import _PATH
from lightning.pytorch.plugins.io import TorchCheckpointIO

from sdft.atomic import atomic_write
from sdft.checkpoints import agreed_checkpoint
from sdft.folder_seal import Label, seal_folder
from sdft.ranks import agreed, rank
from sdft.seal import read_label, save_sealed, seal
from sdft.shard_reader import read_whole

PLACE = "place"
"""Where in the run a checkpoint stands: its key in the checkpoint, and the seal's label."""


class SealedIO(TorchCheckpointIO):
    """Writes a checkpoint under a temporary name, seals it (`sdft.seal`) and renames it.

    Before one is loaded, its content is compared with its seal. What is loaded are tensors and
    plain values, unless the caller asks for more. A folder that sharded processes have written is
    put together.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: _PATH, storage_options: Any | None = None
    ) -> None:
        """Write; `path` is the old file or the new one at every moment, unless itself temporary.

        Raises:
            OSError: It cannot be written.
        """
        path, label = Path(path), label_of(checkpoint)
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".tmp":
            save_sealed(checkpoint, path, label)
            return
        with atomic_write(path) as temporary:
            save_sealed(checkpoint, temporary, label)

    def load_checkpoint(
        self,
        path: _PATH,
        map_location: Callable[..., Any] | None = lambda storage, loc: storage,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Load what is whole, the first process's choice; a collective call.

        Raises:
            DamagedCheckpoint: It is not what was written.
        """
        path = agreed_checkpoint(Path(path))
        if path.is_dir():
            return read_whole(path)
        safe = True if weights_only is None else weights_only
        return super().load_checkpoint(path, map_location, safe)


def label_of(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint's seal says of it."""
    place = checkpoint.get(PLACE, {"step": checkpoint.get("global_step")})
    return {"written": time.time_ns(), **place}


def seal_unsealed(path: Path, label: Label) -> None:
    """Seal a file or folder, unless it has been sealed as it was written; a collective call.

    Raises:
        OSError: It cannot be written.
    """
    if agreed(read_label(path) is not None):
        return
    if agreed(path.is_dir()):
        seal_folder(path, label)
    elif rank() == 0:
        seal(path, label)
