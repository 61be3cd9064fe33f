"""Fit each micro-batch's coefficient in the large batch's gradient, from the gradients alone.

Where the gradient of one pass is a linear combination of the micro gradients, its coefficients are what
the large batch gives to each micro-batch: nᵢ/n for a loss that is a mean, 1 for one that is a sum. What
the loss counts need not be known.
"""

import math
from collections.abc import Iterable, Sequence

import torch

from gaccum_exp.core.dtypes import reals, wide
from gaccum_exp.core.gradient import Gradient

ROUNDED = 1e-5
"""How close a weight, seen in the loop's precision, is to the number that was meant."""
EXACT = 1e-11
"""Of the fit, relative, where the coefficients are known beforehand."""
RESIDUAL = 1e-6
"""Of the fit, relative, where they are not, and the micro gradients combine to the one pass's."""
MOST_ELEMENTS = 1_000_000
"""Elements kept of each micro gradient; the unknowns are far fewer."""


def sampled(gradient: Gradient) -> dict[str, torch.Tensor]:
    """Keep some elements of every parameter's gradient."""
    per = max(1, MOST_ELEMENTS // max(1, len(gradient)))
    return {name: reals(wide(g)).flatten()[:per].cpu() for name, g in gradient.items()}


def fitted_coefficients(
    micro: Sequence[dict[str, torch.Tensor]],
    whole: dict[str, torch.Tensor],
    candidates: Iterable[Sequence[float]] = (),
) -> list[float] | None:
    """Return the coefficients of `whole` in the micro gradients; None where it does not combine them.

    Args:
        micro: each micro-batch's gradient; of one that counts nothing it is zero.
        whole: the gradient of the one pass.
        candidates: coefficients to be tried first. Without them N shares always fit where all gradients
            lie in N dimensions, so a fit of few numbers, or one with negative shares, is none.
    """
    columns, target = _columns(micro, whole)
    length = float(target.norm())
    if length == 0 or not bool(torch.isfinite(columns).all()):
        return None

    def fits(coefficients: Sequence[float], residual: float) -> bool:
        combined = columns @ torch.tensor(coefficients, dtype=columns.dtype)
        return float((combined - target).norm()) <= residual * length

    counting = [i for i in range(len(micro)) if float(columns[:, i].norm()) > 1e-14 * length]
    for candidate in candidates:
        if fits(candidate, EXACT):
            return [c if i in counting else 0.0 for i, c in enumerate(candidate)]
    own = columns[:, counting]
    if len(target) < 2 * len(counting) or int(torch.linalg.matrix_rank(own)) < len(counting):
        return None
    solution = torch.linalg.lstsq(own, target[:, None], driver="gelsd").solution[:, 0]
    found = [0.0] * len(micro)
    for i, coefficient in zip(counting, solution.real.tolist(), strict=True):
        found[i] = coefficient
    return found if fits(found, RESIDUAL) and min(found) > -RESIDUAL else None


def reached_shares(
    micro: Sequence[dict[str, torch.Tensor]], reached: dict[str, torch.Tensor]
) -> list[float] | None:
    """Return the share of each micro gradient in what reached the optimizer; None: it is none of them.

    Subsets that leave some out are tried first; else the gradients must be many more than these.
    """
    count = len(micro)
    columns, target = _columns(micro, reached)
    if not bool(torch.isfinite(columns).all()) or not bool(torch.isfinite(target).all()):
        return None

    def fits(shares: Sequence[float]) -> bool:
        """Whether what reached the optimizer is a multiple of the sum with these shares."""
        made = columns @ torch.tensor(shares, dtype=columns.dtype)
        by = float(made @ target) / max(float(made @ made), 1e-300)
        return by > 0 and float((made * by - target).norm()) <= 1e-4 * float(target.norm())

    kept = [
        *(range(first, last) for first in range(count) for last in range(first + 1, count + 1)),
        *([j for j in range(count) if j != i] for i in range(count)),
    ]
    for subset in kept:
        shares = [float(i in subset) for i in range(count)]
        if len(subset) < count and fits(shares):
            return shares
    if len(target) < 4 * count or int(torch.linalg.matrix_rank(columns)) < count:
        return None
    found = torch.linalg.lstsq(columns, target[:, None], driver="gelsd").solution[:, 0].real.tolist()
    largest = max(map(abs, found)) or 1.0
    found = [0.0 if abs(share) < 1e-3 * largest else share for share in found]
    return found if fits(found) else None


def _columns(
    micro: Sequence[dict[str, torch.Tensor]], whole: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return micro gradients as columns, (elements, N), and another one as a vector, (elements,)."""
    every = [*micro, whole]
    like = {name: elements for g in every for name, elements in g.items()}
    zeros = [torch.zeros(0, dtype=torch.float64)]
    vectors = [
        torch.cat([g.get(name, torch.zeros_like(like[name])) for name in sorted(like)] or zeros)
        for g in every
    ]
    return torch.stack(vectors[:-1], 1), vectors[-1]


def intended_weight(
    weights: Sequence[float],
    counts: Sequence[float] | None,
    sizes: Sequence[int],
    accum_steps: int | None,
) -> float:
    """Return the weight that a loop of weighted loss sums means the whole window's sum to have.

    The sizes of micro-batches are no counts, but tell unequal ones apart where counts are not known.
    `accum_steps` is N; None: a division by N may be one by what is counted.
    """
    amounts = list(counts) if counts is not None else [float(size) for size in sizes]
    n = sum(amounts)
    means = [w * k for w, k in zip(weights, amounts, strict=True)]
    if not alike(weights):
        # Each micro-batch's own mean, or weights that no large batch has.
        return 1 / n if n and alike(means) else sum(weights) / len(weights)
    if counts is not None and math.isclose(weights[0] * n, 1, rel_tol=ROUNDED):
        return 1 / n
    if accum_steps is None:
        return weights[0]
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


def snapped(weights: list[float]) -> list[float]:
    """Return weights that are all 1/M but for rounding as exactly that, and others as they are."""
    by = common_divisor(weights) if weights and weights[0] > 0 else None
    return weights if by is None or abs(weights[0] * by - 1) > ROUNDED else [1 / by] * len(weights)


def scale_faults(
    totals: Sequence[float], accum_steps: int, *, together: bool = True
) -> list[float] | None:
    """Return the factor by which each term is off in a loop of means; None where that is not known.

    Args:
        totals: of each term the sum of its weights over the window: 1 for a mean divided by N, unless
            the loss has a weight of its own.
        accum_steps: N.
        together: whether the terms may have their mean taken: weights of 1 in all.
    """

    def plain(factor: float) -> bool:
        each = [total / factor for total in totals]
        return any(math.isclose(x, 1, rel_tol=1e-4) for x in [*each, *([sum(each)] if together else [])])

    if not totals or plain(1.0):
        # A term may lack the division by N that others have.
        lacking = [accum_steps > 1 and math.isclose(x, accum_steps, rel_tol=1e-4) for x in totals]
        return [float(accum_steps) if lacks else 1.0 for lacks in lacking]
    by = next((by for by in (accum_steps, 1 / accum_steps) if accum_steps > 1 and plain(by)), None)
    return None if by is None else [float(by)] * len(totals)


def common_divisor(weights: Sequence[float]) -> int | None:
    """Return the whole number M where all weights are 1/M."""
    if not alike(weights) or not weights[0]:
        return None
    by = 1 / weights[0]
    return round(by) if by >= 1 and math.isclose(by, round(by), rel_tol=1e-4) else None
