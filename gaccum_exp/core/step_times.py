"""Say whether two times of an optimizer step differ measurably.

A time is the median of windows timed after warm-up, its spread their quartiles. Two times differ
measurably where the ranges between the quartiles do not overlap: three quarters of the one's windows
are then slower than three quarters of the other's. Of fewer than `FEWEST_WINDOWS` no quartile means
much, and nothing is stated.

The interval of the median, which narrows with every window, would be the sharper test of independent
windows. They are not: what else a machine does slows down hundreds in a row. One loop timed 24 times in
succession, on two cores that other processes shared, was said to differ from itself in 72 % of the pairs
by order statistics' 95 % intervals of the medians of 300 windows, in 2.5 % by their quartiles. Of 60
windows it was 50 and 19 %: a load that lasts longer than an arm is in no spread of its windows.
"""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

FEWEST_WINDOWS = 10
"""Timed after warm-up, for a ratio of step times to be stated."""
SOME_LOAD = 0.05
"""From here on the share that was waited for a processor is said."""


class StepTime(NamedTuple):
    """The seconds of some optimizer steps."""

    median_s: float
    low_s: float
    """The lower quartile, and the upper one."""
    high_s: float
    windows: int
    """How many were timed after warm-up."""


def time_of(seconds: Sequence[float]) -> StepTime:
    """Return the time of some windows, one at least."""
    low_s, median_s, high_s = (
        statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else [seconds[0]] * 3
    )
    return StepTime(median_s, low_s, high_s, len(seconds))


def times_differ(ours: StepTime | None, theirs: StepTime | None) -> bool | None:
    """Whether two times differ measurably; None where too few windows were timed to tell."""
    if ours is None or theirs is None or min(ours.windows, theirs.windows) < FEWEST_WINDOWS:
        return None
    return ours.high_s < theirs.low_s or theirs.high_s < ours.low_s


def waited_s() -> float | None:
    """Return for how many seconds this thread has been ready and has waited for a processor.

    It is the run delay of Linux, the second number in /proc/<pid>/schedstat (its documentation's page
    on scheduler statistics); None on systems without.
    """
    try:
        return int(Path("/proc/thread-self/schedstat").read_text().split()[1]) / 1e9
    except (OSError, ValueError, IndexError):
        return None
