"""What a loop did to the whole gradient after a window's last backward pass, named and sized.

Noise that is added once, weight decay, a projection or each parameter's own multiple are the same for
the large batch, whose gradient they would change as well: what is judged is the gradient before.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from gaccum_exp.core.gradient import Gradient, difference, distance, dot, norm, scaled

SAME = 1e-4
"""Relative: how close a gradient is to what a kind of change makes of it."""
LEAST_COSINE = 0.1
"""Below, it is another gradient that was put in its place."""


@dataclass(frozen=True, slots=True)
class Change:
    """A change of the gradient between the last backward pass and the step."""

    what: str | None
    """Which kind it is, in words; None: none that is known here."""
    size: float
    """‖after − before‖ / ‖before‖."""
    cosine: float
    """Between the two."""
    drawn: bool = False
    """Whether random numbers were drawn for it."""

    @property
    def said(self) -> str:
        """It in a sentence."""
        how = self.what or "in a way that is not known here"
        return (
            "between the last backward pass and the step the loop changed the gradient by "
            f"{self.size:.2g} × its norm: {how} (cosine of before and after: {self.cosine:.3g})"
        )


def change_between(
    before: Gradient, after: Gradient, weights: Mapping[str, Tensor], accum_steps: int, *, drawn: bool
) -> Change | None:
    """Return what was done to a gradient; None: nothing, or another one was put in its place.

    Args:
        before: right after the last backward pass.
        after: at the step.
        weights: that the passes had.
        accum_steps: N.
        drawn: whether random numbers were drawn in between.
    """
    if before.keys() != after.keys() or not norm(before) or not norm(after):
        return None
    size = distance(after, before)
    cosine = dot(before, after) / (norm(before) * norm(after))
    lost = any(bool(before[name].any()) and not bool(g.any()) for name, g in after.items())
    if (
        size <= SAME
        or cosine < LEAST_COSINE
        or lost
        or distance(after, before, _along(before, after)) <= SAME
    ):
        return None
    what = _masked(before, after)
    if drawn:
        return Change(what or "noise was added", size, cosine, drawn=True)
    what = (
        what
        or _signs(before, after)
        or _weights_added(before, after, weights)
        or _multiplied(before, after, accum_steps)
        or _projected(before, after)
    )
    return Change(what, size, cosine)


def _along(before: Gradient, after: Gradient) -> float:
    return dot(before, after) / norm(before) ** 2


def _weights_added(before: Gradient, after: Gradient, weights: Mapping[str, Tensor]) -> str | None:
    """Find one multiple of the weights that was added to the gradients of some parameters or of all."""
    added = difference(after, before)
    moved = {name: g for name, g in added.items() if norm({name: g}) > SAME * norm(before)}
    own = {name: weights[name].detach() for name in moved if name in weights}
    if not own or own.keys() != moved.keys() or not norm(own):
        return None
    by = dot(moved, own) / norm(own) ** 2
    if norm(difference(moved, scaled(own, by))) > 10 * SAME * norm(moved):
        return None
    return f"{by:.3g} × the weights was added to it"


def _multiplied(before: Gradient, after: Gradient, accum_steps: int) -> str | None:
    """Find a multiple for each parameter, as of layers that are scaled or clipped one by one.

    A division by N, or a multiplication, is no such choice of the loop's.
    """
    by = {n: _along({n: before[n]}, {n: g}) for n, g in after.items() if bool(before[n].any())}
    off = (distance({n: after[n]}, {n: before[n]}, c) for n, c in by.items())
    if any(rest > 10 * SAME for rest in off):
        return None
    by_n = {accum_steps, 1 / accum_steps} - {1}
    if any(abs(c / n - 1) < 10 * SAME for c in by.values() for n in by_n):
        return None
    least, most = min(by.values()), max(by.values())
    return f"each parameter's was multiplied by a number of its own ({least:.3g} to {most:.3g})"


def _signs(before: Gradient, after: Gradient) -> str | None:
    real = not any(g.is_complex() for g in before.values())
    kept = real and all(torch.equal(g, before[name].sign()) for name, g in after.items())
    return "its signs alone were kept" if kept else None


def _masked(before: Gradient, after: Gradient) -> str | None:
    kept = total = 0
    for name, g in after.items():
        if not bool(((g == before[name]) | (g == 0)).all()):
            return None
        kept, total = kept + int((g != 0).sum()), total + int((before[name] != 0).sum())
    return f"{1 - kept / total:.0%} of its elements were set to zero"


def _projected(before: Gradient, after: Gradient) -> str | None:
    """Find that what was taken away is orthogonal to what is left, in each parameter or in all."""
    away = difference(before, after)
    inner = (
        abs(dot({n: away[n]}, {n: g})) / max(norm({n: away[n]}) * norm({n: g}), 1e-300)
        for n, g in after.items()
        if norm({n: away[n]}) > SAME * norm({n: g})
    )
    if any(cosine > 10 * SAME for cosine in inner) and abs(dot(away, after)) > 10 * SAME * norm(
        away
    ) * norm(after):
        return None
    matrices = {n: g for n, g in after.items() if g.ndim > 1}
    moved = {n for n, g in away.items() if norm({n: g}) > SAME * norm({n: before[n]})}
    centred = all(
        float(g.flatten(1).double().mean(1).norm())
        <= 10 * SAME * float(before[n].flatten(1).double().mean(1).norm())
        for n, g in matrices.items()
    )
    if centred and moved <= matrices.keys():
        return "it was centralised: the mean over its rows was taken away"
    return "it was projected: what was taken away is orthogonal to what is left"
