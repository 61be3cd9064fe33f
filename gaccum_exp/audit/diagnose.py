"""The experiments on one window, in the order in which they rule things out."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from gaccum_exp.audit import result
from gaccum_exp.audit.rerun.passes import Trial, Window
from gaccum_exp.audit.result import Audit, Culprit, ParameterError
from gaccum_exp.audit.verdict import (
    NEVER_ROUNDING64,
    RANGE,
    Measured,
    hidden_difference,
    judged,
    multiple,
    parameter_errors,
    remedy,
)
from gaccum_exp.core.gradient import (
    Gradient,
    coarse,
    distance,
    finite,
    identical,
    norm,
)
from gaccum_exp.memory.available import out_of_memory

ORDERS = 3
"""Summation orders of the one pass that the rounding floor is taken from."""
ZERO = 1e-6
"""Relative: a gradient that another order of the samples moves so far in float64 is none."""
ROUNDING_ONLY = 0.5
"""The same in the window's own precision."""
SAME64 = 1e-9
"""Two float64 numbers that should be one."""
NOT_FINITE = "the gradient is not finite"


@dataclass(slots=True)
class Examined:
    """What the runs of a window gave."""

    audit: Audit
    """Verdict and cause as far as the window itself, run again, shows them."""
    measured: Measured | None = None
    one_pass64: Gradient | None = None
    accumulated64: Gradient | None = None


@dataclass(slots=True)
class _Float64:
    one_pass: Gradient
    accumulated: Gradient
    floor: float
    """How far another order of the samples moves the one pass."""
    rounding: tuple[ParameterError, ...]
    """The same, parameter by parameter."""
    parts: list[tuple[float, float]]
    whole: tuple[float, float]
    mixing: list[str]


@dataclass(slots=True)
class _Runs:
    """In the window's own precision."""

    measured: Measured
    accumulated: Gradient
    """That which is judged."""
    replayed: Gradient
    """The sum of its passes, run again."""
    one_pass: Gradient


def examine(
    trial: Trial, observed: Gradient | None, blank: Audit, replayed: Gradient | None = None
) -> Examined:
    """Judge a window of two micro-batches or more.

    Args:
        trial: the window.
        observed: the accumulated gradient where it is known already; None: it is run for.
        blank: what is known of the audit before.
        replayed: what `trial.record()` gave, where it has been called.
    """
    window = trial.window
    if replayed is None:
        replayed = trial.record()
    one_pass = trial.one_pass(float64=False, beside=2)
    if trial.draws.shared:
        replayed = trial.accumulated(float64=False)
    accumulated = replayed if observed is None else observed
    stop = _unanswerable(accumulated, one_pass)
    if stop is not None:
        return Examined(replace(blank, verdict="inconclusive", detail=stop))
    orders = summation_orders(sum(window.sizes))
    floor = max(distance(trial.one_pass(float64=False, order=o), one_pass) for o in orders)
    e = distance(accumulated, one_pass)
    table = parameter_errors(accumulated, one_pass)
    blank = replace(blank, e=e, floor=floor, parameters=table)
    try:
        exact = _in_float64(trial, orders[0])
    except Exception as error:  # a stranger's model in a precision that it never met
        if out_of_memory(error):
            raise
        why = f"it does not run in float64: {first_line(error)}"
        return Examined(replace(blank, verdict="inconclusive", detail=why))
    errors64 = parameter_errors(exact.accumulated, exact.one_pass)
    measured = Measured(
        identical(accumulated, one_pass),
        e=e,
        floor=max(floor, distance(one_pass, exact.one_pass)),
        e64=distance(exact.accumulated, exact.one_pass),
        floor64=exact.floor,
        hidden64=hidden_difference(errors64, exact.rounding),
    )
    audit = replace(
        blank,
        e64=measured.e64,
        floor=measured.floor,
        denominator=exact.whole[1] if math.isfinite(exact.whole[1]) else None,
        parameters=table if measured.same_function else errors64,
    )
    runs = _Runs(measured, accumulated, replayed, one_pass)
    audit = _explained(trial, runs, exact, audit)
    return Examined(audit, measured, exact.one_pass, exact.accumulated)


