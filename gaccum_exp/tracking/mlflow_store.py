"""Runs in MLflow: written here, read back here. The only import of mlflow.

Arms are top-level runs that share the tag `sweep_id`: the UI hides curves of runs nested under a parent.

Every call that writes may be repeated, whatever became of it before: parameters, tags, data sets, files
and the end are what they were, and a point is known by its run, metric, timestamp, step and value. Only
`create_run` makes another run, so a run is tagged with a token, and searched for by it.
"""

import errno
import logging
import os
import sqlite3
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import replace
from fcntl import LOCK_EX, lockf
from pathlib import Path
from typing import Any, TypeVar

from mlflow import MlflowClient
from mlflow.artifacts import download_artifacts
from mlflow.entities import Dataset, DatasetInput, Experiment, InputTag, Metric, Param, Run, RunTag
from mlflow.store.db.utils import create_sqlalchemy_engine

from gaccum_exp.errors import (
    BadInputError,
    RecordRefusedError,
    RunGoneError,
    StoreAwayError,
    first_line,
)
from gaccum_exp.tracking.records import Curve, DatasetRecord, RunRecord
from gaccum_exp.tracking.store_errors import (
    says_away,
    says_clash,
    says_gone,
    says_refused,
    what_is_deleted,
)
from gaccum_exp.tracking.store_uri import refuse_password

log = logging.getLogger(__name__)
for _chatty in ("alembic", "mlflow.store", "urllib3", "psycopg"):
    logging.getLogger(_chatty).setLevel(logging.CRITICAL)  # what goes wrong is raised

T = TypeVar("T")
Point = tuple[str, float, int, int]
"""Of a metric: its name, value, time in ms and global step."""
ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "PGCONNECT_TIMEOUT": "5",
}
"""Settings that MLflow and PostgreSQL's driver read at each request, unless the user has set them."""
NO_RETRIES = "MLFLOW_HTTP_REQUEST_MAX_RETRIES"
"""Zero whatever the user has set: MLflow repeats every request, so also one that creates a run."""
OPENING_S = 5
"""How long a server may take for the first answer."""
MAKING_S = 60
"""How long another process may take to make the tables of a new database."""
READING_S = 10
"""How long a store that is away is asked again for what is read."""
BATCH = 1000
"""Metrics in one request; MLflow takes no more."""
ENTRIES = 100
"""Parameters or tags in one request; MLflow takes no more."""
PARAM_LENGTH, TAG_LENGTH, NAME_LENGTH = 6000, 5000, 250
"""What MLflow keeps of a value, in characters; longer tags were taken later than shorter ones."""
CURVES = ("train/loss", "optim/lr", "optim/grad_norm", "eval/loss", "eval/accuracy")
ATTEMPTS = 4
READERS = 4
"""Requests at a time to a server: as many as it has workers by default."""
RUN_TOKEN = "run_token"


