"""Judge one window of a loop.

The gradient that reached the optimizer is compared with the one pass; what the loop did on the way (the
weight of each micro-batch, gradients left over, zeroed, clipped or unscaled) is compared with what its
passes, run again, add up to.
"""

import math
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch

from gaccum_exp.audit import result
from gaccum_exp.audit.causes.loss_weights import alike, snapped, unrounded
from gaccum_exp.audit.causes.padding import difference_by_padding
from gaccum_exp.audit.diagnose import (
    NOT_FINITE,
    SAME64,
    ZERO,
    ZERO_BUT_FOR_ROUNDING,
    ZERO_GRADIENT,
    Diagnosis,
    diagnose,
    error_line,
    of_factor,
)
from gaccum_exp.audit.rerun.passes import (
    ACCUMULATED,
    ACCUMULATED64,
    ONE_PASS64,
    RECORDING,
    Rerun,
)
from gaccum_exp.audit.rerun.sandbox import NamedModules
from gaccum_exp.audit.result import Audit, ordered
from gaccum_exp.audit.several_causes import Judged, causes_of_passes
from gaccum_exp.audit.verdict import (
    DIVIDE_ONCE,
    REMEDIES,
    listed,
    multiple,
    scale_of,
)
from gaccum_exp.audit.watch.changed_gradient import Change, change_between
from gaccum_exp.audit.watch.divisions import ScaleFaults, faults_of
from gaccum_exp.audit.watch.drawn_weights import drawn
from gaccum_exp.audit.watch.first_values import FirstValues, Replay, connect
from gaccum_exp.audit.watch.gradient_faults import AS_REPLAYED, GradientOfLoop, stale
from gaccum_exp.audit.watch.kept_features import KeptFeatures, UnknownLossError
from gaccum_exp.audit.watch.loop_checks import other_faults
from gaccum_exp.audit.watch.places import said
from gaccum_exp.audit.watch.tape import (
    Observations,
    TapedMicroBatch,
    gradient_asked_for,
    gradient_by_weights,
    ignored_label,
    made_of,
)
from gaccum_exp.audit.watch.taped_window import (
    CouplingError,
    TapedWindow,
    corresponding,
    sample_readings,
)
from gaccum_exp.audit.watch.term_shares import TermShares, shares_of
from gaccum_exp.audit.watch.whole_loss import function_of_loss
from gaccum_exp.audit.watch.window_noise import AskedNoise
from gaccum_exp.core.gradient import Gradient, distance, finite, identical, scaled
from gaccum_exp.core.joined_samples import NotJoinableError
from gaccum_exp.core.seeding import same_states
from gaccum_exp.memory.available import out_of_memory

NOTHING_COUNTS = (
    "all labels of the window are ignored, so that nothing counts and there is no gradient to compare: "
    "audit another window"
)
OF_ITS_OWN = (
    "the loss holds the gradient of another one, which is no sample's own: take that of a sum over "
    "samples, for that of a mean shrinks as the batch grows"
)
LEFT_OVER = (
    "call zero_grad where the epoch begins, or take the step on what is left: an earlier window's "
    "gradients were left over"
)
ASKED = "say which dimension of the model's inputs counts samples, by batch_dim="


def judge(
    seen: Observations,
    reached: Gradient,
    modules: NamedModules,
    dim: int | None,
    noise: AskedNoise | None = None,
) -> Audit:
    """Return the verdict on a window, given the gradient that reached the optimizer.

    It is judged where it ran; on the CPU where that has no memory left or no float64. `noise` takes what
    a window that could be run again tells of its noise, or why it tells none.
    """
    blank, host = Audit("inconclusive", 0, "mean"), torch.device("cpu")
    try:
        micro_batches = seen.tape.micro_batches()
        checks = other_faults(seen, micro_batches)
        blank = Audit("inconclusive", len(micro_batches), "mean", checks=checks)
        if not micro_batches:
            why = "no backward pass through a loss of this model was seen before the optimizer's step"
            return replace(blank, detail=f"{why}: is the criterion the one that the loop calls?")
        own = next(iter(reached.values()), torch.empty(0)).device
        try:
            if own.type != "mps":
                return _under_every_reading(seen, reached, modules, dim, blank, own, noise)
        except Exception as error:
            if not out_of_memory(error) or own == host:
                raise
        audit = _under_every_reading(seen, reached, modules, dim, blank, host, noise)
        return audit.noting("run again on the CPU")
    except CouplingError as error:
        blank = replace(blank, cause=result.NOT_ADDITIVE, remedy=REMEDIES[result.NOT_ADDITIVE])
        seen.loss_function = function_of_loss(seen.tape.micro_batches())
        name = getattr(seen.loss_function, "__qualname__", None)
        said = "give watch the function that computes the whole loss" + (f", {name}" if name else "")
        return replace(blank, detail=f"{error}: {said}")
    except UnknownLossError as error:
        return replace(blank, detail=str(error))
    except NotJoinableError as error:
        return replace(blank, detail=str(error) if dim is not None else f"{error}; or {ASKED}")
    except Exception as error:  # the user's loop must go on, whatever happens here
        if any(call.function in (torch.autograd.grad, gradient_by_weights) for call in seen.tape.calls):
            why = "the loop takes a gradient by the weights for its loss, e.g. for a penalty on it"
            said = f"{why}: give watch the function that computes the whole loss"
            return replace(blank, detail=said)
        return replace(blank, detail=f"the window could not be run again: {error_line(error)}")