def summation_orders(samples: int) -> list[Tensor]:
    """Return a few orders of a window's samples."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randperm(samples, generator=generator) for _ in range(ORDERS)]


def first_line(error: Exception) -> str:
    """Return what happened, in a line."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def _unanswerable(accumulated: Gradient, one_pass: Gradient) -> str | None:
    if not finite(accumulated) or not finite(one_pass):
        return NOT_FINITE
    if norm(one_pass) == 0:
        return "the large batch's gradient is zero: audit at other weights or on another window"
    return None


def _in_float64(trial: Trial, order: Tensor) -> _Float64:
    one_pass = trial.one_pass(float64=True, beside=2)
    accumulated = trial.accumulated(float64=True)
    permuted = trial.one_pass(float64=True, order=order)
    floor, rounding = distance(permuted, one_pass), parameter_errors(permuted, one_pass)
    del permuted  # of a large model a third gradient may not fit beside what comes next
    return _Float64(one_pass, accumulated, floor, rounding, *trial.losses())


def _explained(trial: Trial, runs: _Runs, exact: _Float64, audit: Audit) -> Audit:
    """Say why, from the experiments; the verdict follows from the numbers and from what was drawn."""
    draws, measured = trial.draws, runs.measured
    drew = [_culprit(trial.window, name, result.RANDOMNESS) for name in draws.modules]
    rounding_only = measured.floor64 > ZERO or measured.floor > ROUNDING_ONLY
    if rounding_only and not exact.mixing and not draws.any:
        why = "the large batch's gradient is zero but for rounding: audit at other weights"
        return replace(audit, verdict="inconclusive", detail=why)
    verdict = judged(measured, draws.any)
    if verdict in ("identical", "equivalent"):
        return replace(audit, verdict=verdict)
    if measured.same_function and not measured.in_range and not draws.not_held:
        audit = _rounded(trial, runs, audit)
        if audit.verdict != "stochastic":
            return audit
    if verdict == "stochastic":
        audit = replace(audit, verdict=verdict, cause=result.RANDOMNESS, detail=_not_held(trial))
        return _blaming(audit, drew)
    mixing = exact.mixing
    if distance(trial.one_pass(float64=True), exact.one_pass) > NEVER_ROUNDING64:
        draws.refuse("the same pass, run twice, differs", None, foreign=True)
    if draws.any:
        e64, mixing = _without_randomness(trial)
        if e64 <= NEVER_ROUNDING64:
            why = "; ".join([*draws.not_held, "with every draw a constant it is equivalent"])
            audit = replace(audit, verdict="stochastic", cause=result.RANDOMNESS, e64=e64, detail=why)
            return _blaming(audit, drew)
        if draws.foreign:
            why = "; ".join([*draws.not_held, "without these numbers it could be settled"])
            audit = replace(audit, verdict="inconclusive", cause=result.RANDOMNESS, detail=why)
            return _blaming(audit, drew)
    audit = replace(audit, verdict="biased")
    blamed = _of_the_weights(trial, exact, audit)
    if blamed is not None:
        return _blaming(blamed, drew, first=False)
    if mixing:
        audit = replace(audit, cause=result.BATCH_STATISTICS)
        mixers = [_culprit(trial.window, name, result.BATCH_STATISTICS) for name in mixing]
        return _blaming(audit, [*mixers, *drew])
    carrying = _carrying_state(trial, exact)
    if carrying is not None:
        audit = replace(audit, cause=result.BATCH_STATISTICS)
        culprit = _culprit(trial.window, carrying, result.BATCH_STATISTICS)
        said = (
            f"{carrying or 'the model'} ({culprit.type}) uses a state that every forward pass moves, N "
            "times in a window of N passes: freeze it, or move it once per window"
        )
        return replace(_blaming(audit, [culprit, *drew]), remedy=said)
    return _blaming(_of_the_loss(trial, exact, audit), drew, first=False)


def _carrying_state(trial: Trial, exact: _Float64) -> str | None:
    """Return the module whose buffers carry something from one pass to the next, if that is all."""
    parts = trial.window.parts
    holding = [
        module for module in parts.modules if any(b is not None for b in module._buffers.values())
    ]

    def settled(modules: Sequence[nn.Module]) -> bool:
        return distance(trial.forgetting(modules), exact.one_pass) <= SAME64

    if not holding or not settled(holding):
        return None
    alone = (module for module in holding if settled([module]))
    return parts.name(next(alone, holding[0]))


