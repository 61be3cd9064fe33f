"""Figures show every arm, keep to their axes, and are drawn for any sweep."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib import image
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from gaccum_exp.report.compare.comparison import compare
from gaccum_exp.report.figures.cost_bars import draw_memory, draw_step_time
from gaccum_exp.report.figures.frontier import draw_frontier
from gaccum_exp.report.figures.loss_curves import draw_loss_curves
from gaccum_exp.report.figures.save_figures import FIGURES, draw
from gaccum_exp.report.figures.style import styled
from gaccum_exp.tracking.records import RunRecord
from tests.shortened import shortened

Arm = Callable[..., RunRecord]


def by_id(runs: list[RunRecord]) -> dict[str, RunRecord]:
    """Index runs as the drawing functions want them."""
    return {run.run_id: run for run in runs}


def curves(figure: Figure, label: str) -> dict[str, np.ndarray]:
    """Return run id -> drawn values on all axes of the level whose first axis has this label."""
    axes = figure.get_axes()
    levels = 2 if any("difference" in a.get_ylabel() for a in axes) else 1
    first = next((i for i, a in enumerate(axes) if label in a.get_ylabel()), len(axes))
    return {
        line.get_gid(): np.asarray(line.get_ydata())
        for a in axes[first::levels]
        for line in a.get_lines()
    }


def texts(figure: Figure) -> list[str]:
    """Return everything written on the figure."""
    return [text.get_text() for text in figure.findobj(Text) if text.get_text()]


def sweep(arm: Arm, n_arms: int) -> list[RunRecord]:
    """Return arms with N = 1, 2, … for any number; three reductions for 36 and more."""
    if n_arms < 36:
        return [arm(n, n_losses=20) for n in range(1, n_arms + 1)]
    reductions = ("mean", "sum", "global_mean")
    return [arm(n, reduction=r, n_losses=20) for r in reductions for n in range(1, n_arms // 3 + 1)]


@pytest.mark.parametrize("n_arms", [1, 4, 12, 30, 36])
def test_loss_figure_has_as_many_curves_as_arms(arm: Arm, n_arms: int) -> None:
    """Each arm's loss and each candidate's difference are drawn once, with the recorded values.

    Of differences the largest up to each step, so that no step without one hides the others.
    """
    runs = sweep(arm, n_arms)
    comparison = compare(runs)
    figure = draw_loss_curves(comparison, by_id(runs))
    losses = curves(figure, "train loss")
    assert losses.keys() == {run.run_id for run in runs}
    for run in runs:
        assert tuple(losses[run.run_id]) == run.curves["train/loss"].values
    gaps = curves(figure, "difference")
    assert gaps.keys() == {row.run_id for row in comparison.rows if row.role == "candidate"}
    for row in comparison.rows:
        if row.role == "candidate":
            assert gaps[row.run_id][-1] == row.max_loss_gap
            assert (np.diff(gaps[row.run_id]) >= 0).all()


@pytest.mark.parametrize("n_arms", [4, 12, 30])
def test_arms_are_told_apart_without_colour(arm: Arm, n_arms: int) -> None:
    """No two arms of a panel have both the same dashes and the same marker, up to 28 N."""
    runs = sweep(arm, n_arms)
    figure = draw_loss_curves(compare(runs), by_id(runs))
    lines = figure.get_axes()[0].get_lines()
    looks = {(line.get_marker(), str(line._unscaled_dash_pattern)) for line in lines}
    assert len(looks) == min(n_arms, 28)


@pytest.mark.parametrize(
    ("n_arms", "width"),
    shortened(
        [(1, "double"), (4, "double"), (4, "single"), (4, "talk"), (12, "double"), (12, "single"),
         (30, "double"), (36, "double"), (36, "single")],
        [4, 36],
    ),
)  # fmt: skip
@pytest.mark.parametrize("name", sorted(FIGURES))
def test_labels_do_not_overlap(
    arm: Arm, name: str, n_arms: int, width: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once laid out, no two pieces of text touch, and none leaves the figure."""
    runs = sweep(arm, n_arms)
    runs[-1] = arm(30, status="FAILED", drop=("memory/peak_bytes", "time/step_s"), run_id="failed")
    drawn: list[tuple[str, Bbox]] = []
    draw_text = Text.draw

    def note(self: Text, *args: Any) -> None:
        if self.get_text() and self.get_visible():
            drawn.append((self.get_text(), self.get_window_extent()))
        draw_text(self, *args)

    monkeypatch.setattr(Text, "draw", note)
    with styled(width):
        figure = FIGURES[name](compare(runs), by_id(runs))
        if figure is None:  # no bar, and no two N to be set against each other
            assert (n_arms, name != "loss_curves") == (1, True)
            return
        FigureCanvasAgg(figure).draw()
    assert len(drawn) > 5
    for (one, a), (other, b) in combinations(drawn, 2):
        overlap = Bbox.intersection(a, b)
        assert overlap is None or min(overlap.width, overlap.height) < 0.5, (one, other)
    for words, box in drawn:
        assert box.x0 >= -1, words
        assert box.x1 <= figure.bbox.x1 + 1, words
        assert box.y0 >= -1, words
        assert box.y1 <= figure.bbox.y1 + 1, words