def _under_every_reading(
    seen: Observations,
    reached: Gradient,
    modules: NamedModules,
    dim: int | None,
    blank: Audit,
    device: torch.device,
    noise: AskedNoise | None,
) -> Audit:
    """Judge along the dimension that counts samples, where shapes alone leave more than one.

    A dimension in which another order changes the gradient counts time, or pixels, and no samples.
    """
    every = seen.tape.micro_batches()
    micro_batches = _since_dropped(seen, _since_other_steps(seen, every))
    moving = seen.tape.moving
    if moving is not None:
        connect(micro_batches, moving)
    kept = KeptFeatures(micro_batches)
    micro_batches = kept.with_surrogates(seen.tape)
    moved = FirstValues()
    if moving is not None and micro_batches:
        ends = sorted(m.last_backward for m in every)
        replay = Replay(moving, ends, micro_batches[0].last_backward)
        moved = replay.first_values(list(made_of([x for m in micro_batches for x in m.losses])))
    layouts = sample_readings(micro_batches, dim, moved)
    if any(ignored_label(loss) is None for m in micro_batches[:1] for loss in m.losses):
        layouts += [layout.with_labels_last(least=2) for layout in layouts if layout.padded]
    if moving is not None and micro_batches:
        columns = [
            c
            for of in ("models", "losses")
            for c in corresponding([getattr(m, of) for m in micro_batches])
        ]
        replay.made_again(columns, layouts[0].sizes, layouts[0].dim, moved)
    judged: list[tuple[_LoopWindow, Audit]] = []
    refusals: list[Exception] = []
    with_shared = set[int]()
    for sharing in (True, False):
        # A vector of class weights may be as long as a micro-batch: what is given alike to all is shared
        # first, and is each one's own where that does not run.
        readings = [layout for layout in layouts if sharing or id(layout) in with_shared]
        if readings:
            refusals.clear()
        for layout in readings:
            # What integers are padded with is no matter where padding was none.
            if layout.labels_last and not (refusals or any(w.padding_matters for w, _ in judged)):
                continue
            try:
                taped = TapedWindow(modules, micro_batches, layout, moved, kept, sharing=sharing)
                if taped.shares:
                    with_shared.add(id(layout))
                window = _LoopWindow(seen, reached, every, micro_batches, taped, blank, device)
                audit = _settled(window.audit(), moved)
                for given in dict.fromkeys(moved.given if audit.sound else []):
                    audit = audit.noting(given)
                judged.append((window, audit))
            except Exception as error:  # a model may not take more of what are no samples
                if out_of_memory(error):
                    raise
                refusals.append(error)
                continue
            audit = judged[-1][1]
            doubtful = window.order_matters or window.padding_matters
            if audit.sound or not (doubtful or audit.cause == result.BATCH_STATISTICS):
                break
        if judged:
            break
    if not judged:
        raise refusals[0]
    seen.shares = any(window.shares for window, _ in judged)
    audit = _chosen(judged, len(layouts), blank)
    if noise is not None:
        for window in (window for window, of_window in judged if of_window is audit):
            window.tell_noise(audit, noise)
    return audit


