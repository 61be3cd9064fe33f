"""The hook that measures the memory of some windows, and holds all of them to a budget on a CPU."""

import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from gaccum_exp.core.feed import Window
from gaccum_exp.core.modes import eagerly
from gaccum_exp.memory.meter import (
    AllocatorMeter,
    Meter,
    Peak,
    TensorMeter,
    has_counters,
    resident_set_bytes,
)
from gaccum_exp.tracking import metrics
from gaccum_exp.tracking.sink import Sink
from gaccum_exp.train.hooks import OPTIMIZER_STEP, PASSES, WINDOW, Hook, Values
from gaccum_exp.train.state import TrainState
from gaccum_exp.train.step import moves_weights

log = logging.getLogger(__name__)
METERS: tuple[type[Meter], ...] = (TensorMeter, AllocatorMeter)
MEASURED_WINDOW = 2
"""Windows before the one whose memory is measured: the optimizer's state is made in the first."""
Shapes = tuple[tuple[int, ...], ...]
"""Of a micro-batch's tensors."""


class MeterPhases(Hook):
    """Measures the phases of each window with one meter."""

    phases = frozenset({PASSES, OPTIMIZER_STEP})

    def __init__(self, meter: Meter) -> None:
        self._meter = meter

    def around(self, phase: str, state: Any, window: Any) -> AbstractContextManager[None]:
        """Measure a phase."""
        return self._meter.phase(phase)


class MemoryMeters(Hook):
    """Measures the peak memory of one window with each meter that the device has.

    The device's own counters come first where it has them. Windows are full ones in the steady state,
    where there are such, of the stage with the largest micro-batches. A control is there for its loss
    curve alone.

    Args:
        state: of the training.
        sink: takes what was measured, at the end.
        budget_bytes: what a window may hold on a CPU under `accum.on_oom=increase_steps`: a window that
            holds a micro-batch larger in some dimension than those before it is then metered as well,
            and ends with an out-of-memory error beyond the budget. None: no limit.
    """

    phases = frozenset({WINDOW, PASSES, OPTIMIZER_STEP})
    measures_split = True

    def __init__(self, state: TrainState, sink: Sink, budget_bytes: int | None = None) -> None:
        self._sink = sink
        enforced = state.settings.accum.on_oom == "increase_steps" and state.device.type == "cpu"
        self._budget_bytes = budget_bytes if enforced else None
        self._due = measured_windows(state)
        self._meter: Meter | None = None
        """Of the window in hand."""
        self._peak: Peak | None = None
        """Of the window in hand, once it has ended."""
        self._failure: Exception | None = None
        """What a meter failed with."""
        self._unmeasurable: int | None = None
        """The global step of a window that no meter can follow."""
        self._peaks: list[Peak] = []
        self._resident: int | None = None
        self._has_stepped = False
        self._split_factor = state.split_factor
        self._largest: dict[bool, list[Shapes]] = {False: [], True: []}
        """The micro-batches held to the budget so far, without and with optimizer state."""

    def state_dict(self) -> dict[str, Any]:
        """Return the peaks so far, and which windows are to be measured."""
        due = {k: METERS.index(kind) for k, kind in self._due.items()}
        return {"due": due, "peaks": [asdict(p) for p in self._peaks], "resident": self._resident}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self._due = {k: METERS[kind] for k, kind in state["due"].items()}
        self._peaks = [Peak(**peak) for peak in state["peaks"]]
        self._resident = state["resident"]

    def begin(self, state: TrainState) -> None:
        """Measure later windows in place of those that a training which goes on has behind it."""
        self._has_stepped = bool(state.optimizer.state)
        for global_step in sorted(self._due)[len(self._peaks) :]:
            if global_step < state.global_step:
                self._postpone(state, global_step)

    def due(self, global_step: int) -> bool:
        """Whether the memory of this window is to be measured."""
        return global_step in self._due

    def before(self, state: TrainState, window: Window) -> None:
        """Wait for the steady state, where optimizer state is there, and for a window that is whole."""
        waits = not self._has_stepped and state.global_step >= MEASURED_WINDOW
        if waits or state.begun is not None:
            self._postpone(state, state.global_step)

    def around(self, phase: str, state: TrainState, window: Window) -> AbstractContextManager[None]:
        """Meter the window, and each of its phases."""
        if phase != WINDOW:
            return nullcontext() if self._meter is None else self._meter.phase(phase)
        self._peak = None
        if state.global_step == self._unmeasurable:
            return nullcontext()
        kind: Any = self._due.get(state.global_step)
        if kind is None and not self.could_exceed_budget(state, window):
            return nullcontext()
        if kind in (None, TensorMeter):
            kind = partial(TensorMeter, budget_bytes=self._budget_bytes)
        return self._metered(state, kind)

    @contextmanager
    def _metered(self, state: TrainState, kind: Any) -> Iterator[None]:
        buffers = [(buffer, buffer.clone()) for buffer in state.modules.buffers()]
        loss_fn = state.loss_fn
        try:
            self._meter = meter = kind(state.modules, state.optimizer, state.device)
            # A tracker does not see into compiled kernels.
            with meter, eagerly() if isinstance(meter, TensorMeter) else nullcontext():
                state.loss_fn = meter.loss_fn(loss_fn)
                yield
            self._peak = meter.peak()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            # Once the optimizer step has begun, weights may have moved already.
            if self._meter is None or OPTIMIZER_STEP not in self._meter.begun:
                self._failure = error
                for buffer, before in buffers:
                    buffer.copy_(before)
            raise
        finally:
            state.loss_fn, self._meter = loss_fn, None

    def redo(self, state: TrainState, window: Window, error: Exception) -> bool:
        """Have a window again without a meter, where it failed under one.

        Either the tracker cannot follow this model, or the step itself fails and will do so again.
        """
        if error is not self._failure or not state.strategy.leaves_gradient:
            return False
        self._unmeasurable = state.global_step
        return True

    def after(self, state: TrainState, window: Window, values: Values) -> None:
        """Keep what was measured; on a CPU, beside it, what the process holds in all."""
        self._has_stepped |= moves_weights(values)
        global_step = state.global_step - 1
        if global_step == self._unmeasurable:  # said of a step that succeeds without the meter
            log.warning("memory was not measured: %s: %s", type(self._failure).__name__, self._failure)
            self._failure = None
        if global_step not in self._due:
            return
        if not moves_weights(values):
            self._postpone(state, global_step)
        elif self._peak is not None:
            self._peaks.append(self._peak)
            if state.device.type == "cpu":
                self._resident = resident_set_bytes()

    def end(self, state: TrainState) -> None:
        """Record the peaks: the device's own is the one to compare, the tracker's split beside it."""
        if not self._peaks:
            return
        tracked = next((peak for peak in self._peaks if peak.parts), None)
        compared = next((peak for peak in self._peaks if not peak.parts), self._peaks[0])
        values: dict[str, float] = {metrics.PEAK_BYTES: compared.bytes}
        if tracked is not None:
            values[metrics.TRACKED_PEAK_BYTES] = tracked.bytes
            values |= {metrics.memory_part(part): size for part, size in tracked.parts.items()}
        values |= {metrics.memory_part(name): size for name, size in compared.counters.items()}
        if self._resident is not None:
            values[metrics.RESIDENT_SET_BYTES] = self._resident
        self._sink.record(state.global_step, values)
        source = "tracker" if compared.parts else "allocator"
        self._sink.describe({"memory.peak_phase": compared.phase, "memory.source": source})

    def _postpone(self, state: TrainState, global_step: int) -> None:
        """Measure a later window in place of this one, if it was to be measured and there is one."""
        if global_step in self._due:
            after = max(global_step, state.global_step - 1)
            windows = (k for k in _telling_stage(state) if k > after and k not in self._due)
            later = next((k for k in windows if state.is_full(k)), None)
            if later is not None:
                self._due[later] = self._due.pop(global_step)

    def could_exceed_budget(self, state: TrainState, window: Window) -> bool:
        """Whether a window could hold more than any before it, where there is a budget."""
        if self._budget_bytes is None:
            return False
        if self._split_factor != state.split_factor:
            self._split_factor, self._largest = state.split_factor, {False: [], True: []}
        largest = self._largest[bool(state.optimizer.state)]
        before = len(largest)
        for micro_batch in window:
            leaves = tree_leaves(micro_batch)
            shapes = tuple(tuple(leaf.shape) for leaf in leaves if isinstance(leaf, Tensor))
            if not any(_covers(larger, shapes) for larger in largest):
                largest.append(shapes)
        return len(largest) > before


