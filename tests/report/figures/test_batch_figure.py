"""The figure of global batches shows the numbers of the table, and nothing in it overlaps."""

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from gaccum_exp.report.compare.batches import BatchComparison, compare_batches
from gaccum_exp.report.compare.comparison import compare
from gaccum_exp.report.figures import save_figures
from gaccum_exp.report.figures.batch_figure import draw_batches
from gaccum_exp.report.figures.save_figures import draw
from gaccum_exp.tracking import metrics
from gaccum_exp.tracking.records import Curve, RunRecord

Arm = Callable[..., RunRecord]
SAMPLES = 4096


def trained(arm: Arm, batch: int, rate: float, seed: int, high: float | None, rule: str) -> RunRecord:
    """Return an arm of one global batch with evaluations and, of several micro-batches, noise."""
    steps = SAMPLES // batch
    final = 0.2 + abs(math.log2(rate / 0.1)) + 0.01 * seed + 1e-4 * batch
    run_id = f"{batch}-{rate}-{seed}-{rule}"
    run = arm(
        batch // 32, global_batch=batch, seed=seed, n_losses=steps, run_id=run_id,
        params={"optimizer.lr": str(rate), "train.beta2_rule": rule}, tags={"training_samples": "2048"},
    )  # fmt: skip
    at = tuple(range(4, steps + 1, 4))
    curves = {
        **run.curves,
        "eval/loss": Curve(at, tuple(final + 2 * math.exp(-9 * k / steps) for k in at)),
    }
    if batch > 32:
        curves[metrics.NOISE_TRACE] = curves[metrics.NOISE_SCALE] = Curve((steps,), (90.0,))
        curves[metrics.NOISE_SCALE_LOW] = Curve((steps,), (70.0,))
        if high is not None:
            curves[metrics.NOISE_SCALE_HIGH] = Curve((steps,), (high,))
    return replace(run, curves=curves)


def runs_of(
    arm: Arm,
    batches: tuple[int, ...] = (32, 128, 512),
    rates: tuple[float, ...] = (0.05, 0.1, 0.2),
    seeds: int = 2,
    high: float | None = 120.0,
    rules: tuple[str, ...] = ("fixed",),
) -> list[RunRecord]:
    """Return a sweep over batches, rates, seeds and rules."""
    return [
        trained(arm, batch, rate, seed, high, rule)
        for batch in batches for rate in rates for seed in range(seeds) for rule in rules
    ]  # fmt: skip


def compared(runs: list[RunRecord]) -> tuple[BatchComparison, ...]:
    """Compare their global batches."""
    return compare_batches(compare(runs), runs)


