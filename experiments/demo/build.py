"""Rebuild the README's table, figures and screenshot: `python experiments/demo/build.py`.

It runs what `make demo` runs, in a scratch folder, and needs the test extra and Debian's chromium for
the screenshot. About two minutes on two cores.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from experiments.notebook import provenance, write_results
from gaccum_exp.arms.provenance import git_commit

HERE = Path(__file__).resolve().parent
DEMO = ("accum.steps=1,2,4,8", "noise.every_steps=3")
KEPT = {name: name for name in ("loss_curves.png", "memory.png", "step_time.png", "comparison.csv")}
PICTURE = ("model=mlp", "accum.steps=1,8", "accum.reduction=global_mean,mean",
           "data.global_batch_size=64", "train.epochs=3", "audit.controls=3")  # fmt: skip
"""Right on the left, and on the right biased from the first partial window on."""
KEPT_OF_PICTURE = {"loss_curves.png": "right_and_biased.png", "comparison.csv": "right_and_biased.csv"}


def main() -> None:
    """Run both sweeps, keep their figures, take the screenshot, write the table."""
    git_commit()  # remembered: the commit that is measured
    with tempfile.TemporaryDirectory() as folder:
        start = time.monotonic()
        printed, sweep = _run(Path(folder), DEMO, KEPT)
        seconds = time.monotonic() - start
        subprocess.run(
            [sys.executable, str(ROOT / "experiments" / "screenshot.py"), sweep.name,
             "--out", str(HERE / "mlflow_chart.png")],
            cwd=folder, env=_environment(), check=True,
        )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        told, _ = _run(Path(folder), PICTURE, KEPT_OF_PICTURE)
    said = re.search(r"N = 8 (from step \d+)", told)
    if said is None or f"{said[1]} on" not in (ROOT / "README.md").read_text(encoding="utf-8"):
        raise ValueError(f"README.md says something else than the picture's sweep, which prints\n{told}")
    # Up to the paths, which are of a folder that is gone.
    table = "\n".join(line.rstrip() for line in printed.split("\n\nSweep ")[0].splitlines())
    write_results(ROOT / "README.md", f"```text\n{table}\n```\n\n{provenance(seconds)}")


def _run(folder: Path, overrides: Sequence[str], kept: Mapping[str, str]) -> tuple[str, Path]:
    """Run a sweep, keep some of its files under other names; return what it prints, and its folder."""
    done = subprocess.run(
        [sys.executable, "-m", "gaccum_exp", "-m", *overrides],
        cwd=folder, env=_environment(), check=True, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    (sweep,) = (folder / "multirun").iterdir()
    for name, kept_as in kept.items():
        shutil.copy(sweep / name, HERE / kept_as)
    return done.stdout, sweep


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}


if __name__ == "__main__":
    main()
