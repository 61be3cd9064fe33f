"""The delivery of journals to their stores: what is in one is made durable, then sent, then noted.

The offset moves only after the store's answer, so whatever dies in between is sent again; every request
is one that may be repeated.
"""

import os
import platform
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from gaccum_exp.errors import (
    BadInputError,
    RecordRefusedError,
    RunGoneError,
    StoreAwayError,
    TrackingError,
)
from gaccum_exp.tracking.delivered import Delivered
from gaccum_exp.tracking.journal import (
    Record,
    decoded,
    end_if_dead,
    has_end,
    is_of_this_host,
    last_owner,
    now_ms,
    whole_size,
)
from gaccum_exp.tracking.locks import FileLock
from gaccum_exp.tracking.mlflow_store import Store
from gaccum_exp.tracking.records import DatasetRecord
from gaccum_exp.tracking.store_uri import absolute, is_file

CHUNK = 1 << 18
"""Bytes of a journal that are read at once."""
POINTS = 1000
"""Values in one request, about."""
PATIENCE_S = 3.0
"""A store counts as away when it has not answered for so long."""
RETRY_S = (0.2, 5.0)
"""Between two attempts, at first and at most."""


class Stores:
    """The stores that journals are delivered to, each opened once, and tried again from time to time."""

    def __init__(self) -> None:
        self.folder = os.getcwd()
        """What addresses are relative to that this process was given, or that come from elsewhere."""
        self._stores: dict[tuple[str, ...], _Attempts] = {}

    def of(self, uri: str, experiment_name: str, folder: str) -> "_Attempts":
        """Return the store of an address, which may be relative to a folder."""
        key = absolute(uri, folder), experiment_name, folder
        if key not in self._stores:
            self._stores[key] = _Attempts(*key)
        return self._stores[key]


class _Attempts:
    """One store, and when to try it again."""

    def __init__(self, uri: str, experiment_name: str, folder: str) -> None:
        self.uri, self.experiment_name, self.folder = uri, experiment_name, folder
        self.away_since: float | None = None
        self.reason: str | None = None
        self._store: Store | None = None
        self._next_s = self._wait_s = 0.0

    @property
    def due_s(self) -> float:
        """Seconds until it is to be tried."""
        return 0.0 if self.away_since is None else max(0.0, self._next_s - time.monotonic())

    @property
    def away(self) -> bool:
        """Whether it has not answered for longer than is worth a word, or never."""
        since = self.away_since
        return since is not None and (self._store is None or time.monotonic() - since > PATIENCE_S)

    def call(self, request: Callable[[Store], Any]) -> Any:
        """Make a request, for which the store is opened first.

        Raises:
            StoreAwayError: it does not answer.
            RecordRefusedError: it does, and will never take this.
            BadInputError: it cannot be used, and somebody has to mend something.
        """
        try:
            if self._store is None:
                with suppress(OSError):  # where runs of a new database keep their files
                    os.chdir(self.folder)
                self._store = Store(self.uri, self.experiment_name)
            answer = request(self._store)
        except StoreAwayError as error:
            if self.away_since is None:
                self.away_since, self._wait_s = time.monotonic(), RETRY_S[0]
            self.reason = str(error)
            self._next_s = time.monotonic() + self._wait_s
            self._wait_s = min(2 * self._wait_s, RETRY_S[1])
            raise
        self.away_since = self.reason = None
        return answer

    def forget(self) -> None:
        """Open the store anew: it is another one than it was."""
        self._store = None


