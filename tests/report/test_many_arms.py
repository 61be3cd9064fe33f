"""Sweeps of hundreds of arms: tables and figures sum up, and nothing that stands out is lost."""

import csv
import dataclasses
import io
import math
import statistics
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from matplotlib.legend import Legend
from rich.console import Console

from gaccum_exp.report.arm_limit import MOST_ARMS, spread
from gaccum_exp.report.compare.comparison import Comparison, compare, write_csv
from gaccum_exp.report.figures.curve_data import curve_range
from gaccum_exp.report.figures.loss_curves import draw_loss_curves
from gaccum_exp.report.figures.panels import groups_of, is_crowded, panels_of, thinned
from gaccum_exp.report.figures.save_figures import FIGURES
from gaccum_exp.report.figures.style import styled
from gaccum_exp.report.text.merged_rows import lines_of
from gaccum_exp.report.text.table import render
from gaccum_exp.tracking.records import Curve, RunRecord

Arm = Callable[..., RunRecord]


def of_seeds(arm: Arm, seeds: int = 50) -> list[RunRecord]:
    """Return four N for each seed."""
    return [arm(n, seed=seed, n_losses=5) for seed in range(seeds) for n in (1, 2, 4, 8)]


def of_splits(arm: Arm, count: int = 200) -> list[RunRecord]:
    """Return as many N."""
    return [arm(n, n_losses=5) for n in range(1, count + 1)]


