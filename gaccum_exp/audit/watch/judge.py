"""Judge one window of a loop.

The gradient that reached the optimizer is compared with the one pass; what the loop did on the way (the
weight of each micro-batch, gradients left over, zeroed, clipped or unscaled) is compared with what its
passes, run again, add up to.
"""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace

import torch

from gaccum_exp.audit import result
from gaccum_exp.audit.causes.loss_weights import (
    common_divisor,
    fitted_coefficients,
    intended_weight,
    sampled,
    unrounded,
)
from gaccum_exp.audit.diagnose import ZERO, Diagnosis, diagnose, error_line
from gaccum_exp.audit.rerun.passes import ACCUMULATED64, ONE_PASS64, RECORDING, Rerun
from gaccum_exp.audit.rerun.sandbox import NamedModules
from gaccum_exp.audit.result import Audit
from gaccum_exp.audit.verdict import REMEDIES, multiple, scale_of
from gaccum_exp.audit.watch.loop_checks import other_faults
from gaccum_exp.audit.watch.moving_state import FirstValues
from gaccum_exp.audit.watch.tape import Observations, TapedCall, TapedMicroBatch
from gaccum_exp.audit.watch.taped_window import CouplingError, TapedWindow, sample_readings
from gaccum_exp.core.gradient import Gradient, difference, distance, norm, scaled
from gaccum_exp.core.joined_samples import ASKED, NotJoinableError
from gaccum_exp.memory.available import out_of_memory

AS_REPLAYED = 1e-4
"""How close the loop's gradient is to a multiple of its passes' sum where nothing came in between."""


def judge(seen: Observations, reached: Gradient, modules: NamedModules, dim: int | None) -> Audit:
    """Return the verdict on a window, given the gradient that reached the optimizer.

    It is judged where it ran; on the CPU where that has no memory left or no float64.
    """
    micro_batches = seen.tape.micro_batches()
    checks = other_faults(seen, micro_batches)
    blank = Audit("inconclusive", len(micro_batches), "mean", checks=checks)
    if not micro_batches:
        why = "no backward pass through a loss of this model was seen before the optimizer's step"
        return replace(blank, detail=f"{why}: is the criterion the one that the loop calls?")
    own, host = next(iter(reached.values()), torch.empty(0)).device, torch.device("cpu")
    try:
        try:
            if own.type != "mps":
                return _under_every_reading(seen, reached, modules, dim, blank, own)
        except Exception as error:
            if not out_of_memory(error) or own == host:
                raise
        audit = _under_every_reading(seen, reached, modules, dim, blank, host)
        return audit.noting("run again on the CPU")
    except CouplingError as error:
        blank = replace(blank, cause=result.NOT_ADDITIVE, remedy=REMEDIES[result.NOT_ADDITIVE])
        return replace(blank, detail=f"{error}: give watch the function that computes the whole loss")
    except NotJoinableError as error:
        return replace(blank, detail=str(error))
    except Exception as error:  # the user's loop must go on, whatever happens here
        return replace(blank, detail=f"the window could not be run again: {error_line(error)}")


def _under_every_reading(
    seen: Observations,
    reached: Gradient,
    modules: NamedModules,
    dim: int | None,
    blank: Audit,
    device: torch.device,
) -> Audit:
    """Judge along the dimension that counts samples, where shapes alone leave more than one.

    A dimension in which another order changes the gradient counts time, or pixels, and no samples.
    """
    micro_batches, moving = _since_dropped(seen), seen.tape.moving
    first_values = FirstValues() if moving is None else moving.first_values(_made_of(micro_batches))
    layouts = sample_readings(micro_batches, dim)
    judged: list[tuple[_LoopWindow, Audit]] = []
    refusals: list[Exception] = []
    for layout in layouts:
        try:
            made = TapedWindow(modules, micro_batches, layout, first_values)
            window = _LoopWindow(seen, reached, modules, micro_batches, made, blank, device)
            judged.append((window, _settled(window.audit(), first_values)))
        except Exception as error:  # a model may not take more of what are no samples
            if out_of_memory(error):
                raise
            refusals.append(error)
            continue
        audit = judged[-1][1]
        if audit.sound or not (window.order_matters or audit.cause == result.BATCH_STATISTICS):
            break
    unordered = [audit for window, audit in judged if not window.order_matters]
    if not judged:
        raise refusals[0]
    if len(layouts) == 1 or unordered[:1] == unordered[-1:] != []:
        return unordered[0] if unordered else judged[0][1]
    if not unordered:
        why = f"another order of the samples changes the gradient: {ASKED}"
    elif unordered[-1].verdict in ("identical", "equivalent", "stochastic"):
        why = f"{unordered[0].culprit or 'the model'} mixes what are samples, or time steps: {ASKED}"
    else:
        return unordered[0]
    return replace(blank, verdict="inconclusive", detail=why)