def test_zero_differences_have_a_place_on_the_log_axis(arm: Arm) -> None:
    """A step without difference is drawn at 0, below the smallest decade, and labelled."""
    same = arm(2, losses=[2.0, 1.0, 0.5])
    runs = [arm(1, losses=[2.0, 1.0, 0.5]), same, arm(4, losses=[2.0, 1.0 + 1e-6, 0.5 + 1e-3])]
    figure = draw_loss_curves(compare(runs), by_id(runs))
    axes = figure.get_axes()[1]
    assert axes.get_yscale() == "symlog"
    assert axes.get_ylim()[0] < 0
    assert list(curves(figure, "difference")[same.run_id]) == [0, 0, 0]
    FigureCanvasAgg(figure).draw()
    assert "0" in [tick.label1.get_text() for tick in axes.yaxis.get_major_ticks()]


def test_without_any_zero_the_axis_is_plainly_logarithmic(arm: Arm) -> None:
    """Nothing linear is mixed in where nothing needs it."""
    runs = [arm(1, losses=[2.0, 1.0]), arm(2, losses=[2.1, 1.001])]
    figure = draw_loss_curves(compare(runs), by_id(runs))
    assert figure.get_axes()[1].get_yscale() == "log"


def test_identical_curves_are_said_to_be(arm: Arm) -> None:
    """Where every difference is zero the figure says so instead of showing an empty log axis."""
    runs = [arm(1, noise=0), arm(2, noise=0)]
    assert "no difference at any step" in texts(draw_loss_curves(compare(runs), by_id(runs)))


def test_the_envelope_of_controls_is_shaded_behind_the_differences(arm: Arm, control: Arm) -> None:
    """As measured, once per reference, with its entry in the legend; the controls have no curve."""
    runs = [arm(n, seed=s) for n in (1, 2, 4) for s in (0, 1)]
    controls = [control(run, i, gap) for run in runs[:2] for i, gap in ((1, 1e-6), (2, 3e-6))]
    comparison = compare([*runs, *controls])
    figure = draw_loss_curves(comparison, by_id([*runs, *controls]))
    top, bottom = figure.get_axes()
    assert {line.get_gid() for line in top.get_lines()} == {run.run_id for run in runs}
    drawn = {line.get_gid(): line for line in bottom.get_lines()}
    candidates = {run.run_id for run in runs[2:]}
    assert drawn.keys() == candidates | {f"limit-{run.run_id}" for run in runs[:2]}
    shades = bottom.collections
    assert len(shades) == len(comparison.envelopes) == 2
    for shade, envelope in zip(shades, comparison.envelopes, strict=True):
        outline = shade.get_paths()[0].vertices
        assert outline[:, 1].max() == pytest.approx(envelope.values[-1]) == pytest.approx(3e-6)
        assert shade.get_zorder() < min(drawn[name].get_zorder() for name in candidates)
        limit = drawn[f"limit-{envelope.reference_run_id}"].get_ydata()
        assert tuple(limit) == envelope.limits
        assert bottom.get_ylim()[1] >= max(envelope.limits)
    assert "rounding alone (2 controls)" in texts(figure)
    assert not any("rounding" in text for text in texts(draw_loss_curves(compare(runs), by_id(runs))))


@pytest.mark.parametrize("gap", [0.0, 1e-9, 10.0])
def test_any_envelope_can_be_drawn(arm: Arm, control: Arm, gap: float, tmp_path: Path) -> None:
    """One of width zero, one far below and one far above the differences, on either kind of axis."""
    for others in ([arm(1, noise=0), arm(2, noise=0)], [arm(1), arm(2, noise=1e-3)]):
        runs = [*others, control(others[0], 1, gap)]
        comparison = compare(runs)
        assert len(draw(comparison, runs, tmp_path)) == 2 * len(FIGURES) - 2
        low, high = draw_loss_curves(comparison, by_id(runs)).get_axes()[1].get_ylim()
        assert low < high
        assert high >= gap
        assert low <= gap or gap == 0


