"""The share of each micro-batch in the large batch's gradient, term by term.

Where the gradient of one pass combines the micro gradients, its coefficients say what the large batch
gives to each micro-batch. Held against the weights that the loop gave them, they show what the loop
means, and where it errs.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from gaccum_exp.audit.causes.loss_weights import (
    alike,
    fitted_coefficients,
    intended_weight,
    sampled,
    snapped,
)
from gaccum_exp.audit.rerun.passes import ACCUMULATED64, ONE_PASS64, RECORDING, Rerun
from gaccum_exp.audit.verdict import listed
from gaccum_exp.audit.watch.divisions import Scaling
from gaccum_exp.audit.watch.scalars import Factor
from gaccum_exp.audit.watch.taped_window import TapedWindow, TermWeights

WEIGHTS = 8
"""At how many weights shares are fitted, at most."""
ENOUGH = 20
"""Numbers per micro-batch in the gradients that are enough for a fit."""


@dataclass(frozen=True, slots=True)
class TermShares:
    """How a term's micro-batches count in the one pass, and what that means for the loop's weights."""

    name: str
    weights: list[float]
    """The loop's own, after what it did to the gradients."""
    coefficients: list[float] | None
    """Of its micro gradients in the one pass; None where it is no combination of them."""
    summed: bool
    """Whether the one pass is their sum: the loss does not average."""
    whole_weight: float
    """What the loop means the one pass to be multiplied by."""
    literal: float
    counts: list[float] | None
    sizes: list[int]
    unit: str = "samples"
    """What the sizes are numbers of; rows where the loss has others than its model."""
    inside: float = 1.0
    """What its function multiplies it by, apart from a 1/N."""
    halved: float = 1.0
    """The literal weight that its function gives it, where it has no other term."""
    factors: tuple[Factor, ...] = ()
    """What its function and the loop multiply it by, one by one."""

    @property
    def scaling(self) -> Scaling:
        """What it is multiplied by, for divisions to be found among that."""
        whole = 0.0 if self.summed else self.whole_weight / (self.literal * self.inside)
        own = [w / self.literal for w in self.weights]
        counted = self.sizes if self.counts is None else self.counts
        samples = int(counted[0]) if len(set(counted)) == 1 else 0
        return Scaling(self.name, self.summed, own, whole, self.halved, self.factors, samples)

    @property
    def unequal(self) -> bool:
        """Whether the loop weighs micro-batches otherwise than the large batch does."""
        if self.coefficients is None:
            return False
        meant = [c * self.whole_weight for c in self.coefficients]
        pairs = [(w, m) for w, m in zip(self.weights, meant, strict=True) if m]
        return any(not math.isclose(w, m, rel_tol=1e-4) for w, m in pairs) and not alike(
            [w / m for w, m in pairs]
        )

    @property
    def multiple(self) -> float | None:
        """What it is multiplied by beside what the loop means, where it is a sum; None: by no number."""
        if self.coefficients is None or not self.summed or not self.whole_weight:
            return None
        pairs = zip(self.weights, self.coefficients, strict=True)
        ratios = [w / (c * self.whole_weight) for w, c in pairs if c]
        return ratios[0] if ratios and alike(ratios) else None

    @property
    def weight_changes(self) -> bool:
        """Whether micro-batches count alike, and the loop multiplies them by different numbers."""
        even = self.counts is None or alike([n for n in self.counts if n])
        parts = self.coefficients
        return parts is not None and alike(parts) and even and not alike(self.weights)

    @property
    def makes_up_all(self) -> bool:
        """Whether the micro-batches' parts add up to the large batch."""
        parts = self.coefficients
        return parts is not None and (self.summed or _one(sum(parts)))

    def said(self) -> str:
        """Return what its micro-batches count, in words."""
        assert self.coefficients is not None
        if self.counts is not None and not alike(self.counts):
            whole = all(float(count).is_integer() for count in self.counts)
            what = "" if whole else " (the sums of their targets' weights)"
            return f"count {listed(self.counts)}{what} in {self.name}"
        # Of sums, all of which count once, the loop's own divisors tell.
        divisors = [1 / w if w else 0.0 for w in self.weights]
        amounts = divisors if self.summed else self.coefficients
        per_size = [a / n for a, n in zip(amounts, self.sizes, strict=True) if n]
        if self.counts is None and alike(per_size) and not alike([float(n) for n in self.sizes if n]):
            return f"hold {listed(self.sizes)} {self.unit} in {self.name}"
        if self.weight_changes:
            return f"have sums that are multiplied by {listed(self.weights)} in {self.name}"
        total = sum(amounts) or 1.0
        parts = listed([float(f"{100 * a / total:.3g}") for a in amounts])
        return f"make up {parts} % of what the window counts in {self.name}"


