"""Learning-rate schedules as a factor of the optimizer's own rate, stepped once per optimizer step.

Each is a pure function of the share of training done, so arms whose number of optimizer steps differs
still pass through the same rates.
"""

import math
from collections.abc import Sequence

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


def cosine(optimizer: Optimizer, total_steps: int, final_ratio: float = 0.0) -> LambdaLR:
    """Fall by half a cosine from 1 to `final_ratio` (Loshchilov & Hutter 2017, arXiv 1608.03983)."""
    return warmup_cosine(optimizer, total_steps, warmup_ratio=0.0, final_ratio=final_ratio)


def warmup_cosine(
    optimizer: Optimizer, total_steps: int, warmup_ratio: float = 0.1, final_ratio: float = 0.0
) -> LambdaLR:
    """Rise linearly over the first `warmup_ratio` of training, then fall by half a cosine."""
    warmup = round(warmup_ratio * total_steps)

    def factor(global_step: int) -> float:
        if global_step < warmup:
            return (global_step + 1) / (warmup + 1)
        done = (global_step - warmup) / max(1, total_steps - warmup)
        return final_ratio + (1 - final_ratio) * (1 + math.cos(math.pi * min(1.0, done))) / 2

    return LambdaLR(optimizer, factor)


def multistep(
    optimizer: Optimizer,
    total_steps: int,
    milestones: Sequence[float] = (0.5, 0.75),
    gamma: float = 0.1,
) -> LambdaLR:
    """Multiply by `gamma` after each milestone, a fraction of training."""

    def factor(global_step: int) -> float:
        return float(gamma ** sum(global_step >= milestone * total_steps for milestone in milestones))

    return LambdaLR(optimizer, factor)
