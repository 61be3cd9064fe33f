"""Diagnose one window: run the experiments on it, in the order in which they rule causes out."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import nn

from gaccum_exp.audit import result
from gaccum_exp.audit.agreement import (
    IN_FLOAT64,
    IN_OWN_PRECISION,
    NEVER_ROUNDING64,
    Agreement,
)
from gaccum_exp.audit.causes.batch_mixing import ForwardRuns, compare_forward
from gaccum_exp.audit.rerun.passes import (
    ACCUMULATED,
    ACCUMULATED64,
    ONE_PASS,
    ONE_PASS64,
    Rerun,
)
from gaccum_exp.audit.rerun.random_replay import Draws
from gaccum_exp.audit.result import Audit, Culprit, Finding, Mixing
from gaccum_exp.audit.verdict import (
    REMEDIES,
    Measured,
    hidden_difference,
    multiple,
    of_each_type,
    parameter_errors,
    remedy_of,
    remedy_of_counts,
    remedy_of_factor,
    verdict_of,
)
from gaccum_exp.core.gradient import (
    Deviation,
    Gradient,
    coarse,
    deviation,
    distance,
    finite,
    identical,
    norm,
)
from gaccum_exp.memory.available import out_of_memory

ORDERS = 3
"""Summation orders of the one pass that the rounding floor is taken from."""
ZERO = 1e-6
"""Relative: a gradient that another order of the samples moves so far in float64 is rounding alone."""
NOTHING = 1e-9
"""The norm of a float64 gradient that may be rounding alone."""
ROUNDING_ONLY = 0.5
"""The same in the window's own precision."""
SAME64 = 1e-9
"""Relative distance of two float64 gradients that should be equal."""
NOT_FINITE = "the gradient is not finite"
ZERO_GRADIENT = "the large batch's gradient is zero: audit at other weights or on another window"
ZERO_BUT_FOR_ROUNDING = "the large batch's gradient is zero but for rounding: audit at other weights"
DIFFERING = (
    "micro-batches were called with different values of {names}, on which the gradient depends, and one "
    "pass has one value: give it for each sample, as a tensor, or one to a window"
)
NOT_FINITE_IN_FLOAT64 = "run again in float64, the gradient is not finite"


class Deviations(NamedTuple):
    """How far gradients of the window lie apart, by parameter."""

    own: Deviation
    """The accumulated one from that of one pass, in the run's precision."""
    moved: tuple[Deviation, ...]
    """That of one pass in the run's precision: from itself other orders, and itself from float64."""
    own64: Deviation
    """As `own`, in float64."""
    moved64: Deviation
    """The one pass in another order, in float64."""


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """What the runs of a window gave."""

    audit: Audit
    """Verdict and cause as far as the window itself, run again, shows them."""
    measured: Measured | None = None
    deviations: Deviations | None = None
    one_pass64: Gradient | None = None
    accumulated64: Gradient | None = None
    left: str | None = None
    """What is left once all causes are removed, if anything: a clause behind the last remedy."""
    undone: Rerun | None = None
    """Runs in which the cause is taken away, where it can be."""
    differs: bool = False
    """Whether they still differ from their large batch."""

    def completed(self, findings: Sequence[Finding]) -> list[Finding]:
        """Return the causes, the last one's remedy in full; what names one closer has worded it anew."""
        *others, last = findings
        if self.left is None:
            return [*findings]
        return [*others, replace(last, remedy=f"{last.remedy or 'that settled'}; {self.left}")]


@dataclass(frozen=True, slots=True)
class _Runs:
    """A window's gradients, in its own precision and in float64, and its forward passes in float64."""

    accumulated: Gradient
    """The one that is judged."""
    replayed: Gradient
    """The sum of its passes, run again."""
    one_pass: Gradient
    accumulated64: Gradient
    one_pass64: Gradient
    forward: ForwardRuns


class _State(NamedTuple):
    """A state that may be held, to see whether the gradient is the large batch's then."""

    culprit: Culprit | Mixing
    modules: list[nn.Module]
    owners: list[Any]


