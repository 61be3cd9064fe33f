"""What of a training no checkpoint keeps, and whether it has moved since the training began.

Most of these objects are configuration, and stay as they are: then nothing is missing. Whether they do
is told by a digest of what they would be pickled as, with tensors by their version and their sum, and
what cannot be pickled by its identity. Nothing is read back from a pickle here.
"""

import copyreg
import hashlib
import pickle
from collections.abc import Container, Iterator, Mapping
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gaccum_exp.core.module_state import version_of
from gaccum_exp.train.checkpoint.attributes import attributes_of
from gaccum_exp.train.checkpoint.parts import names_of, parts_of
from gaccum_exp.train.state import TrainState

MOST_BYTES = 1 << 26
"""Of an object's pickle: a longer one is data, and told by its identity."""
_OURS = __name__.partition(".")[0] + "."


class Unkept:
    """The objects that are left out of a training's checkpoints, as they are now.

    A module with an extra state, and an optimizer with a `state_dict` of its own, are taken by their
    word: it holds whatever else they need. What our own loss functions find out, they find out again.
    """

    def __init__(self, state: TrainState) -> None:
        parts = parts_of(state)
        names = names_of(parts)
        self._alive: list[Any] = []  # or another object might get the identity of one that is gone
        self._known = _kept_elsewhere(state, parts) | names.keys()
        self._memo: dict[int, bytes] = {}
        self._digests: dict[str, bytes] = {}
        self._types: dict[str, str] = {}
        for name, part in [*parts.items(), ("optimizer", state.optimizer)]:
            if not _speaks_for_itself(part):
                for key, left in attributes_of(part, names)[1].items():
                    of_each = [repr(where).encode() + self._digest(value) for where, value in left]
                    self._digests[f"{name}.{key}"] = b"".join(of_each)
                    self._types[f"{name}.{key}"] = type(left[0][1]).__qualname__

    def moved_since(self, before: "Unkept") -> Iterator[str]:
        """Yield the names of attributes with such an object that is not what it was, with its type."""
        for name, digest in self._digests.items():
            if before._digests.get(name) != digest:
                yield f"{name} ({self._types[name]})"

    def _digest(self, value: Any) -> bytes:
        if id(value) not in self._memo:
            self._alive.append(value)
            digest = _Hashed()
            try:
                _Pickler(digest, self._known, self._alive).dump(value)
                self._memo[id(value)] = digest.hash.digest()
            except Exception:  # of whatever the user's objects do when they are pickled
                self._memo[id(value)] = repr(id(value)).encode()
        return self._memo[id(value)]


def _kept_elsewhere(state: TrainState, parts: Mapping[str, Any]) -> set[int]:
    """Return the identities of what checkpoints keep, and other objects may refer to."""
    optimizer = state.optimizer
    kept: list[Any] = [optimizer, optimizer.state, optimizer.param_groups, *optimizer.param_groups]
    for part in parts.values():
        kept += part._buffers.values() if isinstance(part, nn.Module) else []
    return set(map(id, kept)) - {id(None)}


def _speaks_for_itself(part: Any) -> bool:
    if isinstance(part, nn.Module):
        return type(part).get_extra_state is not nn.Module.get_extra_state
    if isinstance(part, Optimizer) and type(part).state_dict is not Optimizer.state_dict:
        return True
    return type(part).__module__.startswith(_OURS)


class _Hashed:
    """A file of which only the digest is kept."""

    def __init__(self) -> None:
        self.hash, self._size = hashlib.sha256(), 0

    def write(self, content: Any) -> None:
        """Take bytes."""
        self._size += len(content)
        if self._size > MOST_BYTES:
            raise ValueError("too long")
        self.hash.update(content)


class _Pickler(pickle.Pickler):
    """Pickles what can be pickled of an object, and puts something in the place of all else."""

    def __init__(self, file: _Hashed, known: Container[int], alive: list[Any]) -> None:
        super().__init__(file, protocol=4)
        self._known, self._alive = known, alive

    def persistent_id(self, obj: Any) -> Any:
        """Return what stands for what is known, for functions and types, and for tensors."""
        if id(obj) in self._known or isinstance(
            obj, (type, FunctionType, BuiltinFunctionType, ModuleType)
        ):
            self._alive.append(obj)
            return id(obj)
        if isinstance(obj, Tensor):
            self._alive.append(obj)
            return id(obj), version_of(obj), _sum(obj)
        return None

    def reducer_override(self, obj: Any) -> Any:
        """Return how an object is pickled; of one that refuses that, its identity and its attributes."""
        if type(obj) in copyreg.dispatch_table:
            return NotImplemented
        try:
            return obj.__reduce_ex__(4)
        except Exception:  # of whatever kind
            self._alive.append(obj)
            return object, (id(obj),), getattr(obj, "__dict__", None)


def _sum(tensor: Tensor) -> str | None:
    """Return a tensor's sum: what is written by way of `.data` counts as no version."""
    dtype = torch.complex128 if tensor.is_complex() else torch.float64
    try:
        return repr(tensor.detach().sum(dtype=dtype).item())
    except (RuntimeError, TypeError):  # of a layout that has none
        return None
