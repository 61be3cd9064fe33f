"""Other Pythons that work for this one."""

import subprocess
import sys


def python(statement: str) -> list[str]:
    """Return the command that runs a statement in another Python, with this one's flags.

    It imports from where this one does, and from nowhere else: `-m` would look into the working
    directory first, where a file socket.py could stand for the standard library's.
    """
    flags: list[str] = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]  # as multiprocessing
    return [sys.executable, *flags, "-c", f"import sys; sys.path[:] = {sys.path!r}; {statement}"]
