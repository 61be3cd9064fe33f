"""Diagnose one window: run the experiments on it, in the order in which they rule causes out."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from gaccum_exp.audit import result
from gaccum_exp.audit.canary import IN_FLOAT64, IN_OWN_PRECISION, NEVER_ROUNDING64, Canary
from gaccum_exp.audit.causes.batch_mixing import ForwardRuns, compare_forward
from gaccum_exp.audit.rerun.passes import (
    ACCUMULATED,
    ACCUMULATED64,
    ONE_PASS,
    ONE_PASS64,
    RECORDING,
    Rerun,
)
from gaccum_exp.audit.result import Audit, Culprit, ParameterError
from gaccum_exp.audit.verdict import (
    Measured,
    hidden_difference,
    multiple,
    parameter_errors,
    remedy,
    verdict_of,
)
from gaccum_exp.core.gradient import Gradient, coarse, distance, finite, identical, norm
from gaccum_exp.memory.available import out_of_memory

ORDERS = 3
"""Summation orders of the one pass that the rounding floor is taken from."""
ZERO = 1e-6
"""Relative: a gradient that another order of the samples moves so far in float64 is rounding alone."""
ROUNDING_ONLY = 0.5
"""The same in the window's own precision."""
SAME64 = 1e-9
"""Relative distance of two float64 gradients that should be equal."""
NOT_FINITE = "the gradient is not finite"


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """What the runs of a window gave."""

    audit: Audit
    """Verdict and cause as far as the window itself, run again, shows them."""
    measured: Measured | None = None
    one_pass64: Gradient | None = None
    accumulated64: Gradient | None = None


@dataclass(frozen=True, slots=True)
class _Own:
    """Gradients in the window's own precision."""

    accumulated: Gradient
    """The one that is judged."""
    replayed: Gradient
    """The sum of its passes, run again."""
    one_pass: Gradient


@dataclass(frozen=True, slots=True)
class _Float64:
    one_pass: Gradient
    accumulated: Gradient
    floor: float
    """How far another order of the samples moves the one pass."""
    rounding: tuple[ParameterError, ...]
    """The same, parameter by parameter."""
    forward: ForwardRuns


def diagnose(
    rerun: Rerun, observed: Gradient | None, blank: Audit, replayed: Gradient | None = None
) -> Diagnosis:
    """Judge a window of two micro-batches or more.

    Args:
        rerun: the runs of the window.
        observed: the accumulated gradient where it is known already; None: it is run for.
        blank: what is known of the audit before.
        replayed: the gradient of the recording pass, where that has been run.
    """
    if replayed is None:
        replayed = rerun.gradient(RECORDING)
    one_pass = rerun.gradient(ONE_PASS, held=2)
    if rerun.draws.shared:
        replayed = rerun.gradient(ACCUMULATED)
    accumulated = replayed if observed is None else observed
    if not finite(accumulated) or not finite(one_pass):
        return Diagnosis(replace(blank, verdict="inconclusive", detail=NOT_FINITE))
    if norm(one_pass) == 0:
        why = "the large batch's gradient is zero: audit at other weights or on another window"
        return Diagnosis(replace(blank, verdict="inconclusive", detail=why))
    generator, samples = torch.Generator().manual_seed(0), sum(rerun.window.sizes)
    orders = [torch.randperm(samples, generator=generator) for _ in range(ORDERS)]
    floor = max(distance(rerun.gradient(replace(ONE_PASS, order=o)), one_pass) for o in orders)
    e = distance(accumulated, one_pass)
    errors = parameter_errors(accumulated, one_pass)
    blank = replace(blank, e=e, floor=floor, parameters=errors)
    try:
        exact = _in_float64(rerun, orders[0])
    except Exception as error:  # a user's model may fail in a precision that it was not written for
        if out_of_memory(error):
            raise
        why = f"it does not run in float64: {first_line(error)}"
        return Diagnosis(replace(blank, verdict="inconclusive", detail=why))
    errors64 = parameter_errors(exact.accumulated, exact.one_pass)
    measured = Measured(
        identical(accumulated, one_pass),
        own=Canary(e, max(floor, distance(one_pass, exact.one_pass)), IN_OWN_PRECISION),
        float64=Canary(distance(exact.accumulated, exact.one_pass), exact.floor, IN_FLOAT64),
        hidden64=hidden_difference(errors64, exact.rounding),
    )
    denominator = exact.forward.whole[1]
    audit = replace(
        blank,
        e64=measured.float64.error,
        floor=measured.own.floor,
        denominator=denominator if math.isfinite(denominator) else None,
        parameters=errors if measured.same_function else errors64,
    )
    audit = _explained(rerun, measured, _Own(accumulated, replayed, one_pass), exact, audit)
    return Diagnosis(audit, measured, exact.one_pass, exact.accumulated)


