"""Judge one window of a loop.

The gradient that reached the optimizer is compared with the one pass; what the loop did on the way (the
weight of each micro-batch, gradients left over, zeroed, clipped or unscaled) is compared with what its
passes, run again, add up to.
"""

import math
from dataclasses import dataclass, replace

import torch

from gaccum_exp.audit import result
from gaccum_exp.audit.causes.loss_weights import (
    alike,
    common_divisor,
    fitted_coefficients,
    intended_weight,
    reached_shares,
    sampled,
    scale_faults,
    snapped,
    unrounded,
)
from gaccum_exp.audit.diagnose import Diagnosis, diagnose, error_line
from gaccum_exp.audit.rerun.passes import ACCUMULATED, ACCUMULATED64, ONE_PASS64, RECORDING, Rerun
from gaccum_exp.audit.rerun.sandbox import NamedModules
from gaccum_exp.audit.result import Audit
from gaccum_exp.audit.verdict import REMEDIES, listed, multiple, scale_of
from gaccum_exp.audit.watch.loop_checks import other_faults
from gaccum_exp.audit.watch.tape import Observations, TapedMicroBatch
from gaccum_exp.audit.watch.taped_window import CouplingError, TapedWindow
from gaccum_exp.core.gradient import Gradient, add, difference, distance, dot, finite, norm, scaled
from gaccum_exp.core.joined_samples import NotJoinableError
from gaccum_exp.memory.available import out_of_memory

WEIGHTS = 4
"""At how many weights shares are fitted, at most."""
ENOUGH = 1000
"""Numbers per micro-batch in a gradient that are enough at one."""
AS_REPLAYED = 1e-4
"""How close the loop's gradient is to a multiple of its passes' sum where nothing came in between."""


def judge(seen: Observations, reached: Gradient, modules: NamedModules, dim: int) -> Audit:
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
                return _LoopWindow(seen, reached, modules, dim, blank, own).audit()
        except Exception as error:
            if not out_of_memory(error) or own == host:
                raise
        audit = _LoopWindow(seen, reached, modules, dim, blank, host).audit()
        return audit.noting("run again on the CPU")
    except CouplingError as error:
        blank = replace(blank, cause=result.NOT_ADDITIVE, remedy=REMEDIES[result.NOT_ADDITIVE])
        return replace(blank, detail=f"{error}: give watch the function that computes the whole loss")
    except NotJoinableError as error:
        return replace(blank, detail=str(error))
    except Exception as error:  # the user's loop must go on, whatever happens here
        return replace(blank, detail=f"the window could not be run again: {error_line(error)}")


@dataclass(frozen=True, slots=True)
class _TermShares:
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

    def said(self) -> str:
        """Return what its micro-batches count, in words."""
        assert self.coefficients is not None
        if self.counts is not None and not alike(self.counts):
            return f"count {listed(self.counts)} in {self.name}"
        if self.counts is None and not alike([float(n) for n in self.sizes if n]):
            return f"hold {listed(self.sizes)} samples in {self.name}"
        total = sum(self.coefficients) or 1.0
        parts = listed([float(f"{100 * c / total:.3g}") for c in self.coefficients])
        return f"make up {parts} % of what the window counts in {self.name}"


