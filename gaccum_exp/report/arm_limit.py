"""Decide which arms are shown one by one and which together, for tables, figures and sentences alike.

Up to `MOST_ARMS` of them each arm has its line, curve and bar. Of more, those that repeat each other are
shown as one, first those that differ in the seed alone; where values of N are still too many, some are
left out. Settings have a panel and a sentence each up to `MOST_SETTINGS`, else each reduction has one.
`comparison.csv` has every arm.
"""

from collections import Counter
from collections.abc import Iterable, Sequence

from gaccum_exp.report.compare.columns import ComparisonRow

MOST_ARMS = 48
MOST_SETTINGS = 6
MOST_NOTES = 16
"""Notes below a table; how many more there are is said."""


def by_setting(rows: Sequence[ComparisonRow], merged: str) -> dict[str, list[ComparisonRow]]:
    """Sort rows by their setting's label, repetitions together, or by reduction's if it is too many.

    A reduction's label is `merged`, with `{reduction}` and `{settings}`, how many there are, filled in.
    """
    found: dict[str, list[ComparisonRow]] = {}
    for row in rows:
        found.setdefault(row.setting.repeated_label, []).append(row)
    if len(found) <= MOST_SETTINGS:
        return found
    found = {}
    settings = Counter(setting.reduction for setting in {row.setting for row in rows})
    for row in rows:
        label = merged.format(reduction=row.reduction, settings=settings[row.setting.reduction])
        found.setdefault(label, []).append(row)
    return found


def by_n(rows: Iterable[ComparisonRow]) -> dict[int, list[ComparisonRow]]:
    """Sort rows by N, ascending; those without an N are left out."""
    found: dict[int, list[ComparisonRow]] = {}
    for row in rows:
        if row.accum_steps is not None:
            found.setdefault(row.accum_steps, []).append(row)
    return dict(sorted(found.items()))


def spread(every: Sequence[int], most: int) -> list[int]:
    """Return at most so many of these N, ascending: the least, the greatest, and by ratio between."""
    if len(every) <= most:
        return list(every)
    chosen, ratio = [every[0]], (every[-1] / every[0]) ** (1 / (most - 2))
    for n in every[1:-1]:
        if n >= ratio * chosen[-1]:
            chosen.append(n)
    return [*chosen, every[-1]]
