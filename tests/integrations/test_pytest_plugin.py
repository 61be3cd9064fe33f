"""The pytest fixture, as a stranger's test suite sees it."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.support import ROOT

SUITE = """
import pytest
import torch
from torch import nn

def window(divided_by, dropout=0.0):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Dropout(dropout), nn.Linear(4, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    criterion = nn.CrossEntropyLoss()

    def my_step():
        for _ in range(4):
            loss = criterion(model(torch.randn(8, 4)), torch.randint(2, (8,)))
            (loss / divided_by).backward()
        optimizer.step()
        optimizer.zero_grad()

    return model, criterion, optimizer, my_step

def test_sound(audit_loop):
    *watched, my_step = window(4)
    with audit_loop(*watched) as audit:
        my_step()
    assert audit.verdict == "equivalent"

def test_not_divided(audit_loop):
    *watched, my_step = window(1)
    with audit_loop(*watched):
        my_step()

def test_second_step(audit_loop):
    *watched, my_step = window(1)
    with audit_loop(*watched, steps={1}):
        my_step()
        my_step()

def test_dropout(audit_loop):
    *watched, my_step = window(4, 0.5)
    with audit_loop(*watched):
        my_step()

def test_dropout_allowed(audit_loop):
    *watched, my_step = window(4, 0.5)
    with audit_loop(*watched, stochastic=True):
        my_step()

def test_dropout_allowed_bias_is_not(audit_loop):
    *watched, my_step = window(1, 0.5)
    with audit_loop(*watched, stochastic=True):
        my_step()

def test_no_step(audit_loop):
    *watched, my_step = window(4)
    with audit_loop(*watched):
        pass

def test_own_failure_comes_first(audit_loop):
    *watched, my_step = window(1)
    with audit_loop(*watched):
        my_step()
        raise LookupError("mine")
"""


def entry_points() -> dict[str, str]:
    """Return what pyproject.toml offers to pytest."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return project["entry-points"]["pytest11"]


@pytest.fixture
def offered(tmp_path: Path) -> dict[str, str]:
    """Return an environment in which the entry point is found, whatever is installed here."""
    info = tmp_path / "site" / "offered-0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: offered\nVersion: 0\n")
    lines = [f"{name} = {target}" for name, target in entry_points().items()]
    (info / "entry_points.txt").write_text("\n".join(["[pytest11]", *lines, ""]))
    path = os.pathsep.join([str(info.parent), str(ROOT)])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


def pytest_run(folder: Path, environment: dict[str, str], *options: str) -> str:
    """Run pytest in a folder of its own, warnings being errors; return what it says."""
    command = [sys.executable, "-m", "pytest", "-W", "error", "-p", "no:cacheprovider", "-rA", *options]
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    ).stdout


def test_a_strangers_test_fails_with_the_report_where_the_loop_is_not_sound(
    tmp_path: Path, offered: dict[str, str]
) -> None:
    """And passes where it is, or where it only draws random numbers and that is allowed."""
    (tmp_path / "test_mine.py").write_text(SUITE)
    said = pytest_run(tmp_path, offered)
    for name in ("sound", "dropout_allowed"):
        assert f"PASSED test_mine.py::test_{name}\n" in said, said
    assert "6 failed, 2 passed" in said, said
    assert "FAILED test_mine.py::test_own_failure_comes_first - LookupError: mine" in said
    assert "inconclusive (N = 0, mean): no optimizer step was seen" in said
    assert "gradient is 4 × the large batch's: the loss is not divided by N" in said
    assert "optimizer step 0 of the block\nstochastic (N = 4" in said
    failures, _ = said.split("short test summary info")  # where pytest repeats them whole under CI=true
    assert failures.count("allow it: audit_loop(..., stochastic=True)") == 1


def test_pytest_starts_as_fast_as_without_the_plugin(tmp_path: Path, offered: dict[str, str]) -> None:
    """Loading it imports neither torch nor any of the frameworks."""
    (tmp_path / "test_mine.py").write_text(
        "import sys\n"
        "def test_light():\n"
        "    assert 'gaccum_exp.integrations.pytest_plugin' in sys.modules\n"
        "    assert not {'torch', 'mlflow', 'lightning', 'transformers'} & set(sys.modules)\n"
    )
    said = pytest_run(tmp_path, offered)
    assert "1 passed" in said, said
