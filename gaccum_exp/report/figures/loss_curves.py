"""Loss curves overlaid, and their differences to the reference on a log axis."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedFormatter, FixedLocator, MaxNLocator, NullLocator

from gaccum_exp.report.compare.comparison import Comparison
from gaccum_exp.report.compare.envelope import MARGIN, Envelope
from gaccum_exp.report.compare.gaps import loss_curve, loss_gaps
from gaccum_exp.report.compare.row import ComparisonRow
from gaccum_exp.report.figures.crowd import crowd_of, groups_of, is_crowded
from gaccum_exp.report.figures.panels import Panel, Sheet, label_steps, panels_of, subject
from gaccum_exp.report.text.wording import say_controls
from gaccum_exp.tracking.records import RunRecord

# Distinct without colour: the pair repeats only after 4 × 7 values of N.
_DASHES = ((0, ()), (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (6, 1.5, 1.5, 1.5)))
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_MARKERS_PER_CURVE = 9
_MOST_DECADE_TICKS = 7
_MOST_UNCROWDED = 8
_BAND: dict[str, Any] = {"color": "#8a8f98", "linewidth": 0}
_BAND_ALPHA = 0.32
_RANGE: dict[str, Any] = {"alpha": 0.15, "linewidth": 0, "zorder": 1.8}
_RANGE_LABEL = "line: median; shade: range"
_LIMIT: dict[str, Any] = {"color": "#5b6068", "linewidth": 0.9, "linestyle": (0, (1, 2))}


@dataclass(frozen=True, slots=True)
class _Style:
    color: tuple[float, float, float, float]
    dashes: tuple[float, tuple[float, ...]]
    marker: str
    crowded: bool
    phase: float
    """Where along the curve its first marker sits: coinciding curves must not hide each other."""

    def line(self, row: ComparisonRow | None, points: int) -> dict[str, Any]:
        """Return the properties of a line; the reference's is broad, to be seen under the others."""
        broad = row is not None and row.is_reference
        stride = max(1, points // _MARKERS_PER_CURVE)
        return {
            "color": self.color,
            "linestyle": self.dashes,
            "marker": self.marker,
            "markersize": 3 if self.crowded else 4,
            "markerfacecolor": "white",
            "markevery": (int(self.phase * stride), stride) if points > stride else 1,
            "linewidth": 3.5 if broad else 0.9 if self.crowded else 1.3,
            "alpha": 0.55 if broad else 1.0,
            "zorder": 2 if broad else 3,
            "gid": row.run_id if row is not None else None,
        }


def draw_loss_curves(comparison: Comparison, runs: Mapping[str, RunRecord]) -> Figure:
    """Draw every arm's train loss, and below it |difference to the reference|, both per step.

    What controls show of rounding is shaded behind the differences; they are not drawn themselves.
    The lines carry the run's id as `gid`. Where they would be too many, runs with the same N are drawn
    as their median and their range. `runs` must hold the stored references too.
    """
    panels = panels_of(comparison)
    crowded = is_crowded(panels)
    styles = _styles(groups_of(panels))
    handles: list[Artist] = [
        Line2D([], [], label=label_steps(group, panels), **_legend_line(style, group, panels))
        for group, style in styles.items()
    ]
    handles += [Patch(label=_RANGE_LABEL, **_RANGE, color="black")] if crowded else []
    handles += _envelope_legend(comparison)
    sheet = Sheet(
        f"Train loss: {subject(list(runs.values()), comparison.shown)}",
        panels,
        level_heights=(2.6, 1.7 if len(styles) <= _MOST_UNCROWDED else 3.4),
        panel_width=7.0 if len(panels) == 1 else 4.2,
        legend=handles,
        notes=comparison.reference_notes,
    )
    gaps: list[np.ndarray] = []
    draw_curves = _draw_ranges if crowded else _draw_each
    for panel, top, bottom in zip(panels, *sheet.axes, strict=True):
        gaps += draw_curves((top, bottom), panel, runs, styles)
        gaps += _draw_envelopes(bottom, panel, comparison, crowded)
        bottom.set_xlabel("optimizer step", fontsize=9)
        bottom.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    _scale_losses(sheet.axes[0], comparison, runs)
    _scale_gaps(sheet.axes[1], np.concatenate([*gaps, np.empty(0)]))
    return sheet.figure


def _styles(every: Sequence[tuple[int, ...]]) -> dict[tuple[int, ...], _Style]:
    """Return a style per N, or several: dark to light with growing N, so that print keeps the order."""
    colors = matplotlib.colormaps["viridis"](np.linspace(0.0, 0.85, max(len(every), 2)))
    return {
        group: _Style(
            tuple(colors[index]),
            _DASHES[index % len(_DASHES)],
            _MARKERS[index % len(_MARKERS)],
            len(every) > _MOST_UNCROWDED,
            (index * 0.381966) % 1.0,  # the golden section spreads any number of phases
        )
        for index, group in enumerate(every)
    }


def _legend_line(style: _Style, group: Sequence[int], panels: Sequence[Panel]) -> dict[str, Any]:
    rows = [row for panel in panels for steps in group for row in panel.at(steps)]
    broad = next((row for row in rows if row.is_reference), None)
    return {**style.line(broad, 0), "gid": None}


def _draw_each(
    axes: tuple[Axes, Axes],
    panel: Panel,
    runs: Mapping[str, RunRecord],
    styles: Mapping[tuple[int, ...], _Style],
) -> list[np.ndarray]:
    """Draw the panel's curves one by one; return their differences."""
    top, bottom = axes
    style_of = {steps: style for group, style in styles.items() for steps in group}
    gaps = []
    for row in sorted(panel.rows, key=lambda row: not row.is_reference):
        style = style_of[row.steps or 0]
        _draw_loss(top, row, runs[row.run_id], style)
        gaps.append(_draw_gap(bottom, row, runs, style))
    return gaps


def _draw_ranges(
    axes: tuple[Axes, Axes],
    panel: Panel,
    runs: Mapping[str, RunRecord],
    styles: Mapping[tuple[int, ...], _Style],
) -> list[np.ndarray]:
    """Draw the curves that are styled alike as one; return what their differences reach."""
    reached = []
    for group, style in styles.items():
        rows = [row for steps in group for row in panel.at(steps)]
        of_reference = next((row for row in rows if row.is_reference), None)
        losses = [loss_curve(runs[row.run_id]) for row in rows]
        gaps = [
            loss_gaps(runs[row.run_id], runs[row.reference_run_id])
            for row in rows
            if not row.is_reference and row.reference_run_id is not None
        ]
        for drawn_on, curves in zip(axes, (losses, gaps), strict=True):
            if curves:
                crowd = crowd_of(curves)
                line = {**style.line(of_reference, crowd.steps.size), "gid": f"median-{group[0]}"}
                drawn_on.fill_between(crowd.steps, crowd.low, crowd.high, color=style.color, **_RANGE)
                drawn_on.plot(crowd.steps, crowd.median, **line)
                reached += [crowd.low, crowd.high] if drawn_on is axes[1] else []
    return reached


def _draw_loss(axes: Axes, row: ComparisonRow, run: RunRecord, style: _Style) -> None:
    curve = run.curves.get("train/loss")
    steps = curve.steps if curve else ()
    # Matplotlib breaks a line where a value is not finite.
    axes.plot(steps, curve.values if curve else (), **style.line(row, len(steps)))


def _draw_gap(
    axes: Axes, row: ComparisonRow, runs: Mapping[str, RunRecord], style: _Style
) -> np.ndarray:
    """Draw one arm's difference to its reference; the reference's own is zero and left out."""
    if row.is_reference or row.reference_run_id is None:
        return np.empty(0)
    steps, gaps = loss_gaps(runs[row.run_id], runs[row.reference_run_id])
    axes.plot(steps, gaps, **style.line(row, len(steps)))
    return gaps


def _draw_envelopes(axes: Axes, panel: Panel, comparison: Comparison, crowded: bool) -> list[np.ndarray]:
    """Shade what rounding alone makes of the panel's references, and mark how far is still inside.

    Return what has to be within the axis; where a control has no difference, there is nothing to see.
    """
    compared_with = {row.reference_run_id for row in panel.rows}
    envelopes = [e for e in comparison.envelopes if e.reference_run_id in compared_with]
    envelopes = [_widest(envelopes)] if crowded and envelopes else envelopes
    shown: list[np.ndarray] = []
    for envelope in envelopes:
        steps, values, limits = map(np.array, (envelope.steps, envelope.values, envelope.limits))
        # Those of repeated runs lie on each other: together they are as dark as one alone.
        alpha = _BAND_ALPHA / math.sqrt(len(envelopes))
        axes.fill_between(steps, 0.0, values, alpha=alpha, zorder=1, **_BAND)
        axes.plot(steps, limits, zorder=1.5, gid=f"limit-{envelope.reference_run_id}", **_LIMIT)
        shown += [values[values > 0], limits]
    return shown


def _widest(envelopes: Sequence[Envelope]) -> Envelope:
    """Return at each step the largest envelope and its limit."""
    values = crowd_of([(np.array(e.steps), np.array(e.values)) for e in envelopes])
    limits = crowd_of([(np.array(e.steps), np.array(e.limits)) for e in envelopes])
    widest = (tuple(column.tolist()) for column in (values.steps, values.high, limits.high))
    return Envelope("widest", max(e.controls for e in envelopes), *widest)


def _envelope_legend(comparison: Comparison) -> list[Artist]:
    controlled = [row for row in comparison.rows if row.controls]
    if not controlled:
        return []
    return [
        Patch(label=f"rounding alone ({say_controls(controlled)})", alpha=_BAND_ALPHA, **_BAND),
        Line2D([], [], label=f"still inside: {MARGIN:.0f} × that", **_LIMIT),
    ]


def _scale_losses(
    all_axes: Sequence[Axes], comparison: Comparison, runs: Mapping[str, RunRecord]
) -> None:
    """Label the loss axes; a log scale where one arm's loss would flatten the others'."""
    curves = [loss_curve(runs[row.run_id])[1] for row in comparison.shown]
    values = np.concatenate([*curves, np.empty(0)])
    values = values[np.isfinite(values)]
    if values.size and values.min() > 0 and values.max() > 100 * values.min():
        all_axes[0].set_yscale("log")
    all_axes[0].set_ylabel("train loss", fontsize=9)
    if not values.size:
        _say_empty(all_axes, "no arm recorded a train loss")


def _scale_gaps(all_axes: Sequence[Axes], gaps: np.ndarray) -> None:
    """Put the differences on a log axis that has a place for zero.

    Below the smallest decade that occurs the axis is linear and ends in 0.
    """
    first = all_axes[0]
    first.set_ylabel("|difference to\nthe reference|", fontsize=9)
    finite = gaps[np.isfinite(gaps)]
    positive = finite[finite > 0]
    if not positive.size:
        first.set_ylim(-0.1, 1.0)
        first.yaxis.set_major_locator(FixedLocator([0.0] if finite.size else []))
        words = "no difference at any step" if finite.size else "nothing to compare"
        _say_empty(all_axes, words)
        return
    low, high = math.floor(np.log10(positive.min())), math.ceil(np.log10(positive.max()))
    high = max(high, low + 1)
    decades = range(low, high + 1, -(-(high - low) // _MOST_DECADE_TICKS))
    ticks, names = [10.0**k for k in decades], [f"$10^{{{k}}}$" for k in decades]
    if positive.size < finite.size:
        # The linear part takes an eighth of the axis, so that the labels 0 and 10^low stay apart.
        first.set_yscale("symlog", linthresh=10.0**low, linscale=max(0.5, (high - low) / 8))
        first.set_ylim(-0.3 * 10.0**low, 10.0**high)
        ticks, names = [0.0, *ticks], ["0", *names]
    else:
        first.set_yscale("log")
        first.set_ylim(10.0**low, 10.0**high)
    for axes in all_axes:
        axes.yaxis.set_major_locator(FixedLocator(ticks))
        axes.yaxis.set_major_formatter(FixedFormatter(names))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.grid(axis="y", linewidth=0.4, alpha=0.5)


def _say_empty(all_axes: Sequence[Axes], words: str) -> None:
    for axes in all_axes:
        axes.text(0.5, 0.5, words, transform=axes.transAxes, ha="center", fontsize=9, alpha=0.7)