def first_line(error: Exception) -> str:
    """Return an error's type and the first line of its message."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def _in_float64(rerun: Rerun, order: Tensor) -> _Float64:
    one_pass = rerun.gradient(ONE_PASS64, held=2)
    accumulated = rerun.gradient(ACCUMULATED64)
    permuted = rerun.gradient(replace(ONE_PASS64, order=order))
    floor, rounding = distance(permuted, one_pass), parameter_errors(permuted, one_pass)
    del permuted  # of a large model a third gradient may not fit beside what comes next
    forward = compare_forward(rerun, ACCUMULATED64)
    return _Float64(one_pass, accumulated, floor, rounding, forward)


def _explained(rerun: Rerun, measured: Measured, own: _Own, exact: _Float64, audit: Audit) -> Audit:
    """Find the cause by experiments; the verdict follows from the numbers and from what was drawn."""
    draws, mixing = rerun.draws, exact.forward.mixing
    drew = [_culprit(rerun, name, result.RANDOMNESS) for name in draws.modules]
    rounding_only = measured.float64.floor > ZERO or measured.own.floor > ROUNDING_ONLY
    if rounding_only and not mixing and not draws.any:
        why = "the large batch's gradient is zero but for rounding: audit at other weights"
        return replace(audit, verdict="inconclusive", detail=why)
    verdict = verdict_of(measured, draws.any)
    if verdict in ("identical", "equivalent"):
        return replace(audit, verdict=verdict)
    if measured.same_function and not measured.own.agrees and not draws.not_replayed:
        audit = _rounded(rerun, measured, own, audit)
        if audit.verdict != "stochastic":
            return audit
    if verdict == "stochastic":
        why = "; ".join(draws.not_replayed)
        audit = replace(audit, verdict=verdict, cause=result.RANDOMNESS, detail=why or None)
        return _blaming(audit, drew)
    if distance(rerun.gradient(ONE_PASS64), exact.one_pass) > NEVER_ROUNDING64:
        draws.refuse("the same pass, run twice, differs", foreign=True)
    if draws.any:
        constant = replace(ACCUMULATED64, draws="constant")
        one_pass = rerun.gradient(replace(ONE_PASS64, draws="constant"))
        e64 = distance(rerun.gradient(constant), one_pass)
        mixing = compare_forward(rerun, constant).mixing
        if e64 <= NEVER_ROUNDING64:
            why = "; ".join([*draws.not_replayed, "with every draw a constant it is equivalent"])
            audit = replace(audit, verdict="stochastic", cause=result.RANDOMNESS, e64=e64, detail=why)
            return _blaming(audit, drew)
        if draws.foreign:
            why = "; ".join([*draws.not_replayed, "without these numbers it could be settled"])
            audit = replace(audit, verdict="inconclusive", cause=result.RANDOMNESS, detail=why)
            return _blaming(audit, drew)
    audit = replace(audit, verdict="biased")
    blamed = _of_the_weights(rerun, exact, audit)
    if blamed is not None:
        return replace(blamed, culprits=tuple(drew))
    if mixing:
        audit = replace(audit, cause=result.BATCH_STATISTICS)
        mixers = [_culprit(rerun, name, result.BATCH_STATISTICS) for name in mixing]
        return _blaming(audit, [*mixers, *drew])
    carrying = _carrying_state(rerun, exact)
    if carrying is not None:
        audit = replace(audit, cause=result.BATCH_STATISTICS)
        culprit = _culprit(rerun, carrying, result.BATCH_STATISTICS)
        said = (
            f"{carrying or 'the model'} ({culprit.type}) uses a state that every forward pass moves, N "
            "times in a window of N passes: freeze it, or move it once per window"
        )
        return replace(_blaming(audit, [culprit, *drew]), remedy=said)
    return replace(_of_the_loss(rerun, exact, audit), culprits=tuple(drew))


def _rounded(rerun: Rerun, measured: Measured, own: _Own, audit: Audit) -> Audit:
    """Find where digits were lost: the functions agree, and yet differ more than the one pass rounds."""
    limit = measured.own.limit
    of_passes = distance(rerun.gradient(replace(ACCUMULATED, summed_in_float64=True)), own.one_pass)
    if of_passes <= limit:
        replayed = distance(own.replayed, own.one_pass)
        if replayed > limit or coarse(own.accumulated, audit.accum_steps):
            audit = replace(audit, verdict="biased", cause=result.LOW_PRECISION)
            return replace(audit, remedy=remedy(result.LOW_PRECISION))
        why = (
            "a part of the gradient is none of the loss's: a penalty on the weights or outputs, or a "
            "change to the gradients"
        )
        return replace(audit, verdict="inconclusive", cause=result.UNKNOWN, detail=why)
    # Added up in float64 the passes are no closer: their own rounding is part of the floor then.
    audit = replace(audit, floor=max(measured.own.floor, of_passes))
    if Canary(measured.own.error, of_passes, IN_OWN_PRECISION).agrees:
        return replace(audit, verdict="stochastic" if rerun.draws.any else "equivalent")
    why = "equal in float64, and in its own precision further apart than rounding explains"
    return replace(audit, verdict="inconclusive", cause=result.UNKNOWN, detail=why)


def _of_the_weights(rerun: Rerun, exact: _Float64, audit: Audit) -> Audit | None:
    """Find out whether weighing micro-batches as they count, or rescaling, gives the large batch's."""
    window = rerun.window
    counts = [n for _, n in exact.forward.parts if math.isfinite(n)]
    factor = multiple(exact.accumulated, exact.one_pass, SAME64)
    other = window.recounted(counts) if factor is None else None
    if other is not None:
        recounted = replace(rerun, window=other).gradient(ACCUMULATED64)
        if distance(recounted, exact.one_pass) <= SAME64:
            said = remedy(result.UNEQUAL_DENOMINATORS, sizes=window.sizes, counts=counts)
            return replace(audit, cause=result.UNEQUAL_DENOMINATORS, remedy=said)
        factor = multiple(recounted, exact.one_pass, SAME64)
    if factor is None:
        return None
    said = remedy(result.LOSS_SCALE, sizes=window.sizes, factor=factor)
    return replace(audit, cause=result.LOSS_SCALE, remedy=said)


