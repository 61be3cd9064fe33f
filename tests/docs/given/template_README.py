"""A copy of the template."""

import shutil
from pathlib import Path

import gaccum_exp

shutil.copytree(Path(gaccum_exp.__file__).parents[1] / "docs/template", ".", dirs_exist_ok=True)