def test_the_legend_names_what_is_not_sound(arm: Arm, audited: Arm) -> None:
    """A biased arm is called so where its curve is; an equivalent one needs no word."""
    runs = [arm(1), audited(arm(2), "equivalent"), audited(arm(4), "biased")]
    written = texts(draw_loss_curves(compare(runs), by_id(runs)))
    assert {"N = 2", "N = 4 (biased)"} <= set(written)


def test_memory_is_stacked_to_the_recorded_split(arm: Arm) -> None:
    """Bars of a panel add up to each arm's categories; the marker stands at the total."""
    runs = [arm(n) for n in (1, 2, 8)]
    figure = draw_memory(compare(runs), by_id(runs))
    axes = figure.get_axes()[0]
    assert "MiB" in axes.get_ylabel()
    heights = np.array([patch.get_height() for patch in axes.patches]).reshape(3, 5)
    names = ("parameters", "gradients", "optimizer_state", "activations", "temporaries")
    for run, bar in zip(runs, heights, strict=True):
        assert bar == pytest.approx([run.metrics[f"memory/{n}_bytes"] / 2**20 for n in names])
    bottoms = np.array([patch.get_y() for patch in axes.patches]).reshape(3, 5)
    assert bottoms == pytest.approx(np.cumsum(heights, axis=1) - heights)
    totals = {line.get_gid(): line.get_ydata()[0] for line in axes.get_lines()}
    for run in runs:
        assert totals[run.run_id] == pytest.approx(run.metrics["memory/peak_bytes"] / 2**20)
    markers = {line.get_gid(): line.get_marker() for line in axes.get_lines()}
    assert markers["mean-256-s0-n1"] != markers["mean-256-s0-n8"]
    written = texts(figure)
    assert "total, peak in optimizer step" in written
    assert "total, peak in forward/backward" in written
    assert {"1.00 ×", "0.65 ×", "0.39 ×"} <= set(written)


def test_step_time_shows_the_median_of_seeds_and_each(arm: Arm) -> None:
    """The bar is the median over repetitions, the dots are the repetitions."""
    runs = [arm(n, seed=s) for n in (1, 4) for s in (0, 1, 20)]
    axes = draw_step_time(compare(runs), by_id(runs)).get_axes()[0]
    times = sorted(1e3 * run.metrics["time/step_s"] for run in runs if "n4" in run.run_id)
    assert axes.patches[1].get_height() == pytest.approx(times[1])
    assert sorted(axes.get_lines()[1].get_ydata()) == pytest.approx(times)
    assert "ms" in axes.get_ylabel()


def test_a_time_has_its_spread_and_a_ratio_only_where_one_can_be_stated(arm: Arm) -> None:
    """Quartiles as whiskers; no ratio of a few windows, and none where the quartiles overlap."""
    runs = [arm(n) for n in (1, 2, 4, 8)]
    alike = {"time/step_s": 0.0124, "time/step_low_s": 0.012, "time/step_high_s": 0.013}
    runs[1] = replace(runs[1], metrics={**runs[1].metrics, **alike})
    runs[2] = replace(runs[2], metrics={**runs[2].metrics, "time/step_windows": 3.0})
    figure = draw_step_time(compare(runs), by_id(runs))
    assert figure is not None
    (axes,) = figure.get_axes()
    written = [text.get_text() for text in axes.texts]
    assert written == ["1.00 ×", "≈", "1.21 ×"]
    ends = [line.get_segments()[0][:, 1] for line in axes.collections]
    assert ends[1] == pytest.approx([12, 13])
    said = " ".join(" ".join(texts(figure)).split())
    assert "no measurable difference to the reference" in said
    assert "Without a ratio: fewer than 10 windows were timed" in said


def test_the_resident_set_is_named_as_what_it_is(arm: Arm) -> None:
    """It is no peak of a window, and stands in a note beside the tracked tensors."""
    runs = [arm(1), arm(4)]
    said = " ".join(" ".join(texts(draw_memory(compare(runs), by_id(runs)))).split())
    assert "Resident set of the process, libraries and data included: 668 MiB." in said