def printed(comparison: Comparison) -> str:
    """Return the table as a terminal of 80 columns shows it."""
    console = Console(file=io.StringIO(), width=80)
    console.print(render(comparison))
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_few_arms_have_a_line_each(arm: Arm) -> None:
    """Nothing is summed up and nothing is said."""
    rows = compare(of_seeds(arm, MOST_ARMS // 4)).rows
    condensed = lines_of(rows)
    assert list(condensed.rows) == list(rows)
    assert (condensed.counts, condensed.note) == ({}, "")


def test_arms_that_differ_in_the_seed_share_a_line(arm: Arm) -> None:
    """Medians of losses and times, the largest gap and peak; one line for each N."""
    rows = compare(of_seeds(arm)).rows
    condensed = lines_of(rows)
    assert [row.accum_steps for row in condensed.rows] == [1, 2, 4, 8]
    assert [condensed.counts[row.run_id] for row in condensed.rows] == [50] * 4
    assert [row.is_reference for row in condensed.rows] == [True, False, False, False]
    for line in condensed.rows:
        alike = [row for row in rows if row.accum_steps == line.accum_steps]
        for name in ("train_loss", "eval_loss", "step_s"):
            assert getattr(line, name) == statistics.median(getattr(row, name) for row in alike)
        assert line.peak_bytes == max(row.peak_bytes or 0 for row in alike)
        gaps = [row.max_loss_gap for row in alike if row.max_loss_gap is not None]
        assert line.max_loss_gap == max(gaps, default=None)
    assert "200 arms on 4 lines" in condensed.note


def test_what_stands_out_among_repetitions_is_what_their_line_shows(
    arm: Arm, audited: Callable[..., RunRecord]
) -> None:
    """One biased arm of fifty, one that failed, and one whose gap is not a number."""
    runs = [audited(run, "equivalent") for run in of_seeds(arm)]
    at = {(int(run.params["seed"]), int(run.params["accum.steps"])): i for i, run in enumerate(runs)}
    runs[at[17, 4]] = audited(runs[at[17, 4]], "biased", cause="BatchNorm")
    runs[at[30, 2]] = dataclasses.replace(runs[at[30, 2]], status="FAILED")
    curve = runs[at[31, 8]].curves["train/loss"]
    lost = Curve(curve.global_steps, (*curve.values[:-1], math.nan))
    runs[at[31, 8]] = dataclasses.replace(runs[at[31, 8]], curves={"train/loss": lost})
    lines = {row.accum_steps: row for row in lines_of(compare(runs).rows).rows}
    assert (lines[4].verdict, lines[4].cause) == ("biased", "BatchNorm")
    assert lines[2].status == "FAILED"
    gap = lines[8].max_loss_gap
    assert gap is not None
    assert math.isnan(gap)


def test_of_too_many_n_the_reference_and_what_stands_out_are_kept(
    arm: Arm, audited: Callable[..., RunRecord]
) -> None:
    """And it is said how many are not shown."""
    runs = [audited(run, "equivalent") for run in of_splits(arm)]
    runs[149] = audited(runs[149], "biased", cause="BatchNorm")
    condensed = lines_of(compare(runs).rows)
    shown = [row.accum_steps for row in condensed.rows]
    assert len(shown) == MOST_ARMS
    assert {1, 150} <= set(shown)
    assert shown == sorted(shown, key=lambda n: n or 0)
    assert f"{200 - MOST_ARMS} of 200 arms are left out" in condensed.note
    by_gap = sorted((row.max_loss_gap or 0, row.accum_steps) for row in compare(runs).rows)
    assert {steps for _, steps in by_gap[-MOST_ARMS + 8 :]} <= set(shown)


def test_many_arms_make_a_table_that_fits_a_terminal_and_a_csv_that_has_them_all(
    arm: Arm, tmp_path: Path
) -> None:
    """80 columns, a column that says how many runs a line is of."""
    for runs in (of_seeds(arm), of_splits(arm)):
        comparison = compare(runs)
        lines = printed(comparison).splitlines()
        assert max(map(len, lines)) <= 80
        assert len(lines) < MOST_ARMS + 30
        with write_csv(comparison, tmp_path / "comparison.csv").open() as file:
            assert len(list(csv.DictReader(file))) == 200
    assert " 50 " in printed(compare(of_seeds(arm)))


def test_a_crowd_is_its_median_and_range_where_there_are_values() -> None:
    """Curves of different steps; what is not finite counts as missing."""
    curves = [
        (np.array([1, 2, 3]), np.array([1.0, 5.0, math.nan])),
        (np.array([1, 2, 3]), np.array([3.0, math.inf, math.nan])),
        (np.array([1, 2, 4]), np.array([8.0, -math.inf, 2.0])),
    ]
    global_steps, low, median, high = curve_range(curves)
    assert global_steps.tolist() == [1, 2, 3, 4]
    np.testing.assert_array_equal(low, [1, 5, math.nan, 2])
    np.testing.assert_array_equal(median, [3, 5, math.nan, 2])
    np.testing.assert_array_equal(high, [8, 5, math.nan, 2])


def test_a_crowds_median_is_the_plain_one() -> None:
    """Of an even and of an odd number of curves."""
    steps, values = np.arange(1, 30), np.random.default_rng(0).normal(size=(6, 29))
    for count in (5, 6):
        _, _, median, _ = curve_range([(steps, line) for line in values[:count]])
        np.testing.assert_allclose(median, np.median(values[:count], axis=0), rtol=1e-15)


def test_neighbouring_n_share_a_style_where_there_are_too_many(arm: Arm) -> None:
    """Every N is in one group, the least one alone."""
    few, many = panels_of(compare(of_splits(arm, MOST_ARMS))), panels_of(compare(of_splits(arm)))
    assert not is_crowded(few)
    assert groups_of(few) == [(n,) for n in range(1, MOST_ARMS + 1)]
    assert is_crowded(many)
    groups = groups_of(many)
    assert groups[0] == (1,)
    assert [n for group in groups for n in group] == list(range(1, 201))
    assert len(groups) <= 12


@pytest.mark.parametrize("shape", [of_seeds, of_splits])
def test_a_crowded_figure_has_few_lines_and_a_short_legend(
    arm: Arm, shape: Callable[[Arm], list[RunRecord]]
) -> None:
    """The median of each N, or of neighbouring ones, within the range of its arms."""
    runs = shape(arm)
    with styled():
        figure = draw_loss_curves(compare(runs), {run.run_id: run for run in runs})
    assert figure is not None
    (legend,) = figure.findobj(Legend)
    assert len(legend.get_texts()) <= 14
    (axes, _) = figure.get_axes()
    lines = {str(line.get_gid()): line for line in axes.get_lines()}
    assert len(lines) <= 12
    ones = [run.curves["train/loss"].values for run in runs if run.params["accum.steps"] == "1"]
    drawn = np.asarray(lines["median-1"].get_ydata())
    np.testing.assert_allclose(drawn, np.median(np.array(ones), axis=0))


@pytest.mark.parametrize("name", sorted(FIGURES))
def test_every_figure_of_many_arms_is_no_wider_than_a_page_of_bars(arm: Arm, name: str) -> None:
    """Half a metre at most."""
    for runs in (of_seeds(arm), of_splits(arm)):
        with styled():
            figure = FIGURES[name](compare(runs), {run.run_id: run for run in runs})
        assert figure is not None
        assert figure.get_size_inches()[0] < 20


def test_of_many_bars_some_are_drawn_the_references_among_them(arm: Arm) -> None:
    """And it is said how many."""
    (panel,) = panels_of(compare(of_splits(arm)))
    (thinner,), (said,) = thinned([panel], 48)
    assert 1 in thinner.by_n
    assert 200 in thinner.by_n
    assert len(thinner.by_n) <= 48
    assert said == f"Of 200 N, {len(thinner.by_n)} are drawn; comparison.csv has all of them."
    assert thinned([panel], 200) == ([panel], ())


@pytest.mark.parametrize("most", [3, 7, 16, 48])
def test_n_are_spread_by_ratio(most: int) -> None:
    """The least, the greatest, and no more than asked for."""
    for every in (list(range(1, 201)), [2**i for i in range(60)], list(range(150, 250))):
        chosen = spread(every, most)
        assert len(chosen) <= most
        assert (chosen[0], chosen[-1]) == (every[0], every[-1])
        assert chosen == sorted(set(chosen))
        assert set(chosen) <= set(every)
