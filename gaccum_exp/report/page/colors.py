"""Looks of the page's curves: those of the figures, and on black the same hues, lighter."""

from typing import NamedTuple

from gaccum_exp.report.figures.looks import DASHES, color

_LINE_PIXELS = 2.4


class Look(NamedTuple):
    """How one curve is drawn."""

    light: str
    dark: str
    dash: str
    """As SVG has it, in pixels; empty: none."""


def looks(count: int) -> list[Look]:
    """Return the look of so many curves, one shade after the other."""
    return [
        Look(
            color(index, count),
            color(index, count, on_black=True),
            " ".join(f"{_LINE_PIXELS * part:g}" for part in DASHES[index % len(DASHES)][1]),
        )
        for index in range(count)
    ]
