"""Faults of a loop outside its gradient: in the schedule, the memory and the loss that it reports."""

from collections.abc import Sequence

from gaccum_exp.audit.result import Check
from gaccum_exp.audit.watch.tape import Observations, Tape, TapedCall, TapedMicroBatch


def other_faults(seen: Observations, micro_batches: Sequence[TapedMicroBatch]) -> tuple[Check, ...]:
    """Return the faults in schedule and memory."""
    found = []
    inside = [k for k in seen.scheduler_steps if 0 < k < seen.tape.backwards]
    if inside and len(micro_batches) > 1:
        times = f"{len(inside)} time{'s' if len(inside) > 1 else ''}"
        said = (
            f"the learning-rate schedule was stepped {times} inside the window: step it once per "
            "optimizer step"
        )
        found.append(Check("schedule", said))
    passes = [{loss.backward for loss in micro_batch.losses} for micro_batch in micro_batches]
    at_once = max((sum(k in p for p in passes) for k in set().union(*passes)), default=0)
    if at_once > 1:
        said = (
            f"one backward pass for {at_once} micro-batches: all their graphs are held at once, as in "
            "the large batch; call backward after each"
        )
        found.append(Check("memory", said))
    elif len(micro_batches) > 1 and _graphs_joined(seen.tape, micro_batches):
        said = (
            "losses of several micro-batches were added up with their graphs: detach them first, or "
            "memory grows with N"
        )
        found.append(Check("memory", said))
    elif len(micro_batches) > 1 and all(seen.retained[: seen.tape.backwards]):
        said = "every backward pass was told to retain its graph: leave retain_graph out"
        found.append(Check("memory", said))
    return tuple(found)


def reported_loss(micro_batches: Sequence[TapedMicroBatch]) -> Check | None:
    """Return the fault that a window's loss was reported by its last micro-batch's alone."""
    read = [any(loss.read for loss in micro_batch.losses) for micro_batch in micro_batches]
    if len(micro_batches) > 1 and read[-1] and not any(read[:-1]):
        said = "of the window's losses only the last micro-batch's was read: report the mean of all"
        return Check("reported loss", said)
    return None


def _graphs_joined(tape: Tape, micro_batches: Sequence[TapedMicroBatch]) -> bool:
    """Whether the loop made a tensor that holds the graphs of several micro-batches."""
    belongs = {id(loss): n for n, one in enumerate(micro_batches) for loss in one.losses}

    def held(call: TapedCall) -> set[int]:
        if call.kind == "loss":
            return {belongs[id(call)]} if id(call) in belongs else set()
        return set().union(*(held(ref.call) for ref in call.refs()), set())

    made = [c for c in tape.calls if c.kind == "between" and c.has_graph]
    return any(len(held(call)) > 1 for call in made)
