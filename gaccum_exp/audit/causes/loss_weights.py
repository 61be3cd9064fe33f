"""Each micro-batch's share in the large batch's gradient, found from the gradients alone.

Where the one pass's gradient is a sum of the micro gradients, its coefficients say what the large batch
gives to each micro-batch: nᵢ/n for a loss that is a mean, 1 for one that is a sum. Nobody has to say
what the loss counts.
"""

import math
from collections.abc import Sequence

import torch

from gaccum_exp.core.gradient import Gradient

AS_MEANT = 1e-5
"""How close a weight, seen in the loop's precision, is to the number that was meant."""
RESIDUAL = 1e-6
"""Of the one pass in terms of the micro gradients, relative, where it is a sum of theirs."""
MOST_ELEMENTS = 1_000_000
"""Of each micro gradient so many are kept to find the shares; there are far fewer unknowns."""


def sampled(gradient: Gradient) -> dict[str, torch.Tensor]:
    """Keep some elements of every parameter's gradient."""
    per = max(1, MOST_ELEMENTS // max(1, len(gradient)))
    return {name: g.flatten()[:per].double().cpu() for name, g in gradient.items()}


def fitted_shares(
    micro: Sequence[dict[str, torch.Tensor]], whole: dict[str, torch.Tensor]
) -> list[float] | None:
    """Return the coefficients of `whole` in terms of the micro gradients, or None: it is no such sum."""
    names = sorted({name for g in [*micro, whole] for name in g})
    size = {name: next(g[name].numel() for g in [*micro, whole] if name in g) for name in names}

    def vector(g: dict[str, torch.Tensor]) -> torch.Tensor:
        zeros = (g.get(name, torch.zeros(size[name], dtype=torch.float64)) for name in names)
        return torch.cat(list(zeros))

    target = vector(whole)
    columns = torch.stack([vector(g) for g in micro], 1)
    length = float(target.norm())
    if length == 0:
        return None
    found = torch.linalg.lstsq(columns, target[:, None], driver="gelsd").solution[:, 0]
    residual = float((columns @ found - target).norm())
    return found.tolist() if residual <= RESIDUAL * length else None


def reference_of_sum(
    weights: Sequence[float], counts: Sequence[float] | None, sizes: Sequence[int]
) -> float:
    """Return what a loop that back-propagates weighted sums meant to multiply the large batch's by.

    Args:
        weights: what each micro-batch's loss sum was back-propagated with.
        counts: what each counts, where that is known.
        sizes: samples of each, which are no counts, but tell unequal micro-batches apart.
    """
    amounts = list(counts) if counts is not None else [float(size) for size in sizes]
    n, steps = sum(amounts), len(weights)
    means = [w * k for w, k in zip(weights, amounts, strict=True)]
    if not alike(weights):
        # Each micro-batch's own mean, or something else that no large batch does.
        return 1 / n if alike(means) else sum(weights) / steps
    if steps > 1 and math.isclose(weights[0], 1 / steps, rel_tol=AS_MEANT):
        return 1.0  # a sum that counts already, divided by N once more
    # Where counts are not known a constant is taken for what was meant.
    own_mean = math.isclose(means[0], 1, rel_tol=AS_MEANT) and alike(means)
    twice = math.isclose(weights[0] * n, 1 / steps, rel_tol=AS_MEANT)
    return 1 / n if counts is not None and (own_mean or twice) else weights[0]


def unrounded(weights: list[float], shares: list[float]) -> list[float]:
    """Return the weights that the loop meant: seen in its precision, 1/3 is no third in float64."""
    if not shares:
        return weights
    factor = sum(weights) / sum(shares)
    factor = 1.0 if abs(factor - 1) < AS_MEANT else factor
    meant = [share * factor for share in shares]
    close = all(abs(w - m) <= AS_MEANT * abs(m) for w, m in zip(weights, meant, strict=True))
    return meant if close else weights


def alike(numbers: Sequence[float]) -> bool:
    """Whether they are one number, but for the rounding of the loop's precision."""
    return all(math.isclose(x, numbers[0], rel_tol=AS_MEANT) for x in numbers)


def divided_by(weights: Sequence[float], summed: bool) -> int | None:
    """Return the M of weights that are all 1/M, of mean losses."""
    if summed or not alike(weights):
        return None
    by = 1 / weights[0]
    return round(by) if by >= 1 and math.isclose(by, round(by), rel_tol=1e-4) else None
