"""Locks that a process holds until it dies, whatever it dies of.

POSIX record locks: a forked child does not inherit them, as it would `flock`, so that a data worker that
outlives its training does not keep it alive. The kernel gives such a lock up as soon as its process
closes *any* descriptor of the file; so a lock file is opened by nothing but this module.
"""

import errno
import fcntl
import os
from pathlib import Path
from typing import Self

_held: dict[tuple[int, int], int] = {}
"""The process that holds a lock through this module, by the file's device and inode."""


class FileLock:
    """A lock file, held by this process until it is released."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path, self._descriptor = path, descriptor
        status = os.fstat(descriptor)
        self._key = status.st_dev, status.st_ino
        _held[self._key] = os.getpid()

    @classmethod
    def create(cls, path: Path) -> Self | None:
        """Create the file and hold its lock; None where there is such a file."""
        while True:
            try:
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
            except FileExistsError:
                return None
            fcntl.lockf(descriptor, fcntl.LOCK_EX)
            if _is_there(path, descriptor):
                return cls(path, descriptor)
            os.close(descriptor)

    @classmethod
    def take(cls, path: Path) -> Self | None:
        """Take the lock, of a file that is made if need be; None where a process holds it."""
        try:
            status = os.stat(path)
            if _held.get((status.st_dev, status.st_ino)) == os.getpid():
                return None
        except FileNotFoundError:
            pass
        while True:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                os.close(descriptor)
                if error.errno in (errno.EAGAIN, errno.EACCES):
                    return None
                raise  # a file system without locks
            if _is_there(path, descriptor):
                return cls(path, descriptor)
            os.close(descriptor)

    def release(self) -> None:
        """Give the lock up."""
        if self._descriptor >= 0:
            _held.pop(self._key, None)
            os.close(self._descriptor)
            self._descriptor = -1


def _is_there(path: Path, descriptor: int) -> bool:
    """Whether the file whose lock was had is that of the path: its last holder may have removed it."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False
