"""Signals that end a program, as a request that is looked at where work may end.

The first SIGTERM, SIGUSR1, SIGUSR2 or SIGINT asks for an end: raised at once where nothing is in hand,
else kept until whoever trains looks. The second one ends the process on the spot.
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

from gaccum_exp.errors import text_of

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
OF_QUEUES = (signal.SIGUSR1, signal.SIGUSR2)
"""What batch systems announce an end by. Whoever handles them, as submitit does, leaves the process with
its job back in the queue: so only once the work in hand has ended."""
TOGETHER_S = 0.1
"""Signals so close are one: `timeout` and batch systems signal a process, and then its group."""
NOTICE = "the run ends after the micro-batch in hand; a second signal ends it at once"


class StoppedError(KeyboardInterrupt):
    """Somebody wants the program to end: why, and with which exit status. It can be pickled."""

    def __init__(self, reason: str, status: int) -> None:
        super().__init__(reason, status)
        self.reason, self.status = reason, status

    def __str__(self) -> str:
        return self.reason


def say_at_once(asked: StoppedError, notice: str) -> None:
    """Say from within a signal handler what becomes of a request, where anybody can listen now."""
    with suppress(OSError):  # Ctrl-C ends `| tee log` too, and is followed all the same
        os.write(2, f"gaccum_exp: {asked}: {notice}\n".encode())


def of_signal(number: int) -> StoppedError:
    """Return what a signal asks for: exit status 130 for SIGINT, else 143."""
    status = 130 if number == signal.SIGINT else 143
    return StoppedError(f"interrupted ({signal.Signals(number).name})", status)


class Stop:
    """A request to end, which may come at any time."""

    def __init__(self) -> None:
        self.asked: StoppedError | None = None
        """What was asked for; None: to go on."""
        self.notice = NOTICE
        """What is said of a request that has to wait; empty: nothing."""
        self.before_raising: Callable[[int], None] | None = None
        """Called with a signal that is about to be raised."""
        self.before_end: Callable[[], object] | None = None
        """Called where the process is about to end on the spot."""
        self._held = False
        self._told: StoppedError | None = None
        self._signalled_s: float | None = None
        self._process = os.getpid()
        self._handlers: dict[int, Any] = {}
        """What handled a signal before."""
        self._last: list[tuple[Callable[[int, FrameType | None], Any], int]] = []
        """What is to be called of these once nobody listens any more."""

    def look(self) -> None:
        """Raise what was asked for, if anything was."""
        if self.asked is not None:
            raise StoppedError(self.asked.reason, self.asked.status)

    @contextmanager
    def held(self, notice: str | None = None) -> Iterator[None]:
        """Let a request wait meanwhile, until somebody looks; `notice`: what is said of it."""
        before = self._held, self.notice
        self._held, self.notice = True, self.notice if notice is None else notice
        try:
            yield
        finally:
            self._held, self.notice = before

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Raise a request at once meanwhile, and one that waits already."""
        before, self._held = self._held, False
        try:
            self.look()
            yield
        finally:
            self._held = before

    def followed(self) -> None:
        """Forget the request, which has been followed; a signal from now on is still the second one."""
        self.asked = None

    def tell(self, asked: StoppedError) -> None:
        """Ask, from another thread than the main one; with a signal that says the same: once."""
        self._told = asked
        number, main = next(iter(self._handlers), None), threading.main_thread().ident
        if number is None or main is None:
            self.asked = self.asked or asked
        else:
            signal.pthread_kill(main, number)

    def comes_within(self, seconds: float) -> bool:
        """Whether a request is there, or comes in that time."""
        until = time.monotonic() + seconds
        with self.held():
            while self.asked is None and time.monotonic() < until:
                time.sleep(0.02)
        return self.asked is not None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        handler = self._handlers[number]
        if os.getpid() != self._process:  # a forked data worker, whose end is its own
            _as_before(handler, number, frame)
            return
        told, self._told = self._told, None
        if told is None:
            before, self._signalled_s = self._signalled_s, time.monotonic()
            if before is not None:
                if self._signalled_s - before > TOGETHER_S:
                    self._end(number)
                return
        first = self.asked is None
        if first:
            self.asked = told or of_signal(number)
        if told is None and callable(handler) and handler is not signal.default_int_handler:
            if number in OF_QUEUES:
                self._last.append((handler, number))
            else:
                handler(number, frame)
        if not first:
            return
        if self._held:
            if self.notice and self.asked is not None:
                say_at_once(self.asked, self.notice)
        else:
            if self.before_raising is not None:
                self.before_raising(number)
            self.look()

    def _end(self, number: int) -> None:
        try:
            if self.before_end is not None:
                self.before_end()
        finally:
            os._exit(of_signal(number).status)


NEVER = Stop()
"""Nobody asks."""


def worker_was_ended(error: BaseException) -> bool:
    """Whether an error says that a data worker was ended from outside."""
    return isinstance(error, RuntimeError) and "killed by signal: Terminated" in text_of(error)


def _as_before(handler: Any, number: int, frame: FrameType | None) -> None:
    if callable(handler):
        handler(number, frame)
    else:
        signal.signal(number, handler)
        os.kill(os.getpid(), number)


@contextmanager
def listening() -> Iterator[Stop]:
    """Turn signals into requests, in the main thread; put the handlers back afterwards.

    One that is ignored stays so, as SIGINT is in a shell's background jobs.
    """
    stop = Stop()
    try:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                handler = signal.getsignal(number)
                if handler not in (signal.SIG_IGN, None):
                    stop._handlers[number] = handler  # first: the signal may come at once
                    signal.signal(number, stop._handle)
        yield stop
    finally:
        for installed, before in stop._handlers.items():
            signal.signal(installed, before)
        for last, announced in stop._last:
            last(announced, None)


def silence_workers() -> Any:
    """Let no dead data worker be heard of, which torch raises inside anything; return what heard."""
    while threading.current_thread() is threading.main_thread():
        try:
            return signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        except RuntimeError:  # one more, on the way in
            continue
    return None


@contextmanager
def workers_silenced() -> Iterator[None]:
    """Let no dead data worker be heard of meanwhile."""
    handler = silence_workers()
    try:
        yield
    finally:
        if handler is not None:
            signal.signal(signal.SIGCHLD, handler)
