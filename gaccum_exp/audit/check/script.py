"""Run somebody's script in this process as Python itself would."""

import importlib.util
import io
import os
import runpy
import sys
import types
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import TracebackType

from gaccum_exp.audit.watch.calls import PASSING_ON
from gaccum_exp.errors import BadInputError

OURS = Path(__file__).resolve().parents[2]
"""The package's own folder."""


@contextmanager
def as_main(target: str, arguments: Sequence[str], *, module: bool = False) -> Iterator[None]:
    """Give a script its command line and its path for imports, for the length of a block.

    Args:
        target: the script's file, or with `module` what `python -m` gets.
        arguments: the script's own.
        module: whether it is a module that is looked for.
    """
    argv, path, main = sys.argv, list(sys.path), sys.modules["__main__"]
    sys.path[:] = _path_of_python(path)
    if not sys.flags.safe_path:
        sys.path.insert(0, os.getcwd() if module else str(Path(target).resolve().parent))
    sys.argv = ["-m" if module else target, *arguments]
    try:
        yield
    finally:
        sys.argv, sys.path[:] = argv, path
        sys.modules["__main__"] = main


def run_file(target: str) -> None:
    """Run a file as `__main__`; what it raises is passed through."""
    script = types.ModuleType("__main__")
    loader = SourceFileLoader("__main__", target)
    vars(script).update(__file__=target, __loader__=loader, __builtins__=__builtins__, __cached__=None)
    with io.open_code(str(Path(target).resolve())) as file:
        code = compile(file.read(), target, "exec", dont_inherit=True)
    sys.modules["__main__"] = script
    exec(code, vars(script))


def run_module(target: str) -> None:
    """Run a module as `python -m` would; what it raises is passed through."""
    runpy.run_module(target, run_name="__main__", alter_sys=True)


def require(target: str, *, module: bool) -> None:
    """Refuse what cannot be run; call it within `as_main`.

    Raises:
        BadInputError: there is no such script.
    """
    if not module:
        if Path(target).is_file():
            return
        what = "is a folder: give its file" if Path(target).is_dir() else "no such file"
        raise BadInputError(f"{target}: {what}, or a module by -m package.module")
    try:
        found = importlib.util.find_spec(target)
    except ImportError as error:
        raise BadInputError(f"-m {target}: {error}") from None
    if found is None:
        raise BadInputError(f"-m {target}: no module of that name here")


def of_the_script(trace: TracebackType | None) -> TracebackType | None:
    """Return a traceback from the script on, without frames of ours unless it ends in one."""
    frames: list[TracebackType] = []
    whole, mine = trace, False
    while trace is not None:
        code = trace.tb_frame.f_code
        ours = OURS in Path(code.co_filename).resolve().parents
        mine = ours and code not in PASSING_ON
        if not ours and (frames or "runpy" not in code.co_filename):
            frames.append(trace)
        trace = trace.tb_next
    if mine:
        return whole
    found: TracebackType | None = None
    for each in reversed(frames):
        found = TracebackType(found, each.tb_frame, each.tb_lasti, each.tb_lineno)
    return found


def _path_of_python(path: list[str]) -> list[str]:
    """Return the path for imports without what stands there for our own command's sake."""
    own = os.path.dirname(os.path.abspath(sys.argv[0]))
    found = path[1:] if path[:1] == [own] else list(path)
    # `python -m gaccum_exp` puts the working directory first, and we move it to the end.
    if "-m" in sys.orig_argv and found[-1:] == [os.getcwd()]:
        found.pop()
    return found
