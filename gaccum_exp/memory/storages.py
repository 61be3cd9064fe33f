"""Follow every tensor's storage, operator by operator: what it is for, and how much there is of it.

A dispatch mode sees the result of every operator, and follows the storages in it until they die. It
works with real tensors, and with fake ones (torch's FakeTensorMode), which have a size and no memory:
that is how a peak is predicted. Workspace inside operators is not seen, nor are tensors that were made
outside and assigned to no category.
"""

import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from gaccum_exp.core.modes import EagerMode

PARAMETERS, GRADIENTS, OPTIMIZER_STATE = "parameters", "gradients", "optimizer_state"
ACTIVATIONS, TEMPORARIES, INPUTS = "activations", "temporaries", "inputs"
CATEGORIES = (PARAMETERS, GRADIENTS, OPTIMIZER_STATE, ACTIVATIONS, TEMPORARIES, INPUTS)

CUDA_BLOCK = 512
"""Bytes to which CUDA's caching allocator rounds every allocation up."""


class BudgetExceededError(torch.OutOfMemoryError):
    """More is held than the budget allows."""


@dataclass(slots=True)
class _Storage:
    reference: weakref.ref[Any]
    category: str
    bytes: int = 0


class StorageTracker(EagerMode):  # type: ignore[no-untyped-call]  # torch's metaclass
    """Follow the storages on one device.

    Args:
        device: others' storages are not counted.
        budget_bytes: beyond which an operator's result is an error; None: no limit.
    """

    def __init__(self, device: torch.device, budget_bytes: int | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's own
        self._device = device
        self._budget_bytes = budget_bytes
        self._block = CUDA_BLOCK if device.type == "cuda" else 1
        self._storages: dict[int, _Storage] = {}
        self.held = dict.fromkeys(CATEGORIES, 0)
        """Bytes now, by category."""
        self.total = 0
        self.peak = 0
        self.at_peak = dict(self.held)
        """Bytes by category when most was held."""
        self.paused = False
        """Whether results of operators are not followed for now."""
        self.in_forward = False
        """Whether what is made without gradients, as a custom Function does, is of a forward pass."""

    def reset_peak(self) -> None:
        """Reset the peak to what is held now."""
        self.peak, self.at_peak = self.total, dict(self.held)

    def assign(self, tensors: Iterable[Tensor], category: str) -> None:
        """Assign tensors to a category, and follow them from now on."""
        for tensor in tensors:
            for storage in storages(tensor):
                entry = self._storages.get(storage._cdata)
                if entry is not None:
                    self._move(entry, category)
                else:
                    self._add(storage, tensor.device, category)

    def reassign(self, old: str, new: str) -> None:
        """Move all that is held in one category to another."""
        for entry in self._storages.values():
            if entry.category == old:
                self._move(entry, new)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator and follow what it returns."""
        result = func(*args, **(kwargs or {}))
        if self.paused:
            return result
        # In a backward pass gradients are off, but while checkpointing computes a forward pass again.
        forward = self.in_forward or torch.is_grad_enabled()
        category = ACTIVATIONS if forward else TEMPORARIES
        for leaf in (result,) if isinstance(result, Tensor) else tree_leaves(result):
            if isinstance(leaf, Tensor):
                for storage in storages(leaf):
                    entry = self._storages.get(storage._cdata)
                    if entry is not None:
                        self._resize(entry, storage.nbytes())
                    else:
                        self._add(storage, leaf.device, category)
        return result

    def _add(self, storage: Any, device: torch.device, category: str) -> None:
        if device.type != self._device.type:
            return
        key = storage._cdata
        entry = _Storage(weakref.ref(storage, partial(self._free, key)), category)
        self._storages[key] = entry
        self._resize(entry, storage.nbytes())

    def _resize(self, entry: _Storage, requested: int) -> None:
        size = -(-requested // self._block) * self._block
        if size == entry.bytes:
            return
        self.held[entry.category] += size - entry.bytes
        self.total += size - entry.bytes
        entry.bytes = size
        if self.total > self.peak:
            self.peak, self.at_peak = self.total, dict(self.held)
            if self._budget_bytes is not None and self.total > self._budget_bytes:
                raise BudgetExceededError(
                    f"{self.total:,} bytes are held, the budget is {self._budget_bytes:,}"
                )

    def _move(self, entry: _Storage, category: str) -> None:
        self.held[entry.category] -= entry.bytes
        self.held[category] += entry.bytes
        entry.category = category

    def _free(self, key: int, _: Any) -> None:
        entry = self._storages.pop(key)
        self.held[entry.category] -= entry.bytes
        self.total -= entry.bytes


class OutputBytes(EagerMode):  # type: ignore[no-untyped-call]  # torch's metaclass
    """Add up all that operators return, whether it is kept or not, and also where it is a view."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's own
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator and count what it returns."""
        result = func(*args, **(kwargs or {}))
        self.bytes += sum(leaf.nbytes for leaf in tree_leaves(result) if isinstance(leaf, Tensor))
        return result


def storages(tensor: Tensor) -> list[Any]:
    """Return a tensor's storages: one, but for sparse tensors and subclasses that wrap others."""
    flatten: Any = getattr(tensor, "__tensor_flatten__", None)
    if flatten is not None:
        parts = [getattr(tensor, name) for name in flatten()[0]]
    elif tensor.layout is torch.sparse_coo:
        parts = [tensor._indices(), tensor._values()]
    elif tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        parts = [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    elif tensor.layout is torch.strided:
        return [tensor.untyped_storage()]
    else:
        return []  # e.g. oneDNN's own layout, which has no storage to look at
    return [storage for part in parts for storage in storages(part)]