def lines_of(figure: Figure, panel: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return what is drawn into a panel, by batch."""
    lines = figure.get_axes()[panel].get_lines()
    return {
        str(line.get_gid()): (np.asarray(line.get_xdata()), np.asarray(line.get_ydata()))
        for line in lines
        if str(line.get_gid()).startswith("batch-")
    }


def texts(figure: Figure) -> str:
    """Return everything written on the figure."""
    return " ".join(" ".join(t.get_text() for t in figure.findobj(Text)).split())


def test_every_batch_has_a_curve_on_every_axis(arm: Arm) -> None:
    """The mean over the seeds of its best rate, against samples, optimizer steps and time."""
    (found,) = compared(runs_of(arm))
    figure = draw_batches([found], "CNN on Digits")
    for panel, axis in enumerate(("samples", "steps", "seconds")):
        drawn = lines_of(figure, panel)
        assert drawn.keys() == {"batch-32", "batch-128", "batch-512"}
        for row in found.rows:
            at, mean = drawn[f"batch-{row.global_batch_size}"]
            first, second = (of["eval/loss"] for of in row.curves)
            unit = 1.0 if axis != "seconds" or found.points["seconds"].at >= 1 else 1e-3  # type: ignore[operator]
            assert at * unit == pytest.approx(first.against(axis))  # type: ignore[arg-type]
            assert mean == pytest.approx((first.values + second.values) / 2)


def test_losses_at_equal_samples_stand_against_the_batch(arm: Arm) -> None:
    """With the critical batch and the noise scale of the best one that has it, and its interval."""
    (found,) = compared(runs_of(arm, seeds=2))
    figure = draw_batches([found], "CNN on Digits")
    drawn = lines_of(figure, 3)
    for row in found.rows:
        ((x,), (y,)) = drawn[f"batch-{row.global_batch_size}"]
        assert (x, y) == (row.global_batch_size, row.losses["samples"].mean)
    assert found.critical.size == 128
    written = texts(figure)
    assert "critical batch: 128" in written
    assert "noise scale, batch 128: 90 (70-120)" in written
    last = figure.get_axes()[3]
    shade = last.patches[0].get_extents().transformed(last.transData.inverted())
    assert (shade.x0, shade.x1) == pytest.approx((70, 120))


def test_an_unbounded_interval_reaches_the_end_of_the_axis(arm: Arm) -> None:
    """And its lower end is said."""
    figure = draw_batches(compared(runs_of(arm, high=None)), "CNN on Digits")
    last = figure.get_axes()[3]
    shade = last.patches[0].get_extents().transformed(last.transData.inverted())
    assert shade.x1 == pytest.approx(last.get_xlim()[1])
    assert "noise scale, batch 128: >70" in texts(figure)


def test_what_is_not_resolved_is_hollow_and_said(arm: Arm) -> None:
    """No critical batch is marked where rates leave it open, nor seconds where these are not alike."""
    runs = runs_of(arm, rates=(0.1, 0.2))
    runs = [
        replace(run, tags={**run.tags, "device": run.params["data.global_batch_size"]}) for run in runs
    ]
    figure = draw_batches(compared(runs), "CNN on Digits")
    written = texts(figure)
    assert "critical batch: not resolved, because the best rate for the global batches" in written
    assert "Hollow: " in written
    assert "At equal seconds nothing is compared: the arms ran under several devices." in written
    assert len(figure.get_axes()) == 3, "no empty one in place of seconds"


@pytest.mark.parametrize(
    "shape",
    [
        {"batches": (32, 64)},
        {"rates": (0.1, 0.2), "high": None},
        {"batches": tuple(32 * 2**k for k in range(6)), "rules": ("fixed", "half_life")},
    ],
)
def test_labels_do_not_overlap(arm: Arm, shape: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Once laid out, no two pieces of text touch, and none leaves the figure."""
    figure = draw_batches(compared(runs_of(arm, **shape)), "CNN on Digits, global batch 32 to 1024")
    drawn: list[tuple[str, Bbox]] = []
    draw_text = Text.draw

    def note(self: Text, *args: Any) -> None:
        if self.get_text() and self.get_visible():
            drawn.append((self.get_text(), self.get_window_extent()))
        draw_text(self, *args)

    monkeypatch.setattr(Text, "draw", note)
    FigureCanvasAgg(figure).draw()
    assert len(drawn) > 20
    for (one, a), (other, b) in combinations(drawn, 2):
        overlap = Bbox.intersection(a, b)
        assert overlap is None or min(overlap.width, overlap.height) < 0.5, (one, other)
    for said, box in drawn:
        assert box.x0 >= -1, said
        assert box.x1 <= figure.bbox.x1 + 1, said
        assert box.y0 >= -1, said
        assert box.y1 <= figure.bbox.y1 + 1, said


def test_it_is_saved_only_where_batches_differ(
    arm: Arm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As SVG and as PNG, the same bytes every time."""
    monkeypatch.setattr(save_figures, "NAMES", ("batches",))
    runs = runs_of(arm)
    comparison, found = compare(runs), compared(runs)
    paths = draw(comparison, runs, tmp_path, found, ("svg", "png"))
    assert {path.name for path in paths} == {"batches.svg", "batches.png"}
    before = [path.read_bytes() for path in paths]
    assert [
        path.read_bytes() for path in draw(comparison, runs, tmp_path, found, ("svg", "png"))
    ] == before
    assert draw(comparison, runs, tmp_path) == []
