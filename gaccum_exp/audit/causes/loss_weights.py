"""Fit each micro-batch's coefficient in the large batch's gradient, from the gradients alone.

Where the gradient of one pass is a linear combination of the micro gradients, its coefficients are what
the large batch gives to each micro-batch: nᵢ/n for a loss that is a mean, 1 for one that is a sum. What
the loss counts need not be known.
"""

import math
from collections.abc import Sequence

import torch

from gaccum_exp.core.dtypes import reals, wide
from gaccum_exp.core.gradient import Gradient

ROUNDED = 1e-5
"""How close a weight, seen in the loop's precision, is to the number that was meant."""
RESIDUAL = 1e-6
"""Of the fit, relative, where the one pass's gradient is a combination of the micro gradients."""
MOST_ELEMENTS = 1_000_000
"""Elements kept of each micro gradient; the unknowns are far fewer."""


def sampled(gradient: Gradient) -> dict[str, torch.Tensor]:
    """Keep some elements of every parameter's gradient."""
    per = max(1, MOST_ELEMENTS // max(1, len(gradient)))
    return {name: reals(wide(g)).flatten()[:per].cpu() for name, g in gradient.items()}


def fitted_coefficients(
    micro: Sequence[dict[str, torch.Tensor]], whole: dict[str, torch.Tensor]
) -> list[float] | None:
    """Return the coefficients of `whole` in the micro gradients; None where it does not combine them."""
    names = sorted({name for g in [*micro, whole] for name in g})
    size = {name: next(g[name].numel() for g in [*micro, whole] if name in g) for name in names}

    def vector(g: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.cat([g.get(name, torch.zeros(size[name], dtype=torch.float64)) for name in names])

    target = vector(whole)
    columns = torch.stack([vector(g) for g in micro], 1)
    length = float(target.norm())
    if length == 0:
        return None
    found = torch.linalg.lstsq(columns, target[:, None], driver="gelsd").solution[:, 0]
    return found.tolist() if float((columns @ found - target).norm()) <= RESIDUAL * length else None


def intended_weight(
    weights: Sequence[float], counts: Sequence[float] | None, sizes: Sequence[int]
) -> float:
    """Return the weight that a loop of weighted loss sums means the whole window's sum to have.

    The sizes of micro-batches are no counts, but tell unequal ones apart where counts are not known.
    """
    amounts = list(counts) if counts is not None else [float(size) for size in sizes]
    n, accum_steps = sum(amounts), len(weights)
    means = [w * k for w, k in zip(weights, amounts, strict=True)]
    if not alike(weights):
        # Each micro-batch's own mean, or weights that no large batch has.
        return 1 / n if alike(means) else sum(weights) / accum_steps
    if accum_steps > 1 and math.isclose(weights[0], 1 / accum_steps, rel_tol=ROUNDED):
        return 1.0  # a sum that counts already, divided by N once more
    # Where counts are not known, a constant is taken as it is.
    own_mean = math.isclose(means[0], 1, rel_tol=ROUNDED) and alike(means)
    twice = math.isclose(weights[0] * n, 1 / accum_steps, rel_tol=ROUNDED)
    return 1 / n if counts is not None and (own_mean or twice) else weights[0]


def unrounded(weights: list[float], expected: list[float]) -> list[float]:
    """Return the weights as meant: seen in float32, 1/3 is not the third of float64.

    The `expected` are the large batch's, up to a common factor; empty where not known.
    """
    if not expected:
        return weights
    factor = sum(weights) / sum(expected)
    factor = 1.0 if abs(factor - 1) < ROUNDED else factor
    meant = [weight * factor for weight in expected]
    close = all(abs(w - m) <= ROUNDED * abs(m) for w, m in zip(weights, meant, strict=True))
    return meant if close else weights


def alike(numbers: Sequence[float]) -> bool:
    """Whether they are one number, but for the rounding of the loop's precision."""
    return all(math.isclose(x, numbers[0], rel_tol=ROUNDED) for x in numbers)


def common_divisor(weights: Sequence[float]) -> int | None:
    """Return the whole number M where all weights are 1/M."""
    if not alike(weights):
        return None
    by = 1 / weights[0]
    return round(by) if by >= 1 and math.isclose(by, round(by), rel_tol=1e-4) else None
