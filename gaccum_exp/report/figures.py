"""The comparison as figures, each as SVG and as PNG: loss curves, memory, step time, the frontier.

What draws them is imported when it is needed: matplotlib takes a third of a second, for which nobody
should wait who begins to train.
"""

from collections.abc import Sequence
from pathlib import Path

from gaccum_exp.memory.plan import MemoryPlan
from gaccum_exp.records import RunRecord
from gaccum_exp.report.compare import Comparison


def draw(comparison: Comparison, runs: Sequence[RunRecord], folder: Path) -> list[Path]:
    """Draw every figure into `folder` and return the files written, nothing if no arm has an N.

    Args:
        comparison: what `compare` made of `runs`.
        runs: the arms of the sweep, as given to `compare`.
        folder: made if it does not exist; older figures in it are replaced.
    """
    if all(row.steps is None for row in comparison.rows):
        return []
    from gaccum_exp.report.drawing import save_figures

    records = {run.run_id: run for run in (*comparison.stored_runs, *runs)}
    return save_figures(comparison, records, folder)


def save_plan(plan: MemoryPlan, folder: Path) -> list[Path]:
    """Draw a memory plan into `folder` and return the files written."""
    from gaccum_exp.report.drawing import save_plan

    return save_plan(plan, folder)
