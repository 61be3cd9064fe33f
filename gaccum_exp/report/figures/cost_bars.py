"""Draw what an arm costs as bars against N: peak memory by category, and time of an optimizer step."""

import statistics
from collections.abc import Callable, Mapping, Sequence

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from gaccum_exp.memory.plan import CATEGORIES
from gaccum_exp.report.compare.comparison import Comparison
from gaccum_exp.report.figures import style
from gaccum_exp.report.figures.cost_data import Bar, BarRows, memory_rows, step_time_rows
from gaccum_exp.report.figures.figure_layout import lay_out
from gaccum_exp.report.text.wording import say_ratio
from gaccum_exp.tracking.records import RunRecord

_COLORS = ("#22577a", "#57a0c7", "#bfdcec", "#f4a259", "#f2efe6", "#7fb285")
_HATCHES = ("", "////", "....", "\\\\\\\\", "xxxx", "++++")
LOOKS = dict(zip(CATEGORIES, zip(_COLORS, _HATCHES, strict=True), strict=True))
"""Colour and hatch by category: told apart in greyscale by brightness and by hatch."""
# How the total is marked, by where the peak was.
_PHASES: dict[str | None, str] = {"forward/backward": "o", "optimizer step": "s"}
_UNKNOWN_PHASE = "D"
_TIME_BARS = {"reference": ("#5f7f95", "////"), "candidate": ("#b9cbd6", "")}
_BAR_WIDTH = 0.72
_SLOT_INCHES, _MOST_SLOT_INCHES, _BESIDE_BARS_INCHES = 0.2, 0.85, 0.8
"""Of one N: what it needs, what it can use; and what stands at the left of all."""
_FEWEST_SLOTS = 3
_TICK_ROLES = {"reference": "ref.", "stand-in": "stand-in", "stored reference": "stored"}


def draw_memory(comparison: Comparison, runs: Mapping[str, RunRecord]) -> Figure | None:
    """Draw peak memory against N, stacked by category, the total marked by where the peak is."""
    rows = memory_rows(comparison, runs)
    legend: list[Artist] = [
        Patch(facecolor=color, hatch=hatch, edgecolor="black", label=name.replace("_", " "))
        for name, (color, hatch) in reversed(LOOKS.items())  # as they are stacked
        if name in rows.categories
    ]
    legend += [
        _marker(marker, f"total, peak in {phase}")
        for phase, marker in _PHASES.items()
        if phase in rows.phases
    ]
    if rows.phases - _PHASES.keys():
        legend.append(_marker(_UNKNOWN_PHASE, "total"))

    def draw_bar(axes: Axes, position: int, bar: Bar) -> None:
        (total,), bottom = bar.each, 0.0
        for name, height in bar.parts.items():
            color, hatch = LOOKS[name]
            axes.bar(
                position, height, _BAR_WIDTH, bottom=bottom, color=color, hatch=hatch,
                edgecolor="black", linewidth=0.5, label=name,
            )  # fmt: skip
            bottom += height
        if not bar.parts:
            axes.bar(position, total, _BAR_WIDTH, color="white", edgecolor="black", linewidth=0.8)
        axes.plot(
            position, total, _PHASES.get(bar.phase, _UNKNOWN_PHASE), color="black",
            markerfacecolor="white", markersize=style.points(0.65), gid=bar.name,
        )  # fmt: skip

    return _draw(rows, 2.7, legend, draw_bar)


def draw_step_time(comparison: Comparison, runs: Mapping[str, RunRecord]) -> Figure | None:
    """Draw the time of an optimizer step against N: the median and, of one run, the quartiles of its
    windows; of repetitions each as a dot.
    """
    rows = step_time_rows(comparison, runs)
    legend: list[Artist] = [
        Patch(facecolor=color, hatch=hatch, edgecolor="black", label=label)
        for label, (color, hatch) in _TIME_BARS.items()
    ]
    if rows.are_repeated:
        legend.append(_marker("o", "each of the repeated runs; the bar is their median", "black"))
    if rows.have_spread:
        legend.append(_marker("|", "middle half of the timed windows; the bar is their median"))

    def draw_bar(axes: Axes, position: int, bar: Bar) -> None:
        color, hatch = _TIME_BARS["reference" if bar.is_reference else "candidate"]
        middle = statistics.median(bar.each)
        axes.bar(
            position, middle, _BAR_WIDTH, color=color, hatch=hatch, edgecolor="black", linewidth=0.6
        )
        if len(bar.each) > 1:
            axes.plot(
                [position] * len(bar.each), bar.each, "o", color="black", markersize=style.points(0.35)
            )
        elif bar.low is not None and bar.high is not None:
            apart = [[middle - min(bar.low, middle)], [max(bar.high, middle) - middle]]
            axes.errorbar(position, middle, yerr=apart, color="black", fmt="none")

    return _draw(rows, 2.4, legend, draw_bar)


