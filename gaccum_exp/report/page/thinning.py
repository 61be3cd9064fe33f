"""Leave out points of a curve that nobody could see, and none that stands out."""

from collections.abc import Sequence

import numpy as np


def kept_places(columns: Sequence[np.ndarray], most: int) -> np.ndarray:
    """Return which points to keep, ascending, about `most` of them: (kept,) int64.

    The points are cut into so many buckets that there is room for the least and the greatest value of
    every column in each; the first value that is not finite stays too, as do the first and the last
    point. Of the buckets' ends half are equally far apart, and half ever further: losses fall fastest in
    the first steps.

    Args:
        columns: what is drawn at the same places, (points,) each.
        most: so many points are kept as they are.
    """
    points = columns[0].size
    if points <= most:
        return np.arange(points)
    half = max(1, most // (4 * len(columns)))
    ends = np.unique([*np.linspace(0, points, half + 1), *np.geomspace(1, points, half + 1)]).astype(int)
    kept = {0, points - 1}
    for places in np.split(np.arange(points), np.unique(ends)[1:-1]):
        for column in columns:
            values = column[places]
            finite = np.isfinite(values)
            if not finite.all():
                kept.add(int(places[np.argmin(finite)]))
            if finite.any():
                kept.add(int(places[np.argmin(np.where(finite, values, np.inf))]))
                kept.add(int(places[np.argmax(np.where(finite, values, -np.inf))]))
    return np.array(sorted(kept))


def rounded(values: np.ndarray, digits: int) -> list[float | None]:
    """Return numbers as a figure needs them; None where one is not finite."""
    return [float(f"{v:.{digits}g}") if np.isfinite(v) else None for v in values.tolist()]
