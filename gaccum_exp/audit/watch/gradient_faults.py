"""What came between a window's backward passes and its step, where the gradient is not their sum."""

import math
from dataclasses import dataclass, replace

from torch import Tensor

from gaccum_exp.audit import result
from gaccum_exp.audit.causes.loss_weights import alike, reached_shares, sampled
from gaccum_exp.audit.rerun.passes import ACCUMULATED, RECORDING, Rerun
from gaccum_exp.audit.rerun.random_replay import Draws
from gaccum_exp.audit.result import Audit
from gaccum_exp.audit.verdict import listed, multiple
from gaccum_exp.audit.watch.changed_gradient import Change, change_between
from gaccum_exp.audit.watch.tape import Clipping, Observations, TapedMicroBatch
from gaccum_exp.audit.watch.taped_window import TapedWindow, sample_readings
from gaccum_exp.core.gradient import Gradient, add, difference, distance, dot, norm, scaled
from gaccum_exp.core.seeding import same_states

AS_REPLAYED = 1e-4
"""How close the loop's gradient is to a multiple of its passes' sum where nothing came in between."""
MOST = 3
"""Faults of one window's gradient, at most."""


@dataclass(frozen=True, slots=True)
class GradientOfLoop:
    """The gradient that a loop accumulated, and what it is to be explained by."""

    seen: Observations
    observed: Gradient
    """At the loss's scale, before clipping."""
    at_start: Gradient
    """Gradients that were there before the window, at the loss's scale."""
    at_last_backward: Gradient
    """Those right after the last backward pass, likewise."""
    micro_batches: list[TapedMicroBatch]
    of_others: list[TapedMicroBatch]
    """Micro-batches that came before those, of another optimizer's window or an epoch's rest."""
    rerun: Rerun
    """Of the window."""

    def faults(self, audit: Audit, replayed: Gradient) -> list[Audit]:
        """Find all that came in between where the gradient is not what its passes add up to.

        Each is undone by what was kept of it, to see whether another one is left.
        """
        found: list[Audit] = []
        gradient: GradientOfLoop | None = self
        while gradient is not None and len(found) < MOST:
            if found and multiple(gradient.observed, replayed, AS_REPLAYED) is not None:
                break
            fault = gradient.fault(audit, replayed)
            if fault is None or (found and fault.verdict != "biased"):
                break
            mended = gradient._mended(fault, left_over=gradient.left_over(replayed))
            without = replayed if mended is None else mended.observed
            moves = distance(gradient.observed, without) if norm(without) else None
            found.append(replace(fault, moves=moves))
            gradient = mended
        return found

    @property
    def drawn(self) -> bool:
        """Whether random numbers were drawn between the last backward pass and the step."""
        return all(self.seen.states) and not same_states(*self.seen.states)

    def change(self, replayed: Gradient) -> Change | None:
        """Return what was done to the gradient after the last pass; None: it was not the passes' sum."""
        last = {n: g for n, g in self.at_last_backward.items() if n in self.observed}
        if not last or distance(last, replayed) > AS_REPLAYED:
            return None
        weights, scale = self.rerun.window.modules.parameters(), 1 / self.seen.loss_scale
        found = change_between(
            scaled(last, scale), scaled(self.observed, scale), weights, len(self.micro_batches),
            drawn=self.drawn,
        )  # fmt: skip
        if found is None or found.drawn:
            return found
        # What a loop adds up by itself may count its micro-batches otherwise.
        micro = self.rerun.micro_gradients(ACCUMULATED, sampled)
        return found if reached_shares(micro, sampled(self.observed)) is None else None

    def _mended(self, fault: Audit, *, left_over: bool) -> "GradientOfLoop | None":
        """Return what it would have been without a fault; None: that is not known."""
        if left_over:
            observed = difference(self.observed, self.at_start)
            return replace(self, seen=replace(self.seen, at_start={}), observed=observed)
        inside = self._clippings()
        if fault.cause != result.LOSS_SCALE or not inside:
            return None
        observed = scaled(self.observed, 1.0)
        for clipping in inside:
            scale = 1.0 if clipping.at_loss_scale else self.seen.loss_scale
            taken = scaled(difference(clipping.before, clipping.after), scale)
            add(observed, {n: g.to(observed[n].device) for n, g in taken.items() if n in observed})
        others = [c for c in self.seen.clippings if not any(c is each for each in inside)]
        return replace(self, seen=replace(self.seen, clippings=others), observed=observed)

    def _clippings(self) -> list[Clipping]:
        """Return those inside the window that changed its gradients."""
        return [c for c in self.seen.clippings_inside if c.binds]

    def fault(self, audit: Audit, replayed: Gradient) -> Audit | None:
        """Find what came in between first, if anything."""
        seen, observed, at = self.seen, self.observed, self.seen.places.at
        audit = replace(audit, verdict="biased", culprit=None, culprit_type=None, culprits=())
        if self.left_over(replayed):
            return self.stale_from_before(audit, replayed)
        if self.of_others and self._with_others() is not None:
            return stale(
                audit, f"call zero_grad before the window's first backward pass{at('backward')}",
                f"gradients of {len(self.of_others)} passes for another optimizer, which stepped after "
                "them, are among it",
            )  # fmt: skip
        inside = self._clippings()
        if inside:
            return replace(
                audit, cause=result.LOSS_SCALE,
                remedy="clip once, after the window's last backward pass, not after each micro-batch"
                f"{at('clip')}",
                detail=f"gradients were clipped {len(inside)} time{'s' * (len(inside) > 1)} before the "
                "last backward pass; the float64 run is of the passes alone, without that",
            )  # fmt: skip
        if any(k < seen.tape.backwards for k in seen.unscaled):
            return stale(
                audit, f"unscale_ once, after the window's last backward pass{at('unscale_')}",
                "gradients were unscaled inside the window, and later ones added at full scale",
            )  # fmt: skip
        missing = self._some_missing(audit, replayed)
        if missing is not None:
            return missing
        if distance(observed, replayed) < 0.1:
            return None  # so close that digits were lost, which has been examined
        if seen.changed:
            return stale(
                audit, f"leave .grad alone until the window's last backward pass{at('backward')}",
                "something changed the gradients between the window's passes",
            )  # fmt: skip
        along = dot(observed, replayed) / max(norm(observed) * norm(replayed), 1e-300)
        last = self.at_last_backward
        right = bool(last) and distance(last, replayed) < AS_REPLAYED
        if right and abs(along) < 0.1:
            return stale(
                audit, f"leave .grad alone after the window's last backward pass{at('backward')}",
                f"the gradients were replaced after it (cosine with what the passes gave: {along:.2g})",
            )  # fmt: skip
        why = (
            "the gradient is not the sum of what its micro-batches' losses give: a part comes from "
            "elsewhere, or was changed before the step. Ruled out: gradients left over, zeroed, clipped "
            "or unscaled inside the window, and micro-batches that are missing"
        )
        return replace(audit, verdict="inconclusive", cause=result.UNKNOWN, detail=why, remedy=None)

    def left_over(self, replayed: Gradient) -> bool:
        """Whether the gradient holds a part that was there before the window's first pass."""
        own, left = norm(replayed), norm(self.at_start)
        if not self.seen.at_start or not own or not left:
            return False
        # observed = α × replayed + β × left over, by the normal equations.
        cosine = dot(replayed, self.at_start) / (own * left)
        if 1 - cosine**2 < 1e-6:
            return multiple(self.observed, replayed, AS_REPLAYED) not in (None, 1.0)
        a, b = dot(self.observed, replayed) / own, dot(self.observed, self.at_start) / left
        beta = (b - a * cosine) / (1 - cosine**2)
        alpha = a - beta * cosine
        parts = scaled(replayed, alpha / own), scaled(self.at_start, beta / left)
        rest = difference(difference(self.observed, parts[0]), parts[1])
        return norm(rest) <= 1e-2 * norm(self.observed) and abs(beta) > 1e-2 * abs(alpha)

    def stale_from_before(self, audit: Audit, replayed: Gradient) -> Audit:
        """Return the audit of a window that began with gradients of earlier passes."""
        if self.seen.passes_unseen:
            why = (
                "gradients of passes that called no module were there before the first one was called: "
                "give watch the model and the optimizer, and they are seen"
            )
            return replace(audit, verdict="inconclusive", cause=result.UNKNOWN, detail=why, remedy=None)
        size = norm(self.at_start) / max(norm(replayed), 1e-300)
        return stale(
            audit,
            f"call zero_grad before the window's first backward pass{self.seen.places.at('backward')}",
            f"gradients of earlier passes, {size:.2g} × its own, were there at the start",
        )  # fmt: skip

    def _some_losses_missing(self, audit: Audit) -> Audit | None:
        """Find out whether some of the micro-batches' several losses are missing."""
        window = self.rerun.window
        assert isinstance(window, TapedWindow)
        terms = window.terms()
        columns: list[tuple[tuple[int, int], dict[str, Tensor]]] = []
        for t, term in enumerate(terms):
            alone = replace(self.rerun, window=window.only(t))
            for i, gradient in enumerate(alone.micro_gradients(ACCUMULATED, sampled)):
                columns.append(((i, t), {n: g * term.weights[i] for n, g in gradient.items()}))
        columns.sort(key=lambda column: column[0])
        reached = reached_shares([g for _, g in columns], sampled(self.observed))
        if len(terms) < 2 or reached is None or 0 not in reached:
            return None
        gone = sum(share == 0 for share in reached)
        return stale(
            audit,
            "call zero_grad once per optimizer step, not inside the window"
            f"{self.seen.places.at('zero_grad')}",
            f"the gradients of {gone} of the window's {len(reached)} losses are missing",
        )  # fmt: skip

    def _with_others(self) -> float | None:
        total: Gradient = {}
        for micro_batch in [*self.of_others, *self.micro_batches]:
            layout = sample_readings([micro_batch], None)[0]
            window = TapedWindow(self.rerun.window.modules, [micro_batch], layout)
            rerun = replace(self.rerun, window=window, starts=window.starts, draws=Draws())
            add(total, rerun.gradient(RECORDING))
        return multiple(self.observed, total, AS_REPLAYED)

    def _some_missing(self, audit: Audit, replayed: Gradient) -> Audit | None:
        """Find out whether parameters or micro-batches are missing in the gradient."""
        seen, observed, accum_steps = self.seen, self.observed, len(self.micro_batches)
        at = seen.places.at
        if norm(observed) == 0:
            what = "the gradient that reached the optimizer is zero"
            order = f"step{at('step')} before zero_grad{at('zero_grad')}, once per window"
            return stale(audit, order, what)
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
                return stale(audit, "use checkpoint(..., use_reentrant=False)", why)
            return stale(
                audit, "leave .grad alone until the step", f"{names} lost its gradient before it"
            )
        micro = self.rerun.micro_gradients(ACCUMULATED, sampled)
        reached = reached_shares(micro, sampled(observed))
        if reached is None:
            return self._some_losses_missing(audit)
        gone = [i for i, share in enumerate(reached) if share == 0]
        if gone and not seen.changed:
            last = max(seen.zeroed, default=math.inf)
            since = [i for i, m in enumerate(self.micro_batches) if m.last_backward >= last]
            by_zeroing = since == [i for i in range(accum_steps) if i not in gone]
            missing = f"{len(gone)} of {accum_steps} micro-batches are missing"
            if by_zeroing:
                what = "call zero_grad once per optimizer step, not inside the window" + at("zero_grad")
                return stale(audit, what, f"zero_grad inside the window: {missing}")
            there = ", ".join(str(i + 1) for i in range(accum_steps) if i not in gone)
            what = "step on the gradients of all its micro-batches: add each backward pass to .grad"
            if gone == list(range(len(gone))) and len(gone) < accum_steps - 1:
                what = (
                    "call zero_grad once per optimizer step, and not between a forward and its backward"
                    + at("zero_grad")
                )
            return stale(audit, what, f"{missing} in what reached the optimizer: only {there} is there")
        if alike(reached):
            return None
        return stale(
            audit, "leave .grad alone until the window's last backward pass",
            f"the micro-batches' gradients reached the optimizer times {listed(reached)}",
        )  # fmt: skip


def stale(audit: Audit, what_to_do: str, why: str) -> Audit:
    """Return the audit of a window whose gradients are stale or missing."""
    return replace(audit, verdict="biased", cause=result.STALE_OR_MISSING, remedy=what_to_do, detail=why)


def _nonzero(gradient: Tensor | None) -> bool:
    return gradient is not None and bool(gradient.any())
