"""Calls of compiled code, seen as a whole: nothing of the tracer is compiled into them.

The compiler would put the tracer's operations into the loop's graphs: other graphs, breaks in them, an
error under `fullgraph=True`. So the tracer's mode is off for the length of a compiled call; inside it
nothing is seen. What compiled code calls back runs uncompiled.
"""

import inspect
import sys
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any, TypeVar

import torch
from torch.overrides import (
    TorchFunctionMode,
    _get_current_function_mode_stack,
    _pop_mode,
    _push_mode,
)

F = TypeVar("F", bound=Callable[..., Any])
WRAPPER = "compile_wrapper"
"""The name of torch's function by which every compiled call enters."""


def compiled_function(frame: FrameType) -> Any:
    """Return what was compiled, given a call of `WRAPPER`; None: it is some other function."""
    if frame.f_globals.get("__name__") != "torch._dynamo.eval_frame":
        return None
    return inspect.unwrap(frame.f_locals["fn"])


def original(function: Any) -> Any:
    """Return the function of which this is the compiled one, or itself."""
    return getattr(function, "_torchdynamo_orig_callable", function)


def uncompiled(function: F) -> F:
    """Return a function that the compiler, where it is loaded, does not look into."""
    disable: Any = torch.compiler.disable  # which would import the compiler, and take seconds
    return disable(function) if "torch._dynamo" in sys.modules else function


class ModesOff:
    """Those modes of torch functions that are switched off until `restore`; others keep their places."""

    def __init__(self, which: Callable[[TorchFunctionMode], bool]) -> None:
        stack: list[Any] = _get_current_function_mode_stack()  # type: ignore[no-untyped-call]
        first = next((i for i, mode in enumerate(stack) if which(mode)), len(stack))
        self._before, others = stack[first:], [mode for mode in stack[first:] if not which(mode)]
        self._left = len(others)
        _exchange(len(self._before), others)

    def restore(self) -> None:
        """Switch the modes on again."""
        _exchange(self._left, self._before)


def _exchange(count: int, modes: Sequence[TorchFunctionMode]) -> None:
    """Put these modes in the place of the innermost ones, of which there are `count`."""
    for _ in range(count):
        _pop_mode()  # type: ignore[no-untyped-call]  # torch's own
    for mode in modes:
        _push_mode(mode)  # type: ignore[no-untyped-call]  # torch's own
