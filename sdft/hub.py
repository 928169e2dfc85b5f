"""The model hub: asked about hub names alone, and not at all in offline mode."""

from __future__ import annotations

from collections.abc import Iterator

from huggingface_hub import constants
from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled


def load_failure(error: BaseException) -> str:
    """Why something could not be loaded, on one line."""
    unreachable = (LocalEntryNotFoundError, OfflineModeIsEnabled, ConnectionError)
    if constants.HF_HUB_OFFLINE and any(isinstance(own, unreachable) for own in _chain(error)):
        return "it is not in the local cache, and HF_HUB_OFFLINE forbids asking the hub"
    return " ".join(str(error).split())


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
