"""Draw loss curves over each other, and their differences to the reference on a log axis."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
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
from gaccum_exp.report.compare.rounding_envelope import MARGIN, Envelope
from gaccum_exp.report.figures.curve_data import CurveRow, Group, loss_rows
from gaccum_exp.report.figures.figure_layout import lay_out
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
_LIMIT: dict[str, Any] = {"color": "#5b6068", "linewidth": 0.9, "linestyle": (0, (1, 2))}


def draw_loss_curves(comparison: Comparison, runs: Mapping[str, RunRecord]) -> Figure:
    """Draw every arm's train loss, and below it |difference to the reference|, both per step.

    What controls show of rounding is shaded behind the differences; they are not drawn themselves.
    The lines carry the run's id as `gid`.
    """
    rows = loss_rows(comparison, runs)
    line_of = {group: partial(_line, len(rows.groups), i) for i, group in enumerate(rows.groups)}
    legend: list[Artist] = [
        Line2D([], [], label=label, **line_of[group](is_reference))
        for group, (label, is_reference) in rows.groups.items()
    ]
    if rows.is_crowded:
        legend.append(Patch(label="line: median; shade: range", **_RANGE, color="black"))
    if rows.controls:
        legend += [
            Patch(label=f"rounding alone ({rows.controls})", alpha=_BAND_ALPHA, **_BAND),
            Line2D([], [], label=f"still inside: {MARGIN:.0f} × that", **_LIMIT),
        ]
    figure, (losses_axes, gaps_axes) = lay_out(
        rows.title,
        [panel.title for panel in rows.panels],
        level_heights=(2.6, 1.7 if len(line_of) <= _MOST_UNCROWDED else 3.4),
        panel_width=7.0 if len(rows.panels) == 1 else 4.2,
        legend=legend,
        notes=rows.notes,
    )
    losses, gaps = [np.empty(0)], [np.empty(0)]
    for panel, top, bottom in zip(rows.panels, losses_axes, gaps_axes, strict=True):
        losses += _draw_curves(top, panel.losses, line_of)
        gaps += _draw_curves(bottom, panel.gaps, line_of)
        gaps += _draw_envelopes(bottom, panel.envelopes)
        bottom.set_xlabel("optimizer step", fontsize=9)
        bottom.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    _scale_losses(losses_axes, np.concatenate(losses))
    _scale_gaps(gaps_axes, np.concatenate(gaps))
    return figure


def _line(
    groups: int, index: int, is_reference: bool, points: int = 0, name: str | None = None
) -> dict[str, Any]:
    """Return the properties of a line of one of the groups, of so many points."""
    crowded = groups > _MOST_UNCROWDED
    stride = max(1, points // _MARKERS_PER_CURVE)
    # Coinciding curves must not hide each other's markers: the golden section spreads where they begin.
    first = int((index * 0.381966) % 1.0 * stride)
    return {
        # Dark to light with growing N, so that print keeps the order.
        "color": matplotlib.colormaps["viridis"](np.linspace(0.0, 0.85, max(groups, 2)))[index],
        "linestyle": _DASHES[index % len(_DASHES)],
        "marker": _MARKERS[index % len(_MARKERS)],
        "markersize": 3 if crowded else 4,
        "markerfacecolor": "white",
        "markevery": (first, stride) if points > stride else 1,
        # A reference's is broad, to be seen under the others.
        "linewidth": 3.5 if is_reference else 0.9 if crowded else 1.3,
        "alpha": 0.55 if is_reference else 1.0,
        "zorder": 2 if is_reference else 3,
        "gid": name,
    }


def _draw_curves(
    axes: Axes, curves: Sequence[CurveRow], line_of: Mapping[Group, Callable[..., dict[str, Any]]]
) -> list[np.ndarray]:
    """Draw curves, several runs' over the shade of their range; return what the axis has to hold."""
    reached: list[np.ndarray] = []
    for curve in curves:
        steps = curve.global_steps
        line = line_of[curve.group](curve.is_reference, steps.size, curve.name)
        if curve.range is not None:
            axes.fill_between(steps, *curve.range, color=line["color"], **_RANGE)
        axes.plot(steps, curve.values, **line)  # matplotlib breaks it where a value is not finite
        reached += [curve.values] if curve.range is None else curve.range
    return reached


def _draw_envelopes(axes: Axes, envelopes: Sequence[Envelope]) -> list[np.ndarray]:
    """Shade what rounding alone makes of references, up to its limits; return what the axis holds."""
    shown: list[np.ndarray] = []
    for envelope in envelopes:
        steps, values, limits = map(np.array, (envelope.global_steps, envelope.values, envelope.limits))
        # Those of repeated runs lie on each other: together they are as dark as one alone.
        alpha = _BAND_ALPHA / math.sqrt(len(envelopes))
        axes.fill_between(steps, 0.0, values, alpha=alpha, zorder=1, **_BAND)
        axes.plot(steps, limits, zorder=1.5, gid=f"limit-{envelope.reference_run_id}", **_LIMIT)
        shown += [values[values > 0], limits]  # where a control has no difference, nothing is seen
    return shown


def _scale_losses(all_axes: Sequence[Axes], values: np.ndarray) -> None:
    values = values[np.isfinite(values)]
    # A log scale where one arm's loss would flatten the others'.
    if values.size and values.min() > 0 and values.max() > 100 * values.min():
        all_axes[0].set_yscale("log")
    all_axes[0].set_ylabel("train loss", fontsize=9)
    if not values.size:
        _say_empty(all_axes, "no arm recorded a train loss")


def _scale_gaps(all_axes: Sequence[Axes], gaps: np.ndarray) -> None:
    """Put the differences on a log axis, linear below the smallest decade that occurs, down to 0."""
    first = all_axes[0]
    first.set_ylabel("|difference to\nthe reference|", fontsize=9)
    finite = gaps[np.isfinite(gaps)]
    positive = finite[finite > 0]
    if not positive.size:
        first.set_ylim(-0.1, 1.0)
        first.yaxis.set_major_locator(FixedLocator([0.0] if finite.size else []))
        _say_empty(all_axes, "no difference at any step" if finite.size else "nothing to compare")
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
