"""Time a window at several N, on copies of what trains, the N in turn.

In turn, because what else a machine does comes and goes: so it meets all N alike.
"""

import time
from collections.abc import Iterable
from dataclasses import replace

import torch

from gaccum_exp.core.step_times import FEWEST_WINDOWS, SOME_LOAD, StepTime, time_of, waited_s
from gaccum_exp.core.window import split_sizes
from gaccum_exp.memory.available import MARGIN, free_bytes
from gaccum_exp.memory.meter import Unmetered
from gaccum_exp.memory.plan import MemoryPlan, size
from gaccum_exp.memory.predict import MeteredStep

TIMED = (1, 2, 4, 8)
"""The N that are timed, as far as a plan has them."""
LIMIT_S = 60.0
"""No further round begins after so long."""


def with_times(plan: MemoryPlan, step: MeteredStep, also: Iterable[int | None] = ()) -> MemoryPlan:
    """Return the plan with the times of its windows that fit the machine.

    Args:
        plan: of the step.
        step: on real tensors; its windows are whole, with a micro-batch of every size asked for.
        also: other N than `TIMED` to time.
    """
    free = free_bytes(step.device)
    asked = [row for row in plan.rows if row.accum_steps in {*TIMED, *also, plan.chosen_steps}]
    fitting = [row for row in asked if free is None or row.peak.bytes <= MARGIN * free]
    times, notes = _times_in_turn(step, plan.global_batch_size, [row.accum_steps for row in fitting])
    beyond = [str(row.accum_steps) for row in asked if row not in fitting]
    if beyond and free is not None:
        what = f"N = {', '.join(beyond)} is not timed: {size(free)} are free on {step.device}."
        notes.insert(0, what)
    rows = tuple(replace(row, time=times.get(row.accum_steps)) for row in plan.rows)
    return replace(plan, rows=rows, notes=(*plan.notes, *notes))


def _times_in_turn(
    step: MeteredStep, samples: int, every: Iterable[int]
) -> tuple[dict[int, StepTime], list[str]]:
    """Return the time of each N, and why some have none."""
    windows = {n: step.window(split_sizes(samples, n)) for n in every}
    seconds: dict[int, list[float]] = {}
    notes = []
    for n in list(windows):  # which warms up, and makes the optimizer's state
        try:
            _seconds(step, windows[n])
        except Exception as error:  # a model may refuse a single sample; memory may run out
            why = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
            notes.append(f"N = {n} could not be timed: {why}.")
            del windows[n]
    began_s, waited_before_s = time.monotonic(), waited_s()
    for _ in range(FEWEST_WINDOWS):
        for n, window in windows.items():
            seconds.setdefault(n, []).append(_seconds(step, window))
        if time.monotonic() - began_s > LIMIT_S:
            break
    waited = None if waited_before_s is None else (waited_s() or waited_before_s) - waited_before_s
    share = 0.0 if waited is None else waited / (time.monotonic() - began_s)
    if share > SOME_LOAD and seconds:
        notes.append(
            f"For {share:.0%} of that time other processes had the processor: times are longer."
        )
    return {n: time_of(taken) for n, taken in seconds.items()}, notes


def _seconds(step: MeteredStep, window: list[object]) -> float:
    with step.context():
        _wait_for(step.device)
        began_s = time.perf_counter()
        step.take(window, Unmetered(step.modules, step.optimizer, step.device))
        _wait_for(step.device)
        return time.perf_counter() - began_s


def _wait_for(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
