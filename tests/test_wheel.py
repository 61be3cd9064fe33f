"""The wheel holds everything that a run needs, `conf/` too."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.support import ROOT

COMPOSE = """
import gaccum_exp
from hydra import compose, initialize_config_dir, initialize_config_module
from gaccum_exp.config import schema as config
config.register()
print(gaccum_exp.__file__)
print(config.conf_dir())
with initialize_config_dir(config.conf_dir(), version_base="1.3"):
    print(config.validate(compose("config", ["model=mlp", "accum.steps=4"])).data.micro_batch_size)
with initialize_config_module("gaccum_exp.conf", version_base="1.3"):
    print(compose("config", ["model=gpt"]).model._target_)
"""


def call(*command: str, cwd: Path, path: Path | None = None) -> str:
    """Run a Python command; nothing of this project is importable but what lies in `path`."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    environment = kept | ({"PYTHONPATH": str(path)} if path else {})
    done = subprocess.run(
        [sys.executable, *command], cwd=cwd, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel from a copy of the sources, so that the checkout stays clean."""
    source, built = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("built")
    ignored = shutil.ignore_patterns("__pycache__")
    for folder in ("gaccum_exp", "conf"):
        shutil.copytree(ROOT / folder, source / folder, ignore=ignored)
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copyfile(ROOT / file, source / file)
    call("-m", "build", "--wheel", "--no-isolation", "--outdir", str(built), str(source), cwd=built)
    (path,) = built.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install the wheel alone into a folder that no other Python knows."""
    target = tmp_path_factory.mktemp("installed")
    install = ("install", "--quiet", "--no-deps", "--no-index", "--target", str(target), str(wheel))
    call("-m", "pip", *install, cwd=target)
    return target


def test_the_wheel_holds_every_module_and_every_yaml_file_and_nothing_else(wheel: Path) -> None:
    """`conf/` lies inside the package, since a top-level folder of that name would be everybody's."""
    names = set(zipfile.ZipFile(wheel).namelist())
    modules = {str(p.relative_to(ROOT)) for p in (ROOT / "gaccum_exp").rglob("*.py")}
    files = {f"gaccum_exp/{p.relative_to(ROOT)}" for p in (ROOT / "conf").rglob("*.yaml")}
    beside = (p for p in (ROOT / "gaccum_exp/report/page").glob("*.*") if p.suffix != ".py")
    page = {str(p.relative_to(ROOT)) for p in beside}
    assert len(page) == 7
    assert modules | files | page | {"gaccum_exp/py.typed"} <= names
    assert all(name.startswith(("gaccum_exp/", "gaccum_exp-")) for name in names)


def test_the_configuration_composes_from_the_installed_wheel(installed: Path, tmp_path: Path) -> None:
    """In another directory, from the package's own copy of `conf/`."""
    package, conf, micro, target = call("-c", COMPOSE, cwd=tmp_path, path=installed).splitlines()
    assert Path(package).is_relative_to(installed)
    assert Path(conf) == installed / "gaccum_exp/conf"
    assert micro == "64"
    assert target == "gaccum_exp.models.gpt.GPT"


def test_help_works_from_the_installed_wheel(installed: Path, tmp_path: Path) -> None:
    """With all blocks and their files."""
    said = call("-m", "gaccum_exp", "--help", cwd=tmp_path, path=installed)
    assert "model: cnn, custom, gpt, mlp, timm, torchvision, transformers" in said
    assert "accum.reduction" in said
