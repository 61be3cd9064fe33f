"""Learning rate and β₂ of a global batch, by rules from the batch that they were chosen for."""

import warnings
from collections.abc import Sequence

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from gaccum_exp.config.schema import Settings
from gaccum_exp.core.batch_growth import ROUNDING, rate_factor
from gaccum_exp.core.strategies import InPlace
from gaccum_exp.core.window import WindowPlan
from gaccum_exp.errors import BadInputError

Rates = Sequence[Sequence[float]]
"""Learning rates by step of a schedule and parameter group."""


def half_life(beta: float, share: float) -> float:
    """Return the β that forgets as fast, counted in samples, at so many times the batch.

    After B·k samples a moment has β^k of its old value, so that β' = β^(B'/B) (Marek et al. 2025, arXiv
    2507.07101).

    >>> round(half_life(0.999, 1 / 16), 6)
    0.999937
    """
    return float(beta**share)


def batch_factor(settings: Settings) -> float:
    """Return what the optimizer's learning rate is multiplied by for the settings' global batch."""
    train = settings.train
    if train.base_batch_size is None:
        return 1.0
    return rate_factor(train.lr_rule, settings.data.global_batch_size / train.base_batch_size)


def follow_batch(optimizer: Optimizer, settings: Settings) -> None:
    """Give an optimizer the rate and β₂ of the settings' global batch, as `train` asks for them.

    Of a batch that changes in the training: those of the batch that the configured rate belongs to.

    Raises:
        BadInputError: there is no such number to change.
    """
    train = settings.train
    if train.base_batch_size is None:
        return
    share, factor = settings.data.global_batch_size / train.base_batch_size, batch_factor(settings)
    for group in optimizer.param_groups:
        if train.lr_rule != "none":
            if "lr" not in group:
                raise BadInputError(
                    f"train.lr_rule={train.lr_rule}: {type(optimizer).__name__} has no learning rate lr"
                )
            group["lr"] = group["lr"] * factor
        if train.beta2_rule == "half_life":
            if len(group.get("betas", ())) < 2:
                raise BadInputError(
                    "train.beta2_rule=half_life: only Adam and its like have a β₂, in `betas`; "
                    f"{type(optimizer).__name__} has none: use train.beta2_rule=fixed"
                )
            first, second, *others = group["betas"]
            group["betas"] = (first, half_life(second, share), *others)


def rates_of(optimizer: Optimizer, scheduler: LRScheduler, total_steps: int) -> Rates:
    """Return the learning rates of all groups at every step of a schedule, which is used up."""
    rates = []
    with warnings.catch_warnings(action="ignore"):  # the optimizer takes no steps
        for _ in range(total_steps):
            rates.append([float(group["lr"]) for group in optimizer.param_groups])
            scheduler.step()
    return rates


def require_following(settings: Settings, rates: Rates, of_base: Rates) -> None:
    """Refuse a schedule that sets rates by itself, whatever the optimizer's is.

    Args:
        settings: of the run.
        rates: of its optimizer, whose rate is multiplied for the batch.
        of_base: the same where that rate is not multiplied.

    Raises:
        BadInputError: the ones are not so many times the others, to rounding.
    """
    factor, peak = batch_factor(settings), max(map(max, rates))
    for step, (here, there) in enumerate(zip(rates, of_base, strict=True)):
        for rate, base in zip(here, there, strict=True):
            if abs(rate - factor * base) > ROUNDING * peak:
                raise BadInputError(
                    f"train.lr_rule={settings.train.lr_rule}: scheduler._target_="
                    f"{settings.scheduler['_target_']} has rates that do not follow the optimizer's "
                    f"(at step {step} {rate:.3g}, not {factor:.3g} × {base:.3g}); use scheduler=cosine, "
                    "or train.lr_rule=none with rates for each batch"
                )


def require_scaled_once(
    settings: Settings, strategy: InPlace, plan: WindowPlan, total_steps: int
) -> None:
    """Refuse what a strategy that scales rate and moments by N scales wrongly.

    Raises:
        BadInputError: a rule follows the batch besides, or micro-batches are of several sizes.
    """
    if not any(strategy.scales_at(stage.accum_steps) for stage in settings.stages):
        return
    train, accum, by = (
        settings.train,
        settings.accum,
        f"strategy={strategy.name} scales rate and moments by N",
    )
    asked = {
        f"train.lr_rule={train.lr_rule}": train.lr_rule != "none",
        f"train.beta2_rule={train.beta2_rule}": train.beta2_rule != "fixed",
        f"accum.schedule_lr={accum.schedule_lr}": accum.schedule_lr != "none",
        f"accum.grow={accum.grow}": accum.grow is not None,
    }
    if found := next((key for key, holds in asked.items() if holds), None):
        raise BadInputError(f"{found} follows the batch, and {by} already: leave one of the two out")
    if len({stage.global_batch_size / stage.accum_steps for stage in settings.stages}) > 1:
        raise BadInputError(
            f"accum.schedule={accum.schedule}: {by}, for micro-batches of one size; set "
            "data.micro_batch_size, and data.global_batch_size to null"
        )
    for step in range(total_steps if plan.partial_window == "exact" else 0):
        held, full = plan.size(step), plan.stages[plan.stage_of(step)].global_batch_size
        if held < full:
            raise BadInputError(
                f"accum.partial_window=exact: window {step + 1} holds {held} samples of {full}, in "
                f"smaller micro-batches, and {by}, for those of one size; use carry, or drop"
            )
