"""Learning rate and global batch where one follows the other, and a batch that grows instead of a rate
that falls.

Where a schedule would multiply the rate by α < 1, SGD may keep its rate and multiply the batch by 1/α
(Smith et al. 2018, arXiv 1711.00489); Adam and its like multiply the rate by √α and the batch by 1/α
(Meterez et al. 2025, arXiv 2510.14717). Both are the schedule's rate, times what a rate follows the
batch by: α · (1/α) and α · √(1/α). That is how it is done here, since a batch grows by whole
micro-batches: for SGD the quotient of rate and batch is the schedule's in every window, and the rate is
constant but for what rounding leaves.
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


ROUNDING = 1e-9
"""So little may a schedule's rate be off, relatively: 0.1² is not 0.01."""


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


def growing_accum_steps(rates: Sequence[float], accum_steps: int, largest: int) -> list[int]:
    """Return N at each step of a schedule.

    From the schedule's peak on, where it has fallen to α of that, N is accum_steps / α rounded down, and
    the largest at most. What rounding and the largest leave of α is for the rate to take.

    Args:
        rates: of the schedule, by step; they rise to their peak and fall from there.
        accum_steps: N up to the peak.
        largest: N at most.
    """
    peak = max(rates)
    rising = len(rates) - rates[::-1].index(peak)
    found = [accum_steps] * rising
    for rate in rates[rising:]:
        alpha = rate / peak * (1 - ROUNDING)
        # The comparison comes first, since the quotient may be infinite.
        found.append(largest if alpha * largest <= accum_steps else math.floor(accum_steps / alpha))
    return found


def grow(plan: WindowPlan, accum_steps: Sequence[int], micro_batch: int, rule: str) -> BatchGrowth:
    """Cut the samples of a training into windows that grow.

    They hold the samples of the training at the first batch, and the last window what is left of them,
    where that is less. Under `drop` what is no whole window is left out, there as at an epoch's end.

    Args:
        plan: at the first batch.
        accum_steps: N at each step of the schedule, that is at each of the plan's windows.
        micro_batch: samples.
        rule: that the rate follows the batch by.
    """
    last = len(accum_steps) - 1
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
        size = accum_steps[step] * micro_batch
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
        factors.append(rate_factor(rule, size / first_batch))
    return BatchGrowth(tuple(stages), (*base_steps, len(accum_steps)), tuple(factors))
