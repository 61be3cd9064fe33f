"""Draw the loss of every global batch against samples, steps and time, and at equal samples its loss."""

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullLocator

from gaccum_exp.report.arm_limit import MOST_SETTINGS
from gaccum_exp.report.compare.batches import BatchComparison
from gaccum_exp.report.figures.batch_data import (
    CurvePanel,
    NoiseMark,
    SettingPanels,
    batch_panels,
    notes_of,
)

_DASHES = ((0, ()), (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (6, 1.5, 1.5, 1.5)))
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_MARKERS_PER_CURVE = 6
_WIDTH_INCHES, _HEIGHT_INCHES = 9.0, 6.4
_LINEAR = 4
"""So many times as large as the least may the greatest of what has to be seen be on a linear axis."""
_ROOM_PER_LINE = 0.075
"""Of the last panel's height, for a line of its legend."""
Looks = Mapping[int, Mapping[str, Any]]
"""The properties of a line by batch."""
_CRITICAL, _NOISE = "#d1495b", "#8a8f98"


def draw_batches(comparisons: Sequence[BatchComparison], subject: str) -> Figure:
    """Draw four panels for each setting: loss against each axis, and best loss against the batch."""
    shown = comparisons[:MOST_SETTINGS]
    settings = [batch_panels(of, named=len(comparisons) > 1) for of in shown]
    notes = notes_of(shown, len(comparisons) - len(shown))
    lines = [line for note in notes for line in textwrap.wrap(note, 150)]
    batches = sorted({of.batch for setting in settings for of in setting.losses})
    look_of = {batch: _look(i, len(batches)) for i, batch in enumerate(batches)}
    strip = 0.1 + 0.15 * len(lines)
    heights = [*(_HEIGHT_INCHES for _ in settings), strip]
    figure = Figure(figsize=(_WIDTH_INCHES, sum(heights)), layout="constrained")
    *parts, below = figure.subfigures(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
    title = "\n".join(textwrap.wrap(f"Global batches: {subject}", 95))
    for number, (part, setting) in enumerate(zip(parts, settings, strict=True)):
        _draw_setting(part, setting, look_of)
        part.suptitle(
            "\n".join(filter(None, (title if number == 0 else "", setting.label))), fontsize=11
        )
    below.text(0.015, 0.05 / strip, "\n".join(lines), va="bottom", fontsize=8)
    return figure


def _look(index: int, batches: int) -> dict[str, Any]:
    return {
        # Dark to light with a growing batch, so that print keeps the order.
        "color": matplotlib.colormaps["viridis"](np.linspace(0.0, 0.85, max(batches, 2)))[index],
        "linestyle": _DASHES[index % len(_DASHES)],
        "marker": _MARKERS[index % len(_MARKERS)],
        "markersize": 4,
        "markerfacecolor": "white",
        "linewidth": 1.3,
    }


def _draw_setting(part: SubFigure, setting: SettingPanels, look_of: Looks) -> None:
    *curves, last = part.subplots(2, 2).ravel()
    for axes, panel in zip(curves, setting.panels, strict=False):
        _draw_curves(axes, panel, look_of)
    for axes in curves[len(setting.panels) :]:
        axes.set_axis_off()
    _draw_losses(last, setting, look_of)
    for axes in part.axes:
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    named = [Line2D([], [], label=f"batch {of.batch}", **look_of[of.batch]) for of in setting.losses]
    marks = last.get_legend_handles_labels()[0]
    part.legend(
        handles=named, loc="outside lower center", ncols=min(8, len(named)), fontsize=8, frameon=False,
        handlelength=3.2,
    )  # fmt: skip
    last.legend(handles=marks, loc="upper left", fontsize=7, frameon=False)
    lines = sum(1 + str(mark.get_label()).count("\n") for mark in marks)
    low, high = last.get_ylim()
    last.set_ylim(low, high + (high - low) * _ROOM_PER_LINE * lines)


def _draw_curves(axes: Axes, panel: CurvePanel, look_of: Looks) -> None:
    for curve in panel.curves:
        look = look_of[curve.batch]
        axes.fill_between(curve.at, curve.low, curve.high, color=look["color"], alpha=0.15, linewidth=0)
        stride = max(1, curve.at.size // _MARKERS_PER_CURVE)
        axes.plot(curve.at, curve.mean, markevery=stride, gid=f"batch-{curve.batch}", **look)
    axes.axvline(panel.point, color="black", linestyle=":", linewidth=1)
    ends = [curve.at[-1] for curve in panel.curves]
    if max(ends) > _LINEAR * min(ends):  # on a linear axis the short curves would be no more than a line
        axes.set_xscale("log")
        _label(axes.xaxis, min(curve.at[0] for curve in panel.curves), max(ends))
    axes.set_title(panel.title, fontsize=10)
    axes.set_xlabel(panel.axis, fontsize=9)
    axes.set_ylabel(panel.loss, fontsize=9)
    values = np.concatenate([curve.mean for curve in panel.curves])
    values = values[np.isfinite(values)]
    if values.size and values.min() > 0 and values.max() > _LINEAR * values.min():
        axes.set_yscale("log")
        _label(axes.yaxis, values.min(), values.max())


def _label(axis: Axis, low: float, high: float) -> None:
    """Label a logarithmic axis with plain numbers, of a short one 2 and 5 too."""
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high < 300 * low else (1.0,)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_locator(NullLocator())


def _draw_losses(axes: Axes, setting: SettingPanels, look_of: Looks) -> None:
    """Draw the loss at equal samples against the batch, the critical batch and the noise scale."""
    every = setting.losses
    axes.plot([of.batch for of in every], [of.mean for of in every], color="black", linewidth=0.8)
    for of in every:
        look = look_of[of.batch]
        drawn = axes.errorbar(
            of.batch, of.mean, yerr=of.spread or None, marker=look["marker"], color=look["color"],
            markerfacecolor=look["color"] if of.is_settled else "white", markersize=6, capsize=3,
            linestyle="",
        )  # fmt: skip
        drawn[0].set_gid(f"batch-{of.batch}")
    axes.set_xscale("log", base=2)
    ends = [of.batch / 1.5 for of in every] + [of.batch * 1.5 for of in every]
    if setting.noise is not None:
        ends += _draw_noise(axes, setting.noise, max(ends))
    axes.set_xlim(min(ends), max(ends))
    if setting.limit is not None:
        axes.axhline(
            setting.limit, color=_CRITICAL, linestyle="--", linewidth=0.9,
            label="lowest loss + 2 × its spread over seeds",
        )  # fmt: skip
    critical = setting.critical
    where = ([critical, critical], [0, 1]) if critical else ([], [])
    axes.plot(
        *where, transform=axes.get_xaxis_transform(), color=_CRITICAL, linewidth=1.2 if critical else 0,
        label=textwrap.fill(setting.critical_label, 44),
    )  # fmt: skip
    axes.set_xticks([of.batch for of in every], [str(of.batch) for of in every])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_title("loss at equal samples against the global batch", fontsize=10)
    axes.set_xlabel("global batch in samples", fontsize=9)
    axes.set_ylabel(setting.loss, fontsize=9)


def _draw_noise(axes: Axes, noise: NoiseMark, beyond: float) -> list[float]:
    """Shade the interval of the noise scale, to the end of the axis where nothing bounds it."""
    high = noise.high if math.isfinite(noise.high) else max(beyond, 1.5 * noise.low)
    axes.axvspan(noise.low, high, color=_NOISE, alpha=0.25, linewidth=0, label=noise.label, zorder=0)
    if noise.scale is not None:
        axes.axvline(noise.scale, color=_NOISE, linewidth=1.2, zorder=0)
    return [noise.low, high]