def diagnose(
    rerun: Rerun, replayed: Gradient, blank: Audit, observed: Gradient | None = None
) -> Diagnosis:
    """Judge a window of two micro-batches or more.

    Args:
        rerun: the runs of the window.
        replayed: the gradient of its recording pass.
        blank: what is known of the audit before: inconclusive so far.
        observed: the accumulated gradient, where it is another than the replayed.
    """
    one_pass = rerun.gradient(ONE_PASS, held=2)
    if rerun.draws.shared:
        replayed = rerun.gradient(ACCUMULATED)
    accumulated = replayed if observed is None else observed
    if not finite(accumulated) or not finite(one_pass):
        return Diagnosis(replace(blank, detail=NOT_FINITE))
    if norm(one_pass) == 0:
        return Diagnosis(replace(blank, detail=ZERO_GRADIENT))
    generator, samples = torch.Generator().manual_seed(0), sum(rerun.window.sizes)
    orders = [torch.randperm(samples, generator=generator) for _ in range(ORDERS)]
    moved = [deviation(rerun.gradient(replace(ONE_PASS, order=o)), one_pass) for o in orders]
    floor, own = max(of.distance for of in moved), deviation(accumulated, one_pass)
    e, errors = own.distance, parameter_errors(own)
    blank = replace(blank, e=e, floor=floor, parameters=errors)
    try:
        one_pass64 = rerun.gradient(ONE_PASS64, held=2)
        accumulated64 = rerun.gradient(ACCUMULATED64)
        if not finite(accumulated64) or not finite(one_pass64):
            return Diagnosis(replace(blank, detail=NOT_FINITE_IN_FLOAT64))
        same = rerun.window.with_first_values()
        if same is not None:
            with_first = replace(rerun, window=same).gradient(ACCUMULATED64)
            if distance(with_first, accumulated64) > SAME64:
                said = DIFFERING.format(names=", ".join(same.differing))
                return Diagnosis(replace(blank, detail=said))
        permuted = rerun.gradient(replace(ONE_PASS64, order=orders[-1]))
        moved64 = deviation(permuted, one_pass64)
        del permuted  # of a large model a third gradient may not fit beside what comes next
        forward = compare_forward(rerun, ACCUMULATED64)
    except Exception as error:  # a user's model may fail in a precision that it was not written for
        if out_of_memory(error):
            raise
        return Diagnosis(replace(blank, detail=f"it does not run in float64: {error_line(error)}"))
    own64, digits = deviation(accumulated64, one_pass64), deviation(one_pass, one_pass64)
    errors64 = parameter_errors(own64)
    measured = Measured(
        identical(accumulated, one_pass),
        own=Agreement(e, max(floor, digits.distance), IN_OWN_PRECISION),
        float64=Agreement(own64.distance, moved64.distance, IN_FLOAT64),
        hidden64=hidden_difference(errors64, parameter_errors(moved64)),
    )
    denominator = forward.whole[1]
    audit = replace(
        blank,
        e64=measured.float64.error,
        floor=measured.own.floor,
        denominator=denominator if math.isfinite(denominator) else None,
        parameters=errors if measured.same_function else errors64,
    )
    runs = _Runs(accumulated, replayed, one_pass, accumulated64, one_pass64, forward)
    audit, left = _explained(rerun, measured, runs, audit), None
    undone = _undone(rerun, audit)
    differs = undone is not None and _differs(undone)
    if rerun.draws.any:
        who = of_each_type(_drawing(rerun)) or "numbers are drawn outside of the modules"
        left = f"what then differs is chance, no fault ({who})"
    by_layer = Deviations(own, (*moved, digits), own64, moved64)
    return Diagnosis(audit, measured, by_layer, one_pass64, accumulated64, left, undone, differs)


def _undone(rerun: Rerun, audit: Audit) -> Rerun | None:
    """Return the runs without the cause, as far as it can be taken away."""
    modules = rerun.window.modules
    if audit.verdict != "biased":
        return None
    if audit.cause == result.BATCH_STATISTICS:
        # All of these types: behind one that mixes, others cannot be seen to.
        kinds = {c.type for c in audit.culprits if c.cause == audit.cause}
        frozen = [m for m in modules if type(m).__name__ in kinds and m.training]
        known = {id(module) for module in rerun.frozen}
        frozen = [module for module in frozen if id(module) not in known]
        return replace(rerun, frozen=(*rerun.frozen, *frozen)) if frozen else None
    if audit.cause == result.MOVING_STATE and not rerun.held:
        return replace(rerun, window=rerun.window.holding(None), held=list(modules))
    return None


