"""What the pages of the notebook share: run a study, say where its numbers come from, rewrite a page.

A page's part between the two marks is written by the study's `build.py`; everything else by hand.
"""

import csv
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir

from gaccum_exp.arms.provenance import environment_tags, git_commit
from gaccum_exp.config import schema as config
from gaccum_exp.config.schema import Settings

BEGIN, END = "<!-- results: written by build.py -->", "<!-- end of results -->"


def run_study(slug: str, extra: Sequence[str] = ()) -> tuple[list[dict[str, str]], float]:
    """Run `python -m gaccum_exp -m experiment=<slug>` in a scratch folder.

    Returns the rows of its comparison.csv, as text, and the seconds that it took.
    """
    git_commit()  # remembered: the commit that is measured, not one that is made meanwhile
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "gaccum_exp", "-m", f"experiment={slug}", *extra]
        root = str(Path(__file__).resolve().parent.parent)
        path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
        start = time.monotonic()
        subprocess.run(command, cwd=folder, check=True, env={**os.environ, "PYTHONPATH": path})
        seconds = time.monotonic() - start
        (table,) = Path(folder).glob("multirun/*/comparison.csv")
        with table.open(encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file)), seconds


def read_rows(path: Path) -> list[dict[str, str]]:
    """Return the rows that a study has measured so far, as text."""
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def append_row(path: Path, columns: Sequence[str], row: Mapping[str, object]) -> None:
    """Add what has been measured, so that a study can be stopped and continued."""
    new = not path.exists()
    with path.open("a", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(row)


def spread(values: Iterable[float]) -> tuple[float, float]:
    """Return mean and sample standard deviation (0 for a single value)."""
    values = list(values)
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def middle(values: Iterable[float], unit: str = "", digits: int = 2) -> str:
    """Return the median, and the least and the greatest in brackets: `1.04 × (1.02 to 1.09)`."""
    ordered = sorted(values)
    unit = f" {unit}" if unit else ""
    low, median, high = (
        f"{v:.{digits}f}" for v in (ordered[0], statistics.median(ordered), ordered[-1])
    )
    return f"{median}{unit} ({low} to {high})"


def composed(*overrides: str) -> Settings:
    """Compose and validate as the command line does."""
    config.register()
    with initialize_config_dir(config.conf_dir(), version_base="1.3"):
        return config.validate(compose("config", list(overrides)))


class Quiet:
    """In place of a training's progress bar."""

    def note(self, points: object) -> None:
        """Say nothing."""

    def advance(self, step: int) -> None:
        """Say nothing."""


def provenance(seconds: float) -> str:
    """Return commit, versions, machine and runtime as Markdown."""
    tags = environment_tags()
    versions = ", ".join(f"{k.removeprefix('version.')} {v}" for k, v in tags.items() if "version." in k)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return (
        f"Commit {tags['git_commit']}; {versions}; Python {tags['python']}; device {device}, "
        f"{os.cpu_count()} cores, {torch.get_num_threads()} threads; {seconds / 60:.1f} minutes."
    )


def write_results(page: Path, markdown: str) -> None:
    """Replace what stands between the marks of a page."""
    text = page.read_text(encoding="utf-8")
    head, rest = text.split(BEGIN)
    _, tail = rest.split(END)
    page.write_text(f"{head}{BEGIN}\n\n{markdown.strip()}\n\n{END}{tail}", encoding="utf-8")
