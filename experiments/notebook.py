"""What the pages of the notebook share: run a study, say where its numbers come from, rewrite a page.

A page opens with answer, figure and command. What stands between two marks is written by the study's
`build.py`, everything else by hand: the results, and the answer where it is computed. Every study keeps
the numbers that its figures show, and `build.py --draw` draws them again.
"""

import csv
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir

from gaccum_exp.arms.provenance import environment_tags, git_commit
from gaccum_exp.config import schema as config
from gaccum_exp.config.schema import Settings

RESULTS = "<!-- results: written by build.py -->", "<!-- end of results -->"
ANSWER = "<!-- answer: written by build.py -->", "<!-- end of answer -->"


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


Cells = dict[tuple[Any, ...], dict[str, tuple[float, float]]]
"""What a figure shows: by series and N, of each measure mean and standard deviation."""


def asked_to_draw(kept: Path) -> bool:
    """Whether a study is only to draw its figures again, from the numbers that it has kept."""
    asked = "--draw" in sys.argv[1:]
    if asked and not kept.exists():
        sys.exit(f"--draw: {kept.name} is not there yet; the study keeps it when it is run without")
    return asked


def keep_cells(path: Path, names: Sequence[str], cells: Cells) -> None:
    """Write what a figure shows, under these names of the keys' parts, so that it can be drawn again."""
    path.unlink(missing_ok=True)
    for key, cell in cells.items():
        row: dict[str, object] = dict(zip(names, key, strict=True))
        for measure, (mean, deviation) in cell.items():
            row |= {measure: mean, f"{measure}_std": deviation}
        append_row(path, list(row), row)


def kept_cells(path: Path, *kinds: Callable[[str], Any]) -> Cells:
    """Read them, the parts of keys being of these kinds."""
    cells: Cells = {}
    for row in read_rows(path):
        texts = list(row.items())
        key = tuple(kind(text) for kind, (_, text) in zip(kinds, texts, strict=False))
        numbers = [(name, float(text)) for name, text in texts[len(kinds) :]]
        cells[key] = {
            name: (mean, deviation)
            for (name, mean), (_, deviation) in zip(numbers[::2], numbers[1::2], strict=True)
        }
    return cells


def log_bars(means: Sequence[float], deviations: Sequence[float]) -> list[list[float]]:
    """Return bars up and down for a log axis, where one that would reach zero has no place."""
    lower = [min(std, 0.9 * mean) for mean, std in zip(means, deviations, strict=True)]
    return [lower, list(deviations)]


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

    def begin(self, done: int) -> None:
        """Say nothing."""

    def advance(self, done: int, values: object = None) -> None:
        """Say nothing."""


def provenance(seconds: float | None = None) -> str:
    """Return commit, versions and machine as Markdown, and the runtime where it is given."""
    tags = environment_tags()
    versions = ", ".join(f"{k.removeprefix('version.')} {v}" for k, v in tags.items() if "version." in k)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return (
        f"Commit {tags['git_commit']}; {versions}; Python {tags['python']}; device {device}, "
        f"{os.cpu_count()} cores, {torch.get_num_threads()} threads"
        + ("." if seconds is None else f"; {seconds / 60:.1f} minutes.")
    )


def write_results(page: Path, markdown: str, answer: str = "") -> None:
    """Replace what stands between the marks of a page: the results, and the answer if there is one."""
    text = _between(page.read_text(encoding="utf-8"), RESULTS, markdown)
    page.write_text(_between(text, ANSWER, answer) if answer else text, encoding="utf-8")


def _between(text: str, marks: tuple[str, str], markdown: str) -> str:
    begin, end = marks
    head, rest = text.split(begin)
    _, tail = rest.split(end)
    return f"{head}{begin}\n\n{markdown.strip()}\n\n{end}{tail}"
