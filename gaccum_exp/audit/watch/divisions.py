"""What a loop divides the terms of its loss by, and which of them it divides otherwise than by N.

A term that is a mean is to be divided by N, the micro-batches of this window. A sum has a divisor of its
own, which is taken as it is, but for a fault that it has in common with the means.
"""

import functools
import math
import operator
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from gaccum_exp.audit.causes.loss_weights import common_divisor, scale_faults
from gaccum_exp.audit.verdict import listed, remedy_of_factor
from gaccum_exp.audit.watch.scalars import Factor, whole_divisor


@dataclass(frozen=True, slots=True)
class Scaling:
    """What a loop multiplies one term of its loss by."""

    name: str
    summed: bool
    """Whether it is a sum over samples, and no mean."""
    weights: Sequence[float]
    """Of each micro-batch, without what stands in the source as a weight of the loss."""
    total: float
    """Of a mean: 1 where it is divided by N, and has no weight."""
    halved: float
    """The literal weight that its function gives it, where it has no other term."""
    factors: Sequence[Factor]
    """Those of the loop and of its loss function, one by one."""
    samples: int = 0
    """Of each micro-batch, where all have as many; 0 otherwise."""

    @property
    def divisors(self) -> Counter[int]:
        """Whole numbers that it is divided by, or multiplied by the reciprocals of."""
        return Counter(f.divisor for f in self.factors if f.divisor and (f.divides or not f.weight))

    @property
    def divided(self) -> Counter[int]:
        """Those that it is divided by, and not multiplied by as well."""
        by = Counter(f.divisor for f in self.factors if f.divisor and f.divides and not f.weight)
        times = (whole_divisor(1 / f.value) for f in self.factors if f.value > 1)
        return by - Counter(number for number in times if number)

    @property
    def divided_by_names(self) -> Counter[int]:
        """Those of them that are no literals: such a divisor of one term alone may be its weight."""
        return self.divided & Counter(f.divisor for f in self.factors if f.divisor and not f.literal)


@dataclass(frozen=True, slots=True)
class ScaleFaults:
    """By which factors the terms of a loss are off."""

    accum_steps: int
    factors: list[float]
    """Of each term; 1: it is right, or taken as it is."""
    divisors: Counter[int] = field(default_factory=Counter)
    """What the loop divides by in the place of N, as often as it does; empty: it does not."""
    remark: str | None = None
    """On what is taken as given."""
    doubt: str | None = None
    """Why it cannot be told whether the terms are divided rightly."""

    @property
    def by(self) -> int:
        """What the loop divides by in all, in the place of N."""
        return math.prod(self.divisors.elements())

    @property
    def alike(self) -> bool:
        """Whether all terms are off by the same factor."""
        return len(set(self.factors)) == 1

    def of_division(self, factor: float) -> bool:
        """Whether a factor is that of a division by another number than N."""
        return bool(self.divisors) and math.isclose(factor, self.accum_steps / self.by, rel_tol=1e-4)

    def left_over(self, factor: float) -> bool:
        """Whether there are more micro-batches than it is divided by: of an earlier window, too."""
        return self.of_division(factor) and self.divisors.total() == 1 and self.accum_steps > self.by

    def reached(self) -> str:
        """Return what reached the step."""
        return f"{self.accum_steps} micro-batches reached this step, each divided by {self.by}"

    def remedy(self, factor: float, *, others: bool = False) -> str:
        """Return what to do about terms that are off by a factor; whether there are `others`, right."""
        said = f"gradient is {factor:.4g} × the large batch's"
        if self.of_division(factor):
            once = "once, " if self.divisors.total() > 1 else ""
            return f"{said}: {self.division()}: divide {once}by the number in this window"
        if others:
            return f"{said}: divide it as the other terms"
        return remedy_of_factor(factor, self.accum_steps)

    def division(self) -> str:
        """Return by what the window is divided: `3 micro-batches, each divided by 4`."""
        times = {1: "", 2: " twice"}
        by = " and by ".join(f"{d}{times.get(n, f' {n} times')}" for d, n in self.divisors.items())
        several = self.accum_steps != 1
        return f"{self.accum_steps} micro-batch{'es, each' if several else ''} divided by {by}"


