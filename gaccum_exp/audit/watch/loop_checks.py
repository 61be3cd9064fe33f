"""Faults of a loop outside its gradient, and what was seen around its passes that explains a verdict."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from gaccum_exp.audit import result
from gaccum_exp.audit.result import Audit, Check
from gaccum_exp.audit.watch.tape import Observations, Tape, TapedCall, TapedMicroBatch
from gaccum_exp.core.nesting import tensors_in


def other_faults(seen: Observations, micro_batches: Sequence[TapedMicroBatch]) -> tuple[Check, ...]:
    """Return the faults in schedule, average of the weights and memory."""
    if len(micro_batches) < 2:
        return ()
    found = []
    inside = Counter(which for which, k in seen.scheduler_steps if 0 < k < seen.tape.backwards)
    if inside:
        number = max(inside.values())  # several schedules side by side are each stepped as often
        times = f"{number} time{'s' if number > 1 else ''}"
        found.append(
            Check(
                "schedule",
                f"the learning-rate schedule was stepped {times} inside the "
                f"window: step it once per optimizer step{seen.places.at('schedule')}",
            )
        )
    if seen.average_moved:
        found.append(
            Check(
                "average of the weights",
                "it moves with each micro-batch, so that it forgets N times as fast as with each step: "
                f"move it once, after the optimizer's step{seen.places.at('average')}",
            )
        )
    passes = [{loss.backward for loss in micro_batch.losses} for micro_batch in micro_batches]
    at_once = max((sum(k in p for p in passes) for k in set().union(*passes)), default=0)
    said, where = None, seen.places.at("backward")
    if at_once > 1:
        said = (
            f"one backward pass for {at_once} micro-batches: all their graphs are held at once, as in "
            f"the large batch; call backward after each{where}"
        )
    elif _graphs_joined(seen.tape, micro_batches):
        said = (
            "losses of several micro-batches were added up with their graphs: detach them first, or "
            "memory grows with N"
        )
    elif all(seen.retained[: seen.tape.backwards]):
        said = f"every backward pass was told to retain its graph: leave retain_graph out{where}"
    return (*found, Check("memory", said)) if said else tuple(found)


def reported_loss(micro_batches: Sequence[TapedMicroBatch]) -> Check | None:
    """Return the fault that a window's loss was reported by its last micro-batch's alone."""
    read = [any(loss.read for loss in micro_batch.losses) for micro_batch in micro_batches]
    if len(read) > 1 and read[-1] and not any(read[:-1]):
        said = "of the window's losses only the last micro-batch's was read: report the mean of all"
        return Check("reported loss", said)
    return None


def explained(audit: Audit, seen: Observations) -> Audit:
    """Return the audit with what was seen around the passes: scaling, clipping, weights that moved."""
    if seen.clipped_by_hand is not None:
        size = f"{seen.clipped_by_hand:.2g}"
        audit = audit.noting(f"the loop's own scaling of the gradient to {size} is taken for clipping")
    if seen.clippings_inside and not any(c.binds for c in seen.clippings_inside):
        audit = _of_idle_clipping(audit, seen)
    if not audit.accum_steps and seen.hidden:
        names = ", ".join(dict.fromkeys(seen.hidden))
        why = f"inside what torch.compile compiled nothing is seen ({names}): give watch the compiled"
        return replace(audit, detail=f"{why} function that returns the loss, as its criterion")
    if seen.stepped_in_backward:
        why = "an optimizer steps inside the backward pass, so that nothing accumulates"
        if audit.verdict == "biased":
            return replace(audit, remedy=f"{why}: step after the window's last backward pass")
        return audit.noting(why)
    if audit.sound and seen.zeroed_at_other_weights:
        if _of_the_same_samples(seen):
            return audit.noting("of two gradients at two weights, as SAM takes, this is the second")
        why = "gradients of other samples were zeroed inside the window, where the weights changed too"
        return replace(audit, verdict="inconclusive", detail=f"{why}: only what came after is known")
    if audit.verdict not in ("biased", "inconclusive") or audit.e is None:
        return audit
    scales = list(dict.fromkeys(scale for _, scale in seen.loss_scales))
    of_weights = (result.UNEQUAL_DENOMINATORS, result.LOSS_SCALE, result.UNKNOWN, None)
    of_no_module = audit.cause == result.MOVING_STATE and audit.culprit is None
    if len(scales) > 1 and (audit.cause in of_weights or of_no_module):
        one = len({which for which, _ in seen.loss_scales}) == 1
        what = "update the GradScaler once, after the step" if one else "scale by one GradScaler"
        listed = ", ".join(f"{scale:g}" for scale in scales[:8])
        said = f"the loss scale changed inside the window ({listed}): {what}"
        return replace(audit, verdict="biased", cause=result.LOSS_SCALE, remedy=said, detail=None)
    if seen.moved and audit.verdict == "inconclusive" and audit.cause == result.UNKNOWN:
        return _of_moved_weights(audit, seen)
    return audit


def _of_idle_clipping(audit: Audit, seen: Observations) -> Audit:
    """Say of a clipping after each micro-batch that it will matter where gradients are larger."""
    bound = min(clipping.bound for clipping in seen.clippings_inside)
    if math.isinf(bound):  # which only asks for the norm
        return audit
    return audit.noting(
        f"gradients are clipped inside the window{seen.places.at('clip')}, which changed none of them "
        f"here (to at most {bound:g}); where one is larger it is the large batch's no more: clip once, "
        "after the last backward pass"
    )


def _of_the_same_samples(seen: Observations) -> bool:
    """Whether the passes at other weights, which left no gradient, had the same samples (SAM)."""

    def inputs(tape: Tape) -> list[Tensor]:
        return [t for call in tape.calls if call.kind == "model" for t in tensors_in(call.arguments)]

    *others, then = seen.zeroed_at_other_weights
    one, other = inputs(then), inputs(seen.tape)
    same = len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    return same and not others


def _of_moved_weights(audit: Audit, seen: Observations) -> Audit:
    first, every = min(seen.moved), seen.tape.backwards
    if first == every:
        why = "the weights were changed after the last backward pass and before the step: its passes"
        return replace(audit, detail=f"{why} cannot be run again at the weights that they had")
    return replace(
        audit,
        verdict="biased",
        cause=result.STALE_OR_MISSING,
        remedy="call zero_grad where the weights change: gradients at other weights were added up",
        detail=f"the weights were changed after backward pass {first} of {every}",
    )


def _graphs_joined(tape: Tape, micro_batches: Sequence[TapedMicroBatch]) -> bool:
    """Whether the loop made a tensor that holds the graphs of several micro-batches."""
    belongs = {loss: n for n, one in enumerate(micro_batches) for loss in one.losses}

    def held(call: TapedCall) -> set[int]:
        if call.kind == "loss":
            return {belongs[call]} if call in belongs else set()
        return {n for ref in call.refs() for n in held(ref.call)}

    return any(len(held(c)) > 1 for c in tape.calls if c.kind == "between" and c.has_graph)
