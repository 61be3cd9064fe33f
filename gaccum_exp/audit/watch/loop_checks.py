"""Faults of a loop outside its gradient: in the schedule, the memory and the loss that it reports."""

from collections.abc import Sequence

from gaccum_exp.audit.result import Check
from gaccum_exp.audit.watch.tape import Observations, Tape, TapedCall, TapedMicroBatch


def other_faults(seen: Observations, micro_batches: Sequence[TapedMicroBatch]) -> tuple[Check, ...]:
    """Return the faults in schedule and memory."""
    if len(micro_batches) < 2:
        return ()
    found = []
    inside = [k for k in seen.scheduler_steps if 0 < k < seen.tape.backwards]
    if inside:
        times = f"{len(inside)} time{'s' if len(inside) > 1 else ''}"
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


def _graphs_joined(tape: Tape, micro_batches: Sequence[TapedMicroBatch]) -> bool:
    """Whether the loop made a tensor that holds the graphs of several micro-batches."""
    belongs = {loss: n for n, one in enumerate(micro_batches) for loss in one.losses}

    def held(call: TapedCall) -> set[int]:
        if call.kind == "loss":
            return {belongs[call]} if call in belongs else set()
        return {n for ref in call.refs() for n in held(ref.call)}

    return any(len(held(c)) > 1 for c in tape.calls if c.kind == "between" and c.has_graph)