@pytest.mark.parametrize("name", sorted(FIGURES.keys() - {"memory_frontier"}))  # it has no ratios
def test_borrowed_references_are_named_and_in_view(arm: Arm, name: str) -> None:
    """A stored reference is drawn, called stored, and within the axes; a stand-in is called so."""
    runs, stored = [arm(2), arm(4)], arm(1, run_id="stored")
    comparison = compare(runs, [stored])
    figure = FIGURES[name](comparison, by_id([*runs, stored]))
    assert any("stored" in text for text in texts(figure)[:-1])
    axes = figure.get_axes()[0]
    tops = [patch.get_height() + patch.get_y() for patch in axes.patches]
    assert max(tops, default=0) < axes.get_ylim()[1]
    figure = FIGURES[name](compare(runs), by_id(runs))
    assert any("stand-in" in text for text in texts(figure))
    assert any("stands in" in text for text in texts(figure))


def test_many_settings_share_a_panel_per_reduction(arm: Arm) -> None:
    """Thirty learning rates do not make thirty panels, and still every arm is drawn."""
    runs = [
        arm(n, params={"optimizer.lr": str(lr)}, run_id=f"{lr}-{n}") for n in (1, 2) for lr in range(15)
    ]
    figure = draw_loss_curves(compare(runs), by_id(runs))
    assert len(figure.get_axes()) == 2
    assert len(curves(figure, "train loss")) == 30
    assert "mean, 15 settings" in texts(figure)


def test_broken_arms_are_drawn_as_far_as_they_go(arm: Arm, tmp_path: Path) -> None:
    """NaN, infinite and missing curves and costs, and a run without a config, raise nothing."""
    runs = [
        arm(1, losses=[2.0, 1.0]),
        arm(2, losses=[math.inf, math.nan], status="FAILED", tags={"failure": "NaN at step 2"}),
        arm(4, drop=("train/loss", "time/step_s", "memory/peak_bytes"), status="RUNNING"),
        arm(8, losses=[1e30, 3.0], drop=("memory/activations_bytes", "memory.peak_phase")),
        RunRecord("dead", "1", "dead", "FAILED", 0, {}, {}, {}),
    ]
    assert len(draw(compare(runs), runs, tmp_path)) == 2 * len(FIGURES) - 2
    alone = runs[1:2]
    names = {path.stem for path in draw(compare(alone), alone, tmp_path / "alone")}
    assert names == {"memory", "step_time"}