def faults_of(
    terms: Sequence[Scaling], accum_steps: int, *, constants_outside: bool, rescaled: bool
) -> ScaleFaults:
    """Find the factors by which the terms of a loss are off.

    Args:
        terms: of the loss.
        accum_steps: N.
        constants_outside: whether no loss function multiplies by a constant itself.
        rescaled: whether the gradient was multiplied after its last backward pass.
    """
    means = [term for term in terms if not term.summed]
    instead = Counter[int]() if rescaled else _in_place_of(means, accum_steps)
    if instead:
        found = _of_division(means, accum_steps, instead)
    else:
        found = _of_totals(means, accum_steps, constants_outside=constants_outside, rescaled=rescaled)
    off = set(found.factors)
    # A sum is taken as it is, but for what was done to it and the means alike.
    common = off.pop() if len(off) == 1 else 1.0
    twice = Counter({accum_steps: 2})
    cause = found.divisors if found.of_division(common) else twice if common < 1 else None
    of_means = iter(found.factors)
    factors = [
        next(of_means) if not term.summed
        else common if cause is not None and term.divisors >= cause
        else 1.0
        for term in terms
    ]  # fmt: skip
    doubt = found.doubt or next(filter(None, (_of_own_samples(t, accum_steps) for t in terms)), None)
    return ScaleFaults(accum_steps, factors, found.divisors, found.remark, doubt)


def _of_own_samples(term: Scaling, accum_steps: int) -> str | None:
    """Doubt a sum that is divided by the samples of one micro-batch, and by no N: it may be a mean.

    A multiple of them, as `numel()` is, may be what the whole window counts.
    """
    size, by = term.samples, term.divisors
    if not term.summed or size < 2 or accum_steps in (1, size) or by[accum_steps]:
        return None
    if not term.divided_by_names[size]:
        return None
    return (
        f"the sum in {term.name} is divided by {size}, and not by N = {accum_steps}: right if {size} is "
        f"a constant of the loss; if it is the number of samples in a micro-batch, divide by N, too"
    )


def _in_place_of(means: Sequence[Scaling], accum_steps: int) -> Counter[int]:
    """Return what the terms are divided by where that is another number than N."""
    if any(term.divisors[accum_steps] or _one(term.total) for term in means):
        return Counter()
    if not means:
        return Counter()
    shared = functools.reduce(operator.and_, (term.divided for term in means))
    named = [by for term in means if (by := term.divided_by_names)]
    if not shared and named and all(by == named[0] for by in named):
        return named[0]
    # Terms may have their mean taken, which divides by how many they are.
    return shared - Counter([len(means)]) if len(means) > 1 else shared


def _of_division(means: Sequence[Scaling], accum_steps: int, instead: Counter[int]) -> ScaleFaults:
    """Return by how much means are off that are divided by another number than N, or by none."""
    by = math.prod(instead.elements())
    factors = [
        accum_steps / by if term.divided >= instead
        else float(accum_steps) if _one(term.total / accum_steps)
        else 1.0
        for term in means
    ]  # fmt: skip
    doubt = None
    if len(means) > 1 and by == accum_steps * len(means) and _one(sum(term.total for term in means)):
        factors = [1.0] * len(means)
        doubt = (
            f"the losses of {accum_steps} micro-batches are each divided by {by}: right if that is "
            f"{accum_steps} × the {len(means)} terms of the loss, whose mean is taken; else divide by "
            f"the number in this window"
        )
    return ScaleFaults(accum_steps, factors, instead, _given(means, factors, accum_steps), doubt)


