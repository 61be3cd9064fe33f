"""The time of an arm's optimizer steps, as its run has recorded it; `core/step_times` compares two."""

import math

from gaccum_exp.core.step_times import FEWEST_WINDOWS, StepTime
from gaccum_exp.tracking import metrics
from gaccum_exp.tracking.records import RunRecord


def step_time(run: RunRecord) -> StepTime | None:
    """Return it; None where too few windows were timed, or how many is not known (older versions)."""
    names = metrics.STEP_TIME_S, metrics.STEP_TIME_LOW_S, metrics.STEP_TIME_HIGH_S, metrics.STEP_WINDOWS
    found = [value for name in names if math.isfinite(value := run.metrics.get(name, math.nan))]
    if len(found) < len(names) or found[-1] < FEWEST_WINDOWS:
        return None
    median_s, low_s, high_s, windows = found
    return StepTime(median_s, low_s, high_s, int(windows))