def _made_of(micro_batches: Sequence[TapedMicroBatch]) -> list[TapedCall]:
    """Return the calls that the micro-batches' losses are made of."""
    found: dict[TapedCall, None] = {}
    waiting = [call for m in micro_batches for call in m.losses]
    while waiting:
        call = waiting.pop()
        if call not in found:
            found[call] = None
            waiting += [ref.call for ref in call.refs()]
    return list(found)


def _settled(audit: Audit, first_values: FirstValues) -> Audit:
    """Return the audit; where a state that moved may matter and cannot be replayed, inconclusive."""
    open_questions = first_values.refused
    if not open_questions or audit.verdict not in ("identical", "equivalent", "stochastic"):
        return audit
    said = f"{'; '.join(open_questions)}: move it once per optimizer step"
    return replace(audit, verdict="inconclusive", cause=result.MOVING_STATE, remedy=None, detail=said)


def _since_dropped(seen: Observations) -> list[TapedMicroBatch]:
    """Leave out an epoch's left-over passes whose gradients the loop has zeroed on purpose."""
    micro_batches = seen.tape.micro_batches()
    if len(seen.zeroed) != 1:
        return micro_batches
    kept = [m for m in micro_batches if m.last_backward >= max(seen.zeroed)]
    return kept if len(micro_batches) - len(kept) < len(kept) else micro_batches


