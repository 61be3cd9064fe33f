"""The sheet that every figure is drawn on: a panel per setting, a legend and the notes below.

Figures are built from `matplotlib.figure.Figure` alone: no window system, no state shared with a
caller's own plots.
"""

import textwrap
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure

from gaccum_exp.report.compare.comparison import Comparison
from gaccum_exp.report.compare.pairing import micro_batches_of
from gaccum_exp.report.compare.row import ComparisonRow
from gaccum_exp.report.text.findings import SOUND
from gaccum_exp.report.text.wording import say_list
from gaccum_exp.tracking.records import RunRecord

MOST_PANELS = 6
PANELS_PER_ROW = 3
_MOST_NOTE_LINES = 10
_NOTE_POINTS = 8
_LEAST_WIDTH_INCHES = 7.5
_LEGEND_ROW_INCHES, _NOTE_LINE_INCHES = 0.19, 0.145
_LEGEND_STYLE = {"fontsize": 8, "frameon": False, "handlelength": 3.2, "columnspacing": 1.4}

_ROLE_WORDS = {
    "reference": "reference",
    "stand-in": "stand-in reference",
    "stored reference": "stored reference",
}


@dataclass(frozen=True)
class Panel:
    """The arms that are drawn into one panel; those that differ in the seed alone share it."""

    title: str
    rows: tuple[ComparisonRow, ...]

    @property
    def steps(self) -> list[int]:
        """The N of its arms, ascending."""
        return sorted(self._by_steps)

    def at(self, steps: int) -> list[ComparisonRow]:
        """Return the arms with this N."""
        return self._by_steps.get(steps, [])

    @cached_property
    def _by_steps(self) -> dict[int, list[ComparisonRow]]:
        found: dict[int, list[ComparisonRow]] = {}
        for row in self.rows:
            if row.steps is not None:
                found.setdefault(row.steps, []).append(row)
        return found


def panels_of(comparison: Comparison) -> list[Panel]:
    """Sort arms and stored references into panels: one per setting, or per reduction if too many."""
    rows = [row for row in comparison.shown if row.steps is not None]
    fine = _sort(rows, [row.setting.repeated_label for row in rows])
    if len(fine) <= MOST_PANELS:
        return fine
    count = Counter(setting.reduction for setting in {row.setting for row in rows})
    return _sort(rows, [f"{row.reduction}, {count[row.reduction]} settings" for row in rows])


def thinned(panels: Sequence[Panel], most: int) -> tuple[list[Panel], tuple[str, ...]]:
    """Return panels that hold about so many N side by side at most, and what to say of the others.

    Those of references are among them, whatever they are.
    """
    each = most // max(1, min(len(panels), PANELS_PER_ROW))
    thinner, said = [], []
    for panel in panels:
        every = panel.steps
        if len(every) > each:
            kept = set(spread(every, each))
            kept |= {row.steps for row in panel.rows if row.is_reference and row.steps is not None}
            said.append(f"Of {len(every)} N, {len(kept)} are drawn; comparison.csv has all of them.")
            panel = Panel(panel.title, tuple(row for row in panel.rows if row.steps in kept))
        thinner.append(panel)
    return thinner, tuple(dict.fromkeys(said))


def spread(every: Sequence[int], most: int) -> list[int]:
    """Return at most so many of these N, ascending: the least, the greatest, and by ratio between."""
    if len(every) <= most:
        return list(every)
    chosen, ratio = [every[0]], (every[-1] / every[0]) ** (1 / (most - 2))
    for steps in every[1:-1]:
        if steps >= ratio * chosen[-1]:
            chosen.append(steps)
    return [*chosen, every[-1]]


def _sort(rows: Sequence[ComparisonRow], titles: Sequence[str]) -> list[Panel]:
    sorted_rows: dict[str, list[ComparisonRow]] = {title: [] for title in sorted(titles)}
    for row, title in zip(rows, titles, strict=True):
        sorted_rows[title].append(row)
    return [Panel(title, tuple(members)) for title, members in sorted_rows.items()]


def label_steps(group: Sequence[int], panels: Sequence[Panel]) -> str:
    """Say for a legend what the arms with this N, or these, are: `N = 2 (stand-in reference)`."""
    rows = [row for panel in panels for steps in group for row in panel.at(steps)]
    said = []
    for role in dict.fromkeys(row.role for row in rows if row.is_reference):
        everywhere = all(row.role == role for row in rows)
        said.append(_ROLE_WORDS[role] + ("" if everywhere else " of some"))
    for verdict in dict.fromkeys(row.verdict for row in rows if row.verdict not in (None, *SOUND)):
        concerned = sum(row.verdict == verdict for row in rows)
        said.append(f"{verdict}{'' if concerned == len(rows) else f' in {concerned} of {len(rows)}'}")
    unfinished = [row for row in rows if not row.finished]
    if len(unfinished) == len(rows) == 1:
        said.append(unfinished[0].status)
    elif unfinished:
        said.append(f"{len(unfinished)} of {len(rows)} did not finish")
    name = f"N = {group[0]}" if len(group) == 1 else f"N = {group[0]} to {group[-1]}"
    return name + (f" ({', '.join(said)})" if said else "")


