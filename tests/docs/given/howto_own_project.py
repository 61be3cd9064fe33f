"""A copy of the template, and a package with a model of two heads."""

import shutil
from pathlib import Path

import gaccum_exp

ROOT = Path(gaccum_exp.__file__).parents[1]
shutil.copytree(ROOT / "docs/template", ".", dirs_exist_ok=True)
shutil.copy(ROOT / "tests/docs/given/my_pkg.py", ".")
