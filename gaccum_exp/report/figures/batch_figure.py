"""Draw the loss of every global batch against samples, steps and time, and at equal samples its loss."""

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullLocator

from gaccum_exp.report.arm_limit import MOST_SETTINGS
from gaccum_exp.report.compare.batches import BatchComparison
from gaccum_exp.report.figures import style
from gaccum_exp.report.figures.batch_data import (
    CurvePanel,
    NoiseMark,
    SettingPanels,
    batch_panels,
    notes_of,
)

_MARKERS_PER_CURVE = 6
_LEAST_PANEL_INCHES, _PANEL_HEIGHT_INCHES = 2.8, 2.35
_LINEAR = 4
"""So many times as large as the least may the greatest of what has to be seen be on a linear axis."""
_ROOM_PER_LINE = 0.08
"""Of the last panel's height, for a line of its legend."""
Looks = Mapping[int, Mapping[str, Any]]
"""The properties of a line by batch."""


def draw_batches(comparisons: Sequence[BatchComparison], subject: str) -> Figure:
    """Draw four panels for each setting: loss against each axis, and best loss against the batch."""
    shown = comparisons[:MOST_SETTINGS]
    settings = [batch_panels(of, named=len(comparisons) > 1) for of in shown]
    notes = notes_of(shown, len(comparisons) - len(shown))
    columns = 2 if style.width() >= 2 * style.scaled(_LEAST_PANEL_INCHES) else 1
    lines = [line for note in notes for line in textwrap.wrap(note, style.letters(style.width(), 0.9))]
    batches = sorted({of.batch for setting in settings for of in setting.losses})
    looks = {batch: style.look(i, len(batches)) for i, batch in enumerate(batches)}
    strip = 0.08 + style.lines_inches(len(lines))
    heights = [*(_height(setting, columns) for setting in settings), strip]
    figure = Figure(figsize=(style.width(), sum(heights)), layout="constrained")
    *parts, below = figure.subfigures(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
    title = "\n".join(textwrap.wrap(f"Global batches: {subject}", style.letters(style.width(), 1.2)))
    for number, (part, setting) in enumerate(zip(parts, settings, strict=True)):
        _draw_setting(part, setting, looks, columns)
        part.suptitle("\n".join(filter(None, (title if number == 0 else "", setting.label))))
    below.text(0.012, 0.04 / strip, "\n".join(lines), va="bottom", fontsize=style.points(0.9))
    return figure


def _height(setting: SettingPanels, columns: int) -> float:
    rows = -(-(len(setting.panels) + 1) // columns)
    return 0.5 + rows * style.scaled(_PANEL_HEIGHT_INCHES) * (1 if columns == 2 else 0.95)


def _draw_setting(part: SubFigure, setting: SettingPanels, looks: Looks, columns: int) -> None:
    number = len(setting.panels)
    rows = -(-(number + 1) // columns)
    grid = part.add_gridspec(rows, columns)
    for place, panel in enumerate(setting.panels):
        _draw_curves(part.add_subplot(grid[divmod(place, columns)]), panel, looks)
    # The last panel has what is left of its row.
    row, column = divmod(number, columns)
    last = part.add_subplot(grid[row, column:])
    _draw_losses(last, setting, looks)
    named = [Line2D([], [], label=f"batch {of.batch}", **looks[of.batch]) for of in setting.losses]
    marks = last.get_legend_handles_labels()[0]
    fit = style.letters(style.width()) // 18
    part.legend(handles=named, loc="outside lower center", ncols=min(fit, len(named)))
    last.legend(
        handles=marks, loc="upper left", fontsize=style.points(0.85), frameon=True, framealpha=0.8,
        edgecolor="none",
    )  # fmt: skip
    lines = sum(1 + str(mark.get_label()).count("\n") for mark in marks)
    low, high = last.get_ylim()
    last.set_ylim(low, high + (high - low) * _ROOM_PER_LINE * lines)


def _draw_curves(axes: Axes, panel: CurvePanel, looks: Looks) -> None:
    for curve in panel.curves:
        look = looks[curve.batch]
        axes.fill_between(curve.at, curve.low, curve.high, color=look["color"], alpha=0.15, linewidth=0)
        stride = max(1, curve.at.size // _MARKERS_PER_CURVE)
        axes.plot(curve.at, curve.mean, markevery=stride, gid=f"batch-{curve.batch}", **look)
    axes.axvline(panel.point, color="black", linestyle=":", linewidth=1)
    ends = [curve.at[-1] for curve in panel.curves]
    if max(ends) > _LINEAR * min(ends):  # on a linear axis the short curves would be no more than a line
        axes.set_xscale("log")
        _label(axes.xaxis, min(curve.at[0] for curve in panel.curves), max(ends))
    axes.set_title(panel.title)
    axes.set_xlabel(panel.axis)
    axes.set_ylabel(panel.loss)
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


def _draw_losses(axes: Axes, setting: SettingPanels, looks: Looks) -> None:
    """Draw the loss at equal samples against the batch, the critical batch and the noise scale."""
    every = setting.losses
    axes.plot([of.batch for of in every], [of.mean for of in every], color="black", linewidth=0.8)
    for of in every:
        look = looks[of.batch]
        drawn = axes.errorbar(
            of.batch, of.mean, yerr=of.spread or None, marker=look["marker"], color=look["color"],
            markerfacecolor=look["color"] if of.is_settled else "white", markersize=style.points(0.7),
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
            setting.limit, color=style.ACCENT, linestyle="--", linewidth=0.9,
            label="lowest loss + 2 × its spread over seeds",
        )  # fmt: skip
    critical = setting.critical
    where = ([critical, critical], [0, 1]) if critical else ([], [])
    axes.plot(
        *where, transform=axes.get_xaxis_transform(), color=style.ACCENT,
        linewidth=1.2 if critical else 0, label=textwrap.fill(setting.critical_label, 44),
    )  # fmt: skip
    axes.set_xticks([of.batch for of in every], [str(of.batch) for of in every])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_title("loss at equal samples against the global batch")
    axes.set_xlabel("global batch in samples")
    axes.set_ylabel(setting.loss)


def _draw_noise(axes: Axes, noise: NoiseMark, beyond: float) -> list[float]:
    """Shade the interval of the noise scale, to the end of the axis where nothing bounds it."""
    high = noise.high if math.isfinite(noise.high) else max(beyond, 1.5 * noise.low)
    axes.axvspan(noise.low, high, color=style.GREY, alpha=0.25, linewidth=0, label=noise.label, zorder=0)
    if noise.scale is not None:
        axes.axvline(noise.scale, color=style.GREY, linewidth=1.2, zorder=0)
    return [noise.low, high]
