"""Rebuild the README's table, figures and screenshot: `python experiments/demo/build.py`.

It runs what `make demo` runs, in a scratch folder, and needs the test extra and Debian's chromium for
the screenshot. About two minutes on two cores.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from experiments.notebook import provenance, write_results
from gaccum_exp.arms.provenance import git_commit

HERE = Path(__file__).resolve().parent
FIGURES = ("loss_curves.png", "memory.png", "step_time.png")


def main() -> None:
    """Run the sweep, keep its figures, take the screenshot, write the table."""
    git_commit()  # remembered: the commit that is measured
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with tempfile.TemporaryDirectory() as folder:
        start = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-m", "gaccum_exp", "-m", "accum.steps=1,2,4,8", "noise.every_steps=3"],
            cwd=folder, env=environment, check=True, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        seconds = time.monotonic() - start
        (sweep,) = (Path(folder) / "multirun").iterdir()
        for name in (*FIGURES, "comparison.csv"):
            shutil.copy(sweep / name, HERE / name)
        subprocess.run(
            [sys.executable, str(ROOT / "experiments" / "screenshot.py"), sweep.name,
             "--out", str(HERE / "mlflow_chart.png")],
            cwd=folder, env=environment, check=True,
        )  # fmt: skip
    # Up to the paths, which are of a folder that is gone.
    table = "\n".join(line.rstrip() for line in done.stdout.split("\n\nSweep ")[0].splitlines())
    write_results(ROOT / "README.md", f"```text\n{table}\n```\n\n{provenance(seconds)}")


if __name__ == "__main__":
    main()
