"""Delivery to MLflow in a process of its own, so that the one that trains neither imports it nor waits.

This is that process as others see it; from within it is `helper`. A process connects to its socket and
names a journal whenever that has grown, or a folder in which to look for what earlier processes have
left; the helper answers with the same name when something has changed that stands beside the journal
(`delivered`). Nothing else is said there: what is recorded is in the journal, and a helper that dies is
replaced by another, which goes on from there.
"""

import atexit
import contextlib
import hashlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from urllib.parse import quote, unquote_to_bytes

from gaccum_exp.errors import BadInputError
from gaccum_exp.tracking.delivered import Delivered
from gaccum_exp.tracking.journal import can_write, now_ms, whole_size
from gaccum_exp.tracking.processes import python

GRACE_S = 10.0
"""So long a store that is away is waited for when nothing is left but to deliver."""
STORE_S = 30.0
"""So long a training waits for the first answer of its store."""
DEATHS, DEATHS_S = 5, 60.0
"""A helper that dies so often in so long a time is not started again for as long."""
DECISIVE = ("MLFLOW_", "PG", "AWS_", "AZURE_", "GOOGLE_", "DATABRICKS_", "REQUESTS_", "SSL_", "HTTP")
"""Beginnings of variables that say how a store is reached."""
LEFT_S = 5.0
"""So long a command waits at its end for the delivery of what earlier ones have left."""
AGAIN_S = 5.0
"""After so long without any delivery, journals that are waited for are named again."""
FOLDER = "gaccum_exp-"
"""Beginning of the name of a helper's temporary folder."""
ADDRESS_BYTES = 100
"""So long the name of a socket may be, on every system."""

_let_go_of: list["_Client"] = []
"""Helpers of this process that may still be at work, and outlive it."""


class _Client:
    """The helper, seen from a process that writes journals."""

    def __init__(self, address: str | None = None) -> None:
        self.pid, self.surroundings = os.getpid(), _surroundings()
        self._process: subprocess.Popen[bytes] | None = None
        self.address = address or ""
        self._socket = socket.socket(socket.AF_UNIX)
        self._text = b""
        try:
            if address is None:
                self._start()
            self._socket.connect(self.address)
        except OSError:
            if address is None:
                self.bury()
            self._socket.close()
            raise

    def _start(self) -> None:
        for client in _let_go_of.copy():
            if client.ended:
                _let_go_of.remove(client)
                client.remove_folder()
        address = f"{tempfile.gettempdir()}/{FOLDER}12345678/helper"
        place = None if len(os.fsencode(address)) <= ADDRESS_BYTES else "/tmp"
        folder = tempfile.mkdtemp(prefix=FOLDER, dir=place)
        self.address = address = f"{folder}/helper"
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(address)
            listener.listen(1024)
            # In a session of its own, since Ctrl-C in a terminal is meant for the training alone.
            of_it = listener.fileno(), folder
            self._process = subprocess.Popen(
                python(f"from gaccum_exp.tracking.helper import main; main{of_it!r}"),
                pass_fds=[listener.fileno()], start_new_session=True,
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            )  # fmt: skip

    def tell(self, path: Path) -> None:
        """Name a journal or a folder.

        Raises:
            OSError: the helper is gone.
        """
        with contextlib.suppress(BlockingIOError):  # it has enough to read, and more is said later
            self._socket.send(line_of(path), socket.MSG_DONTWAIT)

    def changed(self, timeout_s: float) -> set[Path]:
        """Return the paths beside which something has changed; wait for one.

        Raises:
            OSError: the helper is gone.
        """
        self._socket.settimeout(timeout_s or 1e-9)
        try:
            text = self._socket.recv(1 << 16)
        except (TimeoutError, BlockingIOError):
            return set()
        finally:
            self._socket.settimeout(None)
        if not text:
            raise ConnectionResetError("the helper has ended")
        *lines, self._text = (self._text + text).split(b"\n")
        return {path_of(line) for line in lines}

    def bury(self) -> None:
        """Take leave of a helper that is dead, and could not remove its folder if it was killed."""
        self._socket.close()
        if self._process is not None:
            try:
                self._process.wait(5)
            except subprocess.TimeoutExpired:
                _let_go_of.append(self)
                return
        self.remove_folder()

    def remove_folder(self) -> None:
        """Remove its temporary folder."""
        folder = Path(self.address).parent
        if folder.name.startswith(FOLDER):
            shutil.rmtree(folder, ignore_errors=True)

    def close(self) -> None:
        """Let go of it; it ends by itself, once everything is delivered or the store is away."""
        self._socket.close()
        if self._process is not None:
            _let_go_of.append(self)

    @property
    def ended(self) -> bool:
        """Whether the process that this one has started for it has ended."""
        return self.pid == os.getpid() and self._process is not None and self._process.poll() is not None

    def disown(self) -> None:
        """Let the process go on after this one, which Python would warn of."""
        if self._process is not None:
            self._process.returncode = self._process.poll() or 0