def _differs(rerun: Rerun) -> bool:
    """Whether the gradients of N passes and of one differ, beyond rounding in float64."""
    try:
        one_pass = rerun.gradient(ONE_PASS64, held=3)
        apart = distance(rerun.gradient(ACCUMULATED64), one_pass)
    except Exception:  # more than fits, or a model that does not run frozen: the first cause stands
        return False
    return norm(one_pass) > 0 and not apart <= NEVER_ROUNDING64


def of_factor(factor: float, accum_steps: int) -> Finding:
    """Return the cause that a gradient is a multiple of the large batch's, beside another cause."""
    said = remedy_of_factor(factor, accum_steps)
    return Finding(result.LOSS_SCALE, None, None, said, None, moves=abs(factor - 1))


def error_line(error: Exception) -> str:
    """Return an error's type and the first line of its message."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def _explained(rerun: Rerun, measured: Measured, runs: _Runs, audit: Audit) -> Audit:
    """Find the cause by experiments; the verdict follows from the numbers and from what was drawn."""
    draws, mixing = rerun.draws, runs.forward.mixing
    drew = _drawing(rerun)
    rounding_only = measured.float64.floor > ZERO or measured.own.floor > ROUNDING_ONLY
    if rounding_only and not mixing and not draws.any:
        why = ZERO_BUT_FOR_ROUNDING
        small = norm(runs.one_pass64) / max(norm(runs.one_pass), 1e-300)
        by_order = measured.float64.floor > ZERO and small > ROUNDING_ONLY
        if by_order and norm(runs.one_pass64) > NOTHING:
            why = (
                "another order of the samples changes the gradient: an argument may point to others of "
                "its batch (nodes of a graph, an index, a permutation), which are not joined"
            )
        return replace(audit, detail=why)
    if draws.any and not measured.same_function and measured.float64.floor > ZERO:
        draws.refuse("drawn numbers do not follow the samples into another order")
    if draws.not_replayed and (unequal := _under_own_draws(rerun, audit)) is not None:
        return _still_drawing(unequal, drew)
    verdict = verdict_of(measured, draws.any)
    if verdict in ("identical", "equivalent"):
        return replace(audit, verdict=verdict)
    if measured.same_function and not measured.own.agrees and not draws.not_replayed:
        audit = _rounded(rerun, measured, runs, audit)
        if audit.verdict != "stochastic":
            return audit
    if verdict == "stochastic":
        why = "; ".join(draws.not_replayed)
        audit = replace(audit, verdict=verdict, cause=result.RANDOMNESS, detail=why or None)
        return _blaming(rerun, audit, drew)
    if distance(rerun.gradient(ONE_PASS64), runs.one_pass64) > NEVER_ROUNDING64:
        draws.refuse("the same pass, run twice, differs", foreign=True)
    if draws.not_replayed:  # else the comparison with the same draws has decided
        constant = replace(ACCUMULATED64, draws="constant")
        one_pass = rerun.gradient(replace(ONE_PASS64, draws="constant"))
        e64 = distance(rerun.gradient(constant), one_pass)
        mixing = compare_forward(rerun, constant).mixing
        if e64 <= NEVER_ROUNDING64 and norm(one_pass) > 0:
            why = "; ".join([*draws.not_replayed, "with every draw a constant it is equivalent"])
            audit = replace(audit, verdict="stochastic", cause=result.RANDOMNESS, e64=e64, detail=why)
            return _blaming(rerun, audit, drew)
        if draws.foreign or norm(one_pass) == 0:
            return _unsettled(rerun, audit, drew)
    audit = replace(audit, verdict="biased")
    blamed = _of_the_weights(rerun, runs, audit)
    if blamed is not None:
        return _still_drawing(blamed, drew)
    if mixing:
        mixers = [_culprit(rerun, name, result.BATCH_STATISTICS) for name in mixing]
        return _still_drawing(_blaming(rerun, audit, mixers), drew)
    if draws.foreign:  # integers may be the numbers of other samples
        return _unsettled(rerun, audit, drew)
    moving = _moving_state(rerun, runs)
    if isinstance(moving, Mixing):
        blamed = replace(_blaming(rerun, audit, [moving.culprit]), remedy=moving.remedy)
        return _still_drawing(blamed, drew)
    if moving is not None:
        times = rerun.window.moves.get(moving.type) or len(rerun.window.sizes)
        said = (
            f"{moving.said} has a state that moves {times} times in the "
            "window, and the large batch meets its first: move it once per optimizer step"
        )
        blamed = replace(_blaming(rerun, audit, [moving]), remedy=said)
        return _still_drawing(blamed, drew)
    return _still_drawing(_of_the_loss(rerun, runs, audit), drew)


def _unsettled(rerun: Rerun, audit: Audit, drew: Sequence[Culprit]) -> Audit:
    why = "; ".join([*rerun.draws.not_replayed, "without these numbers it could be settled"])
    audit = replace(audit, verdict="inconclusive", cause=result.RANDOMNESS, detail=why)
    return _blaming(rerun, audit, drew)


def _under_own_draws(rerun: Rerun, audit: Audit) -> Audit | None:
    """Weigh micro-batches as they count under their own draws, which no one pass can have.

    Constant draws, or the first micro-batch's for all, would hide how much each one counts.
    """
    window = rerun.window
    own = replace(rerun, draws=Draws(rerun.draws.passes))
    counts = [own.forward(ACCUMULATED64, index)[1] for index in range(len(window.sizes))]
    other = window.recounted(counts)
    if other is None or not all(map(math.isfinite, counts)) or len(set(counts)) == 1:
        return None
    weighed, again = own.gradient(ACCUMULATED64), own.gradient(ACCUMULATED64)
    if distance(again, weighed) > SAME64:  # it draws other numbers each time
        return None
    recounted = replace(own, window=other).gradient(ACCUMULATED64)
    e64 = distance(weighed, recounted)
    if not e64 > SAME64:
        return None
    said = remedy_of_counts(window.sizes, counts)
    cause = result.UNEQUAL_DENOMINATORS
    return replace(audit, verdict="biased", cause=cause, e64=e64, remedy=said)


def _rounded(rerun: Rerun, measured: Measured, runs: _Runs, audit: Audit) -> Audit:
    """Find where digits were lost: the functions agree, and yet differ more than the one pass rounds."""
    limit = measured.own.limit
    of_passes = distance(rerun.gradient(replace(ACCUMULATED, summed_in_float64=True)), runs.one_pass)
    if of_passes <= limit:
        replayed = distance(runs.replayed, runs.one_pass)
        if replayed > limit or coarse(runs.accumulated, audit.accum_steps):
            said = REMEDIES[result.LOW_PRECISION]
            return replace(audit, verdict="biased", cause=result.LOW_PRECISION, remedy=said)
        why = (
            "a part of the gradient is none of the loss's: a penalty on the weights or outputs, or a "
            "change to the gradients"
        )
        return replace(audit, verdict="inconclusive", cause=result.UNKNOWN, detail=why)
    # Added up in float64 the passes are no closer: their own rounding is part of the floor then.
    audit = replace(audit, floor=max(measured.own.floor, of_passes))
    if Agreement(measured.own.error, of_passes, IN_OWN_PRECISION).agrees:
        return replace(audit, verdict="stochastic" if rerun.draws.any else "equivalent")
    why = "equal in float64, and in its own precision further apart than rounding explains"
    return replace(audit, verdict="inconclusive", cause=result.UNKNOWN, detail=why)


def _of_the_weights(rerun: Rerun, runs: _Runs, audit: Audit) -> Audit | None:
    """Find out whether weighing micro-batches as they count, or rescaling, gives the large batch's."""
    window = rerun.window
    counts = [n for _, n in runs.forward.parts if math.isfinite(n)]
    factor = multiple(runs.accumulated64, runs.one_pass64, SAME64)
    other = window.recounted(counts) if factor is None else None
    if other is not None:
        recounted = replace(rerun, window=other).gradient(ACCUMULATED64)
        if distance(recounted, runs.one_pass64) <= SAME64:
            said = remedy_of_counts(window.sizes, counts)
            return replace(audit, cause=result.UNEQUAL_DENOMINATORS, remedy=said)
        factor = multiple(recounted, runs.one_pass64, SAME64)
        if factor is not None:
            said = remedy_of_counts(window.sizes, counts)
            alone = distance(runs.accumulated64, runs.one_pass64, factor) / abs(factor)
            return replace(
                audit, cause=result.UNEQUAL_DENOMINATORS, remedy=said, moves=alone,
                besides=(of_factor(factor, len(window.sizes)),),
            )  # fmt: skip
    if factor is None:
        return None
    said = remedy_of_factor(factor, len(window.sizes))
    return replace(audit, cause=result.LOSS_SCALE, remedy=said)


