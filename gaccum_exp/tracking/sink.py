"""From a training's metrics to a run in the store, and weights back out of it."""

import logging
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from gaccum_exp.tracking.metrics import Point, Sink
from gaccum_exp.tracking.records import DatasetRecord

if TYPE_CHECKING:
    from gaccum_exp.tracking.mlflow_store import MlflowRun, Store

log = logging.getLogger(__name__)
WEIGHTS = "weights.pt"


class MlflowSink(Sink):
    """Delivers one run's metrics to MLflow, many in a request.

    Args:
        run: of a store in this process, or what stands for one in another.
    """

    def __init__(self, run: "MlflowRun") -> None:
        super().__init__()
        self.run = run

    def ready(self) -> None:
        """Wait until the run has begun in the store.

        Raises:
            BadInputError: the store cannot be used.
        """
        self.run.ready()

    def send(self, points: list[Point]) -> None:
        """Send these points, and what could not be delivered before."""
        said = self.run.log([(key, v, p.time_ms, p.step) for p in points for key, v in p.values.items()])
        if said is not None:
            log.warning("tracking: %s", said)

    def describe(self, tags: Mapping[str, str]) -> None:
        """Tag the run."""
        self.run.describe(dict(tags))

    def log_datasets(self, datasets: Sequence[DatasetRecord]) -> None:
        """Say what the run is fed."""
        self.run.log_datasets(list(datasets))

    def keep_weights(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Store parameters by name."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / WEIGHTS
            torch.save({name: tensor.detach().cpu() for name, tensor in weights.items()}, path)
            self.keep_file(path)

    def keep_file(self, path: Path) -> None:
        """Store a file with the run, under its name."""
        self.run.keep_file(str(path.absolute()))

    def close(self, status: str, failure: str | None = None) -> None:
        """Deliver what is left and end the run with its status."""
        self.deliver()
        self.run.end(status, failure)


def kept_weights(store: "Store", run_id: str) -> dict[str, torch.Tensor] | None:
    """Return a run's final parameters by name, on the CPU; None if they were not kept."""
    with tempfile.TemporaryDirectory() as folder:
        path = store.fetch(run_id, WEIGHTS, folder)
        if path is None:
            return None
        weights: dict[str, torch.Tensor] = torch.load(path, map_location="cpu", weights_only=True)
        return weights
