"""The sink that takes metrics off the training loop's hands, and the one that writes a run's journal.

Values may be tensors on the run's device. They stay there until a delivery, so recording never waits for
the device, and a delivery reads all of them at once.
"""

import logging
import math
import shutil
import tempfile
import time
from collections import OrderedDict, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from gaccum_exp.errors import TrackingError
from gaccum_exp.tracking.journal import Journal
from gaccum_exp.tracking.metrics import TRAIN_LOSS
from gaccum_exp.tracking.notes import write_text
from gaccum_exp.tracking.records import DatasetRecord
from gaccum_exp.tracking.shipper import announce, wait_for_store

log = logging.getLogger(__name__)
WEIGHTS = "weights.pt"
"""A state dict of the plain model, or of what of it was trained."""
CRITERION_WEIGHTS = "criterion_weights.pt"
"""The same of a criterion that has parameters."""
ABOUT = "_gaccum_exp"
"""The attribute of a stored state dict that says which parameters were trained."""
DELIVERY_INTERVAL_S = 2.0
DELIVERY_WINDOWS = 1000
"""A buffer of so many windows is delivered before its time, so that it cannot grow without bound."""


@dataclass(frozen=True, slots=True)
class Point:
    """The metrics of one global step."""

    global_step: int
    time_ms: int
    values: dict[str, float]


class NonFiniteLossError(RuntimeError):
    """The training loss became NaN or infinite."""

    def __init__(self, global_step: int, loss: float) -> None:
        super().__init__(f"{TRAIN_LOSS} is {loss} at step {global_step}")


