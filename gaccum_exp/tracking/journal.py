r"""The journal of a run: everything that is recorded of it, in a file that is only ever appended to.

A record is a line: the CRC-32 of what follows in eight hexadecimal digits, a blank, and a JSON object
with its `kind`:

    store            uri, experiment_name, folder (that a relative address is relative to), host, boot
    begin            token, name, params, tags, texts, time_ms
    points           points: [[global step, time_ms, {metric: value}], ...]
    tags             tags
    datasets         datasets: [{name, digest, samples, context}, ...]
    file             path (relative to the journal's folder), name
    experiment_tags  tags
    end              status, failure, time_ms
    compared         points, tags: what a comparison adds to a run that has ended, and leaves ended
    resume           host, boot, time_ms: another process goes on with the run, which has no end any more

A reader drops a last line that is torn, and skips one that is damaged. While the training's process
lives it holds the lock file beside the journal; who can take that lock knows that it is dead. Who goes
on with the run takes it.
"""

import json
import logging
import mmap
import os
import platform
import re
import tempfile
import time
import uuid
import zlib
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

from gaccum_exp.errors import TrackingError
from gaccum_exp.tracking.locks import FileLock

log = logging.getLogger(__name__)
Record = dict[str, Any]
PATTERN, NAME = "journal*.jsonl", re.compile(r"journal(-\d+)?\.jsonl")
NEW = os.O_CREAT | os.O_EXCL
RESUME = b' {"kind":"resume",'
"""In the line of such a record."""


class Journal:
    """A journal that this process writes.

    What cannot be written, on a full disk, is kept for the next record, and said once.
    """

    def __init__(self, path: Path, lock: FileLock, flags: int) -> None:
        self.path = path
        self.token = ""
        """Of the run, once it has begun."""
        self._lock = lock
        self._file = os.open(path, os.O_RDWR | os.O_APPEND | flags, 0o644)
        self._pending = bytearray()
        self._said: str | None = None

    @classmethod
    def create(cls, folder: Path, uri: str, experiment_name: str, home: Path | None = None) -> "Journal":
        """Create the journal of another run in a folder: `journal.jsonl`, `journal-2.jsonl`, ...

        Args:
            folder: made if need be.
            uri: of the store that it is to be delivered to.
            experiment_name: there.
            home: what a relative address is relative to; None: the working directory.
        """
        folder.mkdir(parents=True, exist_ok=True)
        number = 1
        while True:
            path = folder.absolute() / ("journal.jsonl" if number == 1 else f"journal-{number}.jsonl")
            lock = None if path.exists() else FileLock.create(path.with_suffix(".lock"))
            if lock is not None:
                break
            number += 1
        journal = cls(path, lock, NEW)
        journal.append(
            "store", uri=uri, experiment_name=experiment_name, folder=str(home or os.getcwd()), **owner()
        )
        return journal

    @classmethod
    def going_on(cls, path: Path, lock: FileLock) -> "Journal":
        """Open the journal of a run that this process goes on with.

        Args:
            path: absolute.
            lock: of the journal.
        """
        os.truncate(path, whole_size(path))  # what is torn of it was never recorded
        journal = cls(path, lock, 0)
        journal.token = str(beginning(path)[1].get("token", ""))
        journal.append("resume", time_ms=now_ms(), **owner())
        return journal

    def begin(
        self, name: str, *, params: Mapping[str, Any], tags: Mapping[str, str], texts: Mapping[str, str]
    ) -> None:
        """Begin the run; `texts` become files, by name."""
        self.token = uuid.uuid4().hex
        self.append(
            "begin", token=self.token, name=name, params={k: str(v) for k, v in params.items()},
            tags=dict(tags), texts=dict(texts), time_ms=now_ms(),
        )  # fmt: skip

    def keep_file(self, path: Path, name: str | None = None) -> None:
        """Record a file of the run, under its name or another one."""
        kept = os.path.relpath(path.absolute(), self.path.parent)
        self.append("file", path=kept, name=name or path.name)

    def end(self, status: str, failure: str | None = None) -> None:
        """End the run and close its journal.

        Raises:
            TrackingError: something could not be written.
        """
        self.append("end", status=status, failure=failure, time_ms=now_ms())
        self.close()

    def append(self, kind: str, **fields: Any) -> None:
        """Append a record; it outlives this process at once, and the machine once it is flushed."""
        self._pending += encoded({"kind": kind, **fields})
        try:
            if not os.fstat(self._file).st_nlink:
                self._write_anew()
            while self._pending:
                del self._pending[: os.write(self._file, self._pending)]
        except OSError as error:
            if self._said is None:
                self._said = str(error.strerror)
                log.warning("%s cannot be written (%s): kept in memory", self.path, self._said)
        else:
            if self._said is not None:
                log.warning("%s can be written again: nothing of it is lost", self.path)
            self._said = None

    def file_path(self, name: str) -> Path:
        """Return where a file of the run belongs: beside the journal, under a name of its own."""
        own = "" if self.path.stem == "journal" else f"{self.path.stem}."
        return self.path.parent / f"{own}{name}"

    def close(self) -> None:
        """Close it, and let its run count as over.

        Raises:
            TrackingError: something could not be written.
        """
        self._lock.release()
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
        if self._pending:
            self._pending.clear()
            raise TrackingError(f"{self.path} could not be written to its end ({self._said})")

    def _write_anew(self) -> None:
        """Write the whole journal again, whose folder was removed meanwhile."""
        size = os.fstat(self._file).st_size
        text = b"".join(os.pread(self._file, 1 << 20, start) for start in range(0, size, 1 << 20))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock.create(self.path.with_suffix(".lock"))
        if lock is not None:
            self._lock.release()
            self._lock = lock
        file = os.open(self.path, os.O_RDWR | os.O_APPEND | NEW, 0o644)
        log.warning("%s was removed: written again", self.path)
        os.close(self._file)
        self._file = file
        self._pending[:0] = text


