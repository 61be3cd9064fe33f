"""Runs in MLflow: written here, read back here. The only import of mlflow.

Arms are top-level runs that share the tag `sweep_id`: the UI hides curves of runs nested under a parent.
"""

import logging
import os
import socket
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

# A tracking server that is away must not hold a run up for minutes.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")

from mlflow import MlflowClient  # after the settings above, which it reads
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, Run, RunTag
from mlflow.exceptions import MlflowException

from gaccum_exp.errors import BadInputError
from gaccum_exp.records import Curve, DatasetRecord, RunRecord

log = logging.getLogger(__name__)
for _chatty in ("alembic", "mlflow.store"):
    logging.getLogger(_chatty).setLevel(logging.WARNING)

BATCH = 1000
"""Metrics in one request; MLflow takes no more."""
CURVES = ("train/loss", "optim/lr", "optim/grad_norm", "eval/loss", "eval/accuracy")
ATTEMPTS = 4


class Store:
    """One MLflow experiment at one tracking URI.

    Raises:
        BadInputError: the tracking URI cannot be used or reached.
    """

    def __init__(self, uri: str, experiment_name: str) -> None:
        self.uri = uri
        _require_reachable(uri)
        try:
            self._client = MlflowClient(tracking_uri=uri)
            self.experiment_id = self._experiment(experiment_name)
        except BadInputError:
            raise
        except Exception as error:  # every store raises errors of its own here
            first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise BadInputError(f"tracking.uri={uri}: cannot be used ({first})") from error

    def _experiment(self, name: str) -> str:
        found = self._client.get_experiment_by_name(name)
        if found is None:
            try:
                return str(self._client.create_experiment(name))
            except MlflowException:  # another process was quicker
                found = self._client.get_experiment_by_name(name)
                if found is None:
                    raise
        if found.lifecycle_stage == "deleted":
            raise BadInputError(
                f"tracking.experiment_name={name}: deleted in MLflow; restore it or use another name"
            )
        return str(found.experiment_id)

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
        except BaseException as error:  # whoever asked gets no run that could be ended
            with suppress(Exception):
                run.end("FAILED", f"{type(error).__name__}: {error}")
            raise
        return run

    def ready(self) -> None:
        """Do nothing: whoever waits for this knows that the store can be used."""

    def sweep(self, sweep_id: str) -> list[RunRecord]:
        """Return the arms of a sweep with their curves, oldest first."""
        quoted = sweep_id.replace("'", "")
        return self._read(f"tags.sweep_id = '{quoted}'", curves=True)

    def references(self) -> list[RunRecord]:
        """Return all finished one-pass runs of the experiment, without their curves."""
        return self._read("tags.role = 'reference' AND attributes.status = 'FINISHED'", curves=False)

    def with_curves(self, record: RunRecord) -> RunRecord:
        """Return a record read without curves again, with them."""
        return self._record(self._client.get_run(record.run_id), curves=True)

    def fetch(self, run_id: str, name: str, folder: str) -> str | None:
        """Bring a file of a run into a folder and return its path; None if there is no such file."""
        try:
            return str(self._client.download_artifacts(run_id, name, folder))
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
        """Set a tag of the experiment."""
        self._client.set_experiment_tag(self.experiment_id, key, value)

    def _read(self, condition: str, *, curves: bool) -> list[RunRecord]:
        runs: list[Run] = []
        token: str | None = None
        while True:
            page = self._client.search_runs(
                [self.experiment_id], condition, order_by=["attributes.start_time ASC"], page_token=token
            )
            runs.extend(page)
            token = page.token
            if not token:
                return [self._record(run, curves=curves) for run in runs]

    def _record(self, run: Run, *, curves: bool) -> RunRecord:
        return RunRecord(
            run_id=run.info.run_id,
            experiment_id=run.info.experiment_id,
            name=run.info.run_name,
            status=run.info.status,
            start_time_ms=run.info.start_time,
            params=dict(run.data.params),
            tags=dict(run.data.tags),
            metrics=dict(run.data.metrics),
            curves={k: self._curve(run, k) for k in CURVES if curves and k in run.data.metrics},
        )

    def _curve(self, run: Run, key: str) -> Curve:
        history = self._client.get_metric_history(run.info.run_id, key)
        points = sorted((m.step, m.value) for m in history)
        return Curve(tuple(step for step, _ in points), tuple(value for _, value in points))


class MlflowRun:
    """One run, as it is written.

    A delivery that fails is kept for the next one; only the last one's failure ends the run.
    """

    def __init__(self, client: MlflowClient, run_id: str) -> None:
        self._client = client
        self._pending: list[Metric] = []
        self.run_id = run_id
        self.ended = False

    def ready(self) -> None:
        """Do nothing: whoever waits for this knows that the run has begun."""

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
        """Say what the run is fed."""
        _insist(self._client.log_inputs, self.run_id, [_dataset_input(d) for d in datasets])

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
    """Try again what the store may refuse for a moment.

    E.g. two arms side by side create the same entry for their data, and it refuses the second.
    """
    for attempt in range(1, ATTEMPTS + 1):
        try:
            call(*args, **kwargs)
            return
        except MlflowException:
            if attempt == ATTEMPTS:
                raise
            time.sleep(0.2 * attempt)


def _dataset_input(record: DatasetRecord) -> DatasetInput:
    return DatasetInput(
        Dataset(
            name=record.name,
            digest=record.digest,
            source_type="code",
            source=f'{{"target": "{record.name}"}}',
            profile=f'{{"num_rows": {record.samples}}}',
        ),
        [InputTag("mlflow.data.context", record.context)],
    )


def _require_reachable(uri: str) -> None:
    """Try the server's address before MLflow does, which would retry for long."""
    address = urlsplit(uri)
    if address.scheme not in ("http", "https"):
        return
    port = address.port or (443 if address.scheme == "https" else 80)
    try:
        socket.create_connection((address.hostname or "", port), timeout=5).close()
    except OSError as error:
        raise BadInputError(f"tracking.uri={uri}: no tracking server answers there ({error})") from None
