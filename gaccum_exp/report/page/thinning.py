"""Leave out points of a curve that nobody could see, and none that stands out."""

from collections.abc import Sequence

import numpy as np


def kept_places(columns: Sequence[np.ndarray], most: int) -> np.ndarray:
    """Return which points to keep, ascending, about `most` of them: (kept,) int64.

    The points are cut into as many equal buckets as leave room for the least and the greatest value of
    every column, and for the first value that is not finite, in each. The first and the last point stay.

    Args:
        columns: what is drawn at the same places, (points,) each.
        most: so many points are kept as they are.
    """
    points = columns[0].size
    if points <= most:
        return np.arange(points)
    buckets = max(1, most // (2 * len(columns)))
    kept = {0, points - 1}
    for places in np.array_split(np.arange(points), buckets):
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
