"""State that passes may move beside gradients (running statistics, counters), kept to be put back."""

import operator
import random
from collections import deque
from collections.abc import Callable, Container, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gaccum_exp.core.losses.protocol import LossWrapper
from gaccum_exp.core.nesting import tensors_in
from gaccum_exp.errors import BadInputError

_REGISTRIES = frozenset(vars(nn.Module())) - {"training"}


def own_attributes(of: Any) -> dict[str, Any]:
    """Return an object's attributes, of a module without the registries that every module has."""
    return {key: value for key, value in vars(of).items() if key not in _REGISTRIES}


def version_of(tensor: Tensor) -> int:
    """Return how often a tensor was written to, as autograd counts it."""
    return -1 if tensor.is_inference() else tensor._version


class Entries:
    """Entries of dictionaries (attributes, buffers), to be put back: the objects, not their content."""

    def __init__(self, *held: dict[str, Any]) -> None:
        self._held = [(each, dict(each)) for each in held]

    def put_back(self) -> None:
        """Put every entry back as it was when this was made."""
        for held, before in reversed(self._held):
            held.clear()
            held.update(before)


class ObjectState:
    """A module's buffers and attributes, or another object's attributes, to be put back.

    Attributes may be set anew, or be tensors, lists, sets, dictionaries, arrays and generators that are
    written to or drawn from; what lies deeper, inside other objects, is not kept.

    Args:
        of: the module or object.
        stepped: identities of the parameters that an optimizer steps: all others are kept, too; None:
            no parameter is, since a copy of each takes memory.
    """

    def __init__(self, of: Any, stepped: Container[int] | None = None) -> None:
        own, registries = list(own_attributes(of).values()), list[dict[str, Any]]()
        if isinstance(of, nn.Module):
            registries.append(of._buffers)
        self._entries = Entries(vars(of), *registries)
        found = tensors_in([own, registries])
        kept = [t for t in found if t.is_leaf and not isinstance(t, nn.Parameter)]
        if stepped is not None and isinstance(of, nn.Module):
            kept += [p for p in of._parameters.values() if p is not None and id(p) not in stepped]
        self._values = [
            (tensor, tensor.detach().clone())
            for tensor in {id(tensor): tensor for tensor in kept}.values()
            # What shows one number at several places (expanded) cannot be written to itself.
            if tensor.layout == torch.strided
            and all(by or n < 2 for n, by in zip(tensor.shape, tensor.stride(), strict=True))
        ]
        self._restorers = [restore for restore in map(_restorer, own) if restore is not None]

    @torch.no_grad()
    def put_back(self) -> None:
        """Put everything back as it was when this was made."""
        self._entries.put_back()
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
        (module, name, parameter, version_of(parameter))
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
        if version_of(parameter) != version:
            raise BadInputError(
                f"a forward pass moves {type(module).__name__}.{name}, and this window needs its passes "
                "twice: move that parameter after the optimizer step, or, where only terms have to be "
                "counted, let the loss function offer count(micro_batch) -> {name: n}"
            )


def held_by(function: Any) -> list[Any]:
    """Return what a loss function may move: itself, what it is bound to, and the modules it holds.

    It holds them as attributes, arguments of a partial function, or enclosed, and in lists and
    dictionaries of modules there.
    """
    if isinstance(function, LossWrapper):
        return held_by(function.wrapped)
    owner = getattr(function, "__self__", None)
    own = [] if isinstance(owner, (type, ModuleType, type(None))) else [owner]
    found = [value for of in (*own, function) for value in getattr(of, "__dict__", {}).values()]
    if isinstance(function, partial):
        own += held_by(function.func)
        found += [*function.args, *function.keywords.values()]
    for cell in getattr(function, "__closure__", None) or ():
        with suppress(ValueError):  # not filled yet
            found.append(cell.cell_contents)
    for value in list(found):
        entries = value.values() if isinstance(value, dict) else value
        # Data may be enclosed as well, of any length: the first entry tells.
        if isinstance(value, (list, tuple, dict)) and isinstance(next(iter(entries), None), nn.Module):
            found += entries
    return [function, *own, *(value for value in found if isinstance(value, nn.Module))]


def modules_of(function: Any) -> list[nn.Module]:
    """Return the modules that a loss function is, is bound to or holds."""
    return [of for of in held_by(function) if isinstance(of, nn.Module)]


def _restorer(value: Any) -> Callable[[], Any] | None:
    """Return a function that gives a container or generator its present content back; None: neither."""
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
    if isinstance(value, (list, deque, set, dict)):
        values = list(value.values()) if isinstance(value, dict) else []
        return partial(refill, value, list(value), values)
    return None


def refill(container: Any, entries: list[Any], values: list[Any]) -> None:
    """Give a container its entries back, or a dictionary its keys and values, where they are others."""
    now = [*container, *(container.values() if isinstance(container, dict) else ())]
    before = [*entries, *values]
    if len(now) == len(before) and all(map(operator.is_, now, before)):
        return  # some, e.g. those of torch.fx, cannot be written to
    container.clear()
    if isinstance(container, dict):
        for key, value in zip(entries, values, strict=True):  # a Counter's `update` adds
            container[key] = value
    else:
        (container.update if isinstance(container, set) else container.extend)(entries)
