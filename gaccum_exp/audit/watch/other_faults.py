"""Faults of a loop beside its gradient: in the schedule, the memory and the loss that it reports."""

from collections.abc import Sequence

from gaccum_exp.audit.result import Check
from gaccum_exp.audit.watch.observations import Sight
from gaccum_exp.audit.watch.tape import Call, MicroBatch, Tape


def beside_the_gradient(sight: Sight, units: Sequence[MicroBatch]) -> tuple[Check, ...]:
    """Return the faults in schedule, memory and reported loss."""
    checks = []
    inside = [k for k in sight.scheduler_steps if 0 < k < sight.tape.backwards]
    if inside and len(units) > 1:
        times = f"{len(inside)} time{'s' if len(inside) > 1 else ''}"
        checks.append(
            Check(
                "schedule",
                f"the learning-rate schedule was stepped {times} inside the window: step it once per "
                "optimizer step",
            )
        )
    passes = [{loss.backward for loss in unit.losses} for unit in units]
    at_once = max((sum(k in p for p in passes) for k in set().union(*passes)), default=0)
    if at_once > 1:
        checks.append(
            Check(
                "memory",
                f"one backward pass for {at_once} micro-batches: all their graphs are held at once, as "
                "in the large batch; call backward after each",
            )
        )
    elif len(units) > 1 and _graphs_joined(sight.tape, units):
        checks.append(
            Check(
                "memory",
                "losses of several micro-batches were added up with their graphs: detach them first, or "
                "memory grows with N",
            )
        )
    elif len(units) > 1 and all(sight.retained[: sight.tape.backwards]):
        checks.append(
            Check("memory", "every backward pass was told to retain its graph: leave retain_graph out")
        )
    return tuple(checks)


def reported_loss(units: Sequence[MicroBatch]) -> Check | None:
    """Return the finding that a window's loss was reported by its last micro-batch's."""
    read = [any(loss.read for loss in unit.losses) for unit in units]
    if len(units) > 1 and read[-1] and not any(read[:-1]):
        said = "of the window's losses only the last micro-batch's was read: report the mean of all"
        return Check("reported loss", said)
    return None


def _graphs_joined(tape: Tape, units: Sequence[MicroBatch]) -> bool:
    """Whether the loop made a tensor that holds the graphs of several micro-batches."""
    belongs = {id(loss): n for n, unit in enumerate(units) for loss in unit.losses}

    def held(call: Call) -> set[int]:
        if call.kind == "loss":
            return {belongs[id(call)]} if id(call) in belongs else set()
        return set().union(*(held(ref.call) for ref in call.refs()), set())

    made = [c for c in tape.calls if c.kind == "between" and c.graph]
    return any(len(held(call)) > 1 for call in made)