def shares_of(window: TapedWindow, rerun: Rerun, factor: float) -> list[TermShares]:
    """Find out how much each micro-batch counts in the one pass, term by term.

    Args:
        window: has run once, in micro-batches and in one pass.
        rerun: of it, with the draws that were recorded.
        factor: what the loop's weights were multiplied by afterwards.
    """
    found = []
    for t, term in enumerate(window.terms()):
        column = window.column_of(t)
        counts, sizes = window.counts_of(column), window.sizes_of(column)
        coefficients, summed = _coefficients(window, rerun, t, counts, sizes, term.weights)
        weights = [w * factor for w in term.weights]
        counting = [i for i, c in enumerate(coefficients or [1.0] * len(weights)) if c]
        own = [weights[i] for i in counting]
        constants = window.constants_inside(t)
        inside = [f.value for f in constants if f.counted or not _one(f.value * len(weights))]
        if summed:
            # A sum that is divided by its count is divided by N once too often.
            counted = _counted(constants, term, len(weights))
            known = counts is not None and not inside and term.counted == 1
            amounts = [counts[i] for i in counting] if counts is not None and known else None
            of_sizes = [sizes[i] for i in counting]
            given = [w / counted for w in own]
            averages = counts is not None or bool(inside) or term.counted != 1
            meant = intended_weight(given, amounts, of_sizes, len(weights) if averages else None)
            if (inside or term.counted != 1) and len(weights) > 1 and _one(meant / len(weights)):
                meant = 1.0  # divided by its count, and multiplied by N for a division that never comes
            whole = counted * meant if any(own) else 0.0
            if counts is not None and alike(own) and any(own) and _one(own[0] * sum(counts)):
                whole = 1 / sum(counts)  # whatever it is made of
        else:
            parts = [coefficients[i] for i in counting] if coefficients else []
            whole = _meant_weight(weights, own, parts)
        shares = TermShares(term.name, weights, coefficients, summed, whole, term.literal, counts, sizes)
        unit = "samples" if sizes == window.sizes else "rows"
        # What a function's source divides by is its loss's own, unless it is N.
        inner = [f for f in constants if not f.literal or f.divisor == len(weights)]
        halved, factors = window.literal_inside(column), (*term.factors, *inner)
        shares = replace(shares, unit=unit, inside=math.prod(inside), halved=halved)
        found.append(replace(shares, factors=factors))
    return found


def _counted(constants: Sequence[Factor], term: TermWeights, accum_steps: int) -> float:
    """Return what a sum is multiplied by for its own sake: all but the divisions by N."""
    numbers = [f.value for f in constants if not f.counted]
    by_n = [n for n in (*numbers, *term.numbers) if _one(n * accum_steps)]
    # A multiplication by N takes a division back, as where a trainer divides what comes to it.
    times_n = [n for n in numbers if _one(n / accum_steps)]
    own = [f.value for f in constants if f.counted or not _one(f.value * accum_steps)]
    counted = math.prod(own) * term.literal * (term.counted or 1.0) / math.pow(accum_steps, len(times_n))
    # What is counted is whole; an N-th part of it is the average micro-batch's.
    if by_n and not times_n and counted > 0 and not _whole(1 / counted):
        return counted / accum_steps if _whole(accum_steps / counted) else counted
    return counted


def _whole(number: float) -> bool:
    return number > 0.5 and math.isclose(number, round(number), rel_tol=1e-6)


