"""The time of an arm's optimizer steps, as its run has recorded it; `core/step_times` compares two.

A load that lasts longer than an arm is in no spread of its windows. It is in the time that the training
waited for a processor, which Linux counts: where that differs much between two arms, their times have no
ratio.
"""

import math

from gaccum_exp.core.step_times import FEWEST_WINDOWS, StepTime
from gaccum_exp.tracking import metrics
from gaccum_exp.tracking.records import RunRecord

OTHER_LOAD = 1.25
"""From here on a ratio is not stated."""


def loads_differ(ours: RunRecord, theirs: RunRecord) -> bool:
    """Whether the ratio of two trainings' times is as much that of the loads.

    Without what other processes had of the processor it would change by `OTHER_LOAD` or more.
    """
    left = [1 - min(run.metrics.get(metrics.WAITING_SHARE, 0.0), 0.99) for run in (ours, theirs)]
    return max(left) > OTHER_LOAD * min(left)


def step_time(run: RunRecord) -> StepTime | None:
    """Return it; None where too few windows were timed, or how many is not known (older versions)."""
    names = metrics.STEP_TIME_S, metrics.STEP_TIME_LOW_S, metrics.STEP_TIME_HIGH_S, metrics.STEP_WINDOWS
    found = [value for name in names if math.isfinite(value := run.metrics.get(name, math.nan))]
    if len(found) < len(names) or found[-1] < FEWEST_WINDOWS:
        return None
    median_s, low_s, high_s, windows = found
    return StepTime(median_s, low_s, high_s, int(windows))
