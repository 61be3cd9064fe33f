"""The comparison as figures, each as SVG and as PNG: loss curves, memory, step time."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib

from gaccum_exp.records import RunRecord
from gaccum_exp.report.bar_figures import draw_memory, draw_step_time
from gaccum_exp.report.compare import Comparison
from gaccum_exp.report.loss_figure import draw_loss_curves

FIGURES = {
    "loss_curves": draw_loss_curves,
    "memory": draw_memory,
    "step_time": draw_step_time,
}


def draw(comparison: Comparison, runs: Sequence[RunRecord], folder: Path) -> list[Path]:
    """Draw every figure into `folder` and return the files written, nothing if no arm has an N.

    Args:
        comparison: what `compare` made of `runs`.
        runs: the arms of the sweep, as given to `compare`.
        folder: made if it does not exist; older figures in it are replaced.
    """
    if all(row.steps is None for row in comparison.rows):
        return []
    records = {run.run_id: run for run in (*comparison.stored_runs, *runs)}
    folder.mkdir(parents=True, exist_ok=True)
    paths: list[Path] = []
    # The same runs give the same bytes: no random ids in the SVG, no date in either.
    with matplotlib.rc_context({"svg.hashsalt": "gaccum_exp", "hatch.linewidth": 0.6}):
        for name, draw_figure in FIGURES.items():
            figure = draw_figure(comparison, records)
            for suffix, undated in (("svg", {"Date": None}), ("png", {"Software": None})):
                path = folder / f"{name}.{suffix}"
                figure.savefig(path, dpi=150, metadata=undated)
                paths.append(path)
    return paths
