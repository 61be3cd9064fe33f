"""Out of memory in a window: the same window again, in twice as many micro-batches.

The samples, the weights and the random state are those of the first attempt, so the optimizer step is
the one that a run with that N from the start would have taken. An accelerator says itself when it has
run out; on a CPU, where the system would end the process instead, `memory_meters` enforces a budget.
"""

import gc
import logging
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from gaccum_exp.core.feed import Window
from gaccum_exp.core.module_state import states_of
from gaccum_exp.core.seeding import random_states, set_random_states
from gaccum_exp.core.window import split_sizes
from gaccum_exp.errors import BadInputError, first_line
from gaccum_exp.memory.available import out_of_memory
from gaccum_exp.tracking import metrics
from gaccum_exp.tracking.sink import Sink
from gaccum_exp.train.checkpoint.parts import parts_of, put_back
from gaccum_exp.train.hooks import WINDOW, Hook
from gaccum_exp.train.state import TrainState

log = logging.getLogger(__name__)


class FinerSplit(Hook):
    """Has a window in which memory ran out again, under `accum.on_oom=increase_steps`.

    Args:
        sink: takes a metric and a tag of each event.
    """

    phases = frozenset({WINDOW})

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self._events = 0

    def state_dict(self) -> dict[str, int]:
        """Return how often memory ran out."""
        return {"events": self._events}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Count on from there."""
        self._events = state["events"]

    @contextmanager
    def around(self, phase: str, state: TrainState, window: Window) -> Iterator[None]:
        """Put modules and generators back where memory runs out.

        Of a module that is its buffers and attributes, as `core/module_state.py` has them; of a window
        that was interrupted and goes on, what its checkpoint has kept of its start.
        """
        begun, at_start = state.begun is not None, state.begun_at_start
        modules = states_of([state.modules])
        generators = random_states()
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            if begun and at_start is None and out_of_memory(error):
                n = state.accum_steps(state.global_step)
                raise BadInputError(
                    f"out of memory at N = {n} in a window that went on from a checkpoint, which was "
                    "taken under accum.on_oom=raise and does not hold the window's start: "
                    f"resume=<folder of the run> accum.steps={2 * n} goes on with it"
                ) from error
            for module in modules:
                module.put_back()
            set_random_states(generators)
            if begun and at_start is not None:
                put_back(parts_of(state), at_start)
            raise

    def redo(self, state: TrainState, window: Window, error: Exception) -> bool:
        """Double N where memory ran out, for this window and all that follow.

        Raises:
            BadInputError: a micro-batch holds one sample already.
        """
        if not (isinstance(error, (RuntimeError, MemoryError)) and out_of_memory(error)):
            return False
        reason = first_line(error)
        global_step, before = state.global_step, state.accum_steps(state.global_step)
        state.optimizer.zero_grad()
        traceback.clear_frames(error.__traceback__)  # in which the tensors of the failed passes live on
        gc.collect()
        if state.device.type != "cpu":
            torch.accelerator.empty_cache()
        if before >= state.plan.size(global_step):
            raise BadInputError(
                f"out of memory at N = {before}, with micro-batches of one sample, and there is no "
                f"smaller one: {reason}"
            )
        while state.accum_steps(global_step) == before:  # of divisors alone the next may be far
            state.split_factor *= 2
        self._events += 1
        now = state.accum_steps(global_step)
        event = f"step {global_step + 1}: out of memory at N = {before}, repeated with N = {now}"
        log.warning("%s (%s)", event, reason)
        self._sink.record(
            global_step + 1, {metrics.OOM_EVENTS: self._events, metrics.ACCUM_STEPS_NOW: now}
        )
        # Of a schedule its largest, as where nothing had to be split finer.
        used = max(state.accum_steps(windows[0]) for windows in state.stage_windows)
        sizes = split_sizes(state.settings.largest_batch, used)
        tags = {"accum.steps_used": str(used), "micro_batch_sizes": ", ".join(map(str, sizes))}
        self._sink.describe({f"oom.{self._events}": event, **tags})
        if before == 1:
            self._sink.describe({"role": "candidate"})  # it is no longer the large batch in one pass
        return True