def _of_totals(
    means: Sequence[Scaling], accum_steps: int, *, constants_outside: bool, rescaled: bool
) -> ScaleFaults:
    """Return by how much means are off, from what each is multiplied by in all."""
    totals = [term.total for term in means]
    times = [term.divisors[accum_steps] for term in means]
    if len(means) == accum_steps and all(_averaged(term, accum_steps) for term in means):
        totals, times = [total * accum_steps for total in totals], [n - 1 for n in times]
    together = all(each < 2 for each in times)
    faults, remark = scale_faults(totals, accum_steps, together=together), None
    weights = [w for term in means for w in term.weights if w]
    divisor = common_divisor(weights) if weights else None
    if faults is None:
        faults, total = [1.0] * len(means), sum(totals)
        # One loss has hardly a weight of a half, or of two; several may have.
        tried = [[total], [1 / total]] if len(means) == 1 and total > 0 else []
        whole = any(common_divisor(each) is not None for each in tried)
        undivided = accum_steps > 1 and bool(weights) and min(weights) >= 1
        if rescaled or (constants_outside and (whole or undivided)):
            faults = [total] * len(means)
        elif constants_outside and divisor is not None and divisor > 1:
            faults = [accum_steps / divisor] * len(means)
        else:
            said = f"the loop multiplies the loss by {total:.4g} in all"
            if len(means) > 1:
                said = f"the loop multiplies its losses by {listed(totals)}"
            remark = f"{said}, which is taken as given"
    else:
        faults = _of_those_divided(faults, times, accum_steps)
        remark = _given(means, faults, accum_steps) if not (together and _one(sum(totals))) else None
    if len(means) == 1 and _one(means[0].halved * accum_steps) and accum_steps > 1 and remark is None:
        said = f"the loss function multiplies by {1 / accum_steps:.4g} in its source, as N would"
        remark = f"{said}, which is taken as given"
    instead = Counter[int]()
    if divisor is not None and divisor not in (1, accum_steps) and together and not rescaled:
        # Terms may have their mean taken: then their weights make one of a loss together.
        summed = [sum(each) for each in zip(*(term.weights for term in means), strict=True)]
        of_mean = common_divisor(summed) in (1, accum_steps)
        off = accum_steps / divisor
        if not of_mean and all(math.isclose(f, off, rel_tol=1e-4) for f in faults):
            instead = Counter([divisor])
    return ScaleFaults(accum_steps, faults, instead, remark)


def _averaged(term: Scaling, number: int) -> bool:
    """Whether one of its divisions by a number stands in the source: of as many terms it is the mean."""
    return term.divisors[number] > max(1, term.divided_by_names[number])


def _of_those_divided(faults: list[float], times: list[int], accum_steps: int) -> list[float]:
    """Return the factors of those terms alone that lack the division by N, or have it twice."""
    lacking = [f == accum_steps and n > 0 for f, n in zip(faults, times, strict=True)]
    once = [f < 1 and n < 2 and max(times) > 1 for f, n in zip(faults, times, strict=True)]
    found = [1.0 if a or b else f for f, a, b in zip(faults, lacking, once, strict=True)]
    return found if any(f != 1 for f in found) else faults


def _given(means: Sequence[Scaling], faults: Sequence[float], accum_steps: int) -> str | None:
    """Return which terms have weights in all that are taken as they are."""
    pairs = zip(means, faults, strict=True)
    given = [term for term, off in pairs if off == 1 and not _one(term.total)]
    if not given:
        return None
    by = ", ".join(dict.fromkeys(f"{term.name} by {term.total:.4g}" for term in given))
    said = f"the loop multiplies {by} in all, which is taken as given"
    undivided = [term.name for term in given if not term.divisors[accum_steps]]
    if undivided and any(term.divisors[accum_steps] for term in means):
        names = " and ".join(undivided)
        said += f"; of {names} it divides by no N, unlike other terms: right if the weight is divided"
    return said


def _one(number: float) -> bool:
    return math.isclose(number, 1, rel_tol=1e-4)