def _moving_state(rerun: Rerun, runs: _Runs) -> Culprit | Mixing | None:
    """Return what the large batch meets otherwise, if that is the cause: a state that moves, or samples
    that are mixed beside the model."""
    window = rerun.window

    def settled(states: Sequence[_State], *, all_beside: bool = False) -> bool:
        held = [module for state in states for module in state.modules]
        owners = None if all_beside else [owner for state in states for owner in state.owners]
        # Held, micro-batches may still be weighed wrongly, or be off by a factor.
        counts = [n for _, n in runs.forward.parts]
        for weighed in filter(None, (window, window.recounted(counts))):
            holding = replace(rerun, window=weighed.holding(owners))
            gradient = holding.gradient(replace(ACCUMULATED64, state_held_of=held))
            if multiple(gradient, runs.one_pass64, SAME64) is not None:
                return True
        return False

    states = []
    for what, owners in window.moved_beside:
        if isinstance(what, Mixing):
            states.append(_State(what, [], owners))
            continue
        name = what if isinstance(what, str) else type(what).__name__
        inside = list(what.modules()) if isinstance(what, nn.Module) else []
        culprit = Culprit(result.BESIDE_MODEL, name, result.MOVING_STATE)
        states.append(_State(culprit, inside, owners))
    for name, module in window.modules.by_name.items():
        states.append(_State(_culprit(rerun, name, result.MOVING_STATE), [module], [module]))
    if not settled(states, all_beside=True):
        return None
    # The shortest row of states that settles it ends with one that is needed.
    low, high = 0, len(states)
    while low + 1 < high:
        middle = (low + high) // 2
        if settled(states[:middle]):
            high = middle
        else:
            low = middle
    return states[high - 1].culprit


