"""A process of its own for MLflow, so that neither its import nor a delivery holds a training up.

MLflow takes longer to import than most of what a run does before its first window, and writes at some
milliseconds a call. Here `connect` starts a helper process, which does both beside the training, and
returns what stands for a `Store` in it. Beginning a run and delivering metrics wait for no answer; what
goes wrong there is raised by the next call that is made. Where the training's process dies, the
helper writes down what it was given, and ends the run as KILLED.
"""

import atexit
import contextlib
import logging
import os
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from gaccum_exp.errors import BadInputError, TrackingError

if TYPE_CHECKING:
    from gaccum_exp.tracking.mlflow_store import Store

log = logging.getLogger(__name__)
NOT_WAITED_FOR = frozenset({"log", "describe", "log_datasets"})
"""Methods of a run that give nothing back."""
KEPT = frozenset({"start_run"})
"""Methods whose result stays in the helper."""
ATTRIBUTES = frozenset({"uri", "experiment_id"})
"""Of a store."""
_FACTORY = 0
Numbers = tuple[int, ...]
"""Of an object in the helper, and of those that it was made by."""


@dataclass(frozen=True, slots=True)
class _Request:
    target: int
    """The number of an object in the helper; 0: make a Store."""
    method: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    folder: str
    """The working directory, which a relative tracking URI is relative to."""
    keep: int | None = None
    """Under which number the result is kept; None: it is the answer."""


def connect(uri: str, experiment_name: str) -> "Store":
    """Return a store in the helper process, at once: whether it can be used is said later.

    Raises:
        TrackingError: the process has ended.
    """
    return cast("Store", _helper().make((_FACTORY,), "Store", (uri, experiment_name), {}))


def start() -> None:
    """Start the helper process, if it is not there yet: it is ready the sooner."""
    _helper()


class _Helper:
    """The helper process, as seen from the one that trains."""

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
        """For each request without an answer yet, the number of the object that it is of."""
        self._failures: dict[int, Exception] = {}
        """What went wrong with an object and has not been raised yet."""
        atexit.register(self.close)

    def make(self, of: Numbers, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> "_Remote":
        """Have a method called whose result stays there; return what stands for it."""
        number = next(self._numbers)
        self._send(of, _Request(of[0], method, args, kwargs, os.getcwd(), keep=number))
        return _Remote(self, (number, *of))

    def post(self, of: Numbers, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Have a method called, and do not wait for it."""
        self._send(of, _Request(of[0], method, args, kwargs, os.getcwd()))

    def call(self, of: Numbers, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Have a method called, and return its result."""
        self._send(of, _Request(of[0], method, args, kwargs, os.getcwd()))
        while len(self._unanswered) > 1:
            self._note_answer()
        answer = self._receive()
        self._raise(of)
        return answer

    def close(self) -> None:
        """Let the helper come to its end, and wait for it."""
        if not self._asked:
            self._process.terminate()
        self._connection.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=60)

    def _send(self, of: Numbers, request: _Request) -> None:
        while self._unanswered and self._connection.poll():
            self._note_answer()
        self._raise(of)
        try:
            self._connection.send(request)
        except OSError as error:
            raise self._ended() from error
        self._asked = True
        self._unanswered.append(of[0] if request.keep is None else request.keep)

    def _note_answer(self) -> None:
        """Take an answer that nobody waited for: nothing, or a warning."""
        said = self._receive()
        if said is not None:
            log.warning("tracking: %s", said)

    def _receive(self) -> Any:
        try:
            answer = self._connection.recv()
        except (EOFError, OSError) as error:
            raise self._ended() from error
        number = self._unanswered.popleft()
        if isinstance(answer, Exception):
            self._failures.setdefault(number, answer)
            return None
        return answer

    def _raise(self, of: Numbers) -> None:
        """Raise what went wrong with an object, or with one that it was made by."""
        found = [self._failures.pop(number) for number in of if number in self._failures]
        if found:
            raise found[-1]

    def _ended(self) -> TrackingError:
        self._unanswered.clear()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=5)
        return TrackingError(f"the process that writes to MLflow has ended ({self._process.returncode})")

    @property
    def alive(self) -> bool:
        return self._process.poll() is None


class _Remote:
    """Stands for an object in the helper process and has its methods."""

    def __init__(self, helper: _Helper, numbers: Numbers) -> None:
        self._helper, self._numbers = helper, numbers

    def __getattr__(self, method: str) -> Any:
        act: Any = self._helper.call
        if method in ATTRIBUTES:
            return act(self._numbers, method, (), {})
        if method in KEPT:
            act = self._helper.make
        elif method in NOT_WAITED_FOR:
            act = self._helper.post
        return lambda *args, **kwargs: act(self._numbers, method, args, kwargs)


_helpers: dict[int, _Helper] = {}
"""By the process that started it: a forked one must not speak for its parent."""


def _helper() -> _Helper:
    mine = _helpers.get(os.getpid())
    if mine is None or not mine.alive:
        mine = _helpers[os.getpid()] = _Helper()
    return mine


def serve(connection: Connection) -> None:
    """Answer requests, each once and in order, until the other side is gone; then end what it began."""
    from gaccum_exp.tracking.mlflow_store import MlflowRun, Store

    objects: dict[int, Any] = {}
    for request in _requests(connection):
        try:
            os.chdir(request.folder)
            if request.target == _FACTORY:
                answer: Any = Store(*request.args)
            elif objects[request.target] is None:  # it could not be made, which has been said
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
            answer = _told(error)
        try:
            connection.send(answer)
        except OSError:
            break
    for run in objects.values():
        if isinstance(run, MlflowRun) and not run.ended:
            with contextlib.suppress(Exception):
                run.end("KILLED", "its process has ended")


def _requests(connection: Connection) -> Iterator[_Request]:
    while True:
        try:
            yield connection.recv()
        except (EOFError, OSError):
            return


def _told(error: Exception) -> Exception:
    """Return an exception that the other side can read without MLflow."""
    if isinstance(error, BadInputError):
        return error
    lines = str(error).strip().splitlines() or ["no message"]
    return TrackingError(f"{type(error).__name__}: {lines[0]}")


if __name__ == "__main__":
    serve(Connection(int(sys.argv[1])))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # all is stored; taking MLflow down module by module would be waited for