def encoded(record: Record) -> bytes:
    """Return a record as a line."""
    text = json.dumps(record, ensure_ascii=True, separators=(",", ":")).encode()
    return b"%08x %b\n" % (zlib.crc32(text), text)


def decoded(line: bytes) -> Record | None:
    """Return the record of a line without its end; None where it is damaged."""
    checksum, _, text = line.partition(b" ")
    if checksum != b"%08x" % zlib.crc32(text):
        return None
    try:
        record = json.loads(text)
    except (ValueError, RecursionError):  # nobody wrote it here
        return None
    return record if isinstance(record, dict) and isinstance(record.get("kind"), str) else None


def read_journal(path: Path) -> tuple[list[Record], list[str]]:
    """Return the records of a journal, and what is to be said of those that are not whole."""
    return records_in(path.read_bytes(), path)


def records_in(text: bytes, path: Path) -> tuple[list[Record], list[str]]:
    """Return the records of a journal's text, as `read_journal` does."""
    *lines, torn = text.split(b"\n")
    records, notes = [], []
    for number, line in enumerate(lines, 1):
        record = decoded(line)
        if record is not None:
            records.append(record)
        elif line:
            notes.append(f"{path}: line {number} is damaged and left out")
    if torn:
        notes.append(f"{path}: its last record is torn and left out ({len(torn)} bytes)")
    return records, notes


def beginning(path: Path) -> tuple[Record, Record]:
    """Return the `store` and the `begin` record of a journal, each empty where there is none."""
    found: dict[str, Record] = {"store": {}, "begin": {}}
    with open(path, "rb") as file:
        for line in file:
            record = decoded(line.rstrip(b"\n")) or {}
            if record.get("kind") in found:
                found[record["kind"]] = record
            if found["begin"]:
                break
    return found["store"], found["begin"]


def whole_size(path: Path) -> int:
    """Return where the last whole line of a journal ends, in bytes; 0 where there is none."""
    try:
        with open(path, "rb") as file:
            return _end_of_line(file, file.seek(0, os.SEEK_END))
    except OSError:
        return 0