def _of_the_loss(rerun: Rerun, runs: _Runs, audit: Audit) -> Audit:
    """Blame the loss: every module agrees, and no weights make the gradient right."""
    additive = rerun.window.additive(runs.forward.parts, runs.forward.whole)
    if not additive and _values_add_up(rerun.window.sizes, runs.forward):
        why = (
            "every module agrees, and so do the losses; their gradients do not: a backward pass written "
            "by hand (torch.autograd.Function, a hook) or a detached value depends on the batch"
        )
        return replace(audit, cause=result.UNKNOWN, detail=why)
    if not additive:
        said = REMEDIES[result.NOT_ADDITIVE]
        why = "every module agrees, and the large batch's loss is not made of the micro-batches' losses"
        return replace(audit, cause=result.NOT_ADDITIVE, remedy=said, detail=why)
    why = (
        "ruled out: modules that mix samples, unequal denominators, a factor, and a loss that is no sum "
        "(all seen in the forward pass)"
    )
    return replace(audit, cause=result.UNKNOWN, detail=why)


def _values_add_up(sizes: Sequence[int], forward: ForwardRuns) -> bool:
    """Whether the large batch's loss is the sum of the micro-batches', or their mean, by samples."""
    losses = [loss for loss, _ in forward.parts]
    by_sample = [n / sum(sizes) for n in sizes]
    weights = ([1.0] * len(sizes), [1 / len(sizes)] * len(sizes), by_sample)
    made = (sum(w * loss for w, loss in zip(of, losses, strict=True)) for of in weights)
    return any(math.isclose(each, forward.whole[0], rel_tol=SAME64) for each in made)


def _blaming(rerun: Rerun, audit: Audit, culprits: Sequence[Culprit]) -> Audit:
    if not culprits:
        return audit
    first = culprits[0]
    return replace(
        audit,
        cause=first.cause,
        culprit=first.name,
        culprit_type=first.type,
        culprits=tuple(culprits),
        remedy=remedy_of(first, Counter(type(module).__name__ for module in rerun.window.modules)),
    )


def _drawing(rerun: Rerun) -> list[Culprit]:
    """Return the modules that draw random numbers."""
    return [_culprit(rerun, name, result.RANDOMNESS) for name in rerun.draws.modules]


def _still_drawing(audit: Audit, drew: Sequence[Culprit]) -> Audit:
    """Name what is left once a cause is removed, too."""
    return replace(audit, culprits=(*audit.culprits, *drew))


def _culprit(rerun: Rerun, name: str, cause: str) -> Culprit:
    return Culprit(name, type(rerun.window.modules.by_name[name]).__name__, cause)
