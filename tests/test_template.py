"""The project that the docs give to be copied works as it stands."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.program import PATIENCE_S, environment
from tests.support import ROOT

ALL_OF_IT = """
import json, sys, pytest
from gaccum_exp import cli
from my_project.__main__ import main
given = ["task=audit", "accum.steps=4", "runtime.device=cpu", "tracking.uri=sqlite:///mlflow.db"]
statuses = [cli.main(["experiment=denoising", "accum.reduction=mean", *given])]
sys.argv[1:] = given
statuses.append(main())
statuses.append(cli.main(["model=denoizer"]))
statuses.append(cli.main(["--help", "model=denoiser"]))
statuses.append(pytest.main(["-q", "-p", "no:cacheprovider", "tests"]))
print(json.dumps(list(map(int, statuses))))
"""


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> subprocess.CompletedProcess[str]:
    """Copy it, and run its study by both commands, a wrong name, and its tests, in one process."""
    copy = tmp_path_factory.mktemp("template") / "project"
    shutil.copytree(ROOT / "docs/template", copy, ignore=shutil.ignore_patterns("__pycache__"))
    return subprocess.run(
        [sys.executable, "-c", ALL_OF_IT], cwd=copy, env=environment(), capture_output=True, text=True,
        timeout=PATIENCE_S,
    )  # fmt: skip


def test_its_study_its_command_and_its_tests_run(ended: subprocess.CompletedProcess[str]) -> None:
    """Nothing is installed, no flag given: the plugin beside it has its files found."""
    assert ended.returncode == 0, ended.stderr
    statuses = json.loads(ended.stdout.splitlines()[-1])
    assert statuses == [3, 0, 2, 0, 0]  # biased by the mean; not by the global mean; no such model
    assert "unequal denominators" in ended.stdout
    assert "2 passed" in ended.stdout
    assert "Convolutions over time." in ended.stdout  # as --help shows the file


def test_its_files_stand_beside_the_programs_own(ended: subprocess.CompletedProcess[str]) -> None:
    """A misspelt name is held against them."""
    line = next(line for line in ended.stderr.splitlines() if "denoizer" in line)
    assert "cnn, custom, denoiser, gpt" in line
    assert line.endswith("did you mean 'denoiser'?")


def test_its_page_names_every_file_of_it() -> None:
    """So that none is left that nobody explains."""
    folder = ROOT / "docs/template"
    page = (folder / "README.md").read_text()
    for path in Path(folder).rglob("*.py"):
        assert path.name in page or path.name == "__init__.py"
