"""Many runs as few curves: at each step their median, and the range from the least to the greatest.

Where a panel would hold more curves than can be told apart, those of the same N are drawn as one; where
there are more N than a legend can name, neighbouring N are.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gaccum_exp.report.figures.panels import Panel

MOST_CURVES = 40
"""So many curves in a panel, and so many N in a legend, are still drawn one by one."""
_MOST_GROUPS = 12


@dataclass(frozen=True, slots=True)
class Crowd:
    """Several curves by step; NaN where none of them has a finite value. All are (steps,)."""

    steps: np.ndarray
    low: np.ndarray
    median: np.ndarray
    high: np.ndarray


def is_crowded(panels: Sequence[Panel]) -> bool:
    """Whether the arms are too many to be drawn one by one."""
    every = {steps for panel in panels for steps in panel.steps}
    return len(every) > MOST_CURVES or any(len(panel.rows) > MOST_CURVES for panel in panels)


def groups_of(panels: Sequence[Panel]) -> list[tuple[int, ...]]:
    """Return which N are drawn alike, ascending: each by itself, unless they are crowded and many.

    The least N is the reference, as a rule, and stays by itself.
    """
    every = sorted({steps for panel in panels for steps in panel.steps})
    if len(every) <= _MOST_GROUPS or not is_crowded(panels):
        return [(steps,) for steps in every]
    rest = np.array_split(np.array(every[1:]), _MOST_GROUPS - 1)
    return [(every[0],), *(tuple(part.tolist()) for part in rest)]


def crowd_of(curves: Sequence[tuple[np.ndarray, np.ndarray]]) -> Crowd:
    """Sum up curves, each given by its steps, ascending, and its values at them.

    A value that is not finite counts as missing.
    """
    steps = np.unique(np.concatenate([steps for steps, _ in curves]))
    values = np.full((len(curves), steps.size), np.nan)
    for line, (at, of) in zip(values, curves, strict=True):
        line[np.searchsorted(steps, at)] = np.where(np.isfinite(of), of, np.nan)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of steps at which every value is missing
        summed = (of(values, axis=0) for of in (np.nanmin, np.nanmedian, np.nanmax))
        return Crowd(steps, *summed)
