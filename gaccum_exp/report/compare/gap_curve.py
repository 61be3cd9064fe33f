"""How far a loss curve is from its reference's as training goes on, for whoever draws it elsewhere.

A unit in the last place (ulp) is here the distance between two numbers as large as the reference's
largest loss so far, in the precision of its record: about what rounding alone moves a loss by. The loss
itself is no such measure, since what it was made from does not become small as it does.
"""

from typing import NamedTuple

import numpy as np

from gaccum_exp.report.compare.distances import loss_curve, loss_gaps
from gaccum_exp.report.compare.rounding_envelope import spacing
from gaccum_exp.tracking.records import RunRecord


class Gap(NamedTuple):
    """Where two curves are at one step."""

    global_step: int
    gap: float
    """|train loss − reference's|."""
    largest_ulp: float | None
    """The largest gap so far in ulp; None where it is 0, not finite, or what it was and will be next."""


def gap_curve(run: RunRecord, reference: RunRecord, most: int) -> list[Gap]:
    """Return so many gaps at most, each the largest of as many steps, so that no spike is lost."""
    global_steps, gaps = loss_gaps(run, reference)
    every, losses = loss_curve(reference)
    heights = np.fmax.accumulate(np.abs(losses))[np.searchsorted(every, global_steps)]
    with np.errstate(all="ignore"):  # of losses that are not finite
        ulps = np.fmax.accumulate(gaps) / spacing(heights)
    each = max(1, -(-gaps.size // most))
    starts = range(0, gaps.size, each)
    places = np.array(
        [start + int(np.argmax(gaps[start : start + each])) for start in starts], dtype=int
    )
    kept = ulps[places]
    told = (kept > 0) & (kept < np.inf)
    told[1:-1] &= (kept[1:-1] != kept[:-2]) | (kept[1:-1] != kept[2:])
    columns = global_steps[places], gaps[places], kept, told
    return [
        Gap(step, gap, ulp if is_told else None)
        for step, gap, ulp, is_told in zip(*(column.tolist() for column in columns), strict=True)
    ]