def subject(runs: Sequence[RunRecord], rows: Sequence[ComparisonRow]) -> str:
    """Say what was trained: `CNN on Digits, global batch 256`."""
    model = _named(runs, "model.name", "model._target_")
    data = _named(runs, "data.name", "data.train._target_", "data._target_")
    batches = sorted({row.global_batch_size for row in rows if row.global_batch_size is not None})
    parts = [f"{model or 'model'} on {data or 'data'}"]
    if batches:
        parts.append(f"global batch {say_list(batches) if len(batches) <= 6 else 'varied'}")
    return ", ".join(parts)


def _named(runs: Sequence[RunRecord], *keys: str) -> str:
    found = {
        next((run.params[key].rpartition(".")[2] for key in keys if run.params.get(key)), "")
        for run in runs
        if micro_batches_of(run)
    } - {""}
    return say_list(sorted(found)) if len(found) <= 3 else f"{len(found)} kinds"


class Sheet:
    """A figure with a grid of panels above a strip that holds the legend and the notes.

    `axes[level][i]` belongs to panel i; a panel's axes lie one above the other, and those at the
    same level share their y scale, so that panels can be compared by eye.
    """

    def __init__(
        self,
        title: str,
        panels: Sequence[Panel],
        level_heights: Sequence[float],
        panel_width: float,
        legend: Sequence[Artist],
        notes: Sequence[str],
    ) -> None:
        """Lay out the sheet; widths and heights are in inches."""
        columns = min(len(panels), PANELS_PER_ROW)
        rows = -(-len(panels) // columns)
        width = max(_LEAST_WIDTH_INCHES, columns * panel_width + 0.6)
        lines = _wrap(notes, width)
        legend_columns = _legend_columns(legend, width)
        legend_rows = -(-len(legend) // legend_columns)
        strip = 0.1 + _LEGEND_ROW_INCHES * (legend_rows + 0.7) + _NOTE_LINE_INCHES * len(lines)
        main = rows * (sum(level_heights) + 0.75) + 0.4
        self.figure = Figure(figsize=(width, main + strip), layout="constrained")
        halves = self.figure.subfigures(2, 1, squeeze=False, height_ratios=[main, strip])
        above, below = halves[:, 0]
        above.suptitle("\n".join(textwrap.wrap(title, int(width * 11))), fontsize=11)
        below.legend(handles=legend, loc="upper center", ncols=legend_columns, **_LEGEND_STYLE)
        below.text(0.015, 0.05 / strip, "\n".join(lines), va="bottom", fontsize=_NOTE_POINTS)
        self.axes = _grid(above, len(panels), rows, columns, level_heights)
        for panel, axes in zip(panels, self.axes[0], strict=True):
            axes.set_title("\n".join(textwrap.wrap(panel.title, int(panel_width * 9))), fontsize=10)


def _grid(
    figure: SubFigure, n_panels: int, rows: int, columns: int, level_heights: Sequence[float]
) -> list[list[Axes]]:
    levels = len(level_heights)
    grid = figure.add_gridspec(rows * levels, columns, height_ratios=list(level_heights) * rows)
    made: list[list[Axes]] = [[] for _ in range(levels)]
    for index in range(n_panels):
        row, column = divmod(index, columns)
        for level in range(levels):
            first = made[level][0] if made[level] else None
            above = made[0][index] if level else None
            axes = figure.add_subplot(grid[row * levels + level, column], sharey=first, sharex=above)
            axes.tick_params(labelsize=8, labelleft=column == 0, labelbottom=level == levels - 1)
            axes.spines[["top", "right"]].set_visible(False)
            made[level].append(axes)
    return made


def _legend_columns(legend: Sequence[Artist], width: float) -> int:
    longest = max((len(str(artist.get_label())) for artist in legend), default=1)
    return max(1, min(len(legend), int(width / (0.5 + 0.06 * longest))))


def _wrap(notes: Sequence[str], width: float) -> list[str]:
    lines = [line for note in notes for line in textwrap.wrap(note, int(width * 15))]
    if len(lines) > _MOST_NOTE_LINES:
        return [*lines[: _MOST_NOTE_LINES - 1], "… and more: see the comparison's notes."]
    return lines