def test_a_sweep_that_left_nothing_draws_nothing_and_says_so_once(
    arm: Arm, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Failed before the first step, all arms have configurations only."""
    gone = ("train/loss", "time/step_s", "memory/peak_bytes")
    runs = [arm(n, status="FAILED", drop=gone) for n in (1, 2, 4)]
    assert draw(compare(runs), runs, tmp_path / "figures") == []
    assert not (tmp_path / "figures").exists()
    assert [record.getMessage() for record in caplog.records] == [
        "no figure is drawn: no arm got as far as a loss, a peak or a step time"
    ]


@pytest.mark.parametrize("name", sorted(FIGURES))
def test_no_axes_are_empty(arm: Arm, name: str) -> None:
    """Of a reduction whose arms all failed, or were interrupted, there is a note and no panel."""
    gone = ("train/loss", "time/step_s", "memory/peak_bytes")
    runs = [arm(n, n_losses=9) for n in (1, 2)]
    runs += [arm(n, reduction="sum", status="KILLED", drop=gone) for n in (1, 2)]
    figure = FIGURES[name](compare(runs), by_id(runs))
    assert figure is not None
    for axes in figure.get_axes():
        assert axes.lines or axes.patches
    said = " ".join(" ".join(texts(figure)).split())
    assert ("recorded: sum." in said) == (name != "memory_frontier")
    lone = [arm(1, n_losses=9)]
    figure = draw_loss_curves(compare(lone), by_id(lone))
    assert figure is not None
    assert len(figure.get_axes()) == 1, "one arm has no difference"


def test_no_line_passes_through_an_n_that_is_missing(arm: Arm) -> None:
    """The curve of memory against time is broken where an arm failed."""
    runs = [arm(n) for n in (1, 2, 8, 16)]
    runs.append(arm(4, status="FAILED", drop=("time/step_s",)))
    figure = draw_frontier(compare(runs), by_id(runs))
    assert figure is not None
    measured = figure.get_axes()[0].get_lines()[0]
    assert np.isnan(np.asarray(measured.get_xdata())).tolist() == [False, False, True, False, False]
    assert {"1", "2", "8", "16"} <= set(texts(figure))
    assert "4" not in texts(figure)


def test_the_axis_of_time_holds_every_quartile(arm: Arm) -> None:
    """However far one is from its median."""
    runs = [arm(n) for n in (1, 2)]
    wide = {"time/step_low_s": 1e-4, "time/step_high_s": 9.0, "time/step_windows": 20.0}
    runs[0] = replace(runs[0], metrics={**runs[0].metrics, **wide})
    figure = draw_frontier(compare(runs), by_id(runs))
    assert figure is not None
    (axes,) = figure.get_axes()
    low, high = axes.get_xlim()
    ends = [x for drawn in axes.collections for path in drawn.get_paths() for x, _ in path.vertices]
    assert low < min(ends) < max(ends) < high


def test_memory_stands_against_time_planned_beside_measured(arm: Arm) -> None:
    """Both at the time that was measured, in the units of the axes."""
    runs = [arm(n) for n in (1, 2, 8)]
    figure = draw_frontier(compare(runs), by_id(runs))
    assert figure is not None
    (axes,) = figure.get_axes()
    assert ("MiB" in axes.get_ylabel(), "ms" in axes.get_xlabel()) == (True, True)
    measured, planned = axes.get_lines()
    for line, metric in ((measured, "memory/peak_bytes"), (planned, "memory/predicted_peak_bytes")):
        assert line.get_xdata() == pytest.approx([1e3 * run.metrics["time/step_s"] for run in runs])
        assert line.get_ydata() == pytest.approx([run.metrics[metric] / 2**20 for run in runs])


@pytest.mark.parametrize("arms", [1, 2])
def test_few_bars_stand_in_the_middle_of_their_axes(arm: Arm, arms: int) -> None:
    """And no panel is mostly empty beside them."""
    runs = [arm(n) for n in (1, 4)[:arms]]
    figure = draw_step_time(compare(runs), by_id(runs))
    assert figure is not None
    (axes,) = figure.get_axes()
    low, high = axes.get_xlim()
    assert (low + high) / 2 == pytest.approx((arms - 1) / 2)
    FigureCanvasAgg(figure).draw()
    assert axes.bbox.width < 0.5 * figure.bbox.width


def test_without_controls_the_last_digit_of_the_loss_is_shaded(arm: Arm, control: Arm) -> None:
    """Of float32 losses, as large as their largest up to each step; controls show more."""
    losses = [float(np.float32(x)) for x in (2.3, 1.1, 0.4)]
    other = [losses[0], float(np.nextafter(np.float32(losses[1]), np.float32(9))), losses[2]]
    runs = [arm(1, losses=losses), arm(2, losses=other)]
    figure = draw_loss_curves(compare(runs), by_id(runs))
    assert figure is not None
    (band,) = figure.get_axes()[1].collections
    assert band.get_paths()[0].vertices[:, 1].max() == pytest.approx(2.0**-22)
    assert "last digit of the loss" in texts(figure)
    runs.append(control(runs[0], 1, 1e-5))
    figure = draw_loss_curves(compare(runs), by_id(runs))
    assert figure is not None
    assert "last digit of the loss" not in texts(figure)


def test_every_figure_is_written_as_svg_and_png(arm: Arm, tmp_path: Path) -> None:
    """Two files each with a picture in them, the same bytes when drawn again; of a single setting none
    of memory against time, which is what two of the others show."""
    runs = [arm(n, n_losses=10, reduction=r) for n in (1, 2) for r in ("mean", "global_mean")]
    alone = draw(compare(runs[::2]), runs[::2], tmp_path / "alone", formats=("svg",))
    assert {path.stem for path in alone} == {"loss_curves", "memory", "step_time"}
    comparison = compare(runs)
    both = partial(draw, comparison, folder=tmp_path / "figures", formats=("svg", "png"))
    paths = both(runs=runs)
    assert {path.name for path in paths} == {
        f"{name}.{suffix}"
        for name in ("loss_curves", "memory", "step_time", "memory_frontier")
        for suffix in ("svg", "png")
    }
    for path in paths:
        if path.suffix == ".png":
            assert image.imread(path).std() > 0.05
        else:
            assert path.read_text(encoding="utf-8").count("<path") > 8
    before = [path.read_bytes() for path in paths]
    assert [p.read_bytes() for p in both(runs=runs[::-1])] == before


def test_an_empty_sweep_draws_nothing(tmp_path: Path) -> None:
    """No arm, no file."""
    assert draw(compare([]), [], tmp_path) == []
    assert list(tmp_path.iterdir()) == []
