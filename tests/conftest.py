"""Fixtures that several test modules share."""

import shutil
from pathlib import Path

import pytest

from tests.program import Program, new_store


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the file of a store without runs, to be copied."""
    return new_store(tmp_path_factory.mktemp("empty_store"))


@pytest.fixture
def program(
    tmp_path: Path,
    empty_store: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> Program:
    """Return the program in a new working directory that holds an empty store."""
    shutil.copyfile(empty_store, tmp_path / "mlflow.db")
    monkeypatch.chdir(tmp_path)
    for key in ("HYDRA_FULL_ERROR", "MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(key, raising=False)
    return Program(tmp_path, capfd)