def _draw(
    rows: BarRows, height: float, legend: Sequence[Artist], draw_bar: Callable[[Axes, int, Bar], None]
) -> Figure | None:
    """Draw a figure of bars: axes from zero, N below them, ratios above the bars.

    A panel without a bar is left out, and said; None is returned where all are.
    """
    panels = [(title, bars) for title, bars in rows.panels if any(bar.each for bar in bars)]
    if not panels:
        return None
    empty = [title for title, bars in rows.panels if not any(bar.each for bar in bars)]
    notes = [f"Nothing was recorded: {'; '.join(empty)}."] if empty else []
    slots = max(_FEWEST_SLOTS, *(len(bars) for _, bars in panels))
    figure, (all_axes,) = lay_out(
        rows.title,
        [title for title, _ in panels],
        level_heights=(height,),
        panel_width=style.scaled(_SLOT_INCHES * slots + _BESIDE_BARS_INCHES),
        most_panel_width=style.scaled(_MOST_SLOT_INCHES * slots + _BESIDE_BARS_INCHES),
        legend=legend,
        notes=(*notes, *rows.notes),
    )
    columns = len({axes.get_position().x0 for axes in all_axes})
    room = (
        figure.subfigs[0].bbox.width / figure.dpi / columns - style.scaled(_BESIDE_BARS_INCHES) / columns
    )
    inches = room / slots
    # Ratios stand upright where they would touch each other; where even so, only some are written.
    is_upright = inches < style.points(4.2) / 72
    stride = -(-style.points(1.35) // (72 * inches)) if is_upright else 1
    for (_, bars), axes in zip(panels, all_axes, strict=True):
        for position, bar in enumerate(bars):
            if bar.each:
                draw_bar(axes, position, bar)
            if position % stride == 0:
                _write_above(axes, position, bar, 90 if is_upright else 0)
        roles = (f"\n{_TICK_ROLES[bar.role]}" if bar.role else "" for bar in bars)
        labels = [f"{bar.n}{role}" for bar, role in zip(bars, roles, strict=True)]
        widest = max(len(str(bar.n)) for bar in bars)
        every = max(1, -(-style.points(0.65 * widest + 0.3) // (72 * inches)))
        ticks = [p for p in range(len(bars)) if p % every == 0]
        axes.set_xticks(ticks, [labels[p] for p in ticks])
        spare = max(0, slots - len(bars)) / 2  # few bars stand in the middle
        axes.set_xlim(-0.6 - spare, len(bars) - 0.4 + spare)
        axes.set_xlabel("N, micro-batches per optimizer step")
        axes.grid(axis="y")
    highest = max(rows.highest, *(bar.high or 0.0 for _, bars in panels for bar in bars))
    all_axes[0].set_ylim(0, highest * (1.35 if is_upright else 1.18) or 1.0)
    all_axes[0].set_ylabel(rows.axis)
    return figure


def _write_above(axes: Axes, position: int, bar: Bar, rotation: int) -> None:
    """Write a bar's ratio above it, or why there is no bar."""
    if bar.missing:
        axes.text(
            position, 0.03, bar.missing, transform=axes.get_xaxis_transform(), rotation=90,
            ha="center", va="bottom", fontsize=style.points(0.95),
        )  # fmt: skip
    elif bar.ratio is not None:
        axes.annotate(
            "≈" if bar.is_alike else f"{say_ratio(bar.ratio)} ×",
            (position, max(*bar.each, bar.high or 0.0)),
            xytext=(0, style.points(0.6)), textcoords="offset points", ha="center", va="bottom",
            fontsize=style.points(0.95), rotation=rotation,
        )  # fmt: skip


def _marker(marker: str, label: str, face: str = "white") -> Line2D:
    return Line2D([], [], linestyle="", marker=marker, label=label, color="black", markerfacecolor=face)