def _chosen(judged: "list[tuple[_LoopWindow, Audit]]", readings: int, blank: Audit) -> Audit:
    """Return the verdict of several readings, each with its own."""
    in_any_order = [(window, audit) for window, audit in judged if not window.order_matters]
    padded = [audit for window, audit in in_any_order if window.padding_matters]
    unordered = [audit for window, audit in in_any_order if not window.padding_matters]
    if padded and all(audit.cause == result.BATCH_STATISTICS for audit in unordered):
        return padded[0]  # that a module mixes what are perhaps time steps is no verdict then
    if readings == 1 or unordered[:1] == unordered[-1:] != []:
        audit = unordered[0] if unordered else judged[0][1]
        weighed = (None, result.UNEQUAL_DENOMINATORS, result.LOSS_SCALE, result.STALE_OR_MISSING)
        if unordered or audit.cause in weighed:
            return audit
        why = "one pass's gradient depends on the order of its samples: does it take an index of them?"
        return replace(blank, verdict="inconclusive", detail=why)
    if not unordered:
        why = f"another order of the samples changes the gradient: {ASKED}"
    elif unordered[-1].verdict in ("identical", "equivalent", "stochastic"):
        why = f"{unordered[0].culprit or 'the model'} mixes what are samples, or time steps: {ASKED}"
    else:
        return unordered[0]
    return replace(blank, verdict="inconclusive", detail=why)


def _settled(audit: Audit, moved: FirstValues) -> Audit:
    """Return the audit; where a state that moved may matter and cannot be replayed, inconclusive."""
    if moved.not_again and audit.verdict in ("identical", "equivalent", "stochastic"):
        said = "; ".join(moved.not_again)
        return replace(audit, verdict="inconclusive", cause=result.UNKNOWN, remedy=None, detail=said)
    if moved.drew and audit.verdict in ("identical", "equivalent"):
        first = moved.drew[0]
        what = (
            f"random numbers are drawn in every pass, beside the model (in {first.said}): compare "
            "averages over seeds, or call eval() on it"
        )
        return replace(
            audit, verdict="stochastic", cause=first.cause, culprit=first.name,
            culprit_type=first.type, culprits=tuple(moved.drew), remedy=what,
        )  # fmt: skip
    explained = audit.verdict == "biased" and audit.cause not in (result.NOT_ADDITIVE, result.UNKNOWN)
    if not moved.refused or explained:
        return audit
    said = f"{'; '.join(moved.refused)}: move it once per optimizer step"
    return replace(audit, verdict="inconclusive", cause=result.MOVING_STATE, remedy=None, detail=said)


def _since_dropped(seen: Observations, micro_batches: list[TapedMicroBatch]) -> list[TapedMicroBatch]:
    """Leave out an epoch's left-over passes whose gradients the loop has zeroed on purpose."""
    if len(seen.zeroed) != 1:
        return micro_batches
    kept = [m for m in micro_batches if m.last_backward >= max(seen.zeroed)]
    return kept if len(micro_batches) - len(kept) < len(kept) else micro_batches


def _since_other_steps(
    seen: Observations, micro_batches: list[TapedMicroBatch]
) -> list[TapedMicroBatch]:
    """Leave out another optimizer's passes: those through its modules, and those before its step.

    Where all are such passes, as of a decoder behind an encoder, they are this optimizer's, too.
    """
    own = [m for m in micro_batches if not any(call.fed for call in m.models)]
    if seen.other_steps and own:
        micro_batches = own
    for step in seen.other_steps:
        later = [m for m in micro_batches if m.last_backward >= step]
        earlier = {m.signature for m in micro_batches if m.last_backward < step}
        if later and earlier and not earlier & {m.signature for m in later}:
            micro_batches = later
    return micro_batches


def _with_change(audit: Audit, change: Change) -> Audit:
    """Return the audit of a gradient that the loop changed after the last backward pass."""
    if change.what is None:
        if audit.verdict == "biased":
            return audit.noting(change.said)
        audit = replace(
            audit, detail=f"{change.said}. Up to there it is the sum of what the passes gave"
        )
        return replace(
            audit, verdict="inconclusive", cause=result.UNKNOWN, remedy=None, moves=change.size
        )
    audit = audit.noting(f"{change.said}, as it would change the large batch's")
    if not change.drawn or audit.verdict not in ("identical", "equivalent"):
        return audit
    said = "random numbers are added to the whole gradient: compare averages over seeds"
    return replace(audit, verdict="stochastic", cause=result.RANDOMNESS, remedy=said)


def _noting(audit: Audit, faults: ScaleFaults) -> Audit:
    """Add what is taken as given; leave the verdict open where a term's scale is in doubt."""
    if faults.doubt and audit.verdict in ("identical", "equivalent", "stochastic"):
        return replace(
            audit, verdict="inconclusive", cause=result.LOSS_SCALE, remedy=None, detail=faults.doubt
        )
    return audit.noting(faults.remark) if faults.remark else audit


@dataclass(frozen=True, slots=True)
class _Passes:
    """A window's passes, judged."""

    audit: Audit
    found: Diagnosis
    rerun: Rerun
    """Of the window with the loop's own weights."""
    weighed: Rerun
    """Of the window with the weights that it was judged by."""
    shares: list[TermShares]
    faults: ScaleFaults
    observed: Gradient


