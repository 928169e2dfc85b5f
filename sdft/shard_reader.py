"""Sharded checkpoints (folders of torch's distributed checkpoint), read without running code.

The index of such a folder, `.metadata`, is a pickle, and torch reads it as one. Here it is read by
an unpickler that knows the classes of the index alone; weights are read with `weights_only`.
"""

from __future__ import annotations

import io
import pickle
import warnings
import zipfile
from collections.abc import Iterable, Iterator, Mapping
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

_OPTIMIZER = "optimizer_"
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


def read_whole(folder: Path) -> dict[str, Any]:
    """All of a sharded checkpoint, as one process would have written it: parameters by number.

    Raises:
        UnpicklingError: The checkpoint would run code.
        Exception: Whatever torch raises where shards are missing or damaged.
    """
    content: dict[str, Any] = torch.load(folder / FACTS, map_location="cpu", weights_only=True)
    roots = {str(path[0]) for path in _paths(read_index(folder)).values()}
    count = sum(root.startswith(_OPTIMIZER) for root in roots)
    content["state_dict"] = read_tensors(folder, "state_dict.")
    content["optimizer_states"] = [_numbered(_read_optimizer(folder, n)) for n in range(count)]
    return content


def _read_optimizer(folder: Path, number: int) -> dict[str, Any]:
    """The state of one optimizer, by the names of its parameters.

    Args:
        folder: The checkpoint.
        number: Which optimizer, from 0.
    """
    index, root = read_index(folder), f"{_OPTIMIZER}{number}"
    values: dict[str, Any] = read_tensors(folder, f"{root}.")
    plain = [name for name in _plain(index) if name.startswith(f"{root}.")]
    for name, record in _records(folder, index, plain):
        value = torch.load(io.BytesIO(record), map_location="cpu", weights_only=True)
        values[name.removeprefix(f"{root}.")] = value
    state: dict[str, dict[str, Any]] = {}
    groups: dict[int, dict[str, Any]] = {}
    for name, path in _paths(index).items():
        if path[0] == root and len(path) == 4:
            of = state if path[1] == "state" else groups
            own = cast(dict[Any, dict[str, Any]], of).setdefault(path[2], {})
            own[str(path[3])] = values[name.removeprefix(f"{root}.")]
    return {"state": state, "param_groups": [groups[place] for place in sorted(groups)]}


def renamed(state: dict[str, Any], names: Mapping[Any, Any]) -> dict[str, Any]:
    """An optimizer's state under other names of its parameters; those it does not know stay."""
    groups = [
        {**group, "params": [names.get(name, name) for name in group["params"]]}
        for group in state["param_groups"]
    ]
    kept = {names.get(name, name): value for name, value in state["state"].items()}
    return {"state": kept, "param_groups": groups}


def _numbered(state: dict[str, Any]) -> dict[str, Any]:
    names = [name for group in state["param_groups"] for name in group["params"]]
    return renamed(state, {name: number for number, name in enumerate(names)})


def _paths(index: Metadata) -> dict[str, tuple[str | int, ...]]:
    """Where each entry stood in the dictionaries that were saved."""
    return cast(dict[str, tuple[str | int, ...]], index.planner_data or {})


def _plain(index: Metadata) -> list[str]:
    """The entries that are no tensors."""
    found = index.state_dict_metadata.items()
    return [name for name, meta in found if isinstance(meta, BytesStorageMetadata)]


def check_values(folder: Path) -> None:
    """Read everything that is no tensor, as plain values: what torch would unpickle on resuming.

    Raises:
        UnpicklingError: Something there would run code.
    """
    index = read_index(folder)
    for _, record in _records(folder, index, _plain(index)):
        torch.load(io.BytesIO(record), map_location="cpu", weights_only=True)


def check_records(folder: Path, index: Metadata, names: Iterable[str]) -> None:
    """Compare the named entries with the checksums that were written with them.

    Raises:
        ValueError: One is damaged.
    """
    for _, record in _records(folder, index, names):
        with zipfile.ZipFile(io.BytesIO(record)) as archive:
            if archive.testzip() is not None:
                raise ValueError("a shard does not fit its checksum")


def _records(folder: Path, index: Metadata, names: Iterable[str]) -> Iterator[tuple[str, bytes]]:
    wanted = set(names)
    for key, place in index.storage_data.items():
        if key.fqn not in wanted:
            continue
        if getattr(place, "transform_descriptors", None):
            raise ValueError("its shards are compressed, which is not supported")
        with open(folder / place.relative_path, "rb") as file:
            file.seek(place.offset)
            yield key.fqn, file.read(place.length)


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name in _CLASSES.get(module, ()):
            return super().find_class(module, name)
        found = getattr(torch, name, None) if module == "torch" else None
        if isinstance(found, torch.dtype):
            return found
        raise pickle.UnpicklingError(f"GLOBAL {module}.{name} is no part of an index")