class Sink:
    """Buffers metrics and delivers them at intervals with `send`, which here sends them nowhere."""

    def __init__(self) -> None:
        self.last: dict[str, float] = {}
        """The last delivered value of each metric."""
        self._recorded: list[tuple[int, int, Mapping[str, float | Tensor]]] = []
        self._read: list[Point] = []
        self._sent: list[Point] = []
        """Since the last delivery."""
        self._not_finite: NonFiniteLossError | None = None
        self._last_delivery_s = time.monotonic()

    @property
    def due(self) -> bool:
        """Whether it is time for a delivery."""
        waited = time.monotonic() - self._last_delivery_s
        return waited > DELIVERY_INTERVAL_S or len(self._recorded) >= DELIVERY_WINDOWS

    @property
    def finite(self) -> bool:
        """Whether every loss that was delivered so far is finite."""
        return self._not_finite is None

    def record(self, global_step: int, values: Mapping[str, float | Tensor]) -> None:
        """Take the metrics of a global step: numbers, or 0-dim tensors that are read later."""
        self._recorded.append((global_step, time.time_ns() // 1_000_000, values))

    def deliver(self) -> list[Point]:
        """Send what was recorded, and return everything since the last delivery."""
        self.flush()
        points, self._sent = self._sent, []
        return points

    def flush(self) -> None:
        """Send what was recorded, as before anything that takes long."""
        self._read_recorded()
        points, self._read = self._read, []
        for point in points:
            self.last |= point.values
        self.send(points)
        self._sent += points
        self._last_delivery_s = time.monotonic()

    def require_finite(self) -> None:
        """Raise `NonFiniteLossError` if a loss so far is not finite; the curve up to it is delivered."""
        self._read_recorded()
        if self._not_finite is not None:
            self.deliver()
            raise self._not_finite

    def _read_recorded(self) -> None:
        """Bring what was recorded to the host; a curve ends with its first loss that is not finite."""
        points, self._recorded = _on_host(self._recorded), []
        for point in points:
            if self._not_finite is None:
                self._read.append(point)
                loss = point.values.get(TRAIN_LOSS, 0.0)
                if not math.isfinite(loss):
                    self._not_finite = NonFiniteLossError(point.global_step, loss)

    def has(self, global_step: int, metric: str) -> bool:
        """Whether an earlier process of a run that goes on has recorded a metric of a step."""
        return False

    def send(self, points: list[Point]) -> None:
        """Bring points to where they are kept."""

    def describe(self, tags: Mapping[str, str]) -> None:
        """Attach words, e.g. where the memory peak falls."""

    def keep_text(self, name: str, text: str) -> None:
        """Keep a small file with the run, in place of one of that name."""

    def close(self, status: str, failure: str | None = None) -> None:
        """End the run: FINISHED, FAILED (with the reason) or KILLED."""


def _on_host(recorded: list[tuple[int, int, Mapping[str, float | Tensor]]]) -> list[Point]:
    # All tensors of a device and type with one copy, not one a value.
    alike: dict[tuple[torch.device, torch.dtype], list[Tensor]] = defaultdict(list)
    for _, _, values in recorded:
        for value in values.values():
            if isinstance(value, Tensor):
                alike[value.device, value.dtype].append(value.detach())
    host = {kind: iter(torch.stack(tensors).tolist()) for kind, tensors in alike.items()}

    def number(value: float | Tensor) -> float:
        return float(next(host[value.device, value.dtype]) if isinstance(value, Tensor) else value)

    return [
        Point(global_step, time_ms, {key: number(value) for key, value in values.items()})
        for global_step, time_ms, values in recorded
    ]


@dataclass(frozen=True, slots=True)
class StateDict:
    """A state dict to be stored, on the CPU."""

    entries: "OrderedDict[str, Any]"
    trained: list[str]
    """The parameters among them that were trained, in the order of the model."""
    left_out: list[str]
    """What of the model is not among them, and why."""


class JournalSink(Sink):
    """Writes one run's metrics to its journal, which is delivered to its store from there.

    Args:
        journal: of the run, with its beginning in it.
    """

    def __init__(self, journal: Journal) -> None:
        super().__init__()
        self.journal = journal
        announce(journal.path)

    def ready(self) -> bool:
        """Wait until the store has been opened; without one that answers, the journal waits for it.

        Returns:
            Whether it has been.

        Raises:
            BadInputError: the store cannot be used.
        """
        return wait_for_store(self.journal.path)

    def send(self, points: list[Point]) -> None:
        """Write these points."""
        if points:
            self._append("points", points=[(p.global_step, p.time_ms, p.values) for p in points])

    def describe(self, tags: Mapping[str, str]) -> None:
        """Tag the run."""
        self._append("tags", tags=dict(tags))

    def log_datasets(self, datasets: Sequence[DatasetRecord]) -> None:
        """Record the data sets that the run is fed."""
        self._append("datasets", datasets=[asdict(record) for record in datasets])

    def keep_weights(self, weights: "StateDict", criterion: "StateDict | None" = None) -> None:
        """Store the final weights of a model, and of a criterion that has some.

        Raises:
            TrackingError: they cannot be written.
        """
        self._keep(WEIGHTS, weights, has_criterion=criterion is not None)
        if criterion is not None:
            self._keep(CRITERION_WEIGHTS, criterion)

    def _keep(self, name: str, weights: "StateDict", has_criterion: bool = False) -> None:
        path = self.journal.file_path(name)
        vars(weights.entries)[ABOUT] = {"trained": weights.trained, "criterion": has_criterion}
        try:
            torch.save(weights.entries, path)
        except (OSError, RuntimeError) as error:  # torch says of a full disk that a stream has an error
            free = shutil.disk_usage(path.parent).free if path.parent.is_dir() else 0
            message = f"{path}: the weights cannot be written ({free:,} bytes are free there)"
            raise TrackingError(message) from error
        self.keep_file(path, name)

    def keep_file(self, path: Path, name: str | None = None) -> None:
        """Store a file with the run, under its name or another one."""
        self.journal.keep_file(path, name)
        announce(self.journal.path)

    def keep_text(self, name: str, text: str) -> None:
        """Write a small file beside the journal, and store it with the run."""
        path = self.journal.file_path(name)
        try:
            write_text(path, text)
        except OSError as error:  # the run goes on without it
            log.warning("%s cannot be written (%s)", path, error.strerror)
        else:
            self.keep_file(path, name)

    def close(self, status: str, failure: str | None = None) -> None:
        """Write what is left and end the run with its status.

        Raises:
            TrackingError: the journal could not be written.
        """
        self.deliver()
        self.journal.end(status, failure)
        announce(self.journal.path)

    def _append(self, kind: str, **fields: Any) -> None:
        self.journal.append(kind, **fields)
        announce(self.journal.path)


class Files(Protocol):
    """What has the files of runs: journals, or a store."""

    def fetch(self, run_id: str, name: str, folder: str) -> str | None:
        """Bring a file of a run into a folder and return its path; None if there is no such file."""


def kept_weights(files: Files, run_id: str) -> dict[str, Tensor] | None:
    """Return a run's final parameters by name, on the CPU, the criterion's last; None: not kept."""
    with tempfile.TemporaryDirectory() as folder:
        path = files.fetch(run_id, WEIGHTS, folder)
        if path is None:
            return None
        weights = torch.load(path, map_location="cpu", weights_only=True)
        about = vars(weights).get(ABOUT) if isinstance(weights, OrderedDict) else None
        if about is None:  # of an older version: parameters alone, the model's as `0.…`, then `1.…`
            rooms = {"0": "", "1": "criterion."}
            split = {name: name.partition(".") for name in weights}
            return {rooms[split[n][0]] + split[n][2]: p for n, p in weights.items()}
        parameters = {name: weights[name] for name in about["trained"]}
        path = files.fetch(run_id, CRITERION_WEIGHTS, folder) if about["criterion"] else None
        if path is not None:
            kept = torch.load(path, map_location="cpu", weights_only=True)
            parameters |= {f"criterion.{name}": kept[name] for name in vars(kept)[ABOUT]["trained"]}
        return parameters
