"""Lay out a figure: a grid of panels, and below it a strip with the legend and the notes.

Figures are built from `matplotlib.figure.Figure` alone: no window system, no state shared with a
caller's own plots.
"""

import textwrap
from collections.abc import Sequence

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gaccum_exp.report.figures.panels import PANELS_PER_ROW

_MOST_NOTE_LINES = 10
_NOTE_POINTS = 8
_LEAST_WIDTH_INCHES = 7.5
_LEGEND_ROW_INCHES, _NOTE_LINE_INCHES = 0.19, 0.145
_LEGEND_STYLE = {"fontsize": 8, "frameon": False, "handlelength": 3.2, "columnspacing": 1.4}


def lay_out(
    title: str,
    panel_titles: Sequence[str],
    level_heights: Sequence[float],
    panel_width: float,
    legend: Sequence[Artist],
    notes: Sequence[str],
) -> tuple[Figure, list[list[Axes]]]:
    """Lay out a figure; widths and heights are in inches.

    Returns:
        the figure and its axes, `axes[level][i]` for panel i: a panel's axes lie one above the other,
        and those at the same level share their y scale, so that panels can be compared by eye.
    """
    columns = min(len(panel_titles), PANELS_PER_ROW)
    rows = -(-len(panel_titles) // columns)
    width = max(_LEAST_WIDTH_INCHES, columns * panel_width + 0.6)
    lines = [line for note in notes for line in textwrap.wrap(note, int(width * 15))]
    if len(lines) > _MOST_NOTE_LINES:
        lines[_MOST_NOTE_LINES - 1 :] = ["… and more: see the comparison's notes."]
    longest = max((len(str(artist.get_label())) for artist in legend), default=1)
    legend_columns = max(1, min(len(legend), int(width / (0.5 + 0.06 * longest))))
    legend_rows = -(-len(legend) // legend_columns)
    strip = 0.1 + _LEGEND_ROW_INCHES * (legend_rows + 0.7) + _NOTE_LINE_INCHES * len(lines)
    main = rows * (sum(level_heights) + 0.75) + 0.4
    figure = Figure(figsize=(width, main + strip), layout="constrained")
    above, below = figure.subfigures(2, 1, squeeze=False, height_ratios=[main, strip])[:, 0]
    above.suptitle("\n".join(textwrap.wrap(title, int(width * 11))), fontsize=11)
    below.legend(handles=legend, loc="upper center", ncols=legend_columns, **_LEGEND_STYLE)
    below.text(0.015, 0.05 / strip, "\n".join(lines), va="bottom", fontsize=_NOTE_POINTS)
    levels = len(level_heights)
    grid = above.add_gridspec(rows * levels, columns, height_ratios=list(level_heights) * rows)
    found: list[list[Axes]] = [[] for _ in range(levels)]
    for index, panel_title in enumerate(panel_titles):
        row, column = divmod(index, columns)
        for level in range(levels):
            first = found[level][0] if found[level] else None
            top = found[0][index] if level else None
            axes = above.add_subplot(grid[row * levels + level, column], sharey=first, sharex=top)
            axes.tick_params(labelsize=8, labelleft=column == 0, labelbottom=level == levels - 1)
            axes.spines[["top", "right"]].set_visible(False)
            found[level].append(axes)
        wrapped = "\n".join(textwrap.wrap(panel_title, int(panel_width * 9)))
        found[0][index].set_title(wrapped, fontsize=10)
    return figure, found
