"""The calls of a model's modules, as they happen in a forward pass."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from gaccum_exp.core.nesting import tensors_in

Key = tuple[str, int]
"""A module's dotted name, and the number of the call of it in its pass."""


@dataclass(slots=True)
class ModuleCall:
    """One call of one module in one pass."""

    key: Key
    parent: Key | None
    start: int
    """How many calls of modules began before it."""
    inputs: list[Tensor] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)


class ModuleTracer:
    """Traces the calls of modules, given by name; `see` gets each at its end, with its tensors."""

    def __init__(
        self, modules: Mapping[str, nn.Module], see: Callable[[ModuleCall], None] | None = None
    ) -> None:
        self._names = {id(module): name for name, module in modules.items()}
        self._modules, self._see = modules, see
        self._stack: list[ModuleCall] = []
        self._calls: dict[str, int] = {}
        self._started = 0

    @property
    def module(self) -> str | None:
        """Name of the innermost module that is running."""
        return self._stack[-1].key[0] if self._stack else None

    def begin(self) -> None:
        """Begin the next pass: forget the calls so far."""
        self._stack, self._calls, self._started = [], {}, 0

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Trace for the length of the block."""
        handles = []
        for module in self._modules.values():
            try:
                handles.append(module.register_forward_pre_hook(self._before, with_kwargs=True))
                handles.append(module.register_forward_hook(self._after, with_kwargs=True))
            except RuntimeError:
                continue  # a scripted module takes no such hook; its parent is traced
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _before(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        name = self._names[id(module)]
        nth = self._calls[name] = self._calls.get(name, 0) + 1
        call = ModuleCall((name, nth), self._stack[-1].key if self._stack else None, self._started)
        self._started += 1
        # Before the module runs, since it may change its input in place.
        if self._see is not None:
            with _disable_current_modes():
                call.inputs = [t.detach().clone() for t in tensors_in([args, kwargs])]
        self._stack.append(call)

    def _after(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        name = self._names[id(module)]
        while self._stack and self._stack[-1].key[0] != name:
            self._stack.pop()  # a call that ended in an exception which the model caught
        call = self._stack.pop() if self._stack else None
        if call is not None and self._see is not None:
            with _disable_current_modes():  # operators that compare are not the model's own
                call.outputs = [t.detach() for t in tensors_in(output)]
                self._see(call)
