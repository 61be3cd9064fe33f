"""Reads tensors in the format of `torch.distributed.checkpoint`, and runs nothing that is planted there.

The stock reader unpickles `.metadata` and whatever is no tensor, which runs any code that a pickle
names. Here a pickle may name DCP's metadata classes and the types of their fields alone, and gets
records in their place that hold values and do nothing.
"""

import io
import json
import pickle
from collections.abc import Collection
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gaccum_exp.train.checkpoint.encoding import Encoded

METADATA = ".metadata"
VALUES = "values.json"
"""The name of what is no tensor."""
_CLASSES = {
    "torch.distributed.checkpoint.metadata": {
        "Metadata", "MetadataIndex", "TensorStorageMetadata", "BytesStorageMetadata", "TensorProperties",
        "ChunkStorageMetadata", "StorageMeta", "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
}  # fmt: skip


def load(path: Path, files: Collection[str]) -> Encoded:
    """Read what `dcp_writer.save` has written into a folder.

    Args:
        path: of the folder.
        files: that belong to it; no other one is opened.

    Raises:
        Exception: of whatever kind, where it is anything else.
    """
    with open(path / METADATA, "rb") as file:
        metadata = _field(_Unpickler(file).load(), "Metadata")
    tensors: dict[str, Tensor] = {}
    values: Any = None
    for index, place in metadata["storage_data"].items():
        name = _field(index, "MetadataIndex")["fqn"]
        about = metadata["state_dict_metadata"][name]
        content = io.BytesIO(_content(path, files, _field(place, "_StorageInfo")))
        if name == VALUES:
            values = json.loads(content.read())
        else:
            tensors[name] = _tensor(content, name, _field(about, "TensorStorageMetadata"))
    if set(metadata["state_dict_metadata"]) != {*tensors, VALUES}:
        raise ValueError("a tensor or the values are missing")
    return Encoded(values, tensors)


def _content(path: Path, files: Collection[str], place: dict[str, Any]) -> bytes:
    name, offset, length = place["relative_path"], place["offset"], place["length"]
    if name not in files or name == METADATA:
        raise ValueError(f"{name!r} is no file of the checkpoint")
    with open(path / name, "rb") as file:
        file.seek(offset)
        content = file.read(length)
    if len(content) != length:
        raise ValueError(f"{name} ends before {offset + length} bytes")
    return content


def _tensor(content: io.BytesIO, name: str, about: dict[str, Any]) -> Tensor:
    tensor = torch.load(content, map_location="cpu", weights_only=True)
    dtype, size = _field(about["properties"], "TensorProperties")[0], tuple(about["size"])
    if type(tensor) is not Tensor or tuple(tensor.shape) != size or tensor.dtype != dtype:
        raise ValueError(f"{name} is not the tensor {size}, {dtype}, that it is said to be")
    return tensor


class _Record:
    """Stands for an object of one of DCP's metadata classes."""

    state: Any = None

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments

    def __setstate__(self, state: Any) -> None:
        self.state = state


def _field(record: Any, kind: str) -> Any:
    if not isinstance(record, _Record) or type(record).__name__ != kind:
        raise ValueError(f"there is a {type(record).__name__} in place of a {kind}")
    return record.state


class _Unpickler(pickle.Unpickler):
    @cached_property
    def _made(self) -> dict[tuple[str, str], Any]:
        # Functions and classes of this pickle's own: it may set attributes on whatever it has looked up.
        return {
            ("torch", "Size"): lambda sizes: tuple(map(int, sizes)),
            ("torch.serialization", "_get_layout"): lambda name: str(name),
        }

    def find_class(self, module: str, name: str) -> Any:
        """Return what stands for a name in the pickle.

        Raises:
            pickle.UnpicklingError: it is neither one of DCP's metadata classes nor a field's type.
        """
        found = self._made.get((module, name))
        if found is not None:
            return found
        if name in _CLASSES.get(module, ()):
            return self._made.setdefault((module, name), type(name, (_Record,), {}))
        dtype = vars(torch).get(name) if module == "torch" else None  # `getattr` may import something
        if isinstance(dtype, torch.dtype):
            return dtype
        raise pickle.UnpicklingError(f"{module}.{name} is none of DCP's metadata classes")