def _end_of_line(file: BinaryIO, before: int) -> int:
    """Return where the last line ends that ends not after a place; 0 where there is none."""
    while before:
        start = max(0, before - (1 << 16))
        file.seek(start)
        found = file.read(before - start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        before = start
    return 0


def has_end(path: Path) -> bool:
    """Whether the run of a journal has ended."""
    return bool(end_of(path))


def end_of(path: Path) -> Record:
    """Return the record of a run's end; empty where it has none, goes on since, or that is damaged.

    It is the last whole line but for what comparisons have added.
    """
    record: Record = {"kind": "compared"}
    with open(path, "rb") as file:
        end = _end_of_line(file, file.seek(0, os.SEEK_END))
        while end and record.get("kind") == "compared":
            start = _end_of_line(file, max(0, end - 1))
            file.seek(start)
            record = decoded(file.read(end - start).rstrip(b"\n")) or {}
            end = start
    return record if record.get("kind") == "end" else {}


def add_to_ended(path: Path, points: list[Any], tags: Mapping[str, str]) -> bool:
    """Append what a comparison adds to a run that has ended; return whether that is new.

    A run that goes on, or that another process writes to at this moment, is left.

    Args:
        path: of the journal.
        points: [global step, time_ms, {metric: value}] each.
        tags: of the run.

    Raises:
        OSError: it cannot be written; what is torn of it then is no part of the journal.
    """
    line, size = encoded({"kind": "compared", "points": points, "tags": dict(tags)}), whole_size(path)
    with open(path, "rb") as file:
        file.seek(max(0, size - len(line)))
        if file.read(min(size, len(line))) == line:
            return False
    lock = FileLock.take(path.with_suffix(".lock"))
    if lock is None:
        return False
    try:
        if not has_end(path):
            return False
        os.truncate(path, whole_size(path))  # what is torn of it was never recorded
        with open(path, "ab", buffering=0) as file:
            while line:
                line = line[file.write(line) :]
        return True
    finally:
        lock.release()


def last_owner(path: Path) -> Record:
    """Return the record of the process that wrote a journal last: that began it, or went on with it."""
    found, _ = beginning(path)
    if found:  # else it may be empty, which cannot be mapped
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
            at = text.rfind(RESUME)
            while at >= 0:
                start = text.rfind(b"\n", 0, at) + 1
                record = decoded(text[start : text.find(b"\n", at)])
                if record is not None:
                    return record
                at = text.rfind(RESUME, 0, at)
    return found


def is_of_this_host(of: Record) -> bool:
    """Whether a record of `store` or `resume` is of this machine, by its name now or since it started.

    A container that is started again has another name, and locks are of the kernel.
    """
    here = owner()
    return of.get("host") == here["host"] or (bool(here["boot"]) and of.get("boot") == here["boot"])


def can_write(folder: Path) -> bool:
    """Whether there is room for a small file in a folder."""
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix="journal.room") as file:
            file.write(b"-" * 4096)
        return True
    except OSError:
        return False


def journals_below(folder: Path) -> list[Path]:
    """Return the journals in a folder and below it, in order."""
    return sorted(p for p in folder.rglob(PATTERN) if NAME.fullmatch(p.name) and p.is_file())


def unsettled_below(folder: Path, depth: int = 3) -> Iterator[Path]:
    """Yield the journals near the top of a folder that have a lock file: not delivered whole yet."""
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError:
        return
    for entry in entries:
        if entry.name.startswith("journal") and entry.name.endswith(".lock"):
            if not entry.name.endswith(".delivery.lock"):
                yield Path(entry.path).with_suffix(".jsonl")
        elif depth and entry.is_dir(follow_symlinks=False) and not entry.name.startswith("."):
            yield from unsettled_below(Path(entry.path), depth - 1)


def owner() -> dict[str, str]:
    """Return what tells this machine from others, and from itself before it was started again."""
    return {"host": platform.node(), "boot": _boot()}


@cache
def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def end_if_dead(path: Path, status: str, failure: str, *, stale: bool = False) -> bool:
    """Append an end to a journal that has none and whose process is dead; return whether that is so.

    A run of another host is left: nothing here can tell whether it is alive.

    Args:
        path: of the journal.
        status: FAILED or KILLED.
        failure: why.
        stale: end the run of another host, too.
    """
    lock = FileLock.take(path.with_suffix(".lock"))
    if lock is None:
        return False
    try:
        if has_end(path):
            return True
        last = last_owner(path)
        if not last or not (stale or is_of_this_host(last)):  # without a beginning it may be anything
            return False
        with open(path, "r+b", buffering=0) as file:
            whole = (
                not file.seek(0, os.SEEK_END) or not file.seek(-1, os.SEEK_END) or file.read(1) == b"\n"
            )
            file.seek(0, os.SEEK_END)
            end = {"kind": "end", "status": status, "failure": failure, "time_ms": now_ms()}
            file.write((b"" if whole else b"\n") + encoded(end))
        return True
    finally:
        lock.release()


def end_left(folder: Path, status: str, failure: str) -> list[str]:
    """End the runs below a folder whose process is dead; return their names."""
    ended = []
    for path in journals_below(folder):
        _, begin = beginning(path)
        if begin and not has_end(path) and end_if_dead(path, status, failure):
            ended.append(str(begin["name"]))
    return ended


def now_ms() -> int:
    """Return the time in milliseconds since 1970."""
    return time.time_ns() // 1_000_000