class _LoopWindow:
    """One window of a loop, on one device: what reached the optimizer, and its passes run again."""

    def __init__(
        self,
        seen: Observations,
        reached: Gradient,
        modules: NamedModules,
        dim: int,
        blank: Audit,
        device: torch.device,
    ) -> None:
        self._seen, self._modules, self._dim, self._device = seen, modules, dim, device
        self._loss_scale = seen.loss_scale
        self._reached = self._here(reached)
        at_end = [c for c in seen.clippings[-1:] if c.after_backward == seen.tape.backwards]
        self._clipping = at_end[0] if at_end else None
        before = self._here(self._clipping.before) if self._clipping else {}
        self._observed = before or self._reached
        """The accumulated gradient: what reached the optimizer, before clipping, at the loss's scale."""
        if self._loss_scale != 1:
            self._observed = scaled(self._observed, self._loss_scale)
        every = seen.tape.micro_batches()
        self._micro_batches = self._since_dropped(self._since_other_steps(every))
        self._of_others = [m for m in every if m.last_backward < self._micro_batches[0].last_backward]
        """Micro-batches that came before those, of another optimizer's window or an epoch's rest."""
        self._blank = replace(blank, accum_steps=len(self._micro_batches))
        self._window = TapedWindow(modules, self._micro_batches, dim)
        self._rerun = self._rerun_of(self._window)

    def audit(self) -> Audit:
        observed, loss_scale = self._observed, self._loss_scale
        replayed = self._rerun.gradient(RECORDING)
        if (empty := self._without_loss(replayed)) is not None:
            return empty
        factor = multiple(observed, replayed, AS_REPLAYED)
        if factor is not None and abs(factor - 1) < AS_REPLAYED:
            factor = 1.0
        if self._window.computed_by_user:
            self._rerun.gradient(ONE_PASS64)  # which shows what is constant in the user's function
        shares = self._shares(factor or 1.0)
        faults, remark = self._scale_faults(shares)
        micro, whole = [], []
        for term, off in zip(shares, faults, strict=True):
            meant = [c * term.whole_weight for c in term.coefficients or []]
            exact = unrounded(term.weights, meant) if meant else snapped(term.weights)
            micro.append([weight * loss_scale for weight in exact])
            whole.append(term.whole_weight * loss_scale / off)
        window = self._window.weighed(micro, whole, [term.coefficients for term in shares])
        blank, base = self._described(shares, faults[0])
        if factor is not None and factor != 1:
            replayed = scaled(replayed, factor)
        found = diagnose(replace(self._rerun, window=window), replayed, blank, observed)
        audit = self._with_scale(found, base)
        if found.measured is None:
            return audit
        if factor is None and not found.measured.own.agrees:
            fault = self._changed_in_between(audit, replayed)
            if fault is not None:
                return fault
        if (fault := self._changed_after_clipping(audit)) is not None:
            return fault
        if audit.cause == result.UNEQUAL_DENOMINATORS:
            audit = self._with_shares(audit, shares, faults)
        elif audit.cause == result.LOSS_SCALE:
            audit = self._with_factor(audit, shares, factor or 1.0, faults[0])
        elif audit.cause == result.NOT_ADDITIVE and window.coupled:
            names = " and ".join(window.coupled)
            audit = audit.noting(f"it is {names} that couples samples; the other terms do not")
        # Padding may change what a model computes; where the weights explain all, it has not.
        proven = (result.UNEQUAL_DENOMINATORS, result.LOSS_SCALE, result.STALE_OR_MISSING)
        if audit.verdict == "biased" and audit.cause not in proven and window.padded:
            what = "micro-batches of different lengths were padded to one, which may change what is"
            why = f"{what} computed"
            return replace(audit, verdict="inconclusive", cause=None, remedy=None, detail=why)
        return audit.noting(remark) if remark and audit.verdict != "biased" else audit

    def _here(self, gradient: Gradient) -> Gradient:
        return {name: g.to(self._device) for name, g in gradient.items()}

    def _rerun_of(self, window: TapedWindow) -> Rerun:
        return Rerun(window, self._device, window.starts)

    def _since_dropped(self, micro_batches: list[TapedMicroBatch]) -> list[TapedMicroBatch]:
        """Leave out an epoch's left-over passes whose gradients the loop has zeroed on purpose."""
        if len(self._seen.zeroed) != 1:
            return micro_batches
        kept = [m for m in micro_batches if m.last_backward >= max(self._seen.zeroed)]
        return kept if len(micro_batches) - len(kept) < len(kept) else micro_batches

    def _since_other_steps(self, micro_batches: list[TapedMicroBatch]) -> list[TapedMicroBatch]:
        """Leave out passes that another optimizer's step ended, where none like them came later."""
        for step in self._seen.other_steps:
            later = [m for m in micro_batches if m.last_backward >= step]
            earlier = {m.signature for m in micro_batches if m.last_backward < step}
            if later and earlier and not earlier & {m.signature for m in later}:
                micro_batches = later
        return micro_batches

    def _without_loss(self, replayed: Gradient) -> Audit | None:
        """Find micro-batches whose own loss is not a number though others' are: their mean is 0/0."""
        if finite(replayed):
            return None
        pairs = self._rerun.micro_gradients(ACCUMULATED, finite)
        lost = [i + 1 for i, ok in enumerate(pairs) if not ok]
        if not lost or len(lost) == len(pairs) or self._loss_scale != 1:
            return None
        numbers = ", ".join(map(str, lost[:8]))
        one_pass = self._rerun.gradient(replace(ONE_PASS64))
        if not finite(one_pass):
            return None
        return replace(
            self._blank, verdict="biased", cause=result.UNEQUAL_DENOMINATORS,
            detail=f"the gradient of micro-batch {numbers} of {len(pairs)} is not finite, the large batch's is",
            remedy="a micro-batch that counts nothing has no mean (0/0): divide the sum of the losses once "
            "by what the window counts",
        )  # fmt: skip

    def _shares(self, factor: float) -> list[_TermShares]:
        """Find out, term by term, how much each micro-batch counts in the one pass."""
        found = []
        for t, term in enumerate(self._window.terms()):
            column = self._window.column_of(t)
            counts, sizes = self._window.counts_of(column), self._window.sizes_of(column)
            coefficients, summed = self._coefficients(t, counts, sizes)
            weights = [w * factor / self._loss_scale for w in term.weights]
            counting = [i for i, c in enumerate(coefficients or [1.0] * len(weights)) if c]
            own = [weights[i] for i in counting]
            if summed:
                amounts = None if counts is None else [counts[i] for i in counting]
                of_sizes = [sizes[i] for i in counting]
                whole = intended_weight(own, amounts, of_sizes) if any(own) else 0.0
            else:
                whole = self._meant(
                    weights, own, [coefficients[i] for i in counting] if coefficients else []
                )
            found.append(
                _TermShares(term.name, weights, coefficients, summed, whole, term.literal, counts, sizes)
            )
        return found

    @staticmethod
    def _meant(weights: list[float], counting: list[float], shares: list[float]) -> float:
        """Return what a loop of weighed means means the one pass to be multiplied by."""
        ratios = [w / c for w, c in zip(counting, shares, strict=True)] if shares else []
        # Empty micro-batches may be among those that it divides by, or not.
        without, all_of_them = sum(counting), sum(snapped(weights))
        if ratios and alike(ratios):
            means = math.isclose(all_of_them, 1, rel_tol=1e-4) and not math.isclose(without, 1, rel_tol=1e-4)
            return all_of_them if means else ratios[0]
        return without if math.isclose(without, 1, rel_tol=1e-4) else all_of_them

    def _coefficients(
        self, term: int, counts: list[float] | None, sizes: list[int]
    ) -> tuple[list[float] | None, bool]:
        """Fit a term's micro gradients in the one pass; return whether it is their sum, too."""
        window, rerun = self._window, self._rerun
        accum_steps, alone = len(window.sizes), len(self._micro_batches) == 1
        if alone:  # one micro-batch and its double: a sum doubles, a mean does not
            window = TapedWindow(self._modules, self._micro_batches * 2, self._dim)
            rerun = self._rerun_of(window)
            rerun.gradient(RECORDING)
            rerun.gradient(ONE_PASS64)
            counts, sizes, accum_steps = None, sizes * 2, 2
        rerun = replace(rerun, window=window.only(term))
        micro, whole = self._at_several_weights(rerun, accum_steps)
        if not any(float(g.norm()) for g in whole.values()):
            return None, window.sums(window.column_of(term))
        ones, equal = [1.0] * accum_steps, [1 / accum_steps] * accum_steps
        amounts = [c for c in (counts, sizes) if c is not None and sum(c)]
        candidates = [ones, *([n / sum(c) for n in c] for c in amounts), equal]
        coefficients = fitted_coefficients(micro, whole, candidates)
        if coefficients is None:
            return None, window.sums(window.column_of(term))
        counting = [
            c for c, g in zip(coefficients, micro, strict=True) if any(bool(v.any()) for v in g.values())
        ]
        summed = all(abs(c - 1) < 1e-3 for c in counting) and len(counting) > 1
        summed |= len(counting) == 1 and window.sums(window.column_of(term))
        return ([1.0] if alone else coefficients), summed

    def _at_several_weights(
        self, rerun: Rerun, accum_steps: int
    ) -> tuple[list[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
        """Return micro gradients and the one pass's; of few parameters at other weights, too."""
        micro: list[dict[str, torch.Tensor]] = [{} for _ in range(accum_steps)]
        whole: dict[str, torch.Tensor] = {}
        for seed in range(WEIGHTS):
            one_pass = sampled(rerun.gradient(replace(ONE_PASS64, weights_moved=seed)))
            whole |= {f"{seed} {name}": g for name, g in one_pass.items()}
            each = rerun.micro_gradients(replace(ACCUMULATED64, weights_moved=seed), sampled)
            for kept, own in zip(micro, each, strict=True):
                kept |= {f"{seed} {name}": g for name, g in own.items()}
            if sum(g.numel() for g in one_pass.values()) >= ENOUGH * accum_steps:
                break
        return micro, whole

    def _scale_faults(self, shares: list[_TermShares]) -> tuple[list[float], str | None]:
        """Return the factors by which the terms are off, and a remark on what is taken as given."""
        accum_steps = len(self._micro_batches)
        means = [term for term in shares if not term.summed]
        totals = [term.whole_weight / term.literal for term in means]
        faults, remark = scale_faults(totals, accum_steps), None
        if faults is None:
            faults, total = [1.0] * len(means), sum(totals)
            weights = [w / means[0].literal for w in means[0].weights]
            tried = [weights, [total], [1 / total]] if total > 0 else []
            divisor = next((by for each in tried if (by := common_divisor(each))), None)
            if len(means) == 1 and divisor is not None and self._window.constants_outside:
                faults = [total]
            else:
                said = f"the loop multiplies the loss by {total:.4g} in all"
                remark = f"{said}, which is taken as given"
        of_means = iter(faults)
        return [1.0 if term.summed else next(of_means) for term in shares], remark

    def _described(self, shares: list[_TermShares], off: float) -> tuple[Audit, float | None]:
        """Return the blank audit with its reduction, and by what a term's scale is to be multiplied."""
        blank, first = self._blank, shares[0]
        if all(term.summed for term in shares):
            amounts = first.counts or [float(n) for n in first.sizes]
            counted = math.isclose(first.whole_weight * sum(amounts), 1, rel_tol=1e-5)
            blank = replace(blank, reduction="global_mean" if counted else "sum")
            return blank, first.whole_weight if len(shares) == 1 else 1.0
        inside = self._window.literal_inside(0)
        return blank, None if len(shares) > 1 else first.whole_weight / off / inside

    def _with_scale(self, found: Diagnosis, base: float | None) -> Audit:
        """Return the audit with the gradient's scale; `base` None: the one pass is the mean's."""
        audit = found.audit
        summed = audit.reduction in ("global_mean", "sum")
        if found.one_pass64 is None or (summed and audit.denominator is None):
            return audit
        along = scale_of(self._observed, found.one_pass64)
        per_mean = (1.0 if base is None else base) * ((audit.denominator or 1.0) if summed else 1.0)
        return replace(audit, scale=None if along is None else along * per_mean)

    def _with_shares(self, audit: Audit, shares: list[_TermShares], faults: list[float]) -> Audit:
        """Say which term's micro-batches count unequally, or which is scaled otherwise than the others."""
        unequal = [term for term in shares if term.unequal]
        if not unequal:
            scaled_by = [(t.name, off) for t, off in zip(shares, faults, strict=True) if off != 1]
            if not scaled_by or len(shares) < 2:
                return audit
            said = ", ".join(f"{name} is {off:.4g} × the large batch's" for name, off in scaled_by)
            what = f"{said}: divide it as the other terms"
            return replace(audit, cause=result.LOSS_SCALE, remedy=what)
        said = "; ".join(term.said() for term in unequal[:3])
        if len(shares) == 1:
            said = said.removesuffix(f" in {shares[0].name}")
            where = " in their loss" if said.startswith("count ") else ""
            return replace(audit, remedy=f"micro-batches {said}{where}: use global_mean")
        what = "divide each term's sum once by what the window counts for it"
        return replace(audit, remedy=f"micro-batches {said}: {what}")

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
        if self._of_others and self._with_others() is not None:
            return _stale(
                audit, "call zero_grad before the window's first backward pass",
                f"gradients of {len(self._of_others)} passes for another optimizer, which stepped after "
                "them, are among it",
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
        missing = self._some_missing(audit, replayed)
        if missing is not None:
            return missing
        if distance(observed, replayed) < 0.1:
            return None  # so close that digits were lost, which has been examined
        if seen.changed:
            return _stale(
                audit, "leave .grad alone until the window's last backward pass",
                "something changed the gradients between the window's passes",
            )  # fmt: skip
        along = dot(observed, replayed) / max(norm(observed) * norm(replayed), 1e-300)
        last = self._here(seen.accumulated.get(seen.tape.backwards, {}))
        right = last and distance(scaled(last, self._loss_scale), replayed) < AS_REPLAYED
        if right and abs(along) < 0.1:
            return _stale(
                audit, "leave .grad alone after the window's last backward pass",
                f"the gradients were replaced after it (cosine with what the passes gave: {along:.2g})",
            )  # fmt: skip
        why = (
            "the gradient is not the sum of what its micro-batches' losses give: a part comes from "
            "elsewhere, or was changed before the step. Ruled out: gradients left over, zeroed, clipped "
            "or unscaled inside the window, and micro-batches that are missing"
        )
        if right:
            why = (
                "the loop changed the gradients between the last backward pass and the step, by none of "
                f"torch's ways to clip (cosine with what the passes gave: {along:.3g})"
            )
        return replace(audit, verdict="inconclusive", cause=result.UNKNOWN, detail=why, remedy=None)

    def _with_others(self) -> float | None:
        both = [*self._of_others, *self._micro_batches]
        total: Gradient = {}
        for micro_batch in both:
            window = TapedWindow(self._modules, [micro_batch], self._dim)
            add(total, self._rerun_of(window).gradient(RECORDING))
        return multiple(self._observed, total, AS_REPLAYED)

    def _some_missing(self, audit: Audit, replayed: Gradient) -> Audit | None:
        """Find out whether parameters or micro-batches are missing in the gradient."""
        seen, observed, accum_steps = self._seen, self._observed, len(self._micro_batches)
        if norm(observed) == 0:
            what = "the gradient that reached the optimizer is zero"
            return _stale(audit, "step before zero_grad, once per window", what)
        lost = [n for n, g in replayed.items() if norm({n: g}) > 0 and not _nonzero(observed.get(n))]
        kept = {n: g for n, g in replayed.items() if n not in lost}
        if lost and kept and distance(observed, kept) < AS_REPLAYED * 10:
            names = ", ".join(lost[:4]) + (" …" if len(lost) > 4 else "")
            never = not any(n in of for of in seen.accumulated.values() for n in lost)
            if never:
                why = (
                    f"{names} got no gradient in any pass of the loop, though the loss depends on it: a "
                    "checkpoint with use_reentrant=True whose inputs need none, or a detach?"
                )
                return _stale(audit, "use checkpoint(..., use_reentrant=False)", why)
            return _stale(
                audit, "leave .grad alone until the step", f"{names} lost its gradient before it"
            )
        micro = self._rerun.micro_gradients(ACCUMULATED, sampled)
        reached = reached_shares(micro, sampled(observed))
        if reached is None:
            return None
        gone = [i for i, share in enumerate(reached) if share == 0]
        if gone:
            last = max(seen.zeroed, default=math.inf)
            since = [i for i, m in enumerate(self._micro_batches) if m.last_backward >= last]
            by_zeroing = since == [i for i in range(accum_steps) if i not in gone]
            missing = f"{len(gone)} of {accum_steps} micro-batches are missing"
            if by_zeroing:
                what = "call zero_grad once per optimizer step, not inside the window"
                return _stale(audit, what, f"zero_grad inside the window: {missing}")
            there = ", ".join(str(i + 1) for i in range(accum_steps) if i not in gone)
            what = "step on the gradients of all its micro-batches: add each backward pass to .grad"
            return _stale(audit, what, f"{missing} in what reached the optimizer: only {there} is there")
        if alike(reached):
            return None
        return _stale(
            audit, "leave .grad alone until the window's last backward pass",
            f"the micro-batches' gradients reached the optimizer times {listed(reached)}",
        )  # fmt: skip

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

    def _with_factor(self, audit: Audit, shares: list[_TermShares], factor: float, off: float) -> Audit:
        """Say where a scale comes from; after its last backward pass the gradient was times `factor`."""
        weights = [w / factor for w in shares[0].weights]
        accum_steps, summed = len(weights), shares[0].summed
        empty = [i for i, c in enumerate(shares[0].coefficients or []) if c == 0]
        if empty and math.isclose(audit.scale or 0.0, 1 - len(empty) / accum_steps, rel_tol=1e-4):
            what = f"{len(empty)} of {accum_steps} micro-batches count nothing, and have a share"
            said = f"{what}: use global_mean"
            return replace(audit, cause=result.UNEQUAL_DENOMINATORS, remedy=said)
        divisor = common_divisor([w / shares[0].literal for w in weights]) if not summed else None
        total = off
        if self._loss_scale != 1 and math.isclose(factor, 1 / self._loss_scale, rel_tol=1e-3):
            said = f"gradient is {factor:.4g} × the large batch's: it was unscaled twice"
            return replace(audit, remedy=said)
        # A division by a whole number, or a multiplication, is none that clipping makes.
        whole = factor > 1 or math.isclose(1 / factor, round(1 / factor), rel_tol=1e-5)
        if not whole:
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


def _nonzero(gradient: torch.Tensor | None) -> bool:
    return gradient is not None and bool(gradient.any())


def _stale(audit: Audit, what_to_do: str, why: str) -> Audit:
    return replace(audit, verdict="biased", cause=result.STALE_OR_MISSING, remedy=what_to_do, detail=why)
