"""Draw a comparison as figures: loss curves, memory, step time, and of several settings memory against
time, of several global batches these.

To be imported when something is drawn: matplotlib takes a third of a second.
"""

import logging
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from gaccum_exp.memory.plan import MemoryPlan
from gaccum_exp.report.compare.batches import BatchComparison
from gaccum_exp.report.compare.comparison import Comparison
from gaccum_exp.report.figures import style
from gaccum_exp.report.figures.batch_figure import draw_batches
from gaccum_exp.report.figures.cost_bars import draw_memory, draw_step_time
from gaccum_exp.report.figures.frontier import draw_frontier, draw_plan
from gaccum_exp.report.figures.loss_curves import draw_loss_curves
from gaccum_exp.report.figures.panels import panels_of, subject
from gaccum_exp.tracking.records import RunRecord

log = logging.getLogger(__name__)
FIGURES = {
    "loss_curves": draw_loss_curves,
    "memory": draw_memory,
    "step_time": draw_step_time,
    "memory_frontier": draw_frontier,
}
"""By name; None is returned where there would be nothing but axes."""
NAMES = (*FIGURES, "batches")
"""Of all figures of a comparison."""


def draw(
    comparison: Comparison,
    runs: Sequence[RunRecord],
    folder: Path,
    batches: Sequence[BatchComparison] = (),
    formats: Sequence[str] = ("svg",),
    width: str | float = "double",
) -> list[Path]:
    """Draw every figure of a comparison that shows something and save it; return the files.

    Where none does, that is said once.

    Args:
        comparison: what is shown.
        runs: its runs, with their curves.
        folder: of the files.
        batches: the comparison of its global batches.
        formats: out of `style.FORMATS`.
        width: a name among `style.WIDTHS_INCHES`, or inches.
    """
    paths: list[Path] = []
    with style.styled(width):
        for name in NAMES:
            if name == "memory_frontier" and len(panels_of(comparison)) < 2:
                continue  # of one setting it is what memory and step time over N show
            figure = _drawn(name, comparison, runs, batches)
            paths += [] if figure is None else style.save(figure, folder, name, formats)
    if not paths and comparison.rows:
        log.warning("no figure is drawn: no arm got as far as a loss, a peak or a step time")
    return paths


def figure_of(
    name: str,
    comparison: Comparison,
    runs: Sequence[RunRecord],
    batches: Sequence[BatchComparison] = (),
    width: str | float = "double",
) -> Figure | None:
    """Return one figure of a comparison, laid out and with a canvas of its own; None: it shows nothing.

    Args:
        name: out of `NAMES`; the other arguments as of `draw`.
    """
    with style.styled(width):
        figure = _drawn(name, comparison, runs, batches)
        return None if figure is None else style.laid_out(figure)


def _drawn(
    name: str,
    comparison: Comparison,
    runs: Sequence[RunRecord],
    batches: Sequence[BatchComparison],
) -> Figure | None:
    records = {run.run_id: run for run in (*comparison.stored_runs, *runs)}
    if name == "batches":
        return draw_batches(batches, subject(comparison, records)) if batches else None
    return FIGURES[name](comparison, records)


def save_plan(
    plan: MemoryPlan,
    folder: Path,
    formats: Sequence[str] = ("svg",),
    width: str | float = "double",
) -> list[Path]:
    """Draw a memory plan, and return the files written; formats and width as of `draw`."""
    with style.styled(width):
        return style.save(draw_plan(plan), folder, "plan", formats)