def line_of(path: Path) -> bytes:
    """Return the line that names a path."""
    return quote(os.fsencode(path)).encode() + b"\n"


def path_of(line: bytes) -> Path:
    """Return the path that a line without its end names."""
    return Path(os.fsdecode(unquote_to_bytes(line)))


def _surroundings() -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if key.upper().startswith(DECISIVE)}


class _Deliveries:
    """What this process has to have delivered, and the helper that does it."""

    def __init__(self) -> None:
        self._client: _Client | None = None
        self._address: str | None = None
        self._open: set[Path] = set()
        """Journals that are not settled."""
        self._folders: set[Path] = set()
        self._away: set[str | None] = set()
        """Addresses of stores that are away, as far as this process knows."""
        self._deaths: list[float] = []
        """When helpers have died."""
        self._lamed = False
        """Whether it has been said that there is none."""

    def start(self) -> None:
        """Start the helper, or another one where stores are to be reached in other ways now."""
        if self._client is not None and self._client.surroundings != _surroundings():
            self._client.close()
            self._client = self._address = None
        self._restart() if self._open else self.helper()

    def use(self, address: str) -> None:
        """Have the helper that listens there deliver from now on, what is open too."""
        if self._client is not None and self._client.address != address:
            self._client.close()
            self._client = None
        self._address = address

    def helper(self) -> _Client:
        """Return the helper; start one if there is none, or none any more.

        Raises:
            OSError: none can be started, or it dies again and again.
        """
        if self._client is None or self._client.pid != os.getpid():
            recent = [at for at in self._deaths if time.monotonic() - at < DEATHS_S]
            if len(recent) >= DEATHS:
                raise ChildProcessError("it dies again and again")
            self._client = None
            if self._address is not None:
                try:
                    self._client = _Client(self._address)
                except OSError:  # whose it was is gone, or on another host
                    self._address = None
            if self._client is None:
                try:
                    self._client = _Client()
                except OSError:
                    self._note_death()
                    raise
        return self._client

    def tell(self, path: Path) -> None:
        """Name a path to the helper; to another one, with all others, where it is dead."""
        if self._client is None and not self._restart():
            return
        client = self.helper()
        try:
            client.tell(path)
            self._note(client.changed(0))
        except OSError:
            self._bury()
            self._restart()

    def _bury(self) -> None:
        if self._client is not None:
            self._client.bury()
            self._note_death()
        self._client = self._address = None

    def _note_death(self) -> None:
        self._deaths = [*self._deaths[-DEATHS:], time.monotonic()]

    def _restart(self) -> bool:
        """Have another helper deliver everything; return whether there is one. What has been recorded
        is in the journals, so a training goes on without.
        """
        try:
            for path in (*self._open, *self._folders):
                self.helper().tell(path)
        except OSError as error:
            if not self._lamed:
                say(f"tracking: no process that writes to MLflow ({error}); the runs' folders keep "
                     "what is recorded")  # fmt: skip
            self._lamed = True
            return False
        return True

    def announce(self, path: Path) -> None:
        """Say that a journal has grown, or that a folder may hold what was left."""
        if path.is_dir():
            self._folders.add(path)
        else:
            self._open.add(path)
        self.tell(path)

    def wait(self, over: Callable[[], bool], timeout_s: float | None = None) -> bool:
        """Wait until `over()`, asked whenever something has changed; return whether it is."""
        until = None if timeout_s is None else time.monotonic() + timeout_s
        while not over():
            left = 1.0 if until is None else min(1.0, until - time.monotonic())
            if left <= 0:
                return False
            try:
                self._note(self.helper().changed(left))
            except OSError:
                self._bury()
                if not self._restart():
                    return over()
        return True

    def _note(self, changed: Iterable[Path]) -> None:
        """Take in what stands beside these journals; say when a store is away, and when it is back."""
        for path in changed:
            if path in self._folders:
                self._folders.discard(path)
            elif path in self._open:
                known = Delivered.of(path)
                if known.state == "away" and self._is_first_to_say(known):
                    why = str(known.reason).removeprefix("tracking.uri=")
                    say(f"tracking: {why}; the runs' folders keep what is recorded")
                elif known.state == "ready" and self._may_say_that_it_is_back(known):
                    say(f"tracking: {known.uri} is back")
                if known.settled:
                    self._open.discard(path)

    def _is_first_to_say(self, known: Delivered) -> bool:
        """Whether no process that shares the helper has said yet that a store is away."""
        if known.uri in self._away:
            return False
        self._away.add(known.uri)
        try:
            self._said(known.uri).touch(exist_ok=False)
        except OSError:
            return False
        return True

    def _may_say_that_it_is_back(self, known: Delivered) -> bool:
        if known.uri not in self._away:
            return False
        self._away.discard(known.uri)
        try:
            self._said(known.uri).unlink()
        except OSError:
            return False
        return True

    def _said(self, uri: str | None) -> Path:
        """Return the file, beside the helper's socket, that stands for what has been said of a store."""
        name = f"away-{hashlib.sha256(str(uri).encode()).hexdigest()[:16]}"
        return Path(self.helper().address).with_name(name)

    def finish(self) -> list[Path]:
        """Wait until all is delivered, the store stays away or nothing moves; return what is not."""
        since: dict[Path, tuple[Delivered, float]] = {}
        named = time.monotonic()

        def waited_for(path: Path) -> bool:
            known, now = Delivered.of(path), time.monotonic()
            if known.settled or known.state == "refused" or known.offset >= whole_size(path):
                return False
            if known.state == "away":
                return now_ms() - (known.away_since_ms or now_ms()) < 1e3 * GRACE_S
            if since.get(path, (None, 0.0))[0] != known:
                since[path] = known, now
            # Where nothing moves, nothing may be known of it: the disk is full.
            return now - since[path][1] < STORE_S or can_write(path.parent)

        def over() -> bool:
            nonlocal named
            self._note(list(self._open))
            left = [path for path in self._open if waited_for(path)]
            moved, now = max((at for _, at in since.values()), default=0.0), time.monotonic()
            if left and now - max(moved, named) > AGAIN_S:  # a helper may have let go of them
                named = now
                for path in left:
                    self.tell(path)
            return not left or (moved > 0.0 and now - moved > 2 * STORE_S)

        self.wait(over)
        if not self._away:
            self.wait(lambda: not self._folders, LEFT_S)
        left = sorted(path for path in self._open if path.exists())
        self._open, self._folders = set(), set()
        for uri in self._away:  # a later command says so again
            with contextlib.suppress(OSError):
                self._said(uri).unlink()
        self._away.clear()
        self._lamed = False
        return left


