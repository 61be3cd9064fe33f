"""A helper process for MLflow, so that neither its import nor a delivery holds a training up.

MLflow takes longer to import than most of what a run does before its first window, and writes at some
milliseconds a call. `connect` starts a process that does both meanwhile, and returns a proxy of a
`Store` in it. Beginning a run and delivering metrics wait for no answer; the next call raises what went
wrong there. Where the training's process dies, the helper stores what it was given, and ends the run as
KILLED.
"""

import atexit
import contextlib
import gc
import logging
import os
import socket
import subprocess
import sys
from collections import deque
from dataclasses import dataclass
from functools import partial
from itertools import count
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from gaccum_exp.errors import BadInputError, TrackingError

if TYPE_CHECKING:
    from gaccum_exp.tracking.mlflow_store import Store

log = logging.getLogger(__name__)
NOT_WAITED_FOR = frozenset({"log", "describe", "log_datasets"})
"""Methods that return nothing, or a warning."""
KEPT = frozenset({"Store", "start_run"})
"""Methods whose result stays in the helper, as an object of its own."""
ATTRIBUTES = frozenset({"uri", "experiment_id"})
"""Of a store."""
_FACTORY = 0
Numbers = tuple[int, ...]
"""The number of an object in the helper, and those of the objects that made it."""


@dataclass(frozen=True, slots=True)
class _Request:
    target: int
    """The number of an object in the helper; `_FACTORY`: make a Store."""
    method: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    folder: str
    """The working directory, which a relative tracking URI is relative to."""
    keep: int | None = None
    """Under which number the result is kept; None: it is the answer."""


def connect(uri: str, experiment_name: str) -> "Store":
    """Return a store in the helper process at once; a later call raises if it cannot be used."""
    return cast("Store", start_helper().request((_FACTORY,), "Store", uri, experiment_name))


def start_helper() -> "_Helper":
    """Start the helper process, if it does not run yet; return it."""
    own = _helpers.get(os.getpid())
    if own is None or own._process.poll() is not None:
        own = _helpers[os.getpid()] = _Helper()
    return own


class _Helper:
    """The helper process, seen from the one that trains."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        root = str(Path(__file__).resolve().parents[2])
        path = os.pathsep.join(p for p in (root, os.environ.get("PYTHONPATH")) if p)
        # In a session of its own, since Ctrl-C in a terminal is meant for the training alone.
        self._process = subprocess.Popen(
            [sys.executable, "-m", "gaccum_exp.tracking.shipper", str(theirs.fileno())],
            pass_fds=[theirs.fileno()], start_new_session=True, env={**os.environ, "PYTHONPATH": path},
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        theirs.close()
        self._connection = Connection(ours.detach())
        self._numbers = count(1)
        self._asked = False
        self._unanswered: deque[int] = deque()
        """The number of the object that each request without an answer is made of."""
        self._failures: dict[int, Exception] = {}
        """Errors that have not been raised yet, by the number of the object."""
        atexit.register(self.close)

    def request(self, of: Numbers, method: str, *args: Any, **kwargs: Any) -> Any:
        """Call a method of an object in the helper.

        Return a proxy of a result that is kept there, or None of a method in `NOT_WAITED_FOR`, at once;
        else the result, once it is there.
        """
        keep = next(self._numbers) if method in KEPT else None
        while self._unanswered and self._connection.poll():
            self._note_answer()
        self._raise(of)
        try:
            self._connection.send(_Request(of[0], method, args, kwargs, os.getcwd(), keep))
        except OSError as error:
            raise self._end() from error
        self._asked = True
        self._unanswered.append(of[0] if keep is None else keep)
        if keep is not None:
            return _Proxy(self, (keep, *of))
        if method in NOT_WAITED_FOR:
            return None
        while len(self._unanswered) > 1:
            self._note_answer()
        answer = self._receive()
        self._raise(of)
        return answer

    def close(self) -> None:
        """End the helper and wait until it has."""
        if not self._asked:
            self._process.terminate()
        self._connection.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=60)

    def _note_answer(self) -> None:
        warning = self._receive()  # of a call that does not wait, which has no other answer
        if warning is not None:
            log.warning("tracking: %s", warning)

    def _receive(self) -> Any:
        try:
            answer = self._connection.recv()
        except (EOFError, OSError) as error:
            raise self._end() from error
        number = self._unanswered.popleft()
        if isinstance(answer, Exception):
            self._failures.setdefault(number, answer)
            return None
        return answer

    def _raise(self, of: Numbers) -> None:
        found = [self._failures.pop(number) for number in of if number in self._failures]
        if found:
            raise found[-1]

    def _end(self) -> TrackingError:
        self._unanswered.clear()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=5)
        return TrackingError(f"the process that writes to MLflow has ended ({self._process.returncode})")


class _Proxy:
    def __init__(self, helper: _Helper, numbers: Numbers) -> None:
        self._helper, self._numbers = helper, numbers

    def __getattr__(self, name: str) -> Any:
        if name in ATTRIBUTES:
            return self._helper.request(self._numbers, name)
        return partial(self._helper.request, self._numbers, name)


_helpers: dict[int, _Helper] = {}
"""By the process that started it: a forked one must not use its parent's connection."""


def serve(connection: Connection) -> None:
    """Answer requests, each once and in order, until the other side is gone; then end its runs."""
    from gaccum_exp.tracking.mlflow_store import MlflowRun, Store

    objects: dict[int, Any] = {}
    while True:
        gc.enable()
        try:
            request: _Request = connection.recv()
        except (EOFError, OSError):
            break
        gc.disable()  # or a sweep that is read back is searched for garbage over and over
        try:
            os.chdir(request.folder)
            if request.target == _FACTORY:
                answer: Any = Store(*request.args)
            elif objects[request.target] is None:  # it could not be made, which has been answered
                answer = None
            else:
                answer = getattr(objects[request.target], request.method)
                if callable(answer):
                    answer = answer(*request.args, **request.kwargs)
            if request.keep is not None:
                objects[request.keep], answer = answer, None
        except Exception as error:
            if request.keep is not None:
                objects[request.keep] = None
            answer = error
            if not isinstance(error, BadInputError):  # the other side unpickles it without MLflow
                line = next(iter(str(error).strip().splitlines()), "no message")
                answer = TrackingError(f"{type(error).__name__}: {line}")
        try:
            connection.send(answer)
        except OSError:
            break
    for run in objects.values():
        if isinstance(run, MlflowRun) and not run.ended:
            with contextlib.suppress(Exception):
                run.end("KILLED", "its process has ended")


if __name__ == "__main__":
    serve(Connection(int(sys.argv[1])))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # all is stored; taking MLflow down module by module would be waited for