def measured_windows(state: TrainState) -> dict[int, type[Meter]]:
    """Return the meters of a training by the global step whose window each is for."""
    if state.settings.audit.control_seed is not None:
        return {}
    kinds: list[type[Meter]] = [TensorMeter]
    if has_counters(state.device):
        kinds.insert(0, AllocatorMeter)
    early = _telling_stage(state)[: 2 * (MEASURED_WINDOW + len(kinds))]
    best = sorted(early, key=lambda k: (not state.is_full(k), max(0, MEASURED_WINDOW - k), k))
    return dict(zip(sorted(best[: len(kinds)]), kinds, strict=False))


def _telling_stage(state: TrainState) -> range:
    """Return the windows of the stage with the largest micro-batches, of such stages that with most.

    From the second micro-batch on the gradients are there beside the activations.
    """

    def size(windows: range) -> tuple[int, int]:
        stage = state.settings.stages[state.plan.stage_of(windows[0])]
        return -(-stage.global_batch_size // stage.accum_steps), stage.accum_steps

    return max(state.stage_windows, key=size)


def _covers(larger: Shapes, shapes: Shapes) -> bool:
    """Whether every tensor is as large in every dimension: fewer elements, but longer, may hold more."""
    return len(larger) == len(shapes) and all(
        len(ours) == len(theirs) and all(n >= m for n, m in zip(ours, theirs, strict=True))
        for ours, theirs in zip(larger, shapes, strict=True)
    )
