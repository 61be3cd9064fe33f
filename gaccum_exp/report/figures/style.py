"""One style for every figure, of a sweep and of a study: the looks of `looks`, and sizes.

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
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

from gaccum_exp.report.figures.looks import ACCENT, DARK_GREY, GREY, color, look
from gaccum_exp.report.whole_files import whole

__all__ = [
    "ACCENT", "DARK_GREY", "DPI", "FORMATS", "GREY", "WIDTHS_INCHES", "color", "laid_out", "letters",
    "lines_inches", "look", "points", "save", "scaled", "styled", "width",
]  # fmt: skip
WIDTHS_INCHES = {"single": 3.5, "double": 7.2, "talk": 12.0}
"""A column and the text width of a page with two columns, and a slide."""
FORMATS = ("svg", "png", "pdf")
_PRINTED, _POINTS = 8.0, {"single": 7.0, "talk": 15.0}
"""The size of letters, and what it is instead in some widths."""
DPI = 150


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
        with whole(path) as beside:
            figure.savefig(beside, dpi=DPI, **unsaid[suffix])
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
