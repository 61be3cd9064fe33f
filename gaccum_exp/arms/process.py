"""What a command, or an arm, changes of its process, and how it is put back."""

import gc
import logging
import os
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig

from gaccum_exp.errors import BadInputError

_here = threading.Lock()
"""Held while a command, or an arm, runs in this process."""
SPENT = threading.Event()
"""Set once something may be left in this process that no other arm should meet."""


@contextmanager
def process_restored() -> Iterator[None]:
    """Put back what a command or an arm changes of the process; of torch and Hydra, too.

    Raises:
        BadInputError: another one runs here, in another thread, or where a `_target_` is the program.
    """
    if not _here.acquire(blocking=False):
        raise BadInputError("a command of the program runs in this process already: one at a time")
    try:
        with _restored():
            yield
    finally:
        _here.release()


@contextmanager
def _restored() -> Iterator[None]:
    argv, environment, collects, path = sys.argv, dict(os.environ), gc.isenabled(), list(sys.path)
    streams, known_filters = (sys.stdin, sys.stdout, sys.stderr), list(warnings.filters)
    mask = os.umask(0o077)  # which nothing else tells
    os.umask(mask)
    _look_here_last()
    # A log file that cannot be written, on a full disk, is no reason to end, nor for a traceback a line.
    raises, logging.raiseExceptions = logging.raiseExceptions, False
    known = [x for x in logging.root.manager.loggerDict.values() if isinstance(x, logging.Logger)]
    loggers = [(logger, list(logger.handlers), logger.level) for logger in (logging.root, *known)]
    hydra_before, job_before = GlobalHydra.instance().hydra, HydraConfig.instance().cfg
    # Without waiting for torch, where no arm has needed it.
    torchs = sys.modules.get("gaccum_exp.arms.torch_settings")
    of_torch = None if torchs is None else torchs.torch_settings()
    GlobalHydra.instance().clear()  # or Hydra refuses to begin
    try:
        yield
    finally:
        GlobalHydra.instance().hydra, HydraConfig.instance().cfg = hydra_before, job_before
        torchs = sys.modules.get("gaccum_exp.arms.torch_settings")
        if torchs is not None and not torchs.set_torch_settings(of_torch or torchs.BEFORE_ANY_ARM):
            SPENT.set()
        sys.stdin, sys.stdout, sys.stderr = streams
        os.umask(mask)
        filters: Any = warnings.filters
        # What imports have added stays: it makes no errors.
        filters[:] = [entry for entry in filters if entry[0] != "error" or entry in known_filters]
        for logger, handlers, level in loggers:
            for handler in set(logger.handlers) - set(handlers):
                with suppress(OSError):
                    handler.close()
            logger.handlers = handlers
            logger.setLevel(level)
        sys.argv, logging.raiseExceptions = argv, raises
        sys.path[:] = path
        for key in os.environ.keys() - environment.keys():
            del os.environ[key]
        os.environ.update(environment)
        if collects:
            gc.enable()
        else:
            gc.disable()


def _look_here_last() -> None:
    """Have modules looked for in the working directory too, after everything else.

    `gaccum_exp` as a script would not find a package of the user's own there, and `python -m` would take
    a file random.py there for the standard library's (see the package's first lines).
    """
    with suppress(OSError):
        here = os.getcwd()
        if not sys.flags.safe_path and not {"", here} & set(sys.path):
            sys.path.append(here)
