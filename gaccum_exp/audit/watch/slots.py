"""Places that hold state: tensors, numbers and containers of modules and of other objects."""

import copy
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from gaccum_exp.core.module_state import own_attributes, version_of

STATES = (Tensor, bool, int, float, str, list, dict, deque)
"""Types of attributes that hold state."""
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
