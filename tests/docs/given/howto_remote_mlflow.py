"""A sweep, and the folder of another, which was carried over."""

import shutil
import subprocess
import sys
from pathlib import Path

sweep = [sys.executable, "-m", "gaccum_exp", "-m", "model=mlp", "train.steps=2", "accum.steps=1,2"]
subprocess.run(sweep, check=True)
(folder,) = Path("multirun").iterdir()
shutil.copytree(folder, "carried_over")