def _meant_weight(weights: list[float], counting: list[float], shares: list[float]) -> float:
    """Return what a loop of weighed means means the one pass to be multiplied by."""
    ratios = [w / c for w, c in zip(counting, shares, strict=True)] if shares else []
    # Empty micro-batches may be among those that it divides by, or not.
    without, all_of_them = sum(counting), sum(snapped(weights))
    if ratios and alike(ratios):
        return all_of_them if _one(all_of_them) and not _one(without) else ratios[0]
    return without if _one(without) else all_of_them


def _one(number: float) -> bool:
    return math.isclose(number, 1, rel_tol=1e-4)


def _coefficients(
    window: TapedWindow,
    rerun: Rerun,
    term: int,
    counts: list[float] | None,
    sizes: list[int],
    weights: list[float],
) -> tuple[list[float] | None, bool]:
    """Fit a term's micro gradients in the one pass; return whether it is their sum, too."""
    accum_steps, alone = len(window.sizes), len(window.sizes) == 1
    if window.of_weights_alone(window.column_of(term)):  # a part to each micro-batch that takes it
        return [n / (sum(sizes) or 1) for n in sizes], False
    if window.of_the_whole(window.column_of(term)):  # each has the part of its own samples
        return [1.0] * accum_steps, False
    if alone:  # one micro-batch and its double: a sum doubles, a mean does not
        window = window.doubled()
        rerun = Rerun(window, rerun.device, window.starts, around=rerun.around)
        rerun.gradient(RECORDING)
        rerun.gradient(ONE_PASS64)
        counts, sizes, weights, accum_steps = None, sizes * 2, weights * 2, 2
    # What moves in the window is no matter of weights: here it keeps still.
    held = replace(rerun, window=window.only(term).holding(None))
    micro, whole = _at_several_weights(held, accum_steps, window.moved.modules)
    if not any(float(g.norm()) for g in whole.values()):
        return None, window.sums(window.column_of(term))
    ones, equal = [1.0] * accum_steps, [1 / accum_steps] * accum_steps
    amounts = [list(map(float, c)) for c in (counts, sizes, weights) if c is not None]
    candidates = [ones, *([n / sum(c) for n in c] for c in amounts if sum(c)), equal]
    coefficients = None
    if window.moved.mixing:  # a weight that is counted is a matter of weights
        moving = replace(rerun, window=window.only(term))
        loop = _at_several_weights(moving, accum_steps, ())[0]
        coefficients = fitted_coefficients(loop, whole, candidates)
        micro = micro if coefficients is None else loop
    if coefficients is None:
        coefficients = fitted_coefficients(micro, whole, candidates)
    if coefficients is None:
        return None, window.sums(window.column_of(term))
    pairs = zip(coefficients, micro, strict=True)
    counting = [c for c, g in pairs if any(bool(v.any()) for v in g.values())]
    summed = all(abs(c - 1) < 1e-3 for c in counting) and len(counting) > 1
    summed |= len(counting) == 1 and window.sums(window.column_of(term))
    return ([1.0] if alone else coefficients), summed


def _at_several_weights(
    rerun: Rerun, accum_steps: int, moved: Sequence[nn.Module]
) -> tuple[list[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    """Return micro gradients and the one pass's; of few parameters at other weights, too."""
    micro: list[dict[str, torch.Tensor]] = [{} for _ in range(accum_steps)]
    whole: dict[str, torch.Tensor] = {}
    for seed in range(WEIGHTS):
        one_pass = sampled(rerun.gradient(replace(ONE_PASS64, weights_moved=seed)))
        whole |= {f"{seed} {name}": g for name, g in one_pass.items()}
        how = replace(ACCUMULATED64, weights_moved=seed, state_held_of=moved)
        each = rerun.micro_gradients(how, sampled)
        for kept, own in zip(micro, each, strict=True):
            kept |= {f"{seed} {name}": g for name, g in own.items()}
        if sum(int(g.count_nonzero()) for g in whole.values()) >= ENOUGH * accum_steps:
            break
    return micro, whole
