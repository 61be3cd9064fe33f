"""Draw loss curves over each other, and how far they have come from the reference on a log axis."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import (
    FixedFormatter,
    FixedLocator,
    FuncFormatter,
    LogLocator,
    MaxNLocator,
    NullFormatter,
    NullLocator,
)

from gaccum_exp.report.compare.comparison import Comparison
from gaccum_exp.report.compare.rounding_envelope import MARGIN, Envelope
from gaccum_exp.report.figures import style
from gaccum_exp.report.figures.curve_data import CurveRow, Group, LossRows, PanelRows, loss_rows
from gaccum_exp.report.figures.figure_layout import lay_out
from gaccum_exp.tracking.records import RunRecord

_MARKERS_PER_CURVE = 9
_MOST_DECADE_TICKS = 7
_MOST_UNCROWDED = 8
_FAR_BELOW = 100.0
"""A last digit that is so many times smaller than the least difference is not drawn: it would only
stretch the axis."""
_BAND: dict[str, Any] = {"color": style.GREY, "linewidth": 0}
_BAND_ALPHA = 0.32
_RANGE: dict[str, Any] = {"alpha": 0.15, "linewidth": 0, "zorder": 1.8}
_LIMIT: dict[str, Any] = {"color": style.DARK_GREY, "linewidth": 0.9, "linestyle": (0, (1, 2))}
Looks = Mapping[Group, Callable[..., dict[str, Any]]]
"""The properties of a line by what is drawn alike."""


def draw_loss_curves(comparison: Comparison, runs: Mapping[str, RunRecord]) -> Figure | None:
    """Draw every arm's train loss, and below it the largest |difference to the reference| so far.

    What rounding alone does is shaded behind the differences: as controls show it, which are not drawn
    themselves, else the last digit of the loss. The lines carry the run's id as `gid`. None is returned
    where no arm has a loss, and differences are left out where there is nothing to be compared.
    """
    rows = loss_rows(comparison, runs)
    panels = [panel for panel in rows.panels if panel.has_losses]
    if not panels:
        return None
    line_of = {group: partial(_line, len(rows.groups), i) for i, group in enumerate(rows.groups)}
    compared = any(np.isfinite(gap.values).any() for panel in panels for gap in panel.largest_gaps)
    digits = _shown_digits(panels)
    figure, levels = lay_out(
        rows.title,
        [panel.title for panel in panels],
        level_heights=(2.3, 1.6 if len(line_of) <= _MOST_UNCROWDED else 3.0) if compared else (2.8,),
        panel_width=style.scaled(2.1),
        legend=_legend(rows, panels, line_of, bool(digits)),
        notes=(*_left_out(rows, panels), *rows.notes),
    )
    losses, gaps = [np.empty(0)], [np.empty(0)]
    for panel, axes in zip(panels, levels[0], strict=True):
        losses += _draw_curves(axes, panel.losses, line_of)
    for panel, axes in zip(panels, levels[1] if compared else (), strict=compared):
        gaps += _draw_curves(axes, panel.largest_gaps, line_of)
        gaps += _draw_envelopes(axes, panel.envelopes)
        if panel.title in digits:
            gaps.append(_draw_band(axes, *digits[panel.title], _BAND_ALPHA))
    for axes in levels[-1]:
        axes.set_xlabel("optimizer step")
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    _scale_losses(levels[0], np.concatenate(losses))
    if compared:
        _scale_gaps(levels[1], np.concatenate(gaps))
    return figure


def _legend(
    rows: LossRows, panels: Sequence[PanelRows], line_of: Looks, has_digits: bool
) -> list[Artist]:
    drawn = {curve.group for panel in panels for curve in panel.losses}
    legend: list[Artist] = [
        Line2D([], [], label=label, **line_of[group](is_reference))
        for group, (label, is_reference) in rows.groups.items()
        if group in drawn
    ]
    if rows.is_crowded:
        legend.append(Patch(label="line: median; shade: range", **_RANGE, color="black"))
    if rows.controls:
        legend += [
            Patch(label=f"rounding alone ({rows.controls})", alpha=_BAND_ALPHA, **_BAND),
            Line2D([], [], label=f"still inside: {MARGIN:.0f} × that", **_LIMIT),
        ]
    if has_digits:
        legend.append(Patch(label="last digit of the loss", alpha=_BAND_ALPHA, **_BAND))
    return legend


def _left_out(rows: LossRows, panels: Sequence[PanelRows]) -> tuple[str, ...]:
    """Say which arms have no curve."""
    drawn = {curve.group for panel in panels for curve in panel.losses}
    absent = [label for group, (label, _) in rows.groups.items() if group not in drawn]
    absent += [panel.title for panel in rows.panels if not panel.has_losses]
    return (f"No loss was recorded: {'; '.join(absent)}.",) if absent else ()


def _shown_digits(panels: Sequence[PanelRows]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return the last digits that are worth drawing, by their panels' titles."""
    every = np.concatenate(
        [np.empty(0), *(gap.values for panel in panels for gap in panel.largest_gaps)]
    )
    positive = every[np.isfinite(every) & (every > 0)]
    least = positive.min(initial=math.inf)
    return {
        panel.title: panel.last_digit
        for panel in panels
        if panel.last_digit is not None
        and (math.isinf(least) or np.nanmax(panel.last_digit[1], initial=0) * _FAR_BELOW >= least)
    }


