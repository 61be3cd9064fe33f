"""Faults of a loop outside its gradient, and what was seen around its passes that explains a verdict."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from gaccum_exp.audit import result
from gaccum_exp.audit.result import Audit, Check
from gaccum_exp.audit.watch.tape import Observations, Tape, TapedCall, TapedMicroBatch


def other_faults(seen: Observations, micro_batches: Sequence[TapedMicroBatch]) -> tuple[Check, ...]:
    """Return the faults in schedule and memory."""
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
                "window: step it once per optimizer step",
            )
        )
    passes = [{loss.backward for loss in micro_batch.losses} for micro_batch in micro_batches]
    at_once = max((sum(k in p for p in passes) for k in set().union(*passes)), default=0)
    said = None
    if at_once > 1:
        said = (
            f"one backward pass for {at_once} micro-batches: all their graphs are held at once, as in "
            "the large batch; call backward after each"
        )
    elif _graphs_joined(seen.tape, micro_batches):
        said = (
            "losses of several micro-batches were added up with their graphs: detach them first, or "
            "memory grows with N"
        )
    elif all(seen.retained[: seen.tape.backwards]):
        said = "every backward pass was told to retain its graph: leave retain_graph out"
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
    if not audit.accum_steps and seen.hidden:
        names = ", ".join(dict.fromkeys(seen.hidden))
        why = (
            f"nothing is seen inside what torch.compile compiled ({names}): give watch as criterion the"
        )
        return replace(audit, detail=f"{why} compiled function that returns the loss")
    scales = list(dict.fromkeys(scale for _, scale in seen.loss_scales))
    of_scale = (result.UNEQUAL_DENOMINATORS, result.LOSS_SCALE, result.UNKNOWN)
    if len(scales) > 1 and not audit.sound and audit.cause in (*of_scale, None):
        said = f"the loss scale changed inside the window ({', '.join(f'{s:g}' for s in scales[:8])})"
        what = "update the GradScaler once, after the step"
        if len({which for which, _ in seen.loss_scales}) > 1:
            what = "scale all losses of a window by one GradScaler"
        what = f"{said}: {what}"
        return replace(audit, verdict="biased", cause=result.LOSS_SCALE, remedy=what, detail=None)
    if seen.moved and audit.cause == result.UNKNOWN and audit.verdict == "inconclusive":
        inside, of = [k for k in seen.moved if k < seen.tape.backwards], seen.tape.backwards
        if not inside:
            why = (
                "the weights were changed after the last backward pass and before the step: the passes "
            )
            return replace(audit, detail=f"{why}cannot be run again at the weights that they had")
        why = f"the weights were changed after backward pass {min(inside)} of {of}"
        said = "gradients of other weights were added up: call zero_grad where the weights change"
        stale = replace(audit, verdict="biased", cause=result.STALE_OR_MISSING)
        return replace(stale, remedy=said, detail=why)
    return audit


def _graphs_joined(tape: Tape, micro_batches: Sequence[TapedMicroBatch]) -> bool:
    """Whether the loop made a tensor that holds the graphs of several micro-batches."""
    belongs = {loss: n for n, one in enumerate(micro_batches) for loss in one.losses}

    def held(call: TapedCall) -> set[int]:
        if call.kind == "loss":
            return {belongs[call]} if call in belongs else set()
        return {n for ref in call.refs() for n in held(ref.call)}

    return any(len(held(c)) > 1 for c in tape.calls if c.kind == "between" and c.has_graph)
