"""The checkout's folder of docs."""

from pathlib import Path

import gaccum_exp

Path("docs").symlink_to(Path(gaccum_exp.__file__).parents[1] / "docs")
