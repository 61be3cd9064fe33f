"""Figures of a sweep and of studies have one style, which holds in grey and at any width."""

import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import matplotlib
import pytest
from matplotlib.colors import to_rgb

from gaccum_exp.report.compare.comparison import compare
from gaccum_exp.report.figures import style
from gaccum_exp.report.figures.cost_bars import LOOKS
from gaccum_exp.report.figures.save_figures import draw
from gaccum_exp.tracking.records import RunRecord

Arm = Callable[..., RunRecord]


def grey(color: str) -> float:
    """Return the brightness of a colour in grey print, 0 to 1 (ITU-R BT.601, as PIL's "L")."""
    return sum(part * weight for part, weight in zip(to_rgb(color), (0.299, 0.587, 0.114), strict=True))


def luminance(color: str) -> float:
    """Return the relative luminance of WCAG 2.1."""
    parts = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(color))
    return sum(part * weight for part, weight in zip(parts, (0.2126, 0.7152, 0.0722), strict=True))


@pytest.mark.parametrize("series", range(2, 13))
def test_series_are_told_apart_in_grey(series: int) -> None:
    """Each is brighter than the one before by a fair share of the range, and none is lost on white."""
    looks = [style.look(i, series) for i in range(series)]
    for one, other in pairwise(looks):
        assert grey(other["color"]) - grey(one["color"]) > 0.25 / (series - 1)
    for look in looks:
        assert 1.05 / (luminance(look["color"]) + 0.05) > 3
    assert len({(look["marker"], look["linestyle"]) for look in looks}) == series


def test_categories_that_touch_differ_in_grey_or_in_their_hatch() -> None:
    """Of the stack of a peak every neighbour, in whichever order some are missing."""
    every = list(LOOKS.values())
    assert len({hatch for _, hatch in every}) == len(every)
    for (one, _), (other, _) in pairwise(every):
        assert abs(grey(one) - grey(other)) > 0.1


@pytest.mark.parametrize(("width", "inches"), [("single", 3.5), ("double", 7.2), ("talk", 12), (5.0, 5)])
def test_every_figure_has_the_width_that_was_asked_for(
    arm: Arm, width: str | float, inches: float, tmp_path: Path
) -> None:
    """To the last point, and letters in their size for it."""
    runs = [arm(n, n_losses=10, reduction=r) for n in (1, 2) for r in ("mean", "sum")]
    paths = draw(compare(runs), runs, tmp_path, formats=("svg",), width=width)
    assert len(paths) == 4
    for path in paths:
        head = re.search(r'width="([\d.]+)pt"', path.read_text(encoding="utf-8"))
        assert head is not None
        assert float(head[1]) == pytest.approx(72 * inches)


def test_each_format_is_written_and_drawn_again_is_the_same_bytes(arm: Arm, tmp_path: Path) -> None:
    """Whatever the user's own settings; text stays text in SVG, and letters are embedded in PDF."""
    runs = [arm(n, n_losses=10) for n in (1, 2)]
    comparison = compare(runs)
    first = draw(comparison, runs, tmp_path / "one", formats=style.FORMATS)
    with matplotlib.rc_context({"font.size": 20, "lines.linewidth": 9, "figure.autolayout": True}):
        again = draw(comparison, runs[::-1], tmp_path / "two", formats=style.FORMATS)
    assert {path.suffix for path in first} == {".svg", ".png", ".pdf"}
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in again]
    said = (tmp_path / "one" / "loss_curves.svg").read_text(encoding="utf-8")
    assert ">optimizer step<" in said
    document = (tmp_path / "one" / "loss_curves.pdf").read_bytes()
    assert b"/FontFile2" in document
    assert b"CreationDate" not in document


def test_a_format_is_written_once_and_no_other_is(arm: Arm, tmp_path: Path) -> None:
    """Whatever is named twice."""
    runs = [arm(n, n_losses=10) for n in (1, 2)]
    paths = draw(compare(runs), runs, tmp_path, formats=("pdf", "pdf"))
    assert sorted(tmp_path.iterdir()) == sorted(paths)
    assert {path.suffix for path in paths} == {".pdf"}


def test_on_black_every_series_stands_out_too() -> None:
    """In the same order, each brighter than the one before, with the contrast of text."""
    shades = [style.color(i, 9, on_black=True) for i in range(9)]
    assert all(grey(other) > grey(one) for one, other in pairwise(shades))
    assert min((luminance(shade) + 0.05) / (luminance("#12161c") + 0.05) for shade in shades) > 4.5
