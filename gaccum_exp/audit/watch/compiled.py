"""Keep an observer out of what torch.compile compiles.

The compiler would trace the observer's operations into the loop's graphs: other graphs, breaks in them,
an error under `fullgraph=True`. So the mode is off for the length of a compiled call, which is reported
as a whole; inside it nothing is seen. What compiled code calls back runs uncompiled.
"""

import inspect
import sys
from collections.abc import Callable
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


class ModeOff:
    """A mode of torch functions, off until `restore`; others keep their places."""

    def __init__(self, mode: TorchFunctionMode) -> None:
        self._mode, self._above = mode, -1
        stack: list[Any] = _get_current_function_mode_stack()  # type: ignore[no-untyped-call]
        if any(each is mode for each in stack):
            above = stack[[each is mode for each in stack].index(True) + 1 :]
            self._above = len(above)
            self._rebuilt(self._above + 1, above)

    def restore(self) -> None:
        """Switch the mode on again."""
        if self._above >= 0:
            stack: list[Any] = _get_current_function_mode_stack()  # type: ignore[no-untyped-call]
            above = stack[len(stack) - self._above :]
            self._rebuilt(self._above, [self._mode, *above])

    @staticmethod
    def _rebuilt(off: int, on: list[Any]) -> None:
        for _ in range(off):
            _pop_mode()  # type: ignore[no-untyped-call]  # torch's own
        for mode in on:
            _push_mode(mode)  # type: ignore[no-untyped-call]  # torch's own