class Store:
    """One MLflow experiment at one tracking URI.

    Raises:
        BadInputError: it can be used only once the user has mended something.
        StoreAwayError: it does not answer now.
    """

    def __init__(self, uri: str, experiment_name: str) -> None:
        for key, value in ENVIRONMENT.items():
            os.environ.setdefault(key, value)
        os.environ[NO_RETRIES] = "0"
        refuse_password(uri)
        self.uri = uri
        self._artifacts: dict[str, str] = {}
        """Where the runs that were read keep their files, by run id."""
        with _opening(uri):
            _make_database(uri)
            _ask_once(uri)
            self._client, found = _opened(uri, experiment_name)
        if found.lifecycle_stage == "deleted":
            raise BadInputError(
                f"tracking.experiment_name={experiment_name}: deleted in MLflow; restore it or use "
                "another name"
            )
        self.experiment_id = str(found.experiment_id)

    def create_run(
        self, token: str, name: str, *, tags: Mapping[str, str], start_time_ms: int, again: bool
    ) -> str:
        """Create a run and return its id.

        Args:
            token: tells it from all others; it becomes a tag.
            name: what differs: `N=4 · micro 64 · mean`.
            tags: with which it begins.
            start_time_ms: since the epoch.
            again: it may have been created before; then that one is returned.
        """
        if again and (found := self._runs_of(token)):
            return str(found[0].info.run_id)
        # What the UI's own columns show; its client would fill them in, this one does not.
        shown = {"mlflow.source.name": "gaccum_exp", RUN_TOKEN: token}
        if "git_commit" in tags:
            shown["mlflow.source.git.commit"] = tags["git_commit"]
        texts = {key: _storable(value, TAG_LENGTH) for key, value in (*tags.items(), *shown.items())}
        with _writing():  # once: another attempt could create a second run
            created = self._client.create_run(
                self.experiment_id, start_time_ms, texts, _storable(name, NAME_LENGTH)
            )
        return str(created.info.run_id)

    def one_run(self, token: str, run_id: str) -> None:
        """Delete what requests whose answers were lost have created: runs of the token without a record.

        One that has a record is another deliverer's, of a copy of the journal.
        """
        for other in self._runs_of(token):
            if other.info.run_id != run_id and not (other.data.params or other.data.metrics):
                _insist(self._client.delete_run, other.info.run_id)

    def log_params(self, run_id: str, params: Mapping[str, Any]) -> None:
        """Record parameters, cut to what MLflow keeps of them."""
        entries = [(key, Param(key, _storable(value, PARAM_LENGTH))) for key, value in params.items()]
        _send(entries, ENTRIES, lambda some: self._client.log_batch(run_id, params=some))

    def log_texts(self, run_id: str, texts: Mapping[str, str]) -> None:
        """Keep texts as files of the run, by name."""
        for file, text in texts.items():
            _insist(self._client.log_text, run_id, _storable(text), file)

    def log_points(self, run_id: str, points: Sequence[Point]) -> None:
        """Record points of metrics.

        Raises:
            RecordRefusedError: names the metrics that the store does not take; the others are stored.
        """
        entries = [(point[0], Metric(*point)) for point in points]
        _send(entries, BATCH, lambda some: self._client.log_batch(run_id, metrics=some))

    def log_tags(self, run_id: str, tags: Mapping[str, str]) -> None:
        """Tag the run."""
        entries = [(key, RunTag(key, _storable(value, TAG_LENGTH))) for key, value in tags.items()]
        _send(entries, ENTRIES, lambda some: self._client.log_batch(run_id, tags=some))

    def log_datasets(self, run_id: str, records: Sequence[DatasetRecord]) -> None:
        """Record the data sets that the run is fed."""
        _insist(self._client.log_inputs, run_id, [_dataset_input(record) for record in records])

    def log_file(self, run_id: str, path: str, name: str) -> None:
        """Keep a file with the run under a name, which may have folders in it."""
        if not os.path.isfile(path):
            raise RecordRefusedError(f"{path}: there is no such file any more")
        folder, _, base = name.rpartition("/")
        if base == os.path.basename(path):
            _insist(self._client.log_artifact, run_id, path, folder or None)
            return
        with ExitStack() as until:  # the client keeps a file under its own name
            try:
                named = os.path.join(until.enter_context(tempfile.TemporaryDirectory()), base)
                os.symlink(os.path.abspath(path), named)
            except OSError as error:
                raise StoreAwayError(f"{path} cannot be sent ({_cause(error)})") from error
            _insist(self._client.log_artifact, run_id, named, folder or None)

    def end_run(self, run_id: str, status: str, failure: str | None, end_time_ms: int) -> None:
        """End the run with FINISHED, FAILED or KILLED, and the reason if there is one."""
        _insist(self._client.set_terminated, run_id, status, end_time_ms)
        if failure is not None:
            self.log_tags(run_id, {"failure": failure})

    def resume_run(self, run_id: str) -> None:
        """Set a run that goes on RUNNING, and drop why it had ended."""
        _insist(self._client.update_run, run_id, "RUNNING")
        with suppress(RecordRefusedError):  # it has no such tag
            _insist(self._client.delete_tag, run_id, "failure")

    def set_experiment_tags(self, tags: Mapping[str, str]) -> None:
        """Set tags of the experiment, which another sweep may be about to set, too."""
        for key, value in tags.items():
            _insist(self._client.set_experiment_tag, self.experiment_id, key, value)

    def sweep(self, sweep_id: str, curves: Sequence[str] = CURVES) -> list[RunRecord]:
        """Return the arms of a sweep with these curves, oldest first."""
        return self._read({"tags.sweep_id": sweep_id}, curves)

    def arms(self) -> list[RunRecord]:
        """Return the arms and audits of all sweeps, oldest first, without their curves."""
        kinds = (self._read({"tags.kind": kind}, ()) for kind in ("arm", "audit"))
        return sorted((run for of in kinds for run in of), key=lambda run: run.start_time_ms)

    def references(self, like: Mapping[str, str] | None = None) -> list[RunRecord]:
        """Return the finished one-pass runs that have these parameters, without their curves."""
        params = {f"params.`{key}`": value for key, value in (like or {}).items()}
        return self._read({"tags.role": "reference", "attributes.status": "FINISHED"} | params, ())

    def finished(self, like: Mapping[str, str]) -> list[RunRecord]:
        """Return the finished trainings that have these parameters, without their curves."""
        params = {f"params.`{key}`": value for key, value in like.items()}
        return self._read({"tags.kind": "arm", "attributes.status": "FINISHED"} | params, ())

    def with_curves(
        self, records: Sequence[RunRecord], curves: Sequence[str] = CURVES
    ) -> list[RunRecord]:
        """Return records that were read without curves, with them."""
        found = self._curves([(record.run_id, record.metrics) for record in records], curves)
        return [replace(record, curves=of) for record, of in zip(records, found, strict=True)]

    def fetch(self, run_id: str, name: str, folder: str) -> str | None:
        """Bring a file of a run into a folder and return its path; None if there is no such file."""
        artifacts, deadline = self._artifacts.get(run_id), time.monotonic() + READING_S
        while True:
            try:
                if (
                    artifacts is None
                ):  # the client reads the whole run first, to learn where its files are
                    return str(self._client.download_artifacts(run_id, name, folder))
                uri = f"{artifacts}/{name}"
                return str(download_artifacts(uri, dst_path=folder, tracking_uri=self.uri))
            except Exception as error:  # each artifact store raises errors of its own for a missing file
                if not says_away(error) or time.monotonic() > deadline:
                    return None
            time.sleep(0.5)

    def _runs_of(self, token: str) -> list[Run]:
        """Return the runs of a token, oldest first."""
        clause = f"tags.{RUN_TOKEN} = '{token}'"
        order = ["attributes.start_time ASC", "attributes.run_id ASC"]
        with _writing():
            return list(self._client.search_runs([self.experiment_id], clause, order_by=order))

    def _read(self, conditions: Mapping[str, str], curves: Sequence[str]) -> list[RunRecord]:
        clauses = [f"""{key} = '{value.replace("'", "")}'""" for key, value in conditions.items()]
        runs: list[Run] = []
        token: str | None = None
        while token is None or token:
            page = _asked(
                self._client.search_runs, [self.experiment_id], " AND ".join(clauses),
                order_by=["attributes.start_time ASC"], page_token=token,
            )  # fmt: skip
            runs.extend(page)
            token = page.token or ""
        found = self._curves([(run.info.run_id, run.data.metrics) for run in runs], curves)
        self._artifacts |= {run.info.run_id: str(run.info.artifact_uri) for run in runs}
        return [
            RunRecord(
                run_id=run.info.run_id,
                experiment_id=run.info.experiment_id,
                name=run.info.run_name,
                status=run.info.status,
                start_time_ms=run.info.start_time,
                params=dict(run.data.params),
                tags=dict(run.data.tags),
                metrics=dict(run.data.metrics),
                curves=of_run,
            )
            for run, of_run in zip(runs, found, strict=True)
        ]

    def _curves(
        self, runs: Sequence[tuple[str, Mapping[str, float]]], keys: Sequence[str]
    ) -> list[dict[str, Curve]]:
        wanted = [(run_id, key) for run_id, metrics in runs for key in keys if key in metrics]
        with ThreadPoolExecutor(READERS) as pool:
            served = self.uri.startswith("http")  # a request waits for the server most of its time
            read = (pool.map if served else map)(lambda of: self._curve(*of), wanted)
            curves = dict(zip(wanted, read, strict=True))
        return [{key: curves[run_id, key] for key in keys if key in metrics} for run_id, metrics in runs]

    def _curve(self, run_id: str, key: str) -> Curve:
        history = _asked(self._client.get_metric_history, run_id, key)
        points = sorted((metric.step, metric.value, metric.timestamp) for metric in history)
        return Curve(*zip(*points, strict=True)) if points else Curve((), ())


