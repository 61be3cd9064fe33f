"""What passes may move beside gradients (running statistics, counters, queues), kept to be put back."""

import functools
import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gaccum_exp.core.joined_samples import tensors_in
from gaccum_exp.core.losses.protocol import LossWrapper
from gaccum_exp.errors import BadInputError

_REGISTRIES = frozenset(vars(nn.Module())) - {"training"}


class ObjectState:
    """A module's buffers and attributes, or another object's attributes, to be put back.

    Attributes may be set anew, or be tensors, lists, sets, dictionaries, arrays and generators that are
    written to or drawn from; what lies deeper, inside other objects, is not kept.
    """

    def __init__(self, of: Any) -> None:
        self._held = vars(of)
        self._attributes = dict(self._held)
        self._registry = of._buffers if isinstance(of, nn.Module) else {}
        self._buffers = dict(self._registry)
        own = [v for name, v in self._attributes.items() if name not in _REGISTRIES]
        found = {id(t): t for value in (*own, *self._buffers.values()) for t in tensors_in(value)}
        self._values = [(t, t.detach().clone()) for t in found.values() if _is_plain(t)]
        self._restorers = [restore for restore in map(_restorer, own) if restore is not None]

    @torch.no_grad()
    def put_back(self) -> None:
        """Put everything back as it was when this was made."""
        for held, before in ((self._held, self._attributes), (self._registry, self._buffers)):
            held.clear()
            held.update(before)
        for restore in self._restorers:
            restore()
        for tensor, value in self._values:
            tensor.data.copy_(value)  # by way of data: a graph may hold it, and finds it as it was


def states_of(objects: Iterable[Any]) -> list[ObjectState]:
    """Return the states of these objects, and of all modules inside them where they are modules."""
    every = {
        id(part): part
        for of in objects
        for part in (of.modules() if isinstance(of, nn.Module) else [of])
        if hasattr(part, "__dict__")
    }
    return [ObjectState(part) for part in every.values()]


@contextmanager
def state_put_back(objects: Iterable[Any]) -> Iterator[None]:
    """Put objects, and all modules inside those that are modules, back at the end of a block.

    Raises:
        BadInputError: a parameter was moved, of which there is no copy.
    """
    every = list(objects)
    states = states_of(every)
    versions = [
        (module, name, parameter, parameter._version)
        for root in every
        if isinstance(root, nn.Module)
        for module in root.modules()
        for name, parameter in module._parameters.items()
        if parameter is not None
    ]
    yield
    for state in states:
        state.put_back()
    for module, name, parameter, version in versions:
        if parameter._version != version:
            raise BadInputError(
                f"a forward pass moves {type(module).__name__}.{name}, and this window needs its passes "
                "twice: move that parameter after the optimizer step, or, where only terms have to be "
                "counted, let the loss function offer count(micro_batch) -> {name: n}"
            )


def held_by(function: Any) -> list[Any]:
    """Return what a loss function may move: itself, what it is bound to, and the modules it holds.

    It holds them as attributes, arguments of a partial function, or enclosed.
    """
    if isinstance(function, LossWrapper):
        return held_by(function.wrapped)
    owner = getattr(function, "__self__", None)
    own = [] if isinstance(owner, (type, ModuleType, type(None))) else [owner]
    found = [value for of in (*own, function) for value in getattr(of, "__dict__", {}).values()]
    if isinstance(function, functools.partial):
        own += held_by(function.func)
        found += [*function.args, *function.keywords.values()]
    for cell in getattr(function, "__closure__", None) or ():
        with suppress(ValueError):  # not filled yet
            found.append(cell.cell_contents)
    return [function, *own, *(value for value in found if isinstance(value, nn.Module))]


def modules_of(function: Any) -> list[nn.Module]:
    """Return the modules that a loss function is, is bound to or holds."""
    return [of for of in held_by(function) if isinstance(of, nn.Module)]


def _is_plain(tensor: Tensor) -> bool:
    return tensor.is_leaf and not isinstance(tensor, nn.Parameter) and tensor.layout == torch.strided


def _restorer(value: Any) -> Callable[[], Any] | None:
    """Return what gives a container or a generator its present content back."""
    if isinstance(value, torch.Generator):
        state = value.get_state()
        return lambda: value.set_state(state)
    if isinstance(value, random.Random) and not isinstance(value, random.SystemRandom):
        drawn = value.getstate()
        return lambda: value.setstate(drawn)
    if isinstance(value, np.random.RandomState):
        legacy: Any = value.get_state()
        return lambda: value.set_state(legacy)
    if isinstance(value, np.random.Generator):
        of_bits = value.bit_generator.state
        return lambda: setattr(value.bit_generator, "state", of_bits)
    if isinstance(value, np.ndarray):
        array = value.copy()
        return lambda: np.copyto(value, array)
    if type(value) in (list, deque):
        items = list(value)
        return lambda: (value.clear(), value.extend(items))
    if type(value) in (dict, set):
        content = value.copy()
        return lambda: (value.clear(), value.update(content))
    return None
