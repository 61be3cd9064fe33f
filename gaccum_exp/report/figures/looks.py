"""How series that are drawn together differ: in colour, in dashes, in markers. No library that draws.

Colours run from dark to light so that grey print keeps the order. The lightest still has a contrast of
three to one with white paper (what WCAG 2.1 asks of graphics), so nothing pale is among them.
"""

from typing import Any

_ORDERED = ("#2b0a4f", "#1a4490", "#0f8c82", "#d9791e")
_ORDERED_ON_BLACK = ("#a487e6", "#7fa8ff", "#4fd1bf", "#f0c27a")
_SHADES = 256
Dash = tuple[int, tuple[float, ...]]
DASHES: tuple[Dash, ...] = ((0, ()), (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (6, 1.5, 1.5, 1.5)))
"""As matplotlib has them, in widths of the line."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
"""With the dashes 4 × 7 looks that are told apart without colour."""
ACCENT, GREY, DARK_GREY = "#b3203f", "#8a8f98", "#5b6068"
"""Of what is marked in a figure, of what lies behind, and of its edge."""


def color(index: int, series: int, *, on_black: bool = False) -> str:
    """Return the colour of one of several series, dark to light; on black all are light."""
    stops = _ORDERED_ON_BLACK if on_black else _ORDERED
    shade = min(_SHADES - 1, int(_SHADES * index / max(series - 1, 1)))
    at = shade / (_SHADES - 1) * (len(stops) - 1)
    place = min(int(at), len(stops) - 2)
    low, high = (bytes.fromhex(stop[1:]) for stop in stops[place : place + 2])
    mixed = (round(a + (at - place) * (b - a)) for a, b in zip(low, high, strict=True))
    return "#" + "".join(f"{part:02x}" for part in mixed)


def look(index: int, series: int) -> dict[str, Any]:
    """Return how the line of one of several series is drawn: colour, dashes and marker."""
    return {
        "color": color(index, series),
        "linestyle": DASHES[index % len(DASHES)],
        "marker": MARKERS[index % len(MARKERS)],
        "markerfacecolor": "white",
    }
