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
_MOST_UPRIGHT_LABELS = 9
_TICK_ROLES = {"reference": "ref.", "stand-in": "stand-in", "stored reference": "stored"}


def draw_memory(comparison: Comparison, runs: Mapping[str, RunRecord]) -> Figure:
    """Draw peak memory against N, stacked by category, the total marked by where the peak is."""
    rows = memory_rows(comparison, runs)
    legend: list[Artist] = [
        Patch(facecolor=color, hatch=hatch, edgecolor="black", label=name.replace("_", " "))
        for name, (color, hatch) in LOOKS.items()
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
            markerfacecolor="white", markersize=6, gid=bar.name,
        )  # fmt: skip

    return _draw(rows, 3.0, legend, draw_bar)


def draw_step_time(comparison: Comparison, runs: Mapping[str, RunRecord]) -> Figure:
    """Draw the time of an optimizer step against N; of repetitions the median and each as a dot."""
    rows = step_time_rows(comparison, runs)
    legend: list[Artist] = [
        Patch(facecolor=color, hatch=hatch, edgecolor="black", label=label)
        for label, (color, hatch) in _TIME_BARS.items()
    ]
    if rows.are_repeated:
        legend.append(_marker("o", "each of the repeated runs; the bar is their median", "black"))

    def draw_bar(axes: Axes, position: int, bar: Bar) -> None:
        color, hatch = _TIME_BARS["reference" if bar.is_reference else "candidate"]
        axes.bar(
            position, statistics.median(bar.each), _BAR_WIDTH, color=color, hatch=hatch,
            edgecolor="black", linewidth=0.6,
        )  # fmt: skip
        if len(bar.each) > 1:
            axes.plot([position] * len(bar.each), bar.each, "o", color="black", markersize=3)

    return _draw(rows, 2.6, legend, draw_bar)


def _draw(
    rows: BarRows, height: float, legend: Sequence[Artist], draw_bar: Callable[[Axes, int, Bar], None]
) -> Figure:
    """Draw a figure of bars: axes from zero, N below them, ratios above the bars."""
    most = max(len(bars) for _, bars in rows.panels)
    figure, (all_axes,) = lay_out(
        rows.title,
        [title for title, _ in rows.panels],
        level_heights=(height,),
        panel_width=max(7.0 if len(rows.panels) == 1 else 3.4, 0.34 * most + 0.8),
        legend=legend,
        notes=rows.notes,
    )
    for (_, bars), axes in zip(rows.panels, all_axes, strict=True):
        rotation = 90 if len(bars) > _MOST_UPRIGHT_LABELS else 0
        for position, bar in enumerate(bars):
            if bar.each:
                draw_bar(axes, position, bar)
            if bar.missing:
                axes.text(
                    position, 0.03, bar.missing, transform=axes.get_xaxis_transform(), rotation=90,
                    ha="center", va="bottom", fontsize=8,
                )  # fmt: skip
            elif bar.ratio is not None:
                axes.annotate(
                    f"{say_ratio(bar.ratio)} ×", (position, max(bar.each)), xytext=(0, 7),
                    textcoords="offset points", ha="center", va="bottom", fontsize=8,
                    rotation=rotation,
                )  # fmt: skip
        roles = (f"\n{_TICK_ROLES[bar.role]}" if bar.role else "" for bar in bars)
        labels = [f"{bar.n}{role}" for bar, role in zip(bars, roles, strict=True)]
        axes.set_xticks(range(len(labels)), labels, fontsize=8)
        axes.set_xlim(-0.8, max(len(labels), 3) - 0.2)
        axes.set_xlabel("N, micro-batches per optimizer step", fontsize=9)
        axes.set_axisbelow(True)
        axes.grid(axis="y", linewidth=0.4, alpha=0.5)
    # Above the bars stand their ratios, upright where there are many.
    factor = 1.3 if most > _MOST_UPRIGHT_LABELS else 1.18
    all_axes[0].set_ylim(0, rows.highest * factor or 1.0)
    all_axes[0].set_ylabel(rows.axis, fontsize=9)
    return figure


def _marker(marker: str, label: str, face: str = "white") -> Line2D:
    return Line2D([], [], linestyle="", marker=marker, label=label, color="black", markerfacecolor=face)
