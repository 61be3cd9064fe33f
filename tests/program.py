"""The program as its user runs it, without paying for a new Python and a new store each time.

`Program` calls the command line's `main` in this process; `in_a_process` starts a real one, for what
only that can show (signals, what is imported, another working directory).
"""

import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from torch import Tensor

from gaccum_exp import cli
from gaccum_exp.arms.child import Answer
from gaccum_exp.arms.serve import _DONE
from gaccum_exp.tracking.mlflow_store import Store
from gaccum_exp.tracking.records import RunRecord
from gaccum_exp.train.stopping import Stop
from tests.strangers import Net
from tests.support import ROOT

TINY = ("model=mlp", "model.hidden=[8]", "runtime.device=cpu", "train.steps=4")
NAMES = re.compile(r"(run|sweep) \d{8}-\d{6}-[0-9a-f]{6}: ")
PATIENCE_S = 240
"""After so long a process that hangs is given up on; no claim about time."""


@dataclass(frozen=True)
class Ended:
    """What the user sees of a run of the program."""

    status: int
    out: str
    err: str

    @property
    def lines(self) -> list[str]:
        """What stands on stderr, but for the line that names the run or the sweep."""
        return [line for line in self.err.splitlines() if not NAMES.match(line)]

    @property
    def plain(self) -> str:
        """Both streams with every run of blanks and line ends made one blank."""
        return " ".join((self.out + self.err).split())


class Program:
    """Runs the program in this process and in a folder of its own, and looks into what it has left."""

    def __init__(self, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
        self.folder = folder
        # Absolute: MLflow keeps a connection for every address that this process has ever opened.
        self.uri = f"sqlite:///{folder / 'mlflow.db'}"
        self._capfd = capfd

    def __call__(self, *arguments: str) -> Ended:
        """Run `python -m gaccum_exp` with these arguments, recording in this folder."""
        located = any(a.startswith("tracking.uri=") for a in arguments)
        uri = () if located else (f"tracking.uri={self.uri}",)
        return self._call(*arguments, *uri)

    def as_given(self, *arguments: str) -> Ended:
        """Run it with these arguments alone, recording wherever they or the environment say."""
        return self._call(*arguments)

    def tiny(self, *arguments: str) -> Ended:
        """Run it on a model of a few hundred parameters for four steps."""
        return self(*TINY, *arguments)

    def report(self, *arguments: str) -> Ended:
        """Run `python -m gaccum_exp report` with these arguments."""
        return self._call("report", *arguments, "--uri", self.uri)

    def store(self) -> Store:
        """Open the store of the runs."""
        return Store(self.uri, "gaccum_exp")

    @property
    def sweep_id(self) -> str:
        """The id of the run or sweep whose arm ended last."""
        return str(json.loads(self._last_outcome.read_text())["sweep_id"])

    @property
    def sweep_folder(self) -> Path:
        """Where it wrote."""
        sweeps = (f for f in self._last_outcome.parents if (f / "multirun.yaml").exists())
        return next(sweeps, self._last_outcome.parent)

    @property
    def _last_outcome(self) -> Path:
        return max(self.folder.rglob("arm.json"), key=lambda path: path.stat().st_mtime_ns)

    def arms(self) -> list[RunRecord]:
        """Return its runs, by N."""
        runs = self.store().sweep(self.sweep_id)
        return sorted(runs, key=lambda run: int(run.params.get("accum.steps", 0)))

    def _call(self, *arguments: str) -> Ended:
        self._capfd.readouterr()
        return Ended(cli.main(arguments), *self._capfd.readouterr())


def sweep_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the arms of sweeps run in this process, where a test has replaced something."""

    def ask(stop: Stop, before: Any, what: str, *given: Any) -> Answer:
        with stop.held():
            return Answer(_DONE[what](given[0], stop))

    monkeypatch.setattr("gaccum_exp.arms.child._ask", ask)


def in_a_process(folder: Path, *arguments: str, module: str = "gaccum_exp") -> Ended:
    """Run `python -m <module>` with these arguments in that folder."""
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=folder, env=environment(), capture_output=True, text=True, timeout=PATIENCE_S,
    )  # fmt: skip
    return Ended(done.returncode, done.stdout, done.stderr)


def environment() -> dict[str, str]:
    """Return this process's environment with this checkout importable, on one thread."""
    # MLflow itself sets its variables, wherever another test has chosen a store.
    left_out = ("HYDRA_FULL_ERROR", "MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME")
    inherited = {key: value for key, value in os.environ.items() if key not in left_out}
    return inherited | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def new_store(folder: Path) -> Path:
    """Create an empty store in a folder; making one takes longer than copying it."""
    MlflowClient(f"sqlite:///{folder / 'mlflow.db'}").search_experiments()
    return folder / "mlflow.db"


class Ending(Net):
    """Something happens in its fourth training pass."""

    def __init__(self) -> None:
        super().__init__()
        self.passes = 0

    def forward(self, x: Tensor) -> Tensor:
        self.passes += self.training
        if self.passes == 4:
            self.happen()
        return super().forward(x)

    def happen(self) -> None:
        raise NotImplementedError


class Interrupted(Ending):
    """The user presses Ctrl-C."""

    def happen(self) -> None:
        signal.raise_signal(signal.SIGINT)


class Broken(Ending):
    """It has a fault of its own."""

    def happen(self) -> None:
        raise RuntimeError("a fault of its own\nwith details")
