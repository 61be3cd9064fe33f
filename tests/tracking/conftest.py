"""Real servers that tests of this folder share, each started when it is first asked for."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from experiments.mlflow_browser import mlflow_server
from experiments.postgresql import PostgresServer, postgres_server, why_not


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory, empty_store: Path) -> Iterator[str]:
    """Return the address of an MLflow server over SQLite."""
    folder = tmp_path_factory.mktemp("served")
    shutil.copyfile(empty_store, folder / "mlflow.db")
    with mlflow_server(f"sqlite:///{folder / 'mlflow.db'}", folder / "log") as address:
        yield address


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    """Return a PostgreSQL server that asks for no password."""
    if reason := why_not():
        pytest.skip(reason)
    with postgres_server() as server:
        yield server


@pytest.fixture(scope="session")
def postgres_uri(postgres: PostgresServer) -> str:
    """Return the address of a database with MLflow's tables in it."""
    return postgres.create("shared")


@pytest.fixture(scope="session")
def served_postgres(postgres_uri: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Return the address of an MLflow server over PostgreSQL."""
    with mlflow_server(postgres_uri, tmp_path_factory.mktemp("served_postgres") / "log") as address:
        yield address


@pytest.fixture(params=["sqlite", "served", "postgres_uri"])
def uri(request: pytest.FixtureRequest, home: Path) -> str:
    """Return the address of each kind of store."""
    kind = str(request.param)
    return f"sqlite:///{home / 'mlflow.db'}" if kind == "sqlite" else str(request.getfixturevalue(kind))
