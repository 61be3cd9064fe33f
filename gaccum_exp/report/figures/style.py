"""One style for every figure, of a sweep and of a study: colours, dashes, markers, and sizes.

Series that are drawn together differ three times: in colour, which runs from dark to light so that grey
print keeps the order, in dashes and in markers. The lightest still has a contrast of three to one with
white paper (what WCAG 2.1 asks of graphics), so nothing pale is among them.

The functions here are to be called inside `styled`, which is also where a figure learns its width:

    with styled("single"):
        figure = Figure(figsize=(width(), 2.5), layout="constrained")
        ...
        save(figure, folder, "name", ("pdf",))
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap, to_hex
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

WIDTHS_INCHES = {"single": 3.5, "double": 7.2, "talk": 12.0}
"""A column and the text width of a page with two columns, and a slide."""
FORMATS = ("svg", "png", "pdf")
_PRINTED, _POINTS = 8.0, {"single": 7.0, "talk": 15.0}
"""The size of letters, and what it is instead in some widths."""
DPI = 150
_ORDERED = LinearSegmentedColormap.from_list(
    "ordered", ["#2b0a4f", "#1a4490", "#0f8c82", "#d9791e"], N=256
)
_ORDERED_ON_BLACK = LinearSegmentedColormap.from_list(
    "ordered_on_black", ["#a487e6", "#7fa8ff", "#4fd1bf", "#f0c27a"], N=256
)
Dash = tuple[int, tuple[float, ...]]
DASHES: tuple[Dash, ...] = ((0, ()), (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (6, 1.5, 1.5, 1.5)))
"""As matplotlib has them, in widths of the line."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
"""With the dashes 4 × 7 looks that are told apart without colour."""
ACCENT, GREY, DARK_GREY = "#b3203f", "#8a8f98", "#5b6068"
"""Of what is marked in a figure, of what lies behind, and of its edge."""


@contextmanager
def styled(size: str | float = "double") -> Iterator[None]:
    """Draw and save in this style, whatever a caller's own settings are.

    Args:
        size: a name among `WIDTHS_INCHES`, or a width in inches.
    """
    inches = WIDTHS_INCHES[size] if isinstance(size, str) else size
    letter = _POINTS.get(str(size), _PRINTED)
    scale = letter / _PRINTED
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(
            {
                "figure.figsize": (inches, 0.6 * inches),
                "figure.dpi": DPI,
                "font.size": letter,
                "figure.titlesize": 1.2 * letter,
                "axes.titlesize": 1.1 * letter,
                "axes.labelsize": letter,
                "xtick.labelsize": 0.9 * letter,
                "ytick.labelsize": 0.9 * letter,
                "legend.fontsize": 0.95 * letter,
                "legend.frameon": False,
                "legend.handlelength": 3.2,
                "legend.columnspacing": 1.4,
                "lines.linewidth": 1.3 * scale,
                "lines.markersize": 4.0 * scale,
                "errorbar.capsize": 2.5 * scale,
                "axes.spines.top": False,
                "axes.spines.right": False,
                "axes.axisbelow": True,
                "grid.linewidth": 0.4,
                "grid.alpha": 0.6,
                "hatch.linewidth": 0.6,
                # Text stays text: to be searched, and set in the letters of the page around it.
                "svg.fonttype": "none",
                "pdf.fonttype": 42,
                # The same runs give the same bytes: no random ids.
                "svg.hashsalt": "gaccum_exp",
            }
        )
        yield


def width() -> float:
    """Return the width of a figure in inches."""
    return float(matplotlib.rcParams["figure.figsize"][0])


def points(size: float = 1.0) -> float:
    """Return so many times the size of ordinary letters."""
    return size * float(matplotlib.rcParams["font.size"])


def scaled(inches: float) -> float:
    """Return inches that hold as many letters as these do at their size in print."""
    return inches * points() / _PRINTED


def letters(inches: float, size: float = 1.0) -> int:
    """Return how many letters of so many times the ordinary size fit into a line."""
    return max(8, int(inches * 72 / (0.58 * points(size))))


def lines_inches(lines: float) -> float:
    """Return how high so many lines of text are."""
    return points(1.35 * lines) / 72


def color(index: int, series: int, *, on_black: bool = False) -> str:
    """Return the colour of one of several series, dark to light; on black all are light."""
    colors = _ORDERED_ON_BLACK if on_black else _ORDERED
    return to_hex(colors(index / max(series - 1, 1)))


def look(index: int, series: int) -> dict[str, Any]:
    """Return how the line of one of several series is drawn: colour, dashes and marker."""
    return {
        "color": color(index, series),
        "linestyle": DASHES[index % len(DASHES)],
        "marker": MARKERS[index % len(MARKERS)],
        "markerfacecolor": "white",
    }


def save(figure: Figure, folder: Path, name: str, formats: Sequence[str] = ("svg", "png")) -> list[Path]:
    """Write a figure as each of these formats, the same bytes for the same figure; return the files."""
    folder.mkdir(parents=True, exist_ok=True)
    laid_out(figure)
    paths = []
    for suffix in dict.fromkeys(formats):
        path = folder / f"{name}.{suffix}"
        # No date and no version in it; a PNG in half the time, and a tenth larger.
        unsaid: dict[str, Any] = {
            "svg": {"metadata": {"Date": None}},
            "png": {"metadata": {"Software": None}, "pil_kwargs": {"compress_level": 3}},
            "pdf": {"metadata": {"CreationDate": None, "Producer": None}},
        }
        figure.savefig(path, dpi=DPI, **unsaid[suffix])
        paths.append(path)
    return paths


def laid_out(figure: Figure) -> Figure:
    """Lay a figure out, once: each file would be laid out again otherwise, and drawn twice."""
    FigureCanvasAgg(figure)
    layout = figure.get_layout_engine()
    if layout is not None:
        layout.execute(figure)
        figure.set_layout_engine(None)
        _round_places(figure)
    return figure


def _round_places(figure: Figure) -> None:
    """Round what the layout's solver found: its last bits depend on where it lies in memory."""
    for part in figure.subfigs:
        part.bbox_relative.set_points(part.bbox_relative.get_points().round(6))
    for text in (*figure.texts, *(text for part in figure.subfigs for text in part.texts)):
        x, y = text.get_position()
        text.set_position((round(x, 6), round(y, 6)))
    for axes in figure.axes:
        axes.set_position(Bbox(axes.get_position().get_points().round(6)))
