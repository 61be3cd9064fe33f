"""Learning rate and global batch where one follows the other, and a batch that grows instead of a rate
that falls.

Where a schedule would multiply the rate by α < 1, SGD may keep its rate and multiply the batch by 1/α
(Smith et al. 2018, arXiv 1711.00489); Adam and its like multiply the rate by √α and the batch by 1/α
(Meterez et al. 2025, arXiv 2510.14717). Both are the schedule's rate, times what the rate follows the
batch by: α · (1/α) and α · √(1/α).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from gaccum_exp.core.window import BatchStage, WindowPlan

POWERS = {"none": 0.0, "sqrt": 0.5, "linear": 1.0}
"""Of the batch, by the rule that the learning rate follows it by."""


def rate_factor(rule: str, share: float) -> float:
    """Return what the learning rate is multiplied by at so many times the batch it was chosen for.

    >>> rate_factor("linear", 4.0), rate_factor("sqrt", 4.0), rate_factor("none", 4.0)
    (4.0, 2.0, 1.0)
    """
    return float(share ** POWERS[rule])


@dataclass(frozen=True, slots=True)
class Cut:
    """A step of a schedule, cut where N changes."""

    accum_steps: int
    """N."""
    factor: float
    """From the schedule's own rate to the one that N stands for: N's first value / N of the highest."""


@dataclass(frozen=True, slots=True)
class BatchGrowth:
    """The windows of a training whose batch grows, by global step."""

    stages: tuple[BatchStage, ...]
    """Each begins at a global step."""
    base_steps: tuple[int, ...]
    """The step of the schedule that each window has: of the window in the training at the first batch
    that holds the sample at which it begins. After the last window, how many steps the schedule has."""
    factors: tuple[float, ...]
    """What the schedule's rate is multiplied by in each window."""


def cut_where_n_changes(rates: Sequence[float], accum_steps: int, largest: int) -> list[Cut]:
    """Return N and what becomes of the rate at each step of a schedule.

    Up to the schedule's peak nothing changes. From there on, where it has fallen to α of the peak, N is
    the integer nearest to accum_steps / α, halves up, and it stands for accum_steps / N of the peak: the
    schedule becomes steps, each above and below it. Once N is the largest, the rate takes over and
    falls below the last of these steps with the schedule.

    Args:
        rates: of the schedule, by step; they rise to their peak and fall from there.
        accum_steps: N up to the peak.
        largest: N at most.
    """
    peak = max(rates)
    fall_from = len(rates) - rates[::-1].index(peak)
    cuts = [Cut(accum_steps, 1.0)] * fall_from
    for rate in rates[fall_from:]:
        alpha = rate / peak
        # The comparison comes first, since the quotient may be infinite.
        n = largest if alpha * largest <= accum_steps else math.floor(accum_steps / alpha + 0.5)
        n = min(max(n, accum_steps), largest)
        stands_for = accum_steps / n if n < largest else min(accum_steps / n, alpha)
        cuts.append(Cut(n, stands_for / alpha if alpha > 0 else 1.0))
    return cuts


def grow(plan: WindowPlan, cuts: Sequence[Cut], micro_batch: int, rule: str) -> BatchGrowth:
    """Cut the samples of a training into windows that grow.

    They hold the samples of the training at the first batch, and the last window what is left of them,
    where that is less. Under `drop` what is no whole window is left out, there as at an epoch's end.

    Args:
        plan: at the first batch.
        cuts: of the schedule, one for each of the plan's windows.
        micro_batch: samples.
        rule: that the rate follows the batch by.
    """
    last = len(cuts) - 1
    end = plan.position(last) + plan.size(last)
    first_batch = plan.largest_batch
    base_steps: list[int] = []
    factors: list[float] = []
    stages, growing = [BatchStage(0, first_batch)], plan

    def begin(size: int) -> None:
        nonlocal growing
        here = len(base_steps)
        stages[:] = [*(stage for stage in stages if stage.start < here), BatchStage(here, size)]
        growing = plan.in_stages(stages)

    while (position := growing.position(len(base_steps))) < end:
        step = min(plan.step_at(position), last)
        size = cuts[step].accum_steps * micro_batch
        if size != stages[-1].global_batch_size:
            begin(size)  # a larger one may not fit into what is left of the epoch, and begins later
            if growing.position(len(base_steps)) != position:
                continue
        left = end - position
        if growing.size(len(base_steps)) > left:
            if plan.partial_window == "drop":
                break
            size = left
            begin(size)
        base_steps.append(step)
        factors.append(cuts[step].factor * rate_factor(rule, size / first_batch))
    return BatchGrowth(tuple(stages), (*base_steps, len(cuts)), tuple(factors))
