"""Report the calls of Python functions as they happen, from wherever and under whatever name.

A loss, a clipping function or a scheduler's step may have been imported anywhere before. So the
interpreter reports their calls (`sys.setprofile`), which changes nothing in what it runs.
"""

import inspect
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import CodeType, FrameType
from typing import Any

from gaccum_exp.audit.watch.compiled import uncompiled

OnCall = Callable[[str, FrameType, Any], None]
"""Takes `call` or `return`, the frame, and what is returned."""


class _Interpreter:
    """The interpreter of one thread, while it reports calls.

    To all that are open at once by one function, so that they may end in any order. A profiler that is
    written in Python goes on; one written in C (cProfile's, up to Python 3.11) rests meanwhile.
    """

    def __init__(self) -> None:
        self._open: list[tuple[dict[int, OnCall], dict[str, OnCall]]] = []
        self._of_code: dict[int, list[OnCall]] = {}
        self._of_name: dict[str, list[OnCall]] = {}
        self._before: Any = None

    def begin(self, of_code: dict[int, OnCall], of_name: dict[str, OnCall]) -> None:
        """Report calls of code, by its identity, and of functions, by their names."""
        if not self._open:
            self._before = sys.getprofile()
            if hasattr(self._before, "disable"):
                self._before.disable()
            sys.setprofile(self._profile)
        self._open.append((of_code, of_name))
        self._sort()

    def end(self, of_code: dict[int, OnCall]) -> None:
        self._open = [each for each in self._open if each[0] is not of_code]
        self._sort()
        if not self._open and self._reporting:
            self.leave()
            if hasattr(self._before, "enable"):
                self._before.enable()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Report nothing for the length of a block, whose calls would take longer."""
        reporting = self._reporting
        self.leave()
        try:
            yield
        finally:
            if reporting:
                sys.setprofile(self._profile)

    @property
    def _reporting(self) -> bool:
        return sys.getprofile() == self._profile  # no other profiler was begun in the loop

    def leave(self) -> None:
        """Report nothing more, unless another profiler has taken over."""
        if self._reporting:
            sys.setprofile(self._before if callable(self._before) else None)

    def _sort(self) -> None:
        self._of_code, self._of_name = {}, {}
        for of_code, of_name in self._open:
            for code, report in of_code.items():
                self._of_code.setdefault(code, []).append(report)
            for name, report in of_name.items():
                self._of_name.setdefault(name, []).append(report)

    def _profile(self, frame: FrameType, event: str, arg: Any) -> None:
        if callable(self._before):
            self._before(frame, event, arg)
        if event in ("call", "return"):
            code = frame.f_code
            reports = self._of_code.get(id(code)) or self._of_name.get(code.co_name)
            for report in reports or ():
                report(event, frame, arg)


_THREAD = threading.local()


def _interpreter() -> _Interpreter:
    found: _Interpreter = vars(_THREAD).setdefault("interpreter", _Interpreter())
    return found


# A process that is forked from the loop's, as a DataLoader's workers are, runs no loop.
os.register_at_fork(after_in_child=lambda: _interpreter().leave())


def calls_unreported() -> AbstractContextManager[None]:
    """Let no call be reported in this thread for the length of a block."""
    return _interpreter().paused()


@contextmanager
def calls_reported(by_code: dict[CodeType, OnCall], by_name: dict[str, OnCall]) -> Iterator[None]:
    """Report every call of these code objects, and of functions of these names."""
    # By identity: code that torch.compile makes may hold constants that have no hash.
    of_code = {id(code): uncompiled(report) for code, report in by_code.items()}
    interpreter = _interpreter()
    interpreter.begin(of_code, {name: uncompiled(report) for name, report in by_name.items()})
    try:
        yield
    finally:
        interpreter.end(of_code)


def code_of(function: Any) -> CodeType | None:
    """Return the Python code that a call of this runs; None where it runs other code."""
    if not inspect.ismethod(function) and not inspect.isfunction(function) and callable(function):
        function = type(function).__call__
    return getattr(function, "__code__", None)


def bound_to(function: Any) -> Any:
    """Return the object that the function's first argument is bound to, or None."""
    if inspect.ismethod(function):
        return function.__self__
    return None if inspect.isfunction(function) or inspect.isbuiltin(function) else function


def arguments_of(frame: FrameType, *, bound: bool) -> tuple[list[Any], dict[str, Any]]:
    """Return positional and keyword arguments of a call that has just begun.

    By name where the function allows it, since a name may say what a number is (`batch_idx`). If it is
    `bound` to an object, which is its first argument then, that is left out.
    """
    code, values = frame.f_code, frame.f_locals
    info = inspect.getargvalues(frame)
    named = code.co_varnames[int(bound) : code.co_argcount]
    keyword_only = code.co_varnames[code.co_argcount :][: code.co_kwonlyargcount]
    keywords = {name: values[name] for name in keyword_only}
    if info.keywords:
        keywords |= values[info.keywords]
    if info.varargs or code.co_posonlyargcount:
        extra = values[info.varargs] if info.varargs else ()
        return [*(values[name] for name in named), *extra], keywords
    return [], {name: values[name] for name in named} | keywords
