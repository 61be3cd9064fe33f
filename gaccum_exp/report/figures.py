"""The comparison as figures, each as SVG and as PNG: loss curves, memory, step time, the frontier."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from gaccum_exp.memory.plan import MemoryPlan
from gaccum_exp.records import RunRecord
from gaccum_exp.report.bar_figures import draw_memory, draw_step_time
from gaccum_exp.report.compare import Comparison
from gaccum_exp.report.frontier_figure import draw_frontier, draw_plan
from gaccum_exp.report.loss_figure import draw_loss_curves

FIGURES = {
    "loss_curves": draw_loss_curves,
    "memory": draw_memory,
    "step_time": draw_step_time,
    "memory_frontier": draw_frontier,
}
# The same runs give the same bytes: no random ids in the SVG, no date in either.
_ALWAYS_ALIKE = {"svg.hashsalt": "gaccum_exp", "hatch.linewidth": 0.6}


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
    paths: list[Path] = []
    with matplotlib.rc_context(_ALWAYS_ALIKE):
        for name, draw_figure in FIGURES.items():
            figure = draw_figure(comparison, records)
            paths += [] if figure is None else _save(figure, folder, name)
    return paths


def save_plan(plan: MemoryPlan, folder: Path) -> list[Path]:
    """Draw a memory plan into `folder` and return the files written."""
    with matplotlib.rc_context(_ALWAYS_ALIKE):
        return _save(draw_plan(plan), folder, "plan")


def _save(figure: Figure, folder: Path, name: str) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for suffix, undated in (("svg", {"Date": None}), ("png", {"Software": None})):
        path = folder / f"{name}.{suffix}"
        figure.savefig(path, dpi=150, metadata=undated)
        paths.append(path)
    return paths
