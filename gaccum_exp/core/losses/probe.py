"""The denominator of an unknown criterion, found by asking it for sums and means.

Its denominator D of some samples is its sum over its mean, in float64, on random outputs of the right
shape; or its own method says it. What the samples *count*, n, adds up over samples, and D need not:

    D = n              the sum is divided by what is counted
    D = max(c, n)      and by c at least, as where nothing is found: max(1, boxes)
    D = n + ε          lest it be divided by zero

A window counts Σnᵢ, and its one denominator is that function of the count: a clamp is of the window's
count, and ε is added once. Which of these holds, and what a micro-batch counts whose D does not show
it, D of k copies of the samples tells, since they count k·n; or D beside samples that count much. What
agrees with none of them, e.g. a division by √n, is refused.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from gaccum_exp.core.losses.asked_criterion import (
    NARROW,
    WIDE,
    CriterionCopies,
    Samples,
    as_asked,
    make_one_batch,
    together,
)
from gaccum_exp.core.modes import unobserved
from gaccum_exp.core.seeding import drawn_since

FINE, COARSE = 1e-11, 1e-6
"""Relative rounding of D where the criterion computes in float64, and in float32 of its own accord."""
MOST_COPIES, FEWEST_COPIES, MOST_ELEMENTS = 4096, 16, 2**20
"""Of the samples, in search of a count far below a clamp, and elements of outputs in all of them."""
MOST_AT_ONCE = 2**24
"""Elements of outputs of which copies are made, or that are kept."""
NOT_ADDITIVE = "its denominator over a batch is not the sum over the batch's parts"
NOT_A_RATIO = "its mean is not its sum divided by a count"
ATTEMPTS = 6
"""At random outputs whose loss is not zero."""


class Refusal(NamedTuple):
    """Why a criterion has no denominator, in words that follow its name."""

    why: str
    has_sum: bool = True
    """Whether at least its sum is one."""


class RefusedError(Exception):
    """The criterion has no denominator, for the reason given."""

    def __init__(self, why: str, *, has_sum: bool = True) -> None:
        super().__init__(why)
        self.refusal = Refusal(why, has_sum)


@dataclass(slots=True)
class DenominatorForm:
    """A denominator as a function of what is counted: max(floor, count + offset)."""

    floor: float | None = None
    """None: none has shown."""
    offset: float | None = None
    """None: nothing counted has been seen yet."""
    uncertainty: float = math.inf
    """Of the offset."""

    def __call__(self, count: float) -> float:
        """Return the denominator of samples that count so much."""
        return max(self.floor or 0.0, count + (self.offset or 0.0))


@dataclass(frozen=True, slots=True)
class _Seen:
    """What copies of samples have shown."""

    count: float
    offset: float | None = None
    floor: float | None = None


@dataclass(frozen=True, slots=True)
class _Witness:
    """Samples whose count is known."""

    samples: Samples | None
    """None: too many to be kept."""
    count: float
    density: float
    """Of the count, per sample."""


class Probe:
    """Finds what each micro-batch counts under an unknown criterion, and its denominator's form.

    That its sum adds up, and that its mean is parallel to it, is checked on the first micro-batch whose
    loss is not zero. What a micro-batch counts is its denominator, one sum and one mean, wherever that
    is larger than the smallest seen, and no more or fewer of its samples count than was seen; else it is
    looked at closely.

    Args:
        criterion: of which copies are asked, in float64 on the CPU; nothing of its own moves.
        arguments: gives its arguments for outputs and targets.
    """

    def __init__(self, criterion: nn.Module, arguments: Callable[[Any, Any], list[Any]]) -> None:
        self._criterion = CriterionCopies(criterion, arguments)
        self._own = getattr(criterion, "denominator", None)
        self._arguments = arguments
        self._inspected = False
        self._within = FINE
        self._form = DenominatorForm()
        self._smallest = math.inf
        """The smallest denominator seen; no clamp is larger."""
        self._witnesses: list[_Witness] = []
        """Those of the fewest and of the most that counts per sample."""
        self._seen_changes = 0
        """How often the criterion had changed when the witnesses were counted."""
        self._uncounted: Samples | None = None
        """Samples of which nothing counts, so that the denominator is the clamp's."""

    def count(self, outputs: Sequence[Tensor], targets: Sequence[Any]) -> float | Refusal:
        """Return what a micro-batch counts, or why nothing can be said to be counted.

        Of the outputs the shapes are used; only a criterion's own `denominator` gets their values.
        """
        try:
            with unobserved(), torch.no_grad(), torch.autocast("cpu", enabled=False):
                self._criterion.look()
                if self._inspected and self._own is not None:
                    denominator = float(self._own(*self._arguments(outputs, targets)))
                    rows = outputs[0].shape[0]
                    if self._is_plain(denominator, rows):
                        return denominator - (self._form.offset or 0.0)
                shapes = [(t.shape, t.is_complex()) for t in outputs]
                values = [as_asked(t) for t in outputs] if self._own is not None else None
                asked = [tree_map_only(Tensor, as_asked, t) for t in targets]
                samples = Samples(shapes, asked, values)
                if not self._inspected:
                    few = max(2, MOST_AT_ONCE * samples.rows // max(1, samples.elements))
                    self._inspect(samples.cut(slice(0, few)) if few < samples.rows else samples)
                return self._counted(samples)
        except RefusedError as error:
            return error.refusal
        except Exception as error:  # the user's code, on values that it has not seen before
            first = (str(error).splitlines() or [""])[0]
            return Refusal(
                f"it could not be asked for its denominator ({type(error).__name__}: {first})"
            )

    def window_denominator(self, count: float) -> float:
        """Return the denominator of a window that counts so much."""
        return self._form(count)

    def _inspect(self, samples: Samples) -> None:
        """Check that the criterion is a sum over samples, divided by what does not depend on outputs."""
        ask = self._criterion
        xs, total, attempt = self._draw(samples, seed=0)
        if drawn_since(attempt):  # asked as in evaluation it may draw nothing, and can be compared
            ask.as_in_evaluation = True
            xs, total, attempt = self._draw(samples, seed=0)
        drew = drawn_since(attempt)
        self._inspected = total != 0
        self._within = COARSE if ask.is_coarse else FINE
        ys = samples.draw(ATTEMPTS, WIDE if attempt else NARROW)
        twice, both = together(samples, samples), [torch.cat(pair) for pair in zip(xs, ys, strict=True)]
        half = samples.rows // 2
        parts = [samples.cut(rows) for rows in (slice(0, half), slice(half, None)) if half]
        # Where it draws, the sums of other samples are of other draws.
        of_twice = ask.sum(twice, both)
        additive = drew or _adds_up(of_twice, [total, ask.sum(samples, ys)])
        if not additive and self._same(of_twice, ask.mean(twice, both)):
            raise RefusedError("its `reduction` changes nothing", has_sum=False)
        if self._own is None:
            n, other = self._denominator(samples), self._denominator(samples, seed=1)
            other = n if math.isnan(other) else other
            depends = n > 0 and not math.isclose(n, other, rel_tol=COARSE)
            if depends or not ask.gradients_parallel(samples, xs, n):
                raise RefusedError(NOT_A_RATIO)
            self._within = self._within if self._same(n, other) else COARSE
        if parts and not drew:
            rows = ([x[:half] for x in xs], [x[half:] for x in xs])
            sums = [ask.sum(part, values) for part, values in zip(parts, rows, strict=True)]
            additive = additive and _adds_up(total, sums)
        if not additive:
            raise RefusedError("its sum over a batch is not the sum over the batch's parts")
        if parts and samples.joinable:
            counts = [self._counted(part) for part in parts]
            self._require_same(self._counted(samples), sum(counts))
        ask.as_in_evaluation = False

    def _counted(self, samples: Samples) -> float:
        """Return what the samples count, from as few questions as tell."""
        denominator = self._denominator(samples)
        if math.isnan(denominator):
            return self._counted_beside_others(samples)
        if not math.isfinite(denominator) or denominator < 0:
            raise RefusedError(NOT_A_RATIO)
        if self._is_plain(denominator, samples.rows):
            return self._rounded(denominator - (self._form.offset or 0.0), denominator)
        self._recount_witnesses()
        if samples.elements > MOST_AT_ONCE and samples.rows > 1 and samples.joinable:
            half = samples.rows // 2  # several copies would not fit into memory
            parts = (samples.cut(rows) for rows in (slice(0, half), slice(half, None)))
            count = sum(map(self._counted, parts))
            self._require_same(denominator, self._form(count))
            return count
        beside = [w for w in self._witnesses if w.samples and make_one_batch(w.samples, samples)]
        seen = self._of_copies(samples, denominator, MOST_COPIES if not beside else 2)
        self._learn(seen, denominator)
        count = seen.count
        for witness in beside:
            assert witness.samples is not None
            expected = self._form(witness.count + count)
            found = self._denominator(together(witness.samples, samples))
            if seen.floor is not None and count == 0.0:
                count = self._rounded(found - self._form(witness.count), found)
                expected = self._form(witness.count + max(0.0, count))
            self._require_same(found, expected)
        if seen.floor is not None:
            if self._form(count) > seen.floor * (1 + COARSE):
                raise RefusedError(NOT_ADDITIVE)
            if self._uncounted is not None and count == 0.0 and make_one_batch(self._uncounted, samples):
                # Each alone may count in a way that shows only where they are together.
                self._require_same(self._denominator(together(self._uncounted, samples)), seen.floor)
            self._uncounted = samples if count == 0.0 else self._uncounted
        else:
            self._witness(samples, count, denominator)
        self._smallest = min(self._smallest, denominator)
        return count

    def _counted_beside_others(self, samples: Samples) -> float:
        """Return what samples without a loss count: all are masked, and yet may be divided by."""
        self._recount_witnesses()
        fitting = [
            w.samples for w in self._witnesses if w.samples and make_one_batch(w.samples, samples)
        ]
        for other in fitting or self._with_a_loss(samples):
            alone = self._denominator(other)
            seen = self._of_copies(other, alone, 2)
            if seen.floor is None and seen.count > 0:
                self._learn(seen, alone)
                both = self._denominator(together(other, samples))
                count = self._rounded(both - alone, both)
                if count < 0:
                    raise RefusedError(f"{NOT_ADDITIVE} ({alone:.6g}, and {both:.6g} with others)")
                return count
        return 0.0

    def _with_a_loss(self, samples: Samples) -> Iterator[Samples]:
        """Yield many samples of the same shapes whose targets were changed so that they have a loss."""
        for value in (1, 0):
            targets = [
                torch.full_like(t, value) if isinstance(t, Tensor) and t.ndim else t
                for t in samples.targets
            ]
            other = replace(samples, targets=targets)
            try:
                if not math.isnan(self._denominator(other)):
                    yield together(*[other] * FEWEST_COPIES)
            except Exception:  # the user's code, on targets that it may not know
                continue

    def _recount_witnesses(self) -> None:
        """Count them again where the criterion has changed: class weights may be trained."""
        if self._seen_changes == self._criterion.changes:
            return
        self._seen_changes, known = self._criterion.changes, self._witnesses
        self._witnesses = []
        for samples in (witness.samples for witness in known if witness.samples):
            denominator = self._denominator(samples)
            count = denominator - (self._form.offset or 0.0)
            if self._form.floor is None or denominator > self._form.floor * (1 + COARSE):
                self._witness(samples, count, denominator)

    def _is_plain(self, denominator: float, rows: int) -> bool:
        """Whether a denominator is above any clamp, and of samples that count as those seen do."""
        form, changed = self._form, self._seen_changes != self._criterion.changes
        no_clamp = form.offset is not None and denominator > self._smallest * (1 + COARSE)
        # A clamp or an ε that has moved, as a running mean in it does, has to be noticed.
        if not no_clamp or not self._witnesses or (changed and (form.offset or form.floor)):
            return False
        density = (denominator - (self._form.offset or 0.0)) / max(1, rows)
        fewest, most = (witness.density for witness in (self._witnesses[0], self._witnesses[-1]))
        return fewest * (1 - COARSE) <= density <= most * (1 + COARSE)

    def _of_copies(self, samples: Samples, denominator: float, most: int) -> _Seen:
        """Return what the denominators of 1, 2, 4, … copies show of the count, the clamp and ε."""

        def of(copies: int) -> float:
            return self._denominator(together(*[samples] * copies))

        ks, ds = [1, 2], [denominator, of(2)]
        if self._same(ds[1], 2 * ds[0]):
            return _Seen(ds[0], 0.0 if ds[0] else None)
        refused = f"{NOT_ADDITIVE} ({ds[0]:.6g} for some samples, {ds[1]:.6g} for these twice)"
        if not samples.joinable:
            raise RefusedError(refused)
        most = max(min(most, MOST_ELEMENTS // max(1, samples.elements)), min(most, FEWEST_COPIES))
        if self._same(ds[1], ds[0]) and self._same(of(most) if most > 2 else ds[1], ds[0]):
            return _Seen(0.0, floor=ds[0])
        while ks[-1] <= 2 * most:
            ks.append(2 * ks[-1])
            ds.append(of(ks[-1]))
            k, (first, second, third) = ks[-3], ds[-3:]
            if self._same(second, first):
                continue
            count = (third - second) / (2 * k)
            offset = second - 2 * k * count
            clamp = denominator if denominator > count + offset + self._error(denominator) else 0.0
            fits = (self._same(d, max(clamp, k * count + offset)) for k, d in zip(ks, ds, strict=True))
            if self._same(third - first, 3 * (second - first), scale=third) and all(fits):
                count = self._rounded(count, third)
                return _Seen(count, offset, clamp or None)
            if not self._same(first, ds[0]):
                break
        raise RefusedError(refused)

    def _learn(self, seen: _Seen, denominator: float) -> None:
        """Note a clamp and an ε, which have to be those of other micro-batches too."""
        form = self._form
        if seen.floor is not None:
            if form.floor is not None:
                self._require_same(seen.floor, form.floor)
            form.floor = seen.floor if form.floor is None else form.floor
            if form.offset is not None and abs(form.floor - form.offset) <= 4 * form.uncertainty:
                # An ε that is seen alone is seen best.
                form.offset, form.uncertainty = form.floor, self._error(form.floor)
        if seen.offset is not None:
            error = self._error(denominator)
            if form.offset is None or error < form.uncertainty:
                agreed = form.offset is None or abs(seen.offset - form.offset) <= 4 * form.uncertainty
                form.offset, form.uncertainty = seen.offset, error
            else:
                agreed = abs(seen.offset - form.offset) <= 4 * error
            if not agreed:
                raise RefusedError(NOT_ADDITIVE)
        if form.floor is not None and denominator < form.floor * (1 - COARSE):
            raise RefusedError(NOT_ADDITIVE)

    def _witness(self, samples: Samples, count: float, denominator: float) -> None:
        if count <= 0 or not self._same(denominator, self._form(count)):
            return
        density = count / max(1, samples.rows)
        witness = _Witness(samples if samples.held <= MOST_AT_ONCE else None, count, density)
        every = sorted([*self._witnesses, witness], key=lambda w: w.density)
        self._witnesses = [every[0], every[-1]] if len(every) > 1 else every

    def _denominator(self, samples: Samples, seed: int = 0) -> float:
        """Return D, what the criterion divides its sum by for its mean; NaN where its sum is zero."""
        if self._own is not None:
            return self._criterion.own_denominator(samples)
        xs, total, attempt = self._draw(samples, seed)
        if total == 0:
            return math.nan
        mean = self._criterion.mean(samples, xs, attempt)
        if mean == 0 or math.isnan(mean):
            raise RefusedError(NOT_A_RATIO)
        return total / mean

    def _draw(self, samples: Samples, seed: int) -> tuple[list[Tensor], float, int]:
        """Return outputs whose loss is not zero, their sum, and at which attempt; a sum of 0: none."""
        for attempt in range(ATTEMPTS):
            xs = samples.draw(seed + attempt, WIDE if attempt else NARROW)
            try:
                total = self._criterion.sum(samples, xs, attempt)
            except Exception:  # the user's code, perhaps outside of its domain
                if attempt == 0:
                    raise
                continue
            if math.isfinite(total) and total != 0:
                return xs, total, attempt
        return samples.draw(seed), 0.0, 0

    def _same(self, one: float, other: float, scale: float = 0.0) -> bool:
        return abs(one - other) <= self._within * max(abs(one), abs(other), abs(scale))

    def _error(self, denominator: float) -> float:
        return 4 * self._within * denominator

    def _rounded(self, count: float, scale: float) -> float:
        """Return a count without the rounding of the denominators, of this size, that it is made of."""
        whole = float(round(count))
        is_whole = abs(count - whole) <= self._error(scale) and (whole == 0 or self._within == COARSE)
        return whole if is_whole else count

    def _require_same(self, found: float, expected: float) -> None:
        if not self._same(found, expected):
            raise RefusedError(f"{NOT_ADDITIVE} ({found:.6g}, and {expected:.6g})")


def _adds_up(whole: float, parts: Sequence[float]) -> bool:
    return abs(sum(parts) - whole) <= COARSE * max(map(abs, (whole, *parts)))