class Delivery:
    """The delivery of one journal.

    Args:
        path: of the journal.
        stores: where it goes.
        uri: another address than the journal names.
        experiment_name: likewise.

    Raises:
        TrackingError: another process delivers it.
    """

    def __init__(
        self, path: Path, stores: Stores, *, uri: str | None = None, experiment_name: str | None = None
    ) -> None:
        self.path, self._stores = path, stores
        self._asked = uri, experiment_name
        self._file = open(path, "rb")  # noqa: SIM115  # until `close`
        self._delivery_lock = path.with_suffix(".delivery.lock")
        lock = FileLock.take(self._delivery_lock)
        if lock is None:
            self._file.close()
            raise TrackingError(f"{path} is being delivered by another process")
        self._lock = lock
        self._to: _Attempts | None = None
        self.name = path.parent.name
        self.notes: list[str] = []
        """What is to be said: records that were damaged, or refused."""
        self._said: set[str] = set()
        self.owner: Record = {}
        self.has_end = self.caught_up = False
        """Whether its end has been read, and whether there was nothing to deliver last time."""
        self.refused = False
        """Whether the store has refused something of it."""
        self._begins = self._begun_again = False
        self._token = ""
        start = 0
        try:
            while not self._token and (batch := self._read(start, until="begin")):
                start = batch[-1][1]
                for record, _ in batch:
                    self._note(record)
            self.delivered = self._known()
        except BaseException:
            self._file.close()
            lock.release()
            raise
        self._saved = Delivered()

    def _note(self, record: Record) -> None:
        try:
            self._take_in(record)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise BadInputError(
                f"{self.path}: its {record['kind']} is none of ours ({error})"
            ) from error

    def _take_in(self, record: Record) -> None:
        self._begins |= record["kind"] not in ("store", "end")
        match record["kind"]:
            case "store":
                self.owner = record
                uri, experiment_name = self._asked
                here = uri is not None or not is_of_this_host(record)
                self._to = self._stores.of(
                    uri or str(record["uri"]), experiment_name or str(record["experiment_name"]),
                    self._stores.folder if here else record["folder"],
                )  # fmt: skip
            case "begin":
                self.name, self._token = record["name"], record["token"]
            case "end" | "resume":
                self.has_end = record["kind"] == "end"

    def _known(self) -> Delivered:
        """Return what is known of it in this store; another one has nothing of it yet."""
        known, size = Delivered.of(self.path), os.fstat(self._file.fileno()).st_size
        if self._to is None or known.offset > size:
            return Delivered()
        here = self._to.uri, self._to.experiment_name
        elsewhere = known.host != platform.node() and is_file(self._to.uri)
        if elsewhere or (known.uri, known.experiment_name) != here:
            return self._nothing_of_it()
        if known.state == "refused":  # somebody may have mended what was wrong
            known.state, known.reason = "unknown", None
        return known

    def _nothing_of_it(self) -> Delivered:
        assert self._to is not None
        return Delivered(
            uri=self._to.uri, experiment_name=self._to.experiment_name, creating=True,
            host=platform.node(),
        )  # fmt: skip

    @property
    def store(self) -> str:
        """Where it goes, to be shown."""
        return (
            "no store" if self._to is None else f"{self._to.uri}, experiment {self._to.experiment_name}"
        )

    @property
    def foreign(self) -> bool:
        """Whether the run belongs to another host."""
        return bool(self.owner) and not is_of_this_host(last_owner(self.path))

    @property
    def due_s(self) -> float:
        """Seconds until its store is to be tried."""
        return 0.0 if self._to is None else self._to.due_s

    @property
    def store_away(self) -> bool:
        """Whether its store is away."""
        return self._to is not None and self._to.away

    @property
    def left_bytes(self) -> int:
        """How much of the journal the store has not taken."""
        return os.fstat(self._file.fileno()).st_size - self.delivered.offset

    def step(self) -> bool:
        """Deliver the next few records; return whether there were any, and the store took them."""
        if self.delivered.settled or self.delivered.state == "refused":
            return False
        batch = self._read(self.delivered.offset)
        self.caught_up = not batch
        self._save()
        if not batch or self._waits():
            return False
        getattr(os, "fdatasync", os.fsync)(self._file.fileno())  # macOS has but the other
        try:
            while batch:
                batch = self._deliver_some(batch)
        except StoreAwayError:
            self._waits()
            self._save()
            return False
        except BadInputError as error:
            self.delivered.state, self.delivered.reason = "refused", str(error)
        else:
            self.delivered.state, self.delivered.reason = "ready", None
        self._save()
        return True

    def _waits(self) -> bool:
        """Note that the store is away, if it is; return whether it is not to be tried yet."""
        if self._to is not None and self._to.away:
            if self.delivered.state != "away":
                self.delivered.away_since_ms = now_ms()
            self.delivered.state, self.delivered.reason = "away", self._to.reason
            self._save()
        return self.due_s > 0

    def _deliver_some(self, batch: list[tuple[Record, int]]) -> list[tuple[Record, int]]:
        """Deliver the first record, points together with those that follow; return the rest."""
        record, end = batch.pop(0)
        self._note(record)
        if self._to is None:
            raise BadInputError(f"{self.path}: does not say to which store it belongs")
        if record["kind"] == "points":
            values = _values(record)
            while batch and batch[0][0]["kind"] == "points" and len(values) < POINTS:
                record, end = batch.pop(0)
                values += _values(record)
            record = {"kind": "points", "values": values}
        try:
            self._deliver(record, self._to)
        except RunGoneError as error:
            if self._begun_again:
                raise BadInputError(f"{self.name}: {error}") from error
            self._say(f"{self.name}: not in its store any more ({error}): written there anew")
            self._begun_again = True
            self.delivered = self._nothing_of_it()
            self._to.forget()
            return []
        except RecordRefusedError as error:
            self._refuse(error)
            self.delivered.settled |= self._is_last(record)
        self.delivered.offset = end
        if self.delivered.settled:  # unless the run goes on already
            self.delivered.settled = whole_size(self.path) <= end
        return batch

    def _refuse(self, error: RecordRefusedError) -> None:
        self._say(f"{self.name}: {error}")
        self.refused = self.delivered.refused = True

    def _deliver(self, record: Record, to: _Attempts) -> None:
        known, kind, run_id = self.delivered, record["kind"], self.delivered.run_id
        if kind == "store":
            known.uri, known.experiment_name, known.host = to.uri, to.experiment_name, platform.node()
            known.experiment_id = to.call(lambda store: store.experiment_id)
        elif kind == "begin":
            self._begin(record, to)
        elif kind == "end" and not self._begins:  # of a sweep without a report
            known.settled = True
        elif kind != "damaged":
            if run_id is None:
                raise RecordRefusedError(f"{kind}: the record of the run's beginning is damaged")
            try:
                to.call(lambda store: self._write(record, store, run_id))
            except (KeyError, TypeError) as error:
                raise RecordRefusedError(f"{kind}: is none of ours ({error})") from error
            known.settled = self._is_last(record)

    def _is_last(self, record: Record) -> bool:
        """Whether nothing is left to deliver after a record, unless more has been written since."""
        return record["kind"] == "end" or (record["kind"] == "compared" and has_end(self.path))

    def _begin(self, record: Record, to: _Attempts) -> None:
        known = self.delivered
        again, known.creating = known.creating, True
        self._save()
        if known.run_id is None:
            try:
                known.run_id = to.call(
                    lambda store: store.create_run(
                        record["token"], record["name"], tags=record["tags"],
                        start_time_ms=record["time_ms"], again=again,
                    )
                )  # fmt: skip
            except RecordRefusedError as error:  # without a run nothing else has a place
                raise BadInputError(f"no run can be created ({error})") from error
            self._save()
        run_id = str(known.run_id)
        try:
            to.call(lambda store: store.log_params(run_id, record["params"]))
        except RunGoneError:
            raise
        except RecordRefusedError as error:
            self._refuse(error)
        to.call(lambda store: store.log_texts(run_id, record["texts"]))

    def _write(self, record: Record, store: Store, run_id: str) -> None:
        match record["kind"]:
            case "points":
                store.log_points(run_id, record["values"])
            case "compared":
                store.log_points(run_id, _values(record))
                store.log_tags(run_id, record["tags"])
            case "tags":
                store.log_tags(run_id, record["tags"])
            case "datasets":
                store.log_datasets(run_id, [DatasetRecord(**of) for of in record["datasets"]])
            case "file":
                path = os.path.realpath(self.path.parent / record["path"])
                if not Path(path).is_relative_to(os.path.realpath(self.path.parent)):
                    raise RecordRefusedError(f"{path}: is no file of the run: it lies elsewhere")
                store.log_file(run_id, path, record["name"])
            case "experiment_tags":
                store.set_experiment_tags(record["tags"])
            case "resume":
                store.resume_run(run_id)
            case "end":
                store.one_run(self._token, run_id)
                store.end_run(run_id, record["status"], record["failure"], record["time_ms"])
            case kind:
                raise RecordRefusedError(f"{kind}: a record of a later version of gaccum_exp")

    def end_if_dead(self, *, stale: bool = False) -> bool:
        """End the run as KILLED whose process is dead; return whether there is an end now."""
        if self.delivered.settled or self.has_end:
            return True
        dead = end_if_dead(self.path, "KILLED", "its process has ended", stale=stale)
        if dead and not self._begins:  # it had not begun: there is nothing to be ended
            self.delivered.settled, self.delivered.offset = True, whole_size(self.path)
            self._save()
        return dead

    def close(self) -> None:
        """Let another process deliver it; without its lock files where nothing is left to deliver."""
        self._file.close()
        if self.delivered.settled or not self.delivered.uri:
            lock = FileLock.take(self.path.with_suffix(".lock"))
            if lock is not None:  # else somebody goes on with the run
                if not self.delivered.uri or whole_size(self.path) <= self.delivered.offset:
                    lock.path.unlink(missing_ok=True)
                lock.release()
            self._delivery_lock.unlink(missing_ok=True)
        self._lock.release()

    def _say(self, note: str) -> None:
        if note not in self._said:
            self._said.add(note)
            self.notes.append(note)

    def _save(self) -> None:
        if self.delivered != self._saved:
            with suppress(OSError):  # it is written once there is room, or sent again
                self.delivered.write(self.path)
                self._saved = replace(self.delivered)

    def _read(self, start: int, until: str | None = None) -> list[tuple[Record, int]]:
        """Return some whole records from an offset on, each with the offset of its end."""
        found: list[tuple[Record, int]] = []
        with suppress(OSError):
            if os.stat(self.path).st_ino != os.fstat(self._file.fileno()).st_ino:  # it was written anew
                self._file.close()
                self._file = open(self.path, "rb")  # noqa: SIM115  # until `close`
        self._file.seek(start)
        parts = [self._file.read(CHUNK)]
        while parts[-1] and b"\n" not in parts[-1]:
            parts.append(self._file.read(CHUNK))
        for line in b"".join(parts).split(b"\n")[:-1]:
            start += len(line) + 1
            record = decoded(line)
            if record is None:
                if line and not until:
                    at = start - len(line) - 1
                    self._say(f"{self.path}: the record at byte {at} is damaged and left out")
                record = {"kind": "damaged"}
            found.append((record, start))
            if record["kind"] == until:
                break
        return found


def _values(record: Record) -> list[tuple[str, float, int, int]]:
    return [
        (key, value, time_ms, global_step)
        for global_step, time_ms, values in record["points"]
        for key, value in values.items()
    ]
