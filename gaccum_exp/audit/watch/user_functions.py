"""Report the calls of Python functions as they happen, from wherever and under whatever name.

A loss, a clipping function or a scheduler's step may have been imported anywhere before. So the
interpreter reports their calls (`sys.setprofile`), which changes nothing in what it runs.
"""

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import CodeType, FrameType
from typing import Any

from gaccum_exp.audit.watch.compiled import uncompiled

OnCall = Callable[[str, FrameType, Any], None]
"""Takes `call` or `return`, the frame, and what is returned."""


@contextmanager
def calls_reported(by_code: dict[CodeType, OnCall], by_name: dict[str, OnCall]) -> Iterator[None]:
    """Report every call of these code objects, and of functions of these names."""
    before = sys.getprofile()
    # By identity: code that torch.compile makes may hold constants that have no hash.
    of_code = {id(code): uncompiled(report) for code, report in by_code.items()}
    of_name = {name: uncompiled(report) for name, report in by_name.items()}

    def profile(frame: FrameType, event: str, arg: Any) -> None:
        if callable(before):  # a profiler written in C is none: it goes on afterwards
            before(frame, event, arg)  # type: ignore[arg-type]  # passed on as it came
        if event in ("call", "return"):
            report = of_code.get(id(frame.f_code)) or of_name.get(frame.f_code.co_name)
            if report is not None:
                report(event, frame, arg)

    sys.setprofile(profile)
    try:
        yield
    finally:
        sys.setprofile(before)


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