def _opened(uri: str, experiment_name: str) -> tuple[MlflowClient, Experiment]:
    """Return a client and the experiment, which is created if there is none."""
    deadline = time.monotonic() + MAKING_S
    while True:
        try:
            client = MlflowClient(tracking_uri=uri)
            found = client.get_experiment_by_name(experiment_name)
            if found is None:
                found = client.get_experiment(client.create_experiment(experiment_name))
            return client, found
        except Exception as error:  # of each store its own
            if not says_clash(error) or time.monotonic() > deadline:
                raise
        time.sleep(0.5)  # another process makes the tables or the experiment at this moment


def _ask_once(uri: str) -> None:
    """Raise what a database says that is away or none; MLflow asks ten times, for a minute."""
    kind = uri.partition("://")[0].partition("+")[0]
    if (path := _sqlite_file(uri)) is not None:
        with closing(sqlite3.connect(path, timeout=OPENING_S)) as database:
            database.execute("SELECT name FROM sqlite_master LIMIT 1").fetchall()
    elif kind in ("postgresql", "mysql", "mssql"):
        engine = create_sqlalchemy_engine(uri)
        engine.connect().close()
        engine.dispose()


def _sqlite_file(uri: str) -> Path | None:
    """Return the file of a SQLite store; None of another store, or where it is not plainly named."""
    path = Path(uri.removeprefix("sqlite:///"))
    plain = uri.startswith("sqlite:///") and path.name not in ("", ":memory:") and "?" not in uri
    return path if plain else None


