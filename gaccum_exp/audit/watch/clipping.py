"""Recognize clipping that a loop has written out: by what it leaves, the gradient of a chosen norm."""

import math

import torch
from torch import Tensor

from gaccum_exp.core.gradient import Gradient, finite, norm

RESIDUAL = 1e-5
"""Relative: how close a clipped gradient is to a multiple of the accumulated, or to a chosen norm."""


def clipped_by_hand(before: Gradient, after: Gradient, *, looked_at: bool) -> float | None:
    """Return the norm, or the largest element, that a gradient was clipped to; None: it was not.

    What is scaled by one number, or parameter by parameter, was clipped if the loop has looked at the
    gradients first (`looked_at`) and if what is left has a norm of two digits at most, as a chosen one
    has: by chance about one norm in a thousand is so close to such a number.
    """
    moved = before.keys() == after.keys() and finite(before) and finite(after)
    changed = {k: g for k, g in after.items() if moved and not torch.equal(g, before[k])}
    if not changed:
        return None
    largest = max(float(g.abs().max()) for g in changed.values())
    real = not any(g.is_complex() for g in before.values())
    if (
        real
        and largest > 0
        and all(torch.equal(before[k].clamp(-largest, largest), g) for k, g in after.items())
    ):
        return largest
    factors = {k: _multiple(g, before[k]) for k, g in after.items()}
    known = [c for c in factors.values() if c is not None]
    if not looked_at or len(known) < len(factors) or all(abs(c - 1) <= RESIDUAL for c in known):
        return None
    if max(known) - min(known) <= RESIDUAL * max(known):
        return _chosen(after, before)
    each = [_chosen({k: g}, {k: before[k]}) for k, g in changed.items()]
    same = each[0] is not None and all(n == each[0] for n in each)
    return each[0] if same and max(known) <= 1 + RESIDUAL else None


def _multiple(gradient: Tensor, reference: Tensor) -> float | None:
    """Return c > 0 where `gradient` = c × `reference`; 1 where both are zero."""
    size, own = float(torch.linalg.vector_norm(reference)), float(torch.linalg.vector_norm(gradient))
    if size == 0:
        return 1.0 if own == 0 else None
    c = own / size
    rest = float(torch.linalg.vector_norm(gradient - c * reference))
    return c if c > 0 and rest <= RESIDUAL * own else None


def _chosen(after: Gradient, before: Gradient) -> float | None:
    """Return the gradient's norm if somebody has chosen it."""
    for order in (2.0, math.inf, 1.0):
        now, then = _norm(after, order), _norm(before, order)
        # torch divides by the norm plus 1e-6.
        for found in (now, now * (1 + 1e-6 / then)):
            rounded = float(f"{found:.1e}")
            if math.isclose(found, rounded, rel_tol=RESIDUAL):
                return rounded
    return None


def _norm(gradient: Gradient, order: float) -> float:
    if order == 2:
        return norm(gradient)
    each = [torch.linalg.vector_norm(g.double(), order) for g in gradient.values()]
    return float(torch.linalg.vector_norm(torch.stack(each), order))
