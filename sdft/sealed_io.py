"""How Lightning writes and reads checkpoint files: whole, sealed, without running code in them."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.types import _PATH
from lightning.pytorch.plugins.io import TorchCheckpointIO

from sdft.atomic import atomic_write
from sdft.checkpoints import check_checkpoint
from sdft.seal import save_sealed

PLACE = "place"
"""Where in the run a checkpoint stands: its key in the checkpoint, and the seal's label."""


class SealedIO(TorchCheckpointIO):
    """Writes a checkpoint under a temporary name, seals it (`sdft.seal`) and renames it.

    Before one is loaded, its content is compared with its seal. What is loaded are tensors and
    plain values, unless the caller asks for more.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: _PATH, storage_options: Any | None = None
    ) -> None:
        """Write; `path` is the old file or the new one at every moment, unless itself temporary.

        Raises:
            OSError: It cannot be written.
        """
        path = Path(path)
        place = checkpoint.get(PLACE, {"step": checkpoint.get("global_step")})
        label = {"written": time.time_ns(), **place}
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
        """Load what is whole.

        Raises:
            DamagedCheckpoint: It is not what was written.
        """
        check_checkpoint(Path(path))
        safe = True if weights_only is None else weights_only
        return super().load_checkpoint(path, map_location, safe)
