"""Fixtures that several test modules share."""

import gc
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING
from unittest.mock import patch

import hypothesis
import pytest

from gaccum_exp.arms import child
from gaccum_exp.memory.fake import settle
from gaccum_exp.tracking.processes import python
from tests.program import Program, new_store
from tests.undrawn import DRAW, UNDRAWN, no_figures

if TYPE_CHECKING:
    from playwright.sync_api import Browser

gc.disable()  # until all tests are collected: imports leave next to no garbage
hypothesis.settings.register_profile("suite", deadline=None)  # no test asserts how long it takes
hypothesis.settings.load_profile("suite")


def pytest_configure() -> None:
    """Hear Ctrl-C also as a shell's background job, whose children would ignore it."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Take what is slow first, so that at the end no worker waits for another's.

    And what forks before all: a fork of a process in which autograd has threads cannot use it.
    """
    for first in ("slow", "forks"):
        items.sort(key=lambda item: item.get_closest_marker(first) is None)  # used at once


def pytest_collection_finish() -> None:
    """Settle, as a child does before its arms: each training built searches all that is not settled."""
    gc.enable()
    settle()


@pytest.fixture(scope="module")
def browser() -> Iterator["Browser"]:
    """Open Debian's browser."""
    from playwright.sync_api import sync_playwright

    from experiments.mlflow_browser import CHROMIUM, CHROMIUM_ARGUMENTS

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=CHROMIUM_ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture(scope="session", autouse=True)
def _arms_in_a_child_of_the_tests() -> Iterator[None]:
    """Let sweeps be compared in a process that knows of `undrawn`."""
    with patch.object(child, "python", lambda statement: python(f"import tests.undrawn; {statement}")):
        yield


@pytest.fixture
def undrawn(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have no figures drawn of sweeps in this test, unless it is marked with `figures`."""
    if request.node.get_closest_marker("figures") is None:
        monkeypatch.setenv(UNDRAWN, "1")
        monkeypatch.setattr(DRAW, no_figures)


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the file of a store without runs, to be copied."""
    return new_store(tmp_path_factory.mktemp("empty_store"))


@pytest.fixture
def home(tmp_path: Path, empty_store: Path) -> Path:
    """Return a new folder with an empty store, to run programs in."""
    shutil.copyfile(empty_store, tmp_path / "mlflow.db")
    return tmp_path


@pytest.fixture
def program(home: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Program:
    """Return the program in a new working directory that holds an empty store."""
    monkeypatch.chdir(home)
    for key in ("HYDRA_FULL_ERROR", "MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(key, raising=False)
    return Program(home, capfd)