def _carrying_state(rerun: Rerun, exact: _Float64) -> str | None:
    """Return the module whose buffers carry a state from one pass to the next, if that is the cause."""
    modules = rerun.window.modules
    holding = [m for m in modules if any(b is not None for b in m._buffers.values())]

    def settled(reset: Sequence[nn.Module]) -> bool:
        gradient = rerun.gradient(replace(ACCUMULATED64, reset_buffers_of=reset))
        return distance(gradient, exact.one_pass) <= SAME64

    if not holding or not settled(holding):
        return None
    alone = (module for module in holding if settled([module]))
    return modules.name(next(alone, holding[0]))


def _of_the_loss(rerun: Rerun, exact: _Float64, audit: Audit) -> Audit:
    """Blame the loss: every module agrees, and no weights make the gradient right."""
    if not rerun.window.additive(exact.forward.parts, exact.forward.whole):
        said = remedy(result.NOT_ADDITIVE)
        why = "every module agrees, and the large batch's loss is not made of the micro-batches' losses"
        return replace(audit, cause=result.NOT_ADDITIVE, remedy=said, detail=why)
    why = (
        "ruled out: modules that mix samples, unequal denominators, a factor, and a loss that is no sum "
        "(all seen in the forward pass)"
    )
    return replace(audit, cause=result.UNKNOWN, detail=why)


def _blaming(audit: Audit, culprits: Sequence[Culprit]) -> Audit:
    audit = replace(audit, culprits=tuple(culprits))
    if not culprits:
        return audit
    return replace(
        audit,
        culprit=culprits[0].name,
        culprit_type=culprits[0].type,
        remedy=remedy(audit.cause, culprits),
    )


def _culprit(rerun: Rerun, name: str, cause: str) -> Culprit:
    modules = rerun.window.modules
    module = next(m for m in modules if modules.name(m) == name)
    return Culprit(name, type(module).__name__, cause)
