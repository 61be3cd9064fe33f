"""Colours of the page's curves, which keep the order of N in print and stand out on white and black."""

from typing import NamedTuple

_LIGHT = ("#1d3f8f", "#0f766e", "#8a5a00", "#b3361b", "#8b2a7f")
_DARK = ("#8fb4ff", "#4fd1bf", "#e8c15a", "#ff9b7a", "#e69ade")
_DASHES = ("", "7 3", "2 2", "9 3 2 3")


class Look(NamedTuple):
    """How one curve is drawn."""

    light: str
    dark: str
    dash: str
    """As SVG has it; empty: none."""


def looks(count: int) -> list[Look]:
    """Return the look of so many curves, one shade after the other."""
    places = [i / max(1, count - 1) for i in range(count)]
    return [
        Look(_between(_LIGHT, place), _between(_DARK, place), _DASHES[i % len(_DASHES)])
        for i, place in enumerate(places)
    ]


def _between(stops: tuple[str, ...], place: float) -> str:
    """Return the colour at a place from 0 to 1 of a line through these."""
    first = min(int(place * (len(stops) - 1)), len(stops) - 2)
    part = place * (len(stops) - 1) - first
    ends = ([int(of[i : i + 2], 16) for i in (1, 3, 5)] for of in stops[first : first + 2])
    mixed = (round(a + part * (b - a)) for a, b in zip(*ends, strict=True))
    return "#" + "".join(f"{value:02x}" for value in mixed)
