"""The helper process: it tails journals and delivers them to their stores.

It is started, spoken to and replaced by `shipper`.
"""

import contextlib
import os
import selectors
import shutil
import signal
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, cast

from gaccum_exp.errors import TrackingError
from gaccum_exp.tracking.journal import unsettled_below
from gaccum_exp.tracking.locks import FileLock
from gaccum_exp.tracking.shipper import GRACE_S, line_of, path_of, say

if TYPE_CHECKING:
    from gaccum_exp.tracking.delivery import Delivery

AT_ONCE = 8
"""So many journals of earlier processes are open at a time."""
ORPHAN_S = 5.0
"""So long a run whose process is gone is left to whoever has started that, to say why it has ended."""
FAULT_S = 5.0
"""So long a journal is left alone that cannot be delivered for another reason than its store's."""
HELD_S = 1.0
"""So long a journal is left alone that another process delivers."""


class Helper:
    """The helper itself: delivers what is announced until all who could announce are gone."""

    def __init__(self, listener: socket.socket) -> None:
        # With MLflow, whose import takes seconds in which signals are to be ignored already.
        from gaccum_exp.tracking.delivery import Stores

        self._listener, self._stores = listener, Stores()
        self._deliveries: dict[Path, Delivery] = {}
        self._put_off: dict[Path, float] = {}
        """Journals that cannot be delivered now, till when: another process may do so meanwhile."""
        self._faults: set[tuple[Path, type[Exception]]] = set()
        """What has been said of them."""
        self._told: dict[socket.socket, set[Path]] = {}
        """What each process has named."""
        self._texts: dict[socket.socket, bytes] = {}
        self._orphaned: dict[Path, float] = {}
        """When the process that had named a journal went."""
        self._left: list[tuple[Path, Iterator[Path]]] = []
        """Folders and the journals in them that earlier processes have left."""
        self._searched: list[Path] = []
        """Folders of which all such journals have been begun with."""
        self._selector = selectors.DefaultSelector()
        listener.setblocking(False)
        self._selector.register(listener, selectors.EVENT_READ)

    def run(self) -> None:
        """Deliver until nobody is there and nothing is left, or its store has long been away."""
        until, work, room = time.monotonic() + GRACE_S, False, True
        while True:
            now = time.monotonic()
            retries = [d.due_s for d in self._deliveries.values() if d.left_bytes and d.due_s]
            retries += [max(0.0, at - now) for at in self._put_off.values()]
            self._listen(0.0 if work else 0.01 if self._left and room else min([1.0, *retries]))
            work, watched = False, set[Path]().union(*self._told.values())
            for path in [path for path, at in self._put_off.items() if at <= time.monotonic()]:
                del self._put_off[path]
                self._open(path, path in watched)
            for path in list(self._deliveries):
                try:
                    work = self._deliver(path, path in watched) or work
                except Exception as error:  # a full disk, or a fault: others are delivered all the same
                    self._say_once(path, error)
                    with contextlib.suppress(Exception):
                        self._deliveries[path].close()
                    del self._deliveries[path]
                    # For a while only: each try may send the same, where how far it came is not noted.
                    if path in watched or time.monotonic() - self._orphaned.get(path, 0.0) < GRACE_S:
                        self._put_off[path] = time.monotonic() + FAULT_S
            others = (self._deliveries.keys() | self._put_off.keys()) - watched
            room = len(others) < AT_ONCE
            if self._left and room and not work:
                try:
                    self._take_what_was_left()
                except Exception as error:
                    self._say_once(self._left[0][0], error)
            for folder in [f for f in self._searched if not any(f in p.parents for p in others)]:
                self._searched.remove(folder)
                self._answer(folder)
            left = self._put_off or self._left or any(d.left_bytes for d in self._deliveries.values())
            if self._told or work or (self._left and room):  # else all those begun with wait for stores
                until = time.monotonic() + GRACE_S
            elif not left or time.monotonic() > until:
                break
        for delivery in self._deliveries.values():
            delivery.close()

    def _listen(self, timeout_s: float) -> None:
        for key, _ in self._selector.select(timeout_s):
            if key.fileobj is self._listener:
                client, _ = self._listener.accept()
                self._told[client], self._texts[client] = set(), b""
                self._selector.register(client, selectors.EVENT_READ)
            else:
                self._hear(cast("socket.socket", key.fileobj))

    def _hear(self, client: socket.socket) -> None:
        try:
            text = client.recv(1 << 16)
        except OSError:
            text = b""
        if not text:
            self._selector.unregister(client)
            self._orphaned |= dict.fromkeys(self._told[client], time.monotonic())
            del self._told[client], self._texts[client]
            client.close()
            return
        *lines, self._texts[client] = (self._texts[client] + text).split(b"\n")
        for path in {path_of(line) for line in lines}:
            self._told[client].add(path)
            if path.is_dir():
                self._left.append((path, unsettled_below(path)))
            else:
                self._open(path, watched=True)

    def _open(self, path: Path, watched: bool) -> None:
        """Begin to deliver a journal, or put off one that somebody waits for."""
        from gaccum_exp.tracking.delivery import Delivery

        if path in self._deliveries or path in self._put_off:
            return
        try:
            self._deliveries[path] = Delivery(path, self._stores)
        except FileNotFoundError:  # removed; once it is written anew, it is named again
            return
        except TrackingError:  # another process delivers it, and may let go of it before its end
            wait_s = HELD_S
        except Exception as error:
            self._say_once(path, error)
            wait_s = FAULT_S
        else:
            return
        if watched:
            self._put_off[path] = time.monotonic() + wait_s

    def _deliver(self, path: Path, watched: bool) -> bool:
        """Deliver some of a journal, and end its run if its process is dead; return whether it did."""
        delivery = self._deliveries[path]
        before = delivery.delivered.state
        work = delivery.step()
        for note in delivery.notes:
            say(f"tracking: {note}")
        delivery.notes.clear()
        over = delivery.delivered.settled
        others_know = self._told and time.monotonic() - self._orphaned.get(path, 0.0) < ORPHAN_S
        if not watched and delivery.caught_up and not (work or over or others_know):
            if delivery.end_if_dead():
                work = True
            else:  # its process lives, or is another host's
                over = True
        state = delivery.delivered.state
        if state != before or over:
            self._answer(path)
        if over or delivery.delivered.settled or (not watched and state == "refused"):
            delivery.close()
            del self._deliveries[path]
        elif delivery.store_away and delivery.due_s:
            self._put_off[path] = time.monotonic() + delivery.due_s
            delivery.close()
            del self._deliveries[path]
        return work

    def _say_once(self, path: Path, error: Exception) -> None:
        if (path, type(error)) not in self._faults:  # its text may hold a name that is drawn each time
            say(f"tracking: {path}: cannot be delivered now ({type(error).__name__}: {error})")
        self._faults.add((path, type(error)))

    def _take_what_was_left(self) -> None:
        """Begin with one more journal of an earlier process."""
        folder, journals = self._left[0]
        path = next(journals, None)
        if path is None:
            del self._left[0]
            self._searched.append(folder)
            return
        lock_path = path.with_suffix(".lock")
        if _is_anothers(path) or _is_anothers(lock_path):
            return
        if not path.exists():  # its process was killed before it wrote a word
            if (lock := FileLock.take(lock_path)) is not None:
                lock_path.unlink(missing_ok=True)
                lock.release()
        else:
            self._open(path, watched=False)

    def _answer(self, path: Path) -> None:
        for client, paths in self._told.items():
            if path in paths:
                with contextlib.suppress(OSError):
                    client.send(line_of(path), socket.MSG_DONTWAIT)


def _is_anothers(path: Path) -> bool:
    """Whether a file is another user's, who could have anything sent in this one's name."""
    try:
        return path.lstat().st_uid != os.getuid()
    except FileNotFoundError:
        return False


def main(listener: int, folder: str) -> NoReturn:
    """Be the helper that listens at a file descriptor, and has a folder for its socket."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    try:
        Helper(socket.socket(fileno=listener)).run()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # all is stored; taking MLflow down module by module would be waited for
