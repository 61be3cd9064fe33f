"""The figure of a memory plan keeps to its axes, whatever the budget."""

from pathlib import Path

import pytest
from matplotlib.text import Text

from gaccum_exp.memory.meter import FORWARD_BACKWARD, Peak
from gaccum_exp.memory.plan import MemoryPlan, Row
from gaccum_exp.memory.storages import ACTIVATIONS, CATEGORIES
from gaccum_exp.report.figures.frontier import draw_plan
from gaccum_exp.report.figures.save_figures import save_plan


@pytest.mark.parametrize(
    ("budget_bytes", "said"),
    [
        (12 * 2**30, "budget 12 GiB, above what is shown"),  # what is free, beside a model of KiB
        (1, "budget 1 B"),
        (3 * 2**15, "budget 96 KiB"),
        (7 * 2**15, "budget 224 KiB"),
    ],
)
@pytest.mark.parametrize("smallest", [2**15, 2**10])
def test_a_budget_far_from_the_peaks_leaves_them_their_room(
    budget_bytes: int, said: str, smallest: int, tmp_path: Path
) -> None:
    """Drawn without a warning, on a linear axis and on a logarithmic one; a far budget is said."""
    rows = [_row(1, 2**17), _row(2, 2**16), _row(4, smallest)]
    plan = MemoryPlan(4, "cpu", tuple(rows), budget_bytes, None, 4)
    (path,) = save_plan(plan, tmp_path, formats=("pdf",), width="single")
    assert path.suffix == ".pdf"
    figure = draw_plan(plan)
    assert any(text.get_text().startswith(said) for text in figure.findobj(Text))
    low, high = figure.get_axes()[0].get_ylim()
    assert high / 2**7 < 10
    assert low >= 0


def _row(steps: int, size: int) -> Row:
    parts = dict.fromkeys(CATEGORIES, 0) | {ACTIVATIONS: size}
    return Row(steps, 4 // steps, Peak(size, FORWARD_BACKWARD, parts))
