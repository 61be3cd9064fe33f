"""What passes move beside gradients (running statistics, counters, queues), put back as it was."""

import functools
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from gaccum_exp.core.losses.protocol import LossWrapper
from gaccum_exp.core.seeding import random_state_kept
from gaccum_exp.errors import BadInputError

_REGISTRIES = frozenset(vars(nn.Module())) - {"training", "_buffers"}


class ModuleSnapshot:
    """A module's buffers and attributes, to be put back.

    Whether they are set anew, or tensors, lists, dictionaries and generators that are changed; what is
    changed inside other objects stays so.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._attributes, self._buffers = dict(vars(module)), dict(module._buffers)
        own = [v for k, v in self._attributes.items() if k not in _REGISTRIES]
        tensors = (t for t in (*own, *self._buffers.values()) if _is_plain(t))
        self._values = [(t, t.clone()) for t in tensors]
        self._containers = [(v, list(v)) for v in own if isinstance(v, (list, deque))]
        self._mappings = [(v, dict(v)) for v in own if type(v) is dict and v is not module._buffers]
        self._generators = [(v, v.get_state()) for v in own if isinstance(v, torch.Generator)]

    @torch.no_grad()
    def put_back(self) -> None:
        """Make the module what it was."""
        for held, before in (
            (vars(self._module), self._attributes),
            (self._module._buffers, self._buffers),
            *self._mappings,
        ):
            held.clear()
            held.update(before)
        for tensor, value in self._values:
            tensor.data.copy_(value)  # by way of data: a graph may hold it, and finds it as it was
        for container, items in self._containers:
            container.clear()
            container.extend(items)
        for generator, state in self._generators:
            generator.set_state(state)


@contextmanager
def state_put_back(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Put modules and random generators back at the end of a block.

    Raises:
        BadInputError: a parameter was moved, of which there is no copy.
    """
    every = list({id(m): m for root in modules for m in root.modules()}.values())
    snapshots = [ModuleSnapshot(module) for module in every]
    versions = [(m, n, p, p._version) for m in every for n, p in m._parameters.items() if p is not None]
    with random_state_kept():
        yield
    for snapshot in snapshots:
        snapshot.put_back()
    for module, name, parameter, version in versions:
        if parameter._version != version:
            raise BadInputError(
                f"the loss function moves {type(module).__name__}.{name} in a forward pass, and this "
                "window has to be counted in a pass of its own first: let it offer count(micro_batch) "
                "-> {name: n}, or move that parameter after the optimizer step"
            )


def modules_of(function: Any) -> list[nn.Module]:
    """Return the modules that a loss function holds: bound, partial, enclosed, or as attributes."""
    if isinstance(function, nn.Module):
        return [function]
    if isinstance(function, LossWrapper):
        return modules_of(function.wrapped)
    owner = getattr(function, "__self__", None)
    held = [owner, *(v for o in (owner, function) for v in getattr(o, "__dict__", {}).values())]
    if isinstance(function, functools.partial):
        held += [*function.args, *function.keywords.values(), *modules_of(function.func)]
    for cell in getattr(function, "__closure__", None) or ():
        with suppress(ValueError):  # not filled yet
            held.append(cell.cell_contents)
    return [module for module in held if isinstance(module, nn.Module)]


def _is_plain(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_leaf and not isinstance(value, nn.Parameter)
