"""The verdict on one window of somebody's loop.

The gradient that reached the optimizer is compared with the one pass; what the loop did on the way (the
weight of each micro-batch, gradients left over, zeroed, clipped or unscaled) is compared with what its
passes, run again, add up to.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch

from gaccum_exp.audit import result
from gaccum_exp.audit.causes.loss_weights import (
    divided_by,
    fitted_shares,
    reference_of_sum,
    sampled,
    unrounded,
)
from gaccum_exp.audit.diagnose import Examined, examine, first_line
from gaccum_exp.audit.rerun.passes import Trial
from gaccum_exp.audit.rerun.samples import NotJoinableError
from gaccum_exp.audit.rerun.sandbox import Parts
from gaccum_exp.audit.result import Audit
from gaccum_exp.audit.verdict import multiple, remedy, scale_of
from gaccum_exp.audit.watch.observations import Sight
from gaccum_exp.audit.watch.other_faults import beside_the_gradient
from gaccum_exp.audit.watch.tape import MicroBatch
from gaccum_exp.audit.watch.taped_window import CouplingError, RecordedWindow
from gaccum_exp.core.gradient import Gradient, difference, distance, norm, scaled
from gaccum_exp.memory.available import out_of_memory

AS_REPLAYED = 1e-4
"""How close the loop's gradient is to a multiple of its passes' sum where nothing came in between."""


def judge(sight: Sight, reached: Gradient, parts: Parts, dim: int) -> Audit:
    """Return the verdict on a window, given the gradient that reached the optimizer."""
    units = sight.tape.micro_batches()
    blank = Audit("inconclusive", len(units), "mean", checks=beside_the_gradient(sight, units))
    if not units:
        why = "no backward pass through a loss of this model was seen before the optimizer's step"
        return replace(blank, detail=f"{why}: is the criterion the one that the loop calls?")
    first = next(iter(reached.values()), torch.empty(0)).device
    try:
        return _on_device_or_host(sight, reached, parts, dim, blank, first)
    except CouplingError as error:
        why = f"{error}: give watch the function that computes the whole loss"
        return replace(blank, cause=result.NOT_ADDITIVE, detail=why, remedy=remedy(result.NOT_ADDITIVE))
    except NotJoinableError as error:
        return replace(blank, detail=str(error))
    except Exception as error:  # a stranger's loop; it must not notice
        return replace(blank, detail=f"the window could not be run again: {first_line(error)}")


def _on_device_or_host(
    sight: Sight, reached: Gradient, parts: Parts, dim: int, blank: Audit, first: torch.device
) -> Audit:
    """Judge it where it ran; on the CPU where there is no room or no float64."""
    host = torch.device("cpu")
    try:
        if first.type != "mps":
            return _Loop(sight, reached, parts, dim, blank, first).audit()
    except Exception as error:
        if not out_of_memory(error) or first == host:
            raise
    audit = _Loop(sight, reached, parts, dim, blank, host).audit()
    where = "run again on the CPU"
    return replace(audit, detail=f"{audit.detail}; {where}" if audit.detail else where)


class _Loop:
    """One window, being judged."""

    def __init__(
        self,
        sight: Sight,
        reached: Gradient,
        parts: Parts,
        dim: int,
        blank: Audit,
        device: torch.device,
    ) -> None:
        self._device = device
        reached = {name: g.to(device) for name, g in reached.items()}
        self._sight, self._reached, self._parts, self._dim = sight, reached, parts, dim
        self._units = self._since_dropped(sight.tape.micro_batches())
        self._blank = replace(blank, steps=len(self._units))
        self._window = RecordedWindow(parts, self._units, dim)
        self._trial = self._run_again(self._window, self._units)
        self._loss_scale = sight.loss_scale
        clip = sight.clips[-1] if sight.clips else None
        self._clip = clip if clip is not None and clip.after_backward == sight.tape.backwards else None
        before = {} if self._clip is None else self._clip.before
        self._accumulated = {name: g.to(device) for name, g in before.items()} or reached

    def audit(self) -> Audit:
        """Run the experiments."""
        replayed = self._trial.record()
        observed = self._accumulated
        if self._loss_scale != 1:
            observed = scaled(observed, self._loss_scale)
        factor = multiple(observed, replayed, AS_REPLAYED)
        if factor is not None and abs(factor - 1) < AS_REPLAYED:
            factor = 1.0
        weights = [w / self._loss_scale for w in self._window.weights]
        summed = self._find_shares()
        given = [w * (factor or 1.0) for w in weights]
        counts, sizes = self._window.counts(), self._window.sizes
        reference = reference_of_sum(given, counts, sizes) if summed else 1.0
        shares = [share * reference for share in self._window.shares or []]
        exact = unrounded(given, shares)
        self._window.weights = [w * self._loss_scale for w in exact]
        self._window.reference = reference * self._loss_scale
        blank = replace(self._blank, reduction=self._named(reference, summed))
        if factor is not None and factor != 1:
            replayed = scaled(replayed, factor)
        examined = examine(self._trial, observed, blank, replayed)
        audit = self._with_scale(examined, reference if summed else None)
        if examined.measured is None:
            return audit
        sound = examined.measured.in_range
        if (
            factor is None
            and not sound
            and (fault := self._fault(audit, observed, replayed)) is not None
        ):
            return fault
        if self._clip is not None and (fault := self._after_clipping(audit)) is not None:
            return fault
        return self._unless_padded(self._reworded(audit, weights, factor, summed))

    def _unless_padded(self, audit: Audit) -> Audit:
        """Padding may change what a model computes; where the weights explain all, it has not."""
        proven = (result.UNEQUAL_DENOMINATORS, result.LOSS_SCALE, result.STALE_OR_MISSING)
        if audit.verdict != "biased" or audit.cause in proven or not self._window.padded:
            return audit
        why = "micro-batches of different lengths were padded to one, which may change what is computed"
        return replace(audit, verdict="inconclusive", cause=None, remedy=None, detail=why)

    def _run_again(self, window: RecordedWindow, units: Sequence[MicroBatch]) -> Trial:
        return Trial(window, [_start(unit) for unit in units], self._device)

    def _since_dropped(self, units: list[MicroBatch]) -> list[MicroBatch]:
        """Leave out an epoch's left-over passes whose gradients the loop has zeroed on purpose."""
        zeroed = [k for k, what in self._sight.between if what == "zeroed"]
        if len(zeroed) != 1:
            return units
        kept = [u for u in units if _last_backward(u) >= zeroed[0]]
        return kept if len(units) - len(kept) < len(kept) else units

    def _find_shares(self) -> bool:
        """Find each micro gradient's share in the one pass; return whether that is their plain sum."""
        window, units = self._window, self._units
        if len(units) == 1:  # one micro-batch and its double: a sum doubles, a mean does not
            window = RecordedWindow(self._parts, [units[0], units[0]], self._dim)
        trial = self._run_again(window, [*units, *units][: len(window.sizes)])
        trial.draws = self._trial.draws if window is self._window else trial.draws
        if window is not self._window:
            trial.record()
        kept = window.weights, window.reference
        window.weights, window.reference = [1.0] * len(window.sizes), 1.0
        try:
            micro = trial.micro_gradients(sampled)
            whole = sampled(trial.one_pass(float64=True))
        finally:
            window.weights, window.reference = kept
        shares = fitted_shares(micro, whole)
        if shares is None:
            return window.sums
        self._window.shares = shares if window is self._window else [1.0]
        return all(abs(share - 1) < 1e-3 for share in shares)

    def _named(self, reference: float, summed: bool) -> str:
        if not summed:
            return "mean"
        counts = self._window.counts() or [float(size) for size in self._window.sizes]
        return "global_mean" if math.isclose(reference * sum(counts), 1, rel_tol=1e-5) else "sum"

    def _with_scale(self, examined: Examined, reference: float | None) -> Audit:
        audit = examined.audit
        known = audit.denominator is not None
        if examined.one_pass64 is None or (reference is not None and not known):
            return audit
        observed = scaled(self._accumulated, self._loss_scale)
        along = scale_of(observed, examined.one_pass64)
        per_mean = 1.0 if reference is None else reference * (audit.denominator or 1.0)
        return replace(audit, scale=None if along is None else along * per_mean)

    def _fault(self, audit: Audit, observed: Gradient, replayed: Gradient) -> Audit | None:
        """The gradient is not what its passes add up to: what came in between?"""
        sight = self._sight
        audit = replace(audit, verdict="biased", culprit=None, culprit_type=None, culprits=())
        if sight.at_start:
            extra = difference(observed, replayed)
            start = {name: g.to(self._device) for name, g in sight.at_start.items()}
            left = multiple(extra, scaled(start, self._loss_scale), 1e-2)
            if left is not None:
                size = norm(sight.at_start) * self._loss_scale / max(norm(replayed), 1e-300)
                return _stale(
                    audit, "call zero_grad before the window's first backward pass",
                    f"gradients of earlier passes, {size:.2g} × its own, were there at the start",
                )  # fmt: skip
        inside = [c for c in sight.clips if c.after_backward < sight.tape.backwards]
        if inside:
            return replace(
                audit, cause=result.LOSS_SCALE,
                remedy="clip once, after the window's last backward pass, not after each micro-batch",
                detail=f"gradients were clipped {len(inside)} times before the last backward pass",
            )  # fmt: skip
        if any(k < sight.tape.backwards for k in sight.unscaled):
            return _stale(
                audit, "unscale_ once, after the window's last backward pass",
                "gradients were unscaled inside the window, and later ones added at full scale",
            )  # fmt: skip
        zeroed = [k for k, what in sight.between if what == "zeroed"]
        if zeroed and self._matches_since(zeroed[-1], observed):
            lost = sum(_last_backward(u) < zeroed[-1] for u in self._units)
            return _stale(
                audit, "call zero_grad once per optimizer step, not inside the window",
                f"zero_grad inside the window: {lost} of {len(self._units)} micro-batches are missing",
            )  # fmt: skip
        if distance(observed, replayed) < 0.1:
            return None  # close: digits were lost, and that is examined
        if any(what == "changed" for _, what in sight.between):
            return _stale(
                audit, "leave .grad alone until the window's last backward pass",
                "something changed the gradients between the window's passes",
            )  # fmt: skip
        why = (
            "the gradient is not the sum of what its micro-batches' losses give: a part comes from "
            "elsewhere, or was changed before the step. Ruled out: gradients left over, zeroed, clipped "
            "or unscaled inside the window"
        )
        return replace(audit, verdict="inconclusive", cause=result.UNKNOWN, detail=why, remedy=None)

    def _matches_since(self, backward: int, observed: Gradient) -> bool:
        kept = [u for u in self._units if _last_backward(u) >= backward]
        if not kept:
            return False
        window = RecordedWindow(self._parts, kept, self._dim)
        again = self._run_again(window, kept).record()
        return multiple(observed, again, AS_REPLAYED) is not None

    def _after_clipping(self, audit: Audit) -> Audit | None:
        """Clipping is the last thing that may happen to a gradient."""
        assert self._clip is not None
        after = {name: g.to(self._device) for name, g in self._clip.after.items()}
        factor = multiple(self._reached, after, AS_REPLAYED)
        if factor is None or abs(factor - 1) < AS_REPLAYED or audit.verdict == "biased":
            return None
        said = (
            f"gradients were multiplied by {factor:.4g} after clipping: {self._unscaled_twice(factor)}"
        )
        return replace(audit, verdict="biased", cause=result.LOSS_SCALE, remedy=said)

    def _unscaled_twice(self, factor: float) -> str:
        twice = self._loss_scale != 1 and math.isclose(factor, 1 / self._loss_scale, rel_tol=1e-3)
        return "they were unscaled twice" if twice else "scale the loss, not the gradients"

    def _reworded(self, audit: Audit, weights: list[float], factor: float | None, summed: bool) -> Audit:
        """Say it in the loop's own terms."""
        shares, sizes = self._window.shares, self._window.sizes
        uncounted = self._window.counts() is None and len(set(sizes)) == 1
        if audit.cause == result.UNEQUAL_DENOMINATORS and shares and uncounted:
            said = ", ".join(f"{100 * share / sum(shares):.3g} %" for share in shares[:8])
            what = f"micro-batches make up {said} of what the window counts: use global_mean"
            return replace(audit, remedy=what)
        if audit.cause != result.LOSS_SCALE:
            return audit
        steps, gone = len(weights), factor or 1.0
        whole = divided_by(weights, summed)
        total = gone * sum(weights) / (1 if not summed else self._window.reference / self._loss_scale)
        said = f"gradient is {total:.4g} × the large batch's: "
        if self._loss_scale != 1 and math.isclose(gone, 1 / self._loss_scale, rel_tol=1e-3):
            said = f"gradient is {gone:.4g} × the large batch's: it was unscaled twice"
            return replace(audit, remedy=said)
        if gone != 1 and not _round(gone) and abs(total / gone - 1) < AS_REPLAYED:
            why = (
                f"gradients were multiplied by {gone:.4g} after the last backward pass by code "
                "not known here; clipping by torch.nn.utils.clip_grad_norm_ would be known"
            )
            return replace(audit, verdict="inconclusive", cause=None, remedy=None, detail=why)
        if gone == 1 and whole is not None and steps > whole > 1:
            why = f"{steps} micro-batches reached this step, each divided by {whole}"
            said = "call zero_grad where the epoch begins, or take the step on what is left: an earlier"
            return _stale(audit, f"{said} window's gradients were left over", why)
        if gone == 1 and whole is not None and steps < whole:
            why = f"{steps} micro-batches, each divided by {whole}: divide by the number in this window"
            return replace(audit, remedy=said + why)
        return audit


def _round(factor: float) -> bool:
    """Whether a factor is that of a division by a whole number, as no clipping makes it."""
    return factor > 1 or math.isclose(1 / factor, round(1 / factor), rel_tol=1e-5)


def _stale(audit: Audit, what_to_do: str, seen: str) -> Audit:
    return replace(
        audit, verdict="biased", cause=result.STALE_OR_MISSING, remedy=what_to_do, detail=seen
    )


def _start(unit: MicroBatch) -> list[object]:
    start = unit.first.start
    assert start is not None
    return start


def _last_backward(unit: MicroBatch) -> int:
    return max(loss.backward or 0 for loss in unit.losses)