class _LoopWindow:
    """One window of a loop, on one device: what reached the optimizer, and its passes run again."""

    def __init__(
        self,
        seen: Observations,
        reached: Gradient,
        modules: NamedModules,
        micro_batches: list[TapedMicroBatch],
        window: TapedWindow,
        blank: Audit,
        device: torch.device,
    ) -> None:
        self._seen, self._modules, self._device = seen, modules, device
        self._micro_batches, self._window = micro_batches, window
        self.order_matters = False
        """Whether another order of the samples changed the gradient."""
        self._loss_scale = seen.loss_scale
        self._reached = self._here(reached)
        at_end = [c for c in seen.clippings[-1:] if c.after_backward == seen.tape.backwards]
        self._clipping = at_end[0] if at_end else None
        before = self._here(self._clipping.before) if self._clipping else {}
        self._observed = before or self._reached
        """The accumulated gradient: what reached the optimizer, before clipping, at the loss's scale."""
        if self._loss_scale != 1:
            self._observed = scaled(self._observed, self._loss_scale)
        self._blank = replace(blank, accum_steps=len(self._micro_batches))
        self._rerun = self._rerun_of(self._window)

    def audit(self) -> Audit:
        observed, loss_scale = self._observed, self._loss_scale
        replayed = self._rerun.gradient(RECORDING)
        factor = multiple(observed, replayed, AS_REPLAYED)
        if factor is not None and abs(factor - 1) < AS_REPLAYED:
            factor = 1.0
        weights = [weight / loss_scale for weight in self._window.weights]
        coefficients, summed = self._coefficients()
        given = [weight * (factor or 1.0) for weight in weights]
        counts, sizes = self._window.counts(), self._window.sizes
        whole_weight = intended_weight(given, counts, sizes) if summed else 1.0
        exact = unrounded(given, [c * whole_weight for c in coefficients or []])
        window = self._window.weighed(
            [weight * loss_scale for weight in exact], whole_weight * loss_scale, coefficients
        )
        blank = self._blank
        if summed:
            counted = math.isclose(whole_weight * sum(counts or map(float, sizes)), 1, rel_tol=1e-5)
            blank = replace(blank, reduction="global_mean" if counted else "sum")
        if factor is not None and factor != 1:
            replayed = scaled(replayed, factor)
        found = diagnose(replace(self._rerun, window=window), replayed, blank, observed)
        audit = self._with_scale(found, whole_weight if summed else None)
        if found.measured is None:
            return audit
        self.order_matters = found.measured.float64.floor > ZERO and not self._rerun.draws.any
        if factor is None and not found.measured.own.agrees:
            fault = self._changed_in_between(audit, replayed)
            if fault is not None:
                return fault
        if (fault := self._changed_after_clipping(audit)) is not None:
            return fault
        if audit.cause == result.UNEQUAL_DENOMINATORS and coefficients:
            if counts is None and len(set(sizes)) == 1:  # then nothing else says how unequal they are
                said = ", ".join(f"{100 * c / sum(coefficients):.3g} %" for c in coefficients[:8])
                what = f"micro-batches make up {said} of what the window counts: use global_mean"
                audit = replace(audit, remedy=what)
        elif audit.cause == result.LOSS_SCALE:
            audit = self._with_factor(audit, weights, factor or 1.0, whole_weight if summed else None)
        # Padding may change what a model computes; where the weights explain all, it has not.
        proven = (result.UNEQUAL_DENOMINATORS, result.LOSS_SCALE, result.STALE_OR_MISSING)
        if audit.verdict == "biased" and audit.cause not in proven and window.padded:
            what = "micro-batches of different lengths were padded to one, which may change what is"
            why = f"{what} computed"
            return replace(audit, verdict="inconclusive", cause=None, remedy=None, detail=why)
        return audit

    def _here(self, gradient: Gradient) -> Gradient:
        return {name: g.to(self._device) for name, g in gradient.items()}

    def _rerun_of(self, window: TapedWindow) -> Rerun:
        moving = self._seen.tape.moving
        around = nullcontext if moving is None else moving.as_at_first
        return Rerun(window, self._device, window.starts, around=around)

    def _coefficients(self) -> tuple[list[float] | None, bool]:
        """Fit the micro gradients' coefficients in the one pass; return whether it is their sum, too."""
        window, alone = self._window, len(self._micro_batches) == 1
        if alone:  # one micro-batch and its double: a sum doubles, a mean does not
            window = window.of(self._micro_batches * 2, [0, 0])
        window = window.weighed([1.0] * len(window.sizes), 1.0)
        rerun = self._rerun_of(window)
        if alone:
            rerun.gradient(RECORDING)
        else:
            rerun = replace(rerun, draws=self._rerun.draws)
        micro = rerun.micro_gradients(ACCUMULATED64, sampled)
        coefficients = fitted_coefficients(micro, sampled(rerun.gradient(ONE_PASS64)))
        if coefficients is None:
            return None, window.sums
        summed = all(abs(coefficient - 1) < 1e-3 for coefficient in coefficients)
        return [1.0] if alone else coefficients, summed

    def _with_scale(self, found: Diagnosis, whole_weight: float | None) -> Audit:
        """Return the audit with the gradient's scale; `whole_weight` None: the loss is a mean."""
        audit = found.audit
        if found.one_pass64 is None or (whole_weight is not None and audit.denominator is None):
            return audit
        along = scale_of(self._observed, found.one_pass64)
        per_mean = 1.0 if whole_weight is None else whole_weight * (audit.denominator or 1.0)
        return replace(audit, scale=None if along is None else along * per_mean)

    def _changed_in_between(self, audit: Audit, replayed: Gradient) -> Audit | None:
        """Find what came in between where the gradient is not what its passes add up to."""
        seen, observed = self._seen, self._observed
        audit = replace(audit, verdict="biased", culprit=None, culprit_type=None, culprits=())
        if seen.at_start:
            extra = difference(observed, replayed)
            left_over = scaled(self._here(seen.at_start), self._loss_scale)
            if multiple(extra, left_over, 1e-2) is not None:
                size = norm(seen.at_start) * self._loss_scale / max(norm(replayed), 1e-300)
                return _stale(
                    audit, "call zero_grad before the window's first backward pass",
                    f"gradients of earlier passes, {size:.2g} × its own, were there at the start",
                )  # fmt: skip
        inside = [c for c in seen.clippings if c.after_backward < seen.tape.backwards]
        if inside:
            return replace(
                audit, cause=result.LOSS_SCALE,
                remedy="clip once, after the window's last backward pass, not after each micro-batch",
                detail=f"gradients were clipped {len(inside)} times before the last backward pass",
            )  # fmt: skip
        if any(k < seen.tape.backwards for k in seen.unscaled):
            return _stale(
                audit, "unscale_ once, after the window's last backward pass",
                "gradients were unscaled inside the window, and later ones added at full scale",
            )  # fmt: skip
        last = max(seen.zeroed, default=math.inf)
        which = [i for i, m in enumerate(self._micro_batches) if m.last_backward >= last]
        kept = [self._micro_batches[i] for i in which]
        if kept:
            since = self._rerun_of(self._window.of(kept, which)).gradient(RECORDING)
            if multiple(observed, since, AS_REPLAYED) is not None:
                every = len(self._micro_batches)
                missing = f"{every - len(kept)} of {every} micro-batches are missing"
                return _stale(
                    audit, "call zero_grad once per optimizer step, not inside the window",
                    f"zero_grad inside the window: {missing}",
                )  # fmt: skip
        if distance(observed, replayed) < 0.1:
            return None  # so close that digits were lost, which has been examined
        if seen.changed:
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

    def _changed_after_clipping(self, audit: Audit) -> Audit | None:
        if self._clipping is None or audit.verdict == "biased":
            return None
        factor = multiple(self._reached, self._here(self._clipping.after), AS_REPLAYED)
        if factor is None or abs(factor - 1) < AS_REPLAYED:
            return None
        twice = self._loss_scale != 1 and math.isclose(factor, 1 / self._loss_scale, rel_tol=1e-3)
        why = "they were unscaled twice" if twice else "scale the loss, not the gradients"
        said = f"gradients were multiplied by {factor:.4g} after clipping: {why}"
        return replace(audit, verdict="biased", cause=result.LOSS_SCALE, remedy=said)

    def _with_factor(
        self, audit: Audit, weights: list[float], factor: float, whole_weight: float | None
    ) -> Audit:
        """Say where a scale comes from; after its last backward pass the gradient was times `factor`."""
        accum_steps = len(weights)
        divisor = common_divisor(weights) if whole_weight is None else None
        total = factor * sum(weights) / (1 if whole_weight is None else whole_weight)
        if self._loss_scale != 1 and math.isclose(factor, 1 / self._loss_scale, rel_tol=1e-3):
            said = f"gradient is {factor:.4g} × the large batch's: it was unscaled twice"
            return replace(audit, remedy=said)
        # A division by a whole number, or a multiplication, is none that clipping makes.
        whole = factor > 1 or math.isclose(1 / factor, round(1 / factor), rel_tol=1e-5)
        if not whole and abs(total / factor - 1) < AS_REPLAYED:
            why = (
                f"gradients were multiplied by {factor:.4g} after the last backward pass by code "
                "not known here; clipping by torch.nn.utils.clip_grad_norm_ would be known"
            )
            return replace(audit, verdict="inconclusive", cause=None, remedy=None, detail=why)
        if factor != 1 or divisor is None:
            return audit
        if accum_steps > divisor > 1:
            why = f"{accum_steps} micro-batches reached this step, each divided by {divisor}"
            said = "call zero_grad where the epoch begins, or take the step on what is left: an earlier"
            return _stale(audit, f"{said} window's gradients were left over", why)
        if accum_steps < divisor:
            said = f"gradient is {total:.4g} × the large batch's: {accum_steps} micro-batches, each"
            what = f"{said} divided by {divisor}: divide by the number in this window"
            return replace(audit, remedy=what)
        return audit


def _stale(audit: Audit, what_to_do: str, why: str) -> Audit:
    return replace(audit, verdict="biased", cause=result.STALE_OR_MISSING, remedy=what_to_do, detail=why)