def _make_database(uri: str) -> None:
    """Make the file of a SQLite store where there is none, in one piece, and once.

    MLflow makes its tables one by one, and of two processes that do so at once one fails; one that is
    killed leaves a file of no use. So who holds a lock makes it under another name, and renames it.
    """
    path = _sqlite_file(uri)
    if path is None or _filled(path):
        return
    if path.exists() and not path.is_file():  # a device would be replaced
        raise OSError(errno.EINVAL, "is no file")
    path.parent.mkdir(parents=True, exist_ok=True)
    lock, new = (path.with_name(f".{path.name}.{what}") for what in ("making", "new"))
    with lock.open("w") as held:
        lockf(held, LOCK_EX)
        if not _filled(path):
            for left in path.parent.glob(f"{new.name}*"):  # by one that was killed, with its journal
                left.unlink()
            MlflowClient(tracking_uri=f"sqlite:///{new}").search_experiments(max_results=1)
            os.replace(new, path)
        # Whoever waits for this very file finds the database made.
        lock.unlink(missing_ok=True)


def _filled(path: Path) -> bool:
    return path.exists() and path.stat().st_size > 0


def _cause(error: BaseException) -> str:
    """Return in a few words what is behind an error: the system's own where it has refused something."""
    deepest: BaseException | None = error
    while deepest is not None:
        if isinstance(deepest, OSError) and deepest.strerror:
            return deepest.strerror
        deepest = deepest.__cause__ or deepest.__context__
    return first_line(error)


