"""Lay out a figure: a grid of panels, and below or beside it the legend and the notes.

A figure is as wide as its style says, never wider: panels that do not fit side by side stand below each
other. Figures are built from `matplotlib.figure.Figure` alone: no window system, no state shared with a
caller's own plots.
"""

import textwrap
from collections.abc import Sequence

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure

from gaccum_exp.report.figures import style
from gaccum_exp.report.figures.panels import PANELS_PER_ROW

_MOST_NOTE_LINES = 10
_NOTES = 0.9
"""Size of the notes' letters, of the ordinary one."""
_HANDLE_LETTERS = 9
"""What is beside a name in a legend is so many letters wide."""
_LEAST_BESIDE_INCHES = 2.3
"""Room that a legend needs to stand beside the panel."""


def lay_out(
    title: str,
    panel_titles: Sequence[str],
    level_heights: Sequence[float],
    panel_width: float,
    legend: Sequence[Artist],
    notes: Sequence[str],
    most_panel_width: float = 99.0,
) -> tuple[Figure, list[list[Axes]]]:
    """Lay out a figure; widths and heights are in inches.

    Args:
        title: of the whole.
        panel_titles: a panel each.
        level_heights: of the axes of a panel, which lie one above the other, at a width of 7.2 inches.
        panel_width: what a panel needs at least.
        legend: what is named.
        notes: sentences.
        most_panel_width: what a panel can use; where a single one leaves enough room, legend and notes
            stand beside it.

    Returns:
        the figure and its axes, `axes[level][i]` for panel i; those at the same level share their y
        scale, so that panels can be compared by eye.
    """
    width = style.width()
    heights = [height * min(1.35, max(0.75, width / 7.2)) for height in level_heights]
    columns = max(1, min(len(panel_titles), PANELS_PER_ROW, int((width - 0.5) / panel_width)))
    rows = -(-len(panel_titles) // columns)
    is_beside = len(panel_titles) == 1 and width - most_panel_width >= style.scaled(_LEAST_BESIDE_INCHES)
    left = most_panel_width if is_beside else width
    lines = _wrapped(notes, width - left if is_beside else width)
    for artist in legend:
        letters = style.letters(width - left if is_beside else width) - _HANDLE_LETTERS
        artist.set_label(textwrap.fill(str(artist.get_label()), letters))
    wrapped = sum(str(artist.get_label()).count("\n") for artist in legend)
    named_rows = len(legend) if is_beside else _rows_of_names(legend, style.letters(width))
    strip = style.lines_inches(1.2 * named_rows + wrapped + 0.5 + len(lines)) + 0.08
    titles = [textwrap.wrap(t, style.letters(width / columns, 1.1)) for t in panel_titles]
    headed = textwrap.wrap(title, style.letters(width, 1.2))
    above_axes = style.lines_inches(1.5 * max(map(len, titles)) + 2.6)
    main = rows * (sum(heights) + above_axes) + style.lines_inches(1.4 * len(headed) + 0.6)
    if is_beside:
        figure = Figure(figsize=(width, max(main, strip + 0.6)), layout="constrained")
        figure.suptitle("\n".join(headed))
        above, below = figure.subfigures(1, 2, squeeze=False, width_ratios=[left, width - left])[0]
    else:
        figure = Figure(figsize=(width, main + strip), layout="constrained")
        above, below = figure.subfigures(2, 1, squeeze=False, height_ratios=[main, strip])[:, 0]
        above.suptitle("\n".join(headed))
    per_row = -(-len(legend) // named_rows) if legend else 1
    _name(below, legend, per_row, lines, "center left" if is_beside else "upper center")
    return figure, _panels(above, titles, heights, columns)


def _rows_of_names(legend: Sequence[Artist], letters: int) -> int:
    """Return in how few rows the names fit, which fill one column after the other."""
    lengths = [len(str(artist.get_label())) + _HANDLE_LETTERS for artist in legend]
    for rows in range(1, len(lengths)):
        if sum(max(lengths[k : k + rows]) for k in range(0, len(lengths), rows)) <= letters:
            return rows
    return len(lengths)


def _wrapped(notes: Sequence[str], inches: float) -> list[str]:
    lines = [line for note in notes for line in textwrap.wrap(note, style.letters(inches, _NOTES))]
    if len(lines) > _MOST_NOTE_LINES:
        lines[_MOST_NOTE_LINES - 1 :] = ["… and more: see the comparison's notes."]
    return lines


def _name(
    part: SubFigure, legend: Sequence[Artist], columns: int, lines: Sequence[str], place: str
) -> None:
    part.legend(handles=legend, loc=place, ncols=columns)
    part.text(0.012, 0.01, "\n".join(lines), va="bottom", fontsize=style.points(_NOTES))


def _panels(
    part: SubFigure, titles: Sequence[Sequence[str]], heights: Sequence[float], columns: int
) -> list[list[Axes]]:
    rows, levels = -(-len(titles) // columns), len(heights)
    grid = part.add_gridspec(rows * levels, columns, height_ratios=list(heights) * rows)
    found: list[list[Axes]] = [[] for _ in range(levels)]
    for index, lines in enumerate(titles):
        row, column = divmod(index, columns)
        for level in range(levels):
            first = found[level][0] if found[level] else None
            top = found[0][index] if level else None
            axes = part.add_subplot(grid[row * levels + level, column], sharey=first, sharex=top)
            axes.tick_params(labelleft=column == 0, labelbottom=level == levels - 1)
            found[level].append(axes)
        found[0][index].set_title("\n".join(lines))
    return found
