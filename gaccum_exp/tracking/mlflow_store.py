"""Runs in MLflow: written here, read back here. The only import of mlflow.

Arms are top-level runs that share the tag `sweep_id`: the UI hides curves of runs nested under a parent.
"""

import logging
import math
import os
import socket
import sqlite3
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, closing, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

from mlflow import MlflowClient
from mlflow.artifacts import download_artifacts
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, Run, RunTag
from mlflow.exceptions import MlflowException

from gaccum_exp.errors import BadInputError
from gaccum_exp.tracking.records import Curve, DatasetRecord, RunRecord

log = logging.getLogger(__name__)
for _chatty in ("alembic", "mlflow.store"):
    logging.getLogger(_chatty).setLevel(logging.WARNING)

ENVIRONMENT = {
    # A tracking server that is away must not hold a run up for minutes.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}
"""Settings that MLflow reads at each request, unless the user has set them."""
BATCH = 1000
"""Metrics in one request; MLflow takes no more."""
CURVES = ("train/loss", "optim/lr", "optim/grad_norm", "eval/loss", "eval/accuracy")
ATTEMPTS = 4
POINTS = "SELECT step, value, is_nan FROM metrics WHERE run_uuid = ? AND key = ? ORDER BY step, value"
READERS = 4
"""Requests at a time to a server: as many as it has workers by default."""


class Store:
    """One MLflow experiment at one tracking URI; `BadInputError` if that cannot be used or reached."""

    def __init__(self, uri: str, experiment_name: str) -> None:
        for key, value in ENVIRONMENT.items():
            os.environ.setdefault(key, value)
        self.uri = uri
        self._artifacts: dict[str, str] = {}
        """Where the runs that were read keep their files, by run id."""
        address = urlsplit(uri)
        if address.scheme in ("http", "https"):
            port = address.port or (443 if address.scheme == "https" else 80)
            try:  # before MLflow does, which would retry for long
                socket.create_connection((address.hostname or "", port), timeout=5).close()
            except OSError as error:
                message = f"tracking.uri={uri}: no tracking server answers there ({error})"
                raise BadInputError(message) from None
        try:
            self._client = MlflowClient(tracking_uri=uri)
            found = self._client.get_experiment_by_name(experiment_name)
            if found is None:
                try:
                    found = self._client.get_experiment(self._client.create_experiment(experiment_name))
                except MlflowException:  # unless another process was quicker
                    found = self._client.get_experiment_by_name(experiment_name)
                    if found is None:
                        raise
        except Exception as error:  # every store raises errors of its own here
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise BadInputError(f"tracking.uri={uri}: cannot be used ({first})") from error
        if found.lifecycle_stage == "deleted":
            raise BadInputError(
                f"tracking.experiment_name={experiment_name}: deleted in MLflow; restore it or use "
                "another name"
            )
        self.experiment_id = str(found.experiment_id)

    def start_run(
        self,
        name: str,
        *,
        params: Mapping[str, Any],
        tags: Mapping[str, str],
        texts: Mapping[str, str],
    ) -> "MlflowRun":
        """Begin a run; `texts` become files of the run, by name."""
        # What the UI's own columns show; its client would fill them in, this one does not.
        shown = {"mlflow.source.name": "gaccum_exp"}
        if "git_commit" in tags:
            shown["mlflow.source.git.commit"] = tags["git_commit"]
        created = self._client.create_run(self.experiment_id, tags={**tags, **shown}, run_name=name)
        run = MlflowRun(self._client, created.info.run_id)
        values = [Param(key, str(value)[:6000]) for key, value in params.items()]  # MLflow's limit
        try:
            for start in range(0, len(values), 100):  # and another
                self._client.log_batch(run.run_id, params=values[start : start + 100])
            for file, text in texts.items():
                self._client.log_text(run.run_id, text, file)
        except BaseException as error:  # the caller gets no run that it could end
            with suppress(Exception):
                run.end("FAILED", f"{type(error).__name__}: {error}")
            raise
        return run

    def ready(self) -> None:
        """Do nothing: where this returns, the store can be used."""

    def sweep(self, sweep_id: str, curves: Sequence[str] = CURVES) -> list[RunRecord]:
        """Return the arms of a sweep with these curves, oldest first."""
        return self._read({"tags.sweep_id": sweep_id}, curves)

    def references(self, like: Mapping[str, str] | None = None) -> list[RunRecord]:
        """Return the finished one-pass runs that have these parameters, without their curves."""
        params = {f"params.`{key}`": value for key, value in (like or {}).items()}
        return self._read({"tags.role": "reference", "attributes.status": "FINISHED"} | params, ())

    def with_curves(
        self, records: Sequence[RunRecord], curves: Sequence[str] = CURVES
    ) -> list[RunRecord]:
        """Return records that were read without curves, with them."""
        found = self._curves([(record.run_id, record.metrics) for record in records], curves)
        return [replace(record, curves=of) for record, of in zip(records, found, strict=True)]

    def fetch(self, run_id: str, name: str, folder: str) -> str | None:
        """Bring a file of a run into a folder and return its path; None if there is no such file."""
        artifacts = self._artifacts.get(run_id)
        try:
            if artifacts is None:  # the client reads the whole run first, to learn where its files are
                return str(self._client.download_artifacts(run_id, name, folder))
            return str(download_artifacts(f"{artifacts}/{name}", dst_path=folder, tracking_uri=self.uri))
        except Exception:  # each artifact store raises errors of its own for a missing file
            return None

    def write_report(self, sweep_id: str, files: Iterable[Path]) -> None:
        """Keep a comparison's files in a run of their own, outside the sweep's filter."""
        tags = {"kind": "report", "report_of": sweep_id}
        run = self._client.create_run(self.experiment_id, tags=tags, run_name=f"report {sweep_id}")
        for path in files:
            self._client.log_artifact(run.info.run_id, str(path))
        self._client.set_terminated(run.info.run_id)

    def set_experiment_tag(self, key: str, value: str) -> None:
        """Set a tag of the experiment, which another sweep may be about to set, too."""
        _insist(self._client.set_experiment_tag, self.experiment_id, key, value)

    def _read(self, conditions: Mapping[str, str], curves: Sequence[str]) -> list[RunRecord]:
        clauses = [f"""{key} = '{value.replace("'", "")}'""" for key, value in conditions.items()]
        runs: list[Run] = []
        token: str | None = None
        while token is None or token:
            page = self._client.search_runs(
                [self.experiment_id], " AND ".join(clauses), order_by=["attributes.start_time ASC"],
                page_token=token,
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
        with _database(self.uri) as database, ThreadPoolExecutor(READERS) as pool:
            served = self.uri.startswith("http")  # a request waits for the server most of its time
            read = (pool.map if served else map)(lambda of: self._curve(of[0], of[1], database), wanted)
            curves = dict(zip(wanted, read, strict=True))
        return [{key: curves[run_id, key] for key in keys if key in metrics} for run_id, metrics in runs]

    def _curve(self, run_id: str, key: str, database: sqlite3.Connection | None) -> Curve:
        points: list[tuple[int, float]] = []
        if database is not None:
            with suppress(sqlite3.Error):  # MLflow's tables are not as they were: it is asked itself
                rows = database.execute(POINTS, (run_id, key)).fetchall()
                points = [(step, math.nan if is_nan else value) for step, value, is_nan in rows]
        if not points:
            history = self._client.get_metric_history(run_id, key)
            points = sorted((m.step, m.value) for m in history)
        return Curve(tuple(step for step, _ in points), tuple(value for _, value in points))


def _database(uri: str) -> AbstractContextManager[sqlite3.Connection | None]:
    """Open the file of a SQLite store, to be read past MLflow; None for any other store."""
    # MLflow's own query for a curve goes through the values that all runs of the file have of the
    # metric: SQLite takes the index of its primary key, which begins with the metric, not with the run.
    path = uri.removeprefix("sqlite:///")
    with suppress(sqlite3.Error):
        if path != uri:
            return closing(sqlite3.connect(f"file:{quote(path)}?mode=ro", uri=True))
    return nullcontext()


class MlflowRun:
    """One run, as it is written. What cannot be delivered is kept for the next delivery."""

    def __init__(self, client: MlflowClient, run_id: str) -> None:
        self._client = client
        self._pending: list[Metric] = []
        self.run_id = run_id
        self.ended = False

    def ready(self) -> None:
        """Do nothing: where this returns, the run has begun."""

    def log(self, values: Sequence[tuple[str, float, int, int]]) -> str | None:
        """Send what is pending and these (key, value, time in ms, step); return what went wrong."""
        self._pending += [Metric(*value) for value in values]
        try:
            self._send_pending()
        except MlflowException as error:
            return f"{len(self._pending)} values not delivered yet ({error})"
        return None

    def describe(self, tags: Mapping[str, str]) -> None:
        """Tag the run."""
        _insist(self._client.log_batch, self.run_id, tags=[RunTag(k, v) for k, v in tags.items()])

    def log_datasets(self, datasets: Sequence[DatasetRecord]) -> None:
        """Record the data sets that the run is fed."""
        inputs = [
            DatasetInput(
                Dataset(
                    name=record.name,
                    digest=record.digest,
                    source_type="code",
                    source=f'{{"target": "{record.name}"}}',
                    profile=f'{{"num_rows": {record.samples}}}',
                ),
                [InputTag("mlflow.data.context", record.context)],
            )
            for record in datasets
        ]
        _insist(self._client.log_inputs, self.run_id, inputs)

    def keep_file(self, path: str) -> None:
        """Store a file with the run, under its name."""
        _insist(self._client.log_artifact, self.run_id, path)

    def end(self, status: str, failure: str | None = None) -> None:
        """Send what is left and end the run with its status."""
        self._send_pending()
        if failure is not None:
            self._client.set_tag(self.run_id, "failure", failure[:5000])
        self._client.set_terminated(self.run_id, status, int(time.time() * 1000))
        self.ended = True

    def _send_pending(self) -> None:
        while self._pending:
            self._client.log_batch(self.run_id, metrics=self._pending[:BATCH])
            del self._pending[:BATCH]


def _insist(call: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    # The store may refuse for a moment, e.g. where two arms create the same entry for their data.
    for attempt in range(1, ATTEMPTS + 1):
        try:
            call(*args, **kwargs)
            return
        except MlflowException:
            if attempt == ATTEMPTS:
                raise
            time.sleep(0.2 * attempt)
