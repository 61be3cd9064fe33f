"""A batch that grows where the schedule of an experiment would let its learning rate fall."""

import logging
from itertools import pairwise
from math import prod

import torch

from gaccum_exp.config.batch_sizes import AccumStage
from gaccum_exp.config.schema import Settings
from gaccum_exp.core.batch_growth import ROUNDING, BatchGrowth, grow, growing_accum_steps
from gaccum_exp.core.window import WindowPlan
from gaccum_exp.errors import BadInputError
from gaccum_exp.train.batch_rules import Rates

log = logging.getLogger(__name__)
RULES = {"sgd": "linear", "adam": "sqrt"}
"""How the learning rate follows the batch, by kind of optimizer."""
KINDS: dict[str, tuple[type[torch.optim.Optimizer], ...]] = {
    "sgd": (torch.optim.SGD,),
    "adam": (
        *(torch.optim.Adam, torch.optim.AdamW, torch.optim.NAdam, torch.optim.RAdam),
        torch.optim.RMSprop,
    ),
}
"""The optimizers that a rule is for: those that divide by a root mean square are of Adam's kind."""


def kind_of(optimizer: type[torch.optim.Optimizer]) -> str | None:
    """Return whose rule is an optimizer's own; None: none is known for it."""
    return next((kind for kind, kinds in KINDS.items() if issubclass(optimizer, kinds)), None)


def growth_of(
    settings: Settings, plan: WindowPlan, optimizer: torch.optim.Optimizer, rates: list[float]
) -> BatchGrowth:
    """Derive how the batch of a training grows.

    Args:
        settings: of the run.
        plan: of the training at the first batch.
        optimizer: any of the run's kind.
        rates: of the schedule, at every window of that plan.

    Raises:
        BadInputError: the schedule is none that a batch can follow, or the data set is too small.
    """
    key = f"accum.grow={settings.accum.grow}"
    first, micro = int(settings.accum.steps), settings.data.micro_batch_size
    _require_one_fall(key, settings, rates)
    held = plan.samples // micro
    largest = min(held, settings.accum.grow_to or held)
    if largest <= first:
        raise BadInputError(
            f"{key}: data.train holds {plan.samples} samples, so that N can be no more than {held} with "
            f"micro-batches of {micro}, and is accum.steps={first} at first; begin with a smaller batch"
        )
    accum_steps = growing_accum_steps(rates, first, largest)
    if accum_steps[-1] == first:
        raise BadInputError(
            f"{key}: the learning rate falls to {rates[-1] / max(rates):.3g} of its peak, at which N is "
            f"accum.steps={first} still, rounded down; accum.steps={4 * first} at a quarter of "
            "data.micro_batch_size is finer"
        )
    rule = RULES[_kind(key, settings, optimizer)]
    try:
        return grow(plan, accum_steps, micro, rule)
    except BadInputError as error:  # of accum.partial_window=error
        raise BadInputError(f"{key}: {error}; accum.partial_window=exact takes any batch") from None


def stages_of(growth: BatchGrowth, settings: Settings) -> tuple[AccumStage, ...]:
    """Return N and the global batch of every stage."""
    micro = settings.data.micro_batch_size
    return tuple(
        AccumStage(stage.start, -(-stage.global_batch_size // micro), stage.global_batch_size)
        for stage in growth.stages
    )


def require_one_schedule(settings: Settings, rates: Rates) -> None:
    """Refuse parameter groups whose rates fall otherwise than the first one's: one batch follows one.

    Raises:
        BadInputError: a group's rates are no multiple of the first one's, to rounding.
    """
    first, *others = zip(*rates, strict=True)
    for number, group in enumerate(others, 2):
        peaks = max(first), max(group)
        of_peak = [(a * peaks[1], b * peaks[0]) for a, b in zip(first, group, strict=True)]
        step = next((k for k, (a, b) in enumerate(of_peak) if abs(a - b) > ROUNDING * prod(peaks)), None)
        if step is not None:
            raise BadInputError(
                f"accum.grow={settings.accum.grow}: at step {step} the learning rate of parameter group "
                f"{number} is {group[step] / peaks[1]:.3g} of its peak and the first one's "
                f"{first[step] / peaks[0]:.3g}, and one batch cannot follow both"
            )


def _require_one_fall(key: str, settings: Settings, rates: list[float]) -> None:
    """Refuse a schedule that rises again once it has fallen, and one without a peak."""
    if not max(rates) > 0:
        raise BadInputError(f"{key}: the learning rate is never above 0, so that it cannot fall")
    fallen = False
    for step, (before, now) in enumerate(pairwise(rates), 1):
        if now > before * (1 + ROUNDING) and fallen:
            raise BadInputError(
                f"{key}: scheduler._target_={settings.scheduler['_target_']} lets the learning rate "
                f"rise again at step {step} of {len(rates)}, and a batch does not shrink; choose one "
                "that falls to the end, as scheduler=cosine"
            )
        fallen = fallen or now < before * (1 - ROUNDING)


def _kind(key: str, settings: Settings, optimizer: torch.optim.Optimizer) -> str:
    """Return whose rule a batch grows by; say so where it is not the optimizer's own."""
    asked, name = str(settings.accum.grow), type(optimizer).__name__
    own = kind_of(type(optimizer))
    if asked == "auto":
        if own is None:
            raise BadInputError(
                f"{key}: no rule is known for {name}; say accum.grow=sgd (batch × 1/α at a constant "
                "rate) or accum.grow=adam (and rate × √α)"
            )
        return own
    if own not in (None, asked):
        log.warning("%s is not the rule of %s, which is accum.grow=%s", key, name, own)
    return asked
