"""Sharded checkpoints (folders of torch's distributed checkpoint), read without running code.

The index of such a folder, `.metadata`, is a pickle, and torch reads it as one. Here it is read by
an unpickler that knows the classes of the index alone; weights are read with `weights_only`.
"""

from __future__ import annotations

import io
import pickle
import warnings
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    Metadata,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.state_dict_loader import load

INDEX = ".metadata"
FACTS = "meta.pt"
"""What Lightning keeps beside the shards: everything but weights and optimizer."""

_METADATA = "torch.distributed.checkpoint.metadata"
_CLASSES = {
    _METADATA: (
        "Metadata",
        "MetadataIndex",
        "TensorStorageMetadata",
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "TensorProperties",
        "StorageMeta",
        "_MEM_FORMAT_ENCODING",
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch": ("Size",),
    "torch.serialization": ("_get_layout",),
    "collections": ("OrderedDict",),
    "pathlib": ("PosixPath", "WindowsPath"),
    "pathlib._local": ("PosixPath", "WindowsPath"),
}
"""All that an index may be made of, beside `torch`'s data types."""


class SafeShardReader(FileSystemReader):
    """Torch's reader of sharded checkpoints, with an index that cannot run code.

    Args:
        folder: The checkpoint.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.folder = folder

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The index.

        Raises:
            UnpicklingError: It is made of something else, or points outside the folder.
        """
        return read_index(self.folder)


def read_index(folder: Path) -> Metadata:
    """The index of a sharded checkpoint.

    Raises:
        UnpicklingError: It is made of something else, or points outside the folder.
    """
    with open(folder / INDEX, "rb") as file:
        index = _IndexUnpickler(file).load()
    if not isinstance(index, Metadata):
        raise pickle.UnpicklingError(f"{INDEX} holds a {type(index).__name__}, not an index")
    for place in index.storage_data.values():
        if PurePosixPath(place.relative_path).name != place.relative_path or place.length < 0:
            raise pickle.UnpicklingError(f"{INDEX} points to {place.relative_path!r}")
    return index


def read_tensors(folder: Path, root: str) -> dict[str, Tensor]:
    """Whole tensors, put together from their shards.

    Args:
        folder: The checkpoint.
        root: What their names begin with; it is taken off.

    Raises:
        UnpicklingError: The checkpoint would run code.
        Exception: Whatever torch raises where shards are missing or damaged.
    """
    index = read_index(folder)
    sizes = {
        name: meta
        for name, meta in index.state_dict_metadata.items()
        if name.startswith(root) and isinstance(meta, TensorStorageMetadata)
    }
    check_records(folder, index, sizes)
    tensors = {
        name: torch.empty(meta.size, dtype=meta.properties.dtype) for name, meta in sizes.items()
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is")  # one process: meant
        state = cast(dict[str, Any], tensors)
        load(state, storage_reader=SafeShardReader(folder), no_dist=True)
    return {name.removeprefix(root): tensor for name, tensor in tensors.items()}


def check_values(folder: Path) -> None:
    """Read everything that is no tensor, as plain values: what torch would unpickle on resuming.

    Raises:
        UnpicklingError: Something there would run code.
    """
    index = read_index(folder)
    plain = [
        name
        for name, meta in index.state_dict_metadata.items()
        if isinstance(meta, BytesStorageMetadata)
    ]
    for record in _records(folder, index, plain):
        torch.load(io.BytesIO(record), map_location="cpu", weights_only=True)


def check_records(folder: Path, index: Metadata, names: Iterable[str]) -> None:
    """Compare the named entries with the checksums that were written with them.

    Raises:
        ValueError: One is damaged.
    """
    for record in _records(folder, index, names):
        with zipfile.ZipFile(io.BytesIO(record)) as archive:
            if archive.testzip() is not None:
                raise ValueError("a shard does not fit its checksum")


def _records(folder: Path, index: Metadata, names: Iterable[str]) -> Iterator[bytes]:
    wanted = set(names)
    for key, place in index.storage_data.items():
        if key.fqn not in wanted:
            continue
        if getattr(place, "transform_descriptors", None):
            raise ValueError("its shards are compressed, which is not supported")
        with open(folder / place.relative_path, "rb") as file:
            file.seek(place.offset)
            yield file.read(place.length)


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name in _CLASSES.get(module, ()):
            return super().find_class(module, name)
        found = getattr(torch, name, None) if module == "torch" else None
        if isinstance(found, torch.dtype):
            return found
        raise pickle.UnpicklingError(f"GLOBAL {module}.{name} is no part of an index")
