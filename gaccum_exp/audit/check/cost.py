"""What a captured window would take at other N: peak memory, predicted, and seconds, measured."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from gaccum_exp.audit.check.captured import CapturedWindow, StepsAtAnyN
from gaccum_exp.memory.available import HEADROOM, free_bytes
from gaccum_exp.memory.fake import nothing_left_behind
from gaccum_exp.memory.plan import MemoryPlan
from gaccum_exp.memory.planner import Planner, peak_source, with_advice
from gaccum_exp.memory.predict import Predicted
from gaccum_exp.memory.timing import TIMED, with_times


@nothing_left_behind()
def cost_of(window: CapturedWindow, budget_gib: float | None, *, equal_parts: bool) -> MemoryPlan:
    """Plan the memory of a window at other N, and time those that fit.

    Args:
        window: of a loop.
        budget_gib: what its tensors may hold; None: what its device has free.
        equal_parts: whether N has to divide the window, as where each loss is a mean divided by N.

    Raises:
        Exception: whatever running it again raises.
    """
    samples, device = sum(window.sizes), window.device
    free = free_bytes(device)
    budget = None if free is None else int(HEADROOM * (free + window.held_bytes))
    budget = budget if budget_gib is None else int(budget_gib * 2**30)
    own = len(window.sizes)
    with _unlogged(), StepsAtAnyN(window) as steps:
        source, notes = peak_source(steps.fake, steps.real, samples)
        planner = Planner(source, samples, equal_parts=equal_parts, notes=notes)
        shown = {own, *(n for n in TIMED if n <= samples and not (equal_parts and samples % n))}
        plan = replace(planner.plan(str(device), budget, shown), in_code=True)
        if equal_parts and any(samples % n for n in TIMED):
            note = f"N that do not divide {samples} are left out: a mean of means needs equal parts."
            plan = replace(plan, notes=(*plan.notes, note))
        if not steps.uniform:
            note = "Micro-batches differ in shape: all samples have that of the largest here."
            plan = replace(plan, notes=(*plan.notes, note))
        if isinstance(source, Predicted) and plan.chosen_steps != 1:
            plan = with_advice(plan, steps.fake)
        return with_times(plan, steps.real(whole=True), [own])


@contextmanager
def _unlogged() -> Iterator[None]:
    """Keep torch from logging what fails on tensors without values, which is raised too."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before