def _without_randomness(trial: Trial) -> tuple[float, list[str]]:
    """Return e64 with every draw a constant, and the modules that mix samples then."""
    trial.draws.neutral = True
    try:
        one_pass = trial.one_pass(float64=True)
        e64 = distance(trial.accumulated(float64=True), one_pass)
        return e64, trial.losses()[2]
    finally:
        trial.draws.neutral = False


def _rounded(trial: Trial, runs: _Runs, audit: Audit) -> Audit:
    """The same function, and yet further apart than the one pass rounds: where were the digits lost?"""
    measured = runs.measured
    of_passes = distance(trial.accumulated(float64=False, apart=True), runs.one_pass)
    if of_passes <= measured.limit:
        replayed = distance(runs.replayed, runs.one_pass)
        if replayed > measured.limit or coarse(runs.accumulated, audit.steps):
            audit = replace(audit, verdict="biased", cause=result.LOW_PRECISION)
            return replace(audit, remedy=remedy(result.LOW_PRECISION))
        why = (
            "a part of the gradient is none of the loss's: a penalty on the weights or outputs, or a "
            "change to the gradients"
        )
        return replace(audit, verdict="inconclusive", cause=result.UNKNOWN, detail=why)
    # Added up in float64 the passes are no closer: their own rounding is part of the floor then.
    audit = replace(audit, floor=max(measured.floor, of_passes))
    if measured.e <= RANGE * of_passes:
        return replace(audit, verdict="stochastic" if trial.draws.any else "equivalent")
    why = "equal in float64, and in its own precision further apart than rounding explains"
    return replace(audit, verdict="inconclusive", cause=result.UNKNOWN, detail=why)


def _of_the_weights(trial: Trial, exact: _Float64, audit: Audit) -> Audit | None:
    """Is it the large batch's gradient once micro-batches are weighed as they count, or rescaled?"""
    window = trial.window
    counts = [n for _, n in exact.parts if math.isfinite(n)]
    factor = multiple(exact.accumulated, exact.one_pass, SAME64)
    other = window.recounted(counts) if factor is None else None
    if other is not None:
        recounted = trial.of(other)
        if distance(recounted, exact.one_pass) <= SAME64:
            said = remedy(result.UNEQUAL_DENOMINATORS, sizes=window.sizes, counts=counts)
            return replace(audit, cause=result.UNEQUAL_DENOMINATORS, remedy=said)
        factor = multiple(recounted, exact.one_pass, SAME64)
    if factor is None:
        return None
    said = remedy(result.LOSS_SCALE, sizes=window.sizes, factor=factor)
    return replace(audit, cause=result.LOSS_SCALE, remedy=said)


def _of_the_loss(trial: Trial, exact: _Float64, audit: Audit) -> Audit:
    """Every module agrees, and no weights make it right: the loss itself is to blame."""
    if not trial.window.additive(exact.parts, exact.whole):
        said = remedy(result.NOT_ADDITIVE)
        why = "every module agrees, and the large batch's loss is not made of the micro-batches' losses"
        return replace(audit, cause=result.NOT_ADDITIVE, remedy=said, detail=why)
    why = (
        "ruled out: modules that mix samples, unequal denominators, a factor, and a loss that is no sum "
        "(all seen in the forward pass)"
    )
    return replace(audit, cause=result.UNKNOWN, detail=why)


def _blaming(audit: Audit, culprits: Sequence[Culprit], *, first: bool = True) -> Audit:
    audit = replace(audit, culprits=tuple(culprits))
    if not first or not culprits:
        return audit
    return replace(
        audit,
        culprit=culprits[0].name,
        culprit_type=culprits[0].type,
        remedy=remedy(audit.cause, culprits),
    )


def _culprit(window: Window, name: str, cause: str) -> Culprit:
    module = next(m for m in window.parts.modules if window.parts.name(m) == name)
    return Culprit(name, type(module).__name__, cause)


def _not_held(trial: Trial) -> str | None:
    return "; ".join(trial.draws.not_held) or None