class _LoopWindow:
    """One window of a loop, on one device: what reached the optimizer, and its passes run again."""

    def __init__(
        self,
        seen: Observations,
        reached: Gradient,
        every: list[TapedMicroBatch],
        micro_batches: list[TapedMicroBatch],
        window: TapedWindow,
        blank: Audit,
        device: torch.device,
    ) -> None:
        self._seen, self._device, self._micro_batches = seen, device, micro_batches
        self.order_matters = False
        """Whether another order of the samples changed the gradient."""
        self.padding_matters = False
        """Whether padding a micro-batch to the longest changed its gradient."""
        self._loss_scale = seen.loss_scale
        self._reached = self._here(reached)
        at_end = [c for c in seen.clippings[-1:] if c.after_backward == seen.tape.backwards]
        self._clipping = at_end[0] if at_end else None
        before = self._here(self._clipping.before) if self._clipping else {}
        self._observed = before or self._reached
        """The accumulated gradient: what reached the optimizer, before clipping, at the loss's scale."""
        if self._loss_scale != 1 and not (before and at_end[0].at_loss_scale):
            self._observed = scaled(self._observed, self._loss_scale)
        self._of_others = [m for m in every if m.last_backward < self._micro_batches[0].last_backward]
        """Micro-batches that came before those, of another optimizer's window or an epoch's rest."""
        self._blank = replace(blank, accum_steps=len(self._micro_batches))
        self._window, self.shares = window, window.shares
        self._rerun = self._rerun_of(self._window)
        self._shares: list[TermShares] = []

    def audit(self) -> Audit:
        """Return the verdict, with every cause: what came between the passes, and what they show."""
        replayed = self._rerun.gradient(RECORDING)
        if (empty := self._without_loss(replayed)) is not None:
            return empty
        if any(p._backward_hooks for p in self._window.modules.parameters().values()):
            bare = replace(self._rerun, hooks=False)
            unhooked = bare.gradient(ACCUMULATED)
            if multiple(replayed, unhooked, AS_REPLAYED) is not None:
                # They scale the whole gradient, which is the loop's doing and no model's.
                self._rerun, replayed = bare, unhooked
        factor = multiple(self._observed, replayed, AS_REPLAYED)
        change = self._gradient().change(replayed) if factor is None else self._change_after_clipping()
        if factor is None and change is not None and change.what is not None:
            self._observed, factor = self._gradient().at_last_backward, 1.0
        if factor is not None and abs(factor - 1) < AS_REPLAYED:
            factor = 1.0
        passes = self._judged(self._rerun, replayed, self._observed, factor)
        audit = self._of_passes(passes, replayed, factor)
        return audit if change is None else _with_change(audit, change)

    def _of_passes(self, passes: "_Passes", replayed: Gradient, factor: float | None) -> Audit:
        """Return the verdict on passes and on what came between them and the step."""
        self._shares, measured = passes.shares, passes.found.measured
        if measured is None:
            return self._counting_nothing(passes)
        moved = measured.float64.floor > ZERO and not self._rerun.draws.any
        self.order_matters = moved and passes.audit.detail != ZERO_BUT_FOR_ROUNDING
        of_loop = self._of_loop(passes, replayed, factor)
        if of_loop and of_loop[-1].verdict != "biased":
            return of_loop[-1]
        # What a factor hides of the weights is not known where gradients were left over.
        shown = not of_loop or (measured.same_function is False and factor in (None, 1.0))
        audit = self._named(passes, factor or 1.0) if shown else of_loop[0]
        findings = [finding for fault in of_loop for finding in fault.findings]
        if shown and audit.verdict == "biased":
            findings += causes_of_passes(Judged(audit, passes.found, passes.weighed), self._again)
        if not findings:
            return _noting(audit, passes.faults)
        first = replace((of_loop or [audit])[0], culprits=passes.audit.culprits)
        return first.led_by(passes.found.completed(ordered(findings)))

    def _counting_nothing(self, passes: "_Passes") -> Audit:
        """Return an audit without numbers, with the reason if all labels of the window are ignored."""
        counts = [n for term in passes.shares for n in (term.counts or [math.nan])]
        if passes.audit.detail not in (ZERO_GRADIENT, NOT_FINITE) or any(counts):
            return passes.audit
        return replace(passes.audit, detail=NOTHING_COUNTS)

    def _again(self, undone: Rerun) -> Judged:
        """Judge the passes where a cause of theirs was taken away, whatever came between them."""
        rerun = replace(undone, window=self._window.holding(None) if undone.held else self._window)
        replayed = rerun.gradient(ACCUMULATED)
        passes = self._judged(rerun, replayed, replayed, 1.0)
        return Judged(self._named(passes, 1.0), passes.found, passes.weighed)

    def _judged(
        self, rerun: Rerun, replayed: Gradient, observed: Gradient, factor: float | None
    ) -> "_Passes":
        """Diagnose the window by its passes; `observed` is `factor` times what they give, if it is."""
        loss_scale, own = self._loss_scale, self._window
        if own.computed_by_user:
            rerun.gradient(ONE_PASS64)  # which shows what is constant in the user's function
        shares = shares_of(own, rerun, (factor or 1.0) / loss_scale)
        faults = faults_of(
            [term.scaling for term in shares],
            len(self._micro_batches),
            constants_outside=own.constants_outside,
            rescaled=factor not in (None, 1.0),
        )
        micro, whole = [], []
        for term, off in zip(shares, faults.factors, strict=True):
            pairs = zip(term.coefficients or [], term.weights, strict=False)
            meant = [c * term.whole_weight if c else weight for c, weight in pairs]
            exact = unrounded(term.weights, meant) if meant else snapped(term.weights)
            micro.append([weight * loss_scale for weight in exact])
            whole.append(term.whole_weight * loss_scale / off)
        assert isinstance(rerun.window, TapedWindow)
        window = rerun.window.weighed(micro, whole, [term.coefficients for term in shares])
        weighed = replace(rerun, window=window)
        blank, base = self._described(shares, faults.factors[0])
        if factor is not None and factor != 1:
            replayed = scaled(replayed, factor)
        found = diagnose(weighed, replayed, blank, observed)
        audit = self._with_scale(found, base, observed)
        return _Passes(audit, found, rerun, weighed, shares, faults, observed)

    def _of_loop(self, passes: "_Passes", replayed: Gradient, factor: float | None) -> list[Audit]:
        """Return what came between the passes, and between the last of them and the step."""
        audit, measured = passes.audit, passes.found.measured
        assert measured is not None
        found: list[Audit] = []
        if factor is None and not measured.own.agrees:
            found = self._gradient().faults(audit, replayed)
        elif audit.verdict == "biased" and factor != 1 and self._gradient().left_over(replayed):
            found = [self._gradient().stale_from_before(audit, replayed)]
        if all(fault.verdict == "biased" for fault in found):
            found += filter(None, [self._changed_after_clipping(audit)])
        return found

    def _named(self, passes: "_Passes", factor: float) -> Audit:
        """Return the audit of passes, its cause named as closely as the loop's own numbers allow."""
        audit, found, shares, window = passes.audit, passes.found, passes.shares, passes.weighed.window
        assert isinstance(window, TapedWindow)
        if audit.cause == result.UNKNOWN and found.one_pass64 is not None:
            audit = self._without_hooks(audit, passes.weighed)
        if audit.cause == result.UNKNOWN and found.one_pass64 is not None:
            audit = self._with_multiples(audit, found.one_pass64, passes.observed)
        if audit.cause == result.UNKNOWN and audit.verdict == "biased" and self._takes_gradients():
            audit = replace(audit, cause=result.NOT_ADDITIVE, remedy=OF_ITS_OWN, detail=None)
        if audit.cause == result.UNEQUAL_DENOMINATORS:
            audit = self._with_shares(audit, passes)
        elif audit.cause == result.LOSS_SCALE:
            audit = self._with_factor(audit, shares, factor, passes.faults)
        elif audit.cause == result.NOT_ADDITIVE and window.coupled:
            names = " and ".join(dict.fromkeys(window.coupled))
            others = "; the other terms do not" if len(window.coupled) < len(shares) else ""
            audit = audit.noting(f"it is {names} that couples samples{others}")
        # Modules that mix padded samples, and what went wrong between passes, are no matter of padding.
        proven = (result.BATCH_STATISTICS, result.STALE_OR_MISSING, result.MOVING_STATE)
        weighed = (result.UNEQUAL_DENOMINATORS, result.LOSS_SCALE)
        why = None
        if audit.cause not in proven:
            why = difference_by_padding(passes.rerun)
            as_it_is = not (passes.rerun.frozen or passes.rerun.held)
            self.padding_matters |= as_it_is and why is not None
        if why is None and audit.verdict == "biased" and audit.cause not in (*proven[1:], *weighed):
            why = next(
                (
                    f"tensors of shapes {shapes} were taken for samples of their own, which may be "
                    "wrong: if they are none, give one tensor to all"
                    for shapes in window.guessed
                ),
                None,
            )
        if why:
            return replace(audit, verdict="inconclusive", cause=None, remedy=None, detail=why)
        if audit.verdict != "biased":
            return audit
        lines = [(finding, self._line_of(finding.cause)) for finding in audit.findings]
        return audit.led_by(
            [replace(of, remedy=f"{of.remedy}{line}") if of.remedy else of for of, line in lines]
        )

    def _takes_gradients(self) -> bool:
        losses = [loss for m in self._micro_batches for loss in m.losses]
        return any(call.function is gradient_asked_for for call in made_of(losses))

    def _line_of(self, cause: str) -> str:
        """Return where in the source the loss or its backward pass is, if a remedy is about it."""
        if cause in (result.UNEQUAL_DENOMINATORS, result.LOSS_SCALE):
            what, line = "the backward pass", self._seen.places.line("backward")
        elif cause == result.NOT_ADDITIVE and self._seen.places.line("backward"):
            places = (loss.place for m in self._micro_batches for loss in m.losses)
            what, line = "the loss", said(dict.fromkeys(filter(None, places)))
        else:
            return ""
        return f" ({what}: {line})" if line else ""

    def tell_noise(self, audit: Audit, asked: AskedNoise) -> None:
        """Tell the noise of the window, after its audit."""
        asked.of_window(audit, self._window, self._rerun, self._shares)

    def _here(self, gradient: Gradient) -> Gradient:
        return {name: g.to(self._device) for name, g in gradient.items()}

    def _rerun_of(self, window: TapedWindow) -> Rerun:
        moving = self._seen.tape.moving
        around = nullcontext if moving is None else moving.as_at_first
        return Rerun(window, self._device, window.starts, around=around)

    def _gradient(self) -> GradientOfLoop:
        seen, scale = self._seen, self._loss_scale
        at_start, last = seen.at_start, seen.accumulated.get(seen.tape.backwards, {})
        return GradientOfLoop(
            seen, self._observed, scaled(self._here(at_start), scale), self._here(last),
            self._micro_batches, self._of_others, self._rerun,
        )  # fmt: skip

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
            detail=f"the gradient of micro-batch {numbers} of {len(pairs)} is not finite, the large "
            "batch's is",
            remedy="a micro-batch that counts nothing has no mean (0/0): divide the sum of the losses "
            "once by what the window counts",
        )  # fmt: skip

    def _described(self, shares: list[TermShares], off: float) -> tuple[Audit, float | None]:
        """Return the blank audit with its reduction, and by what a term's scale is to be multiplied."""
        blank, first = self._blank, shares[0]
        if all(term.summed for term in shares):
            amounts = first.counts or [float(n) for n in first.sizes]
            counted = math.isclose(first.whole_weight * sum(amounts), 1, rel_tol=1e-5)
            blank = replace(blank, reduction="global_mean" if counted else "sum")
            return blank, first.whole_weight if len(shares) == 1 else 1.0
        inside = self._window.literal_inside(0)
        return blank, None if len(shares) > 1 else first.whole_weight / off / inside

    def _with_scale(self, found: Diagnosis, base: float | None, observed: Gradient) -> Audit:
        """Return the audit with the gradient's scale; `base` None: the one pass is the mean's."""
        audit = found.audit
        summed = audit.reduction in ("global_mean", "sum")
        if found.one_pass64 is None or (summed and audit.denominator is None):
            return audit
        along = scale_of(observed, found.one_pass64)
        per_mean = (1.0 if base is None else base) * ((audit.denominator or 1.0) if summed else 1.0)
        return replace(audit, scale=None if along is None else along * per_mean)

    def _with_shares(self, audit: Audit, passes: "_Passes") -> Audit:
        """Say which term's micro-batches count unequally, or which is scaled unlike the others."""
        shares, faults = passes.shares, passes.faults
        unequal = [term for term in shares if term.unequal]
        if not unequal:
            return self._with_terms_scaled(audit, passes) if len(shares) > 1 else audit
        if all(term.weight_changes for term in unequal) and not any(term.summed for term in unequal):
            numbers = "; ".join(
                f"{listed([w * len(t.weights) for w in t.weights])} in {t.name}" for t in unequal[:3]
            )
            what = f"a weight of the loss changes from micro-batch to micro-batch ({numbers})"
            if self._draws_between():
                return self._of_drawn_weights(audit, what, passes)
            remedy = f"{what}: change it once per optimizer step"
            return replace(audit, cause=result.MOVING_STATE, remedy=remedy)
        mixing = self._window.moved.mixing
        if mixing and not any(t.makes_up_all for t in unequal):
            return replace(audit, cause=mixing[0].culprit.cause, remedy=mixing[0].remedy)
        counted = "; ".join(term.said() for term in unequal[:3])
        offs = {t.name: off for t, off in zip(shares, faults.factors, strict=True) if off != 1}
        if offs:
            audit = self._with_factors(audit, passes, offs)
        if len(shares) == 1:
            counted = counted.removesuffix(f" in {shares[0].name}")
            where = " in their loss" if counted.startswith("count ") else ""
            return replace(audit, remedy=f"micro-batches {counted}{where}: {DIVIDE_ONCE}")
        what = "divide each term's sum once by what the window counts for it"
        return replace(audit, remedy=f"micro-batches {counted}: {what}")

    def _with_terms_scaled(self, audit: Audit, passes: "_Passes") -> Audit:
        """Say which terms are scaled otherwise than the large batch's, and whether unlike the others."""
        faults, names = passes.faults, dict[float, list[str]]()
        right: list[TermShares] = []
        for term, off in zip(passes.shares, faults.factors, strict=True):
            by = off * (term.multiple or 1.0)
            if math.isclose(by, 1, rel_tol=1e-4):
                right.append(term)
            else:
                same = next((other for other in names if math.isclose(other, by, rel_tol=1e-4)), by)
                names.setdefault(same, []).append(term.name)
        if not names:
            return audit
        others = not all(term.summed for term in right)
        said = [
            f"of {' and '.join(dict.fromkeys(of))} the {faults.remedy(by, others=others)}"
            for by, of in names.items()
        ]
        if right and not others:
            sums = ", ".join(dict.fromkeys(term.name for term in right))
            audit = audit.noting(f"the sum in {sums} is taken as it is")
        if all(map(faults.left_over, names)):
            return stale(audit, LEFT_OVER, faults.reached())
        return replace(audit, cause=result.LOSS_SCALE, remedy="; ".join(said))

    def _with_factors(self, audit: Audit, passes: "_Passes", offs: dict[str, float]) -> Audit:
        """Return the audit with the factors by which terms are off beside what they count."""
        found, n, every = passes.found, audit.accum_steps, passes.faults.alike
        besides = [
            replace(
                of_factor(off, n),
                moves=abs(off - 1) if every else None,
                remedy=f"{'' if every else f'of {name} the '}{passes.faults.remedy(off)}",
            )
            for name, off in ([*offs.items()][:1] if every else offs.items())
        ]
        factor = next(iter(offs.values())) if every else None
        if factor is None or found.accumulated64 is None or found.one_pass64 is None:
            return replace(audit, besides=tuple(besides))
        alone = distance(found.accumulated64, found.one_pass64, factor) / factor
        return replace(audit, besides=tuple(besides), moves=alone)

    def _draws_between(self) -> bool:
        """Whether random numbers are drawn between the passes: beside those of the passes themselves."""
        starts, ends = self._window.starts, self._rerun.ends
        return any(not same_states(ends[i], start) for i, start in enumerate(starts[1:]))

    def _of_drawn_weights(self, audit: Audit, what: str, passes: "_Passes") -> Audit:
        """Judge weights that may be drawn: those of several terms that add up alike, as mixup's do, are
        where the same draw gives them again."""
        shares, faults = passes.shares, passes.faults
        if faults.alike and faults.factors[0] != 1:
            said = faults.remedy(faults.factors[0])
            return replace(audit, cause=result.LOSS_SCALE, remedy=said)
        totals = [sum(each) for each in zip(*(t.weights for t in shares), strict=True)]
        fractions = [w / total for w, total in zip(shares[0].weights, totals, strict=True) if total]
        together = len(shares) > 1 and alike(totals) and len(fractions) == len(totals)
        if together and drawn(fractions[1:], [self._rerun.ends[i] for i in range(len(fractions) - 1)]):
            said = f"{what}, as random numbers are drawn between them: compare averages over seeds"
            return replace(
                audit, verdict="stochastic", cause=result.RANDOMNESS, e64=None, e=None, remedy=said
            )
        why = (
            f"{what}, and random numbers are drawn between them, which do not show whether it is: drawn "
            "itself, as mixup's is, it is a part of the data and no fault; else change it once per "
            "optimizer step"
        )
        return replace(audit, verdict="inconclusive", cause=result.RANDOMNESS, remedy=None, detail=why)

    def _change_after_clipping(self) -> Change | None:
        """Return what the loop did to the clipped gradient before its step."""
        clipping = self._clipping
        if clipping is None or clipping.at_loss_scale:
            return None
        weights = self._window.modules.parameters()
        found = {n: g for n, g in self._here(clipping.after).items() if n in self._reached}
        return change_between(
            found, self._reached, weights, len(self._micro_batches), drawn=self._gradient().drawn
        )

    def _changed_after_clipping(self, audit: Audit) -> Audit | None:
        if self._clipping is None:
            return None
        clipping, scale = self._clipping, self._loss_scale
        scaled_by_loop = replace(
            audit, verdict="biased", cause=result.LOSS_SCALE,
            culprit=None, culprit_type=None, detail=None,
        )  # fmt: skip
        factor = multiple(self._reached, self._here(clipping.after), AS_REPLAYED)
        if clipping.at_loss_scale:
            if identical(clipping.before, clipping.after):
                return None
            what = (
                f"gradients were clipped at the loss's scale, {scale:g} × as large as they are: call "
                f"unscale_ of the GradScaler before clipping{self._seen.places.at('clip')}"
            )
            moves = distance(clipping.after, clipping.before)
            return replace(scaled_by_loop, remedy=what, moves=moves)
        if factor is None or abs(factor - 1) < AS_REPLAYED:
            return None
        twice = scale != 1 and math.isclose(factor, 1 / scale, rel_tol=1e-3)
        why = "they were unscaled twice" if twice else "scale the loss, not the gradients"
        what = f"gradients were multiplied by {factor:.4g} after clipping: {why}"
        return replace(scaled_by_loop, remedy=what, moves=abs(factor - 1))

    def _without_hooks(self, audit: Audit, rerun: Rerun) -> Audit:
        """Blame the hooks on parameters where the gradient is the large batch's without them."""
        parameters = self._window.modules.parameters().items()
        hooked = [name for name, parameter in parameters if parameter._backward_hooks]
        bare = replace(rerun, hooks=False)
        if not hooked or distance(bare.gradient(ACCUMULATED64), bare.gradient(ONE_PASS64)) > SAME64:
            return audit
        names = ", ".join(hooked[:4]) + (" …" if len(hooked) > 4 else "")
        said = (
            f"hooks change the gradient of each micro-batch by itself ({names}), and do not just scale "
            "it: change .grad once, after the window's last backward pass"
        )
        return replace(audit, verdict="biased", cause=result.LOSS_SCALE, remedy=said, detail=None)

    def _with_multiples(self, audit: Audit, one_pass64: Gradient, observed: Gradient) -> Audit:
        """Say where each parameter's gradient is another multiple of the large batch's."""
        found: dict[float, list[str]] = {}
        for name, gradient in one_pass64.items():
            own = {name: observed.get(name, torch.zeros_like(gradient))}
            by = multiple(own, {name: gradient}, AS_REPLAYED) if bool(gradient.any()) else 1.0
            if by is None:
                return audit
            by = next((known for known in found if math.isclose(known, by, rel_tol=1e-3)), by)
            found.setdefault(by, []).append(name)
        off = {by: names for by, names in found.items() if not math.isclose(by, 1, rel_tol=1e-3)}
        if not off or len(found) < 2:
            return audit
        if self._window.shares_scalars:
            named = ", ".join([name for names in off.values() for name in names][:3])
            why = (
                f"the loop computes with {named} beside the features, and what of that was detached on "
                "purpose is not seen: freeze it for the window that is judged"
            )
            return replace(audit, verdict="inconclusive", cause=None, remedy=None, detail=why)
        said = "; ".join(
            f"{by:.4g} × the large batch's at {', '.join(names[:3])}"
            + (" and others" * (len(names) > 3))
            for by, names in off.items()
        )
        why = "what all samples share gets its gradient from every micro-batch's loss"
        remedy = f"gradient is {said}: {why}, so give it from one, or divide it"
        return replace(audit, cause=result.LOSS_SCALE, remedy=remedy)

    def _with_factor(
        self, audit: Audit, shares: list[TermShares], factor: float, faults: ScaleFaults
    ) -> Audit:
        """Say where a scale comes from; after its last backward pass the gradient was times `factor`."""
        accum_steps, off = len(shares[0].weights), faults.factors[0]
        empty = [i for i, c in enumerate(shares[0].coefficients or []) if c == 0]
        if empty and math.isclose(audit.scale or 0.0, 1 - len(empty) / accum_steps, rel_tol=1e-4):
            what = f"{len(empty)} of {accum_steps} micro-batches count nothing, and have a share"
            said = f"{what}: {DIVIDE_ONCE}"
            return replace(audit, cause=result.UNEQUAL_DENOMINATORS, remedy=said)
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
        if factor != 1 or not faults.of_division(off):
            return audit
        if faults.left_over(off):
            return stale(audit, LEFT_OVER, faults.reached())
        return replace(audit, remedy=faults.remedy(off))