def _line(
    groups: int, index: int, is_reference: bool, points: int = 0, name: str | None = None
) -> dict[str, Any]:
    """Return the properties of a line of one of the groups, of so many points."""
    crowded = groups > _MOST_UNCROWDED
    stride = max(1, points // _MARKERS_PER_CURVE)
    # Coinciding curves must not hide each other's markers: the golden section spreads where they begin.
    first = int((index * 0.381966) % 1.0 * stride)
    return {
        **style.look(index, groups),
        "markersize": style.points(0.4 if crowded else 0.5),
        "markevery": (first, stride) if points > stride else 1,
        # A reference's is broad, to be seen under the others.
        "linewidth": style.points(0.4 if is_reference else 0.11 if crowded else 0.16),
        "alpha": 0.5 if is_reference else 1.0,
        "zorder": 2 if is_reference else 3,
        "gid": name,
    }


def _draw_curves(axes: Axes, curves: Sequence[CurveRow], line_of: Looks) -> list[np.ndarray]:
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
        shown.append(_draw_band(axes, steps, values, _BAND_ALPHA / math.sqrt(len(envelopes))))
        axes.plot(steps, limits, zorder=1.5, gid=f"limit-{envelope.reference_run_id}", **_LIMIT)
        shown.append(limits)
    return shown


def _draw_band(axes: Axes, steps: np.ndarray, values: np.ndarray, alpha: float) -> np.ndarray:
    axes.fill_between(steps, 0.0, values, alpha=alpha, zorder=1, **_BAND)
    return values[values > 0]  # where a control has no difference, nothing is seen


def _scale_losses(all_axes: Sequence[Axes], values: np.ndarray) -> None:
    values = values[np.isfinite(values)]
    first = all_axes[0]
    # A log scale where one arm's loss would flatten the others'.
    if values.size and values.min() > 0 and values.max() > 100 * values.min():
        first.set_yscale("log")
        decades = math.log10(values.max() / values.min())
        first.yaxis.set_major_locator(LogLocator(numticks=_MOST_DECADE_TICKS + 1))
        first.yaxis.set_major_formatter(FuncFormatter(lambda y, _: _power(round(math.log10(y)))))
        first.yaxis.set_minor_formatter(NullFormatter())
        if decades > _MOST_DECADE_TICKS:
            first.yaxis.set_minor_locator(NullLocator())
    first.set_ylabel("train loss")
    for axes in all_axes:
        axes.grid(axis="y")


def _scale_gaps(all_axes: Sequence[Axes], gaps: np.ndarray) -> None:
    """Put the differences on a log axis, linear below the smallest decade that occurs, down to 0."""
    first = all_axes[0]
    first.set_ylabel("largest |difference to\nthe reference| so far")
    finite = gaps[np.isfinite(gaps)]
    positive = finite[finite > 0]
    if not any(np.any(line.get_ydata()) for axes in all_axes for line in axes.get_lines()):
        _say(all_axes, "no difference at any step")
    if not positive.size:
        first.set_ylim(-0.1, 1.0)
        first.yaxis.set_major_locator(FixedLocator([0.0] if finite.size else []))
        return
    low, high = math.floor(np.log10(positive.min())), math.ceil(np.log10(positive.max()))
    high = max(high, low + 1)
    decades = range(low, high + 1, -(-(high - low) // _MOST_DECADE_TICKS))
    ticks, names = [10.0**k for k in decades], [_power(k) for k in decades]
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
        axes.grid(axis="y")


def _power(exponent: int) -> str:
    """Return a power of ten as plain text: to read formulas takes as long as to draw an axis."""
    return "10" + str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def _say(all_axes: Sequence[Axes], words: str) -> None:
    for axes in all_axes:
        axes.text(0.5, 0.5, words, transform=axes.transAxes, ha="center")
