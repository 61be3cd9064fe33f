"""Learning rate and β₂ of a global batch, by rules from the batch that they were chosen for."""

from torch.optim import Optimizer

from gaccum_exp.config.schema import Settings
from gaccum_exp.core.batch_growth import rate_factor
from gaccum_exp.errors import BadInputError


def half_life(beta: float, share: float) -> float:
    """Return the β that forgets as fast, counted in samples, at so many times the batch.

    After B·k samples a moment has β^k of its old value, so that β' = β^(B'/B) (Marek et al. 2025, arXiv
    2507.07101).

    >>> round(half_life(0.999, 1 / 16), 6)
    0.999937
    """
    return float(beta**share)


def follow_batch(optimizer: Optimizer, settings: Settings) -> None:
    """Give an optimizer the rate and β₂ of the settings' global batch, as `train` asks for them.

    Of a batch that changes in the training: those of the batch that the configured rate belongs to.

    Raises:
        BadInputError: there is no such number to change.
    """
    train = settings.train
    if train.base_batch_size is None:
        return
    share = settings.data.global_batch_size / train.base_batch_size
    for group in optimizer.param_groups:
        if train.lr_rule != "none":
            if "lr" not in group:
                raise BadInputError(
                    f"train.lr_rule={train.lr_rule}: {type(optimizer).__name__} has no learning rate lr"
                )
            group["lr"] = group["lr"] * rate_factor(train.lr_rule, share)
        if train.beta2_rule == "half_life":
            if len(group.get("betas", ())) < 2:
                raise BadInputError(
                    "train.beta2_rule=half_life: only Adam and its like have a β₂, in `betas`; "
                    f"{type(optimizer).__name__} has none: use train.beta2_rule=fixed"
                )
            first, second, *others = group["betas"]
            group["betas"] = (first, half_life(second, share), *others)