def say(line: str) -> None:
    """Print a line on stderr, where anybody listens there."""
    with contextlib.suppress(OSError, ValueError):
        print(line, file=sys.stderr, flush=True)


_deliveries = _Deliveries()


def start_helper() -> None:
    """Start the helper process, if it does not run yet."""
    with contextlib.suppress(OSError):  # which is said when there is something to deliver
        _deliveries.start()


def helper_address() -> str:
    """Return where the helper listens; it is started if need be. Empty where it cannot be."""
    try:
        return _deliveries.helper().address
    except OSError:
        return ""


def use_helper(address: str) -> None:
    """Share another process's helper from now on, where it can be reached."""
    if address:
        _deliveries.use(address)


def announce(path: Path) -> None:
    """Have a journal delivered that has grown, or what earlier processes have left below a folder."""
    _deliveries.announce(path)


def wait(over: Callable[[], bool]) -> None:
    """Wait until `over()`, asked whenever something has changed beside an announced journal."""
    _deliveries.wait(over)


def wait_for_store(journal: Path) -> bool:
    """Wait until the store of a journal is open, or known to be away: then the journal waits for it.

    Returns:
        Whether it is open; else that has been said.

    Raises:
        BadInputError: it cannot be used.
    """

    def known() -> bool:
        return Delivered.of(journal).state != "unknown" or not journal.exists()

    if not _deliveries.wait(known, STORE_S) and not _deliveries._lamed:
        say(f"tracking: no answer within {STORE_S:.0f} s; the runs' folders keep what is recorded")
    found = Delivered.of(journal)
    if found.state == "refused":
        raise BadInputError(str(found.reason))
    return found.state == "ready"


def finish() -> list[Path]:
    """Wait until everything announced is delivered, or the store stays away; return what is left."""
    return _deliveries.finish()


@atexit.register
def _let_go() -> None:
    client = _deliveries._client
    if client is not None and client.pid == os.getpid():
        client.close()
    for helper in _let_go_of:
        helper.disown()


def _forget() -> None:
    """Let go in a forked process, which must not keep its parent's connection alive."""
    global _deliveries  # another process's now
    if _deliveries._client is not None:
        _deliveries._client.close()
    _deliveries = _Deliveries()


os.register_at_fork(after_in_child=_forget)