_environment = threading.Lock()


@contextmanager
def _opening(uri: str) -> Iterator[None]:
    """Wait a few seconds for the first answer, and raise what `Store` raises."""
    patience = "MLFLOW_HTTP_REQUEST_TIMEOUT"
    with _environment:  # which MLflow reads at each request
        before, os.environ[patience] = os.environ[patience], str(OPENING_S)
        try:
            yield
        except Exception as error:  # every store raises errors of its own here
            served = uri.startswith(("http://", "https://"))
            if says_away(error):
                what = "no tracking server answers there" if served else "does not answer"
                raise StoreAwayError(f"tracking.uri={uri}: {what} ({_cause(error)})") from error
            raise BadInputError(f"tracking.uri={uri}: cannot be used ({_cause(error)})") from error
        finally:
            os.environ[patience] = before


@contextmanager
def _writing() -> Iterator[None]:
    """Turn an error of the store into `RecordRefusedError`, `StoreAwayError` or `BadInputError`."""
    try:
        yield
    except Exception as error:  # every store raises errors of its own here, too
        if deleted := what_is_deleted(error):
            raise BadInputError(f"its {deleted} was deleted in MLflow: restore it there") from error
        refused = RunGoneError if says_gone(error) else RecordRefusedError
        kind = refused if says_refused(error) else StoreAwayError
        raise kind(_cause(error)) from error


def _insist(call: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    """Write, and again where another process has made the same entry at that moment."""
    for attempt in range(1, ATTEMPTS + 1):
        with _writing():
            try:
                call(*args, **kwargs)
                return
            except Exception as error:
                if attempt == ATTEMPTS or not says_clash(error):
                    raise
        time.sleep(0.2 * attempt)


def _asked(call: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """Read, and again for a while where the store is away."""
    deadline = time.monotonic() + READING_S
    while True:
        try:
            with _writing():
                return call(*args, **kwargs)
        except StoreAwayError:
            if time.monotonic() > deadline:
                raise
        time.sleep(0.5)


def _send(entries: Sequence[tuple[str, T]], most: int, send: Callable[[list[T]], None]) -> None:
    """Send entries, so many in a request; one that is refused does not take the others with it."""
    refused: dict[str, str] = {}
    for start in range(0, len(entries), most):
        some = entries[start : start + most]
        try:
            _insist(send, [entry for _, entry in some])
        except RunGoneError:
            raise
        except RecordRefusedError:
            of_key: dict[str, list[T]] = defaultdict(list)
            for key, entry in some:
                of_key[key].append(entry)
            for key, alone in of_key.items():
                try:
                    _insist(send, alone)
                except RecordRefusedError as error:
                    refused.setdefault(key, str(error))
    if refused:
        raise RecordRefusedError(f"{', '.join(refused)}: {next(iter(refused.values()))}")


def _storable(value: object, most: int | None = None) -> str:
    """Return a value as text that every database takes, of so many characters at most."""
    # PostgreSQL takes no zero characters, and what is no Unicode cannot be written at all.
    text = str(value).replace("\0", "\N{REPLACEMENT CHARACTER}")
    return text.encode(errors="backslashreplace").decode()[:most]


def _dataset_input(record: DatasetRecord) -> DatasetInput:
    data = Dataset(
        name=record.name,
        digest=record.digest,
        source_type="code",
        source=f'{{"target": "{record.name}"}}',
        profile=f'{{"num_rows": {record.samples}}}',
    )
    return DatasetInput(data, [InputTag("mlflow.data.context", record.context)])
