"""Places that hold state: tensors, numbers and containers of modules and of other objects."""

import copy
import functools
import inspect
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from types import CellType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from gaccum_exp.core.module_state import own_attributes, version_of

STATES = (Tensor, bool, int, float, str, list, dict, deque)
"""Types of attributes that hold state."""
MOST, LARGEST = 64, 1 << 24
"""Entries of what a loss encloses, and elements of a tensor there, that are looked at."""
VALUES = 512
"""Elements of a tensor that are compared where its version says that it did not move."""


@dataclass(eq=False, slots=True)
class Slot:
    """A place that holds state: a tensor, a number or a container."""

    owner: Any
    """The module or object that holds it."""
    registry: dict[str, Any] | None
    """In which it stands under `key`; None: the tensor itself is all that is known."""
    key: str
    value: Any
    """The object that stood there at first."""
    first: Any
    """A copy of what it was."""
    outside: bool = False
    """Whether it moved between the calls of model and loss."""
    moves: int = 0
    begun: Any = None
    """Its mark at first."""
    starts: list[tuple[int, Any]] = field(default_factory=list)
    """What it was where passes that are judged may begin, by the backward passes before."""
    _mark: Any = None

    @property
    def now(self) -> Any:
        """What stands there now."""
        return self.value if self.registry is None else self.registry.get(self.key)

    def look(self) -> bool:
        """Return whether it moved since the last look."""
        before, self._mark = self._mark, _mark_of(self.now)
        if before is None:
            self.begun = self._mark
            return False
        moved = not same_mark(before, self._mark)
        self.moves += moved
        return moved

    def start(self, backwards: int) -> Any:
        """Return what it was where the passes began that came after so many backward passes."""
        return next((s for number, s in reversed(self.starts) if number <= backwards), self.first)

    @contextmanager
    def at(self, state: Any) -> Iterator[None]:
        """Put a state in place for the length of the block, under the object that was there at first."""
        now = self.now
        held = self.value if isinstance(self.value, Tensor) else copied(state)
        data = held.data if isinstance(held, Tensor) else None
        try:
            if isinstance(held, Tensor):
                held.data = state.to(held.dtype, copy=True)
            if self.registry is not None:
                self.registry[self.key] = held
            yield
        finally:
            if data is not None:
                held.data = data
            if self.registry is not None:
                self.registry[self.key] = now

    def put(self, state: Any) -> None:
        """Set what stands there now, a copy in a sandbox, to a state."""
        now = self.now
        if not isinstance(state, Tensor):
            if self.registry is not None:
                self.registry[self.key] = copied(state)
        elif isinstance(now, Tensor) and now.shape == state.shape:
            now.data.copy_(state)
        elif self.registry is not None:
            self.registry[self.key] = state.to(now if isinstance(now, Tensor) else state)


Place = tuple[Any, dict[str, Any] | None, str, Any]
"""Owner, registry, key in it, and what stands there."""


def places_of(module: nn.Module, stepped: set[int]) -> Iterator[Place]:
    """Yield the state of one module, without the parameters that are stepped and its children."""
    registries: tuple[Any, Any] = module._parameters, module._buffers
    for registry in registries:
        for key, tensor in registry.items():
            if tensor is not None and id(tensor) not in stepped:
                yield module, registry, key, tensor
    for key, value in own_attributes(module).items():
        if key != "training" and isinstance(value, STATES):
            yield module, vars(module), key, value


class _Cell:
    """What a function encloses, under any key."""

    def __init__(self, cell: CellType) -> None:
        self._cell = cell

    def get(self, key: str) -> Any:
        return self._cell.cell_contents

    def __setitem__(self, key: str, value: Any) -> None:
        self._cell.cell_contents = value


def enclosed_by(function: Any) -> Iterator[Place]:
    """Yield the tensors and numbers that a loss function encloses, also in dictionaries and objects."""
    while isinstance(function, functools.partial):
        function = function.func
    if not inspect.isfunction(function):
        return
    found: list[Place] = []
    names = function.__code__.co_names
    found += [(None, function.__globals__, n, function.__globals__.get(n)) for n in names]
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        with suppress(ValueError):  # not filled yet
            held: Any = _Cell(cell)
            found.append((None, held, name, cell.cell_contents))
    for _, _, _, value in list(found):
        plain = isinstance(value, (nn.Module, type, ModuleType)) or callable(value)
        of = value if isinstance(value, dict) else {} if plain else getattr(value, "__dict__", {})
        found += [(value, of, key, each) for key, each in list(of.items())[:MOST]]
    for owner, registry, key, value in found:
        state = isinstance(value, Tensor) and not value.requires_grad and value.numel() <= LARGEST
        if state or type(value) in (int, float):
            yield (value if owner is None else owner), registry, key, value


def copied(value: Any) -> Any:
    """Return a copy of a state; of a container its entries stay the same objects."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    return copy.copy(value) if isinstance(value, (list, dict, deque)) else value


def _mark_of(value: Any) -> Any:
    if isinstance(value, Tensor):
        flat = value.detach().reshape(-1)
        some = flat[:: max(1, flat.numel() // VALUES)].clone()
        return id(value), version_of(value), value.data_ptr(), some
    if isinstance(value, (list, dict, deque)):
        return (len(value), *map(id, value.values() if isinstance(value, dict) else value))
    return (value,)


def same_mark(one: Any, other: Any) -> bool:
    """Whether two marks are of a state that did not move in between."""
    if isinstance(one[-1], Tensor) and isinstance(other[-1], Tensor):
        return one[:-1] == other[:-1] and torch.equal(one[-1], other[-1])
    return bool(one == other)


def same_state(one: Any, other: Any) -> bool:
    """Whether two states are equal."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and torch.equal(one, other)
    return type(one) is type(other) and (isinstance(one, (list, dict, deque)) or one == other)
