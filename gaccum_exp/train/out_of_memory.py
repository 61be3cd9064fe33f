"""Out of memory in a window: the same window again, in twice as many micro-batches.

The samples, the weights and the random state are those of the first attempt, so the optimizer step is
the one that a run with that N from the start would have taken. An accelerator says itself when it has
run out; on a CPU, where the system would end the process instead, the budget is enforced on tracked
tensors, in windows with a micro-batch that is larger in some dimension than those followed before.
"""

import gc
import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from gaccum_exp.core.feed import Window
from gaccum_exp.core.seeding import random_states, set_random_states
from gaccum_exp.core.window import split_sizes
from gaccum_exp.errors import BadInputError
from gaccum_exp.memory.meter import TrackedWindow
from gaccum_exp.tracking import metrics
from gaccum_exp.tracking.sink import Sink
from gaccum_exp.train.state import Experiment

log = logging.getLogger(__name__)
Shapes = tuple[tuple[int, ...], ...]
"""Of a micro-batch's tensors."""


class MemoryGuard:
    """Of one training run, under `accum.on_oom=increase_steps`; else it does nothing.

    Args:
        experiment: whose N grows.
        sink: takes a metric and a tag of each event.
        budget_bytes: what a window may hold on a CPU; None: no limit.
    """

    def __init__(self, experiment: Experiment, sink: Sink, budget_bytes: int | None) -> None:
        self._experiment, self._sink = experiment, sink
        self.active = experiment.settings.accum.on_oom == "increase_steps"
        enforced = self.active and experiment.device.type == "cpu"
        self._budget_bytes = budget_bytes if enforced else None
        self._events = 0
        self._followed: dict[bool, list[Shapes]] = {False: [], True: []}
        """The micro-batches followed so far, without and with optimizer state."""

    @property
    def tracked(self) -> partial[TrackedWindow]:
        """What follows a window, and ends it beyond the budget."""
        return partial(TrackedWindow, budget_bytes=self._budget_bytes)

    def follows(self, window: Window) -> bool:
        """Whether a window has to be followed, since it could hold more than any before it."""
        if self._budget_bytes is None:
            return False
        followed = self._followed[bool(self._experiment.optimizer.state)]
        before = len(followed)
        for shapes in map(_shapes, window):
            if not any(_covers(larger, shapes) for larger in followed):
                followed.append(shapes)
        return len(followed) > before

    def attempt(self) -> AbstractContextManager[None]:
        """Around a window: where memory runs out, leave modules and generators as they were before.

        Of a module that is its buffers and attributes, whether they are set anew or tensors that are
        written to; what is changed inside its lists and other objects stays so.

        Raises:
            RuntimeError: as the window did.
        """
        return self._attempt() if self.active else nullcontext()

    @contextmanager
    def _attempt(self) -> Iterator[None]:
        modules = [_ModuleState(module) for module in self._experiment.modules.modules()]
        states = random_states()
        try:
            yield
        except (RuntimeError, MemoryError):
            for module in modules:
                module.put_back()
            set_random_states(states)
            raise

    def split_finer(self, global_step: int, reason: str) -> None:
        """Double N after a window in which memory ran out, for it and all that follow.

        Raises:
            BadInputError: a micro-batch holds one sample already.
        """
        experiment = self._experiment
        before = experiment.accum_steps(global_step)
        experiment.optimizer.zero_grad()
        gc.collect()  # what the failed passes held together
        if experiment.device.type != "cpu":
            torch.accelerator.empty_cache()
        if before >= experiment.plan.size(global_step):
            raise BadInputError(
                f"out of memory at N = {before}, with micro-batches of one sample, and there is no "
                f"smaller one: {reason}"
            )
        while experiment.accum_steps(global_step) == before:  # of divisors alone the next may be far
            experiment.splitting.factor *= 2
        self._followed = {False: [], True: []}
        self._events += 1
        now = experiment.accum_steps(global_step)
        said = f"step {global_step + 1}: out of memory at N = {before}, repeated with N = {now}"
        log.warning("%s (%s)", said, reason)
        values = {metrics.OOM_EVENTS: self._events, metrics.ACCUM_STEPS_NOW: now}
        self._sink.record(global_step + 1, values)
        # Of a schedule its largest, as where nothing had to be split finer.
        used = max(experiment.accum_steps(windows[0]) for windows in experiment.stage_windows)
        sizes = split_sizes(experiment.settings.data.global_batch_size, used)
        tags = {"accum.steps_used": str(used), "micro_batch_sizes": ", ".join(map(str, sizes))}
        self._sink.describe({f"oom.{self._events}": said, **tags})
        if before == 1:
            self._sink.describe({"role": "candidate"})  # it is no longer the large batch in one pass


class _ModuleState:
    """A module's buffers and attributes, to be put back."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._attributes, self._buffers = dict(vars(module)), dict(module._buffers)
        tensors = (t for t in (*self._attributes.values(), *self._buffers.values()))
        self._values = [(t, t.clone()) for t in tensors if _is_plain(t)]

    @torch.no_grad()
    def put_back(self) -> None:
        for held, before in (
            (vars(self._module), self._attributes),
            (self._module._buffers, self._buffers),
        ):
            held.clear()
            held.update(before)
        for tensor, value in self._values:
            tensor.copy_(value)


def _is_plain(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_leaf and not isinstance(value, nn.Parameter)


def _shapes(micro_batch: Any) -> Shapes:
    return tuple(tuple(leaf.shape) for leaf in tree_leaves(micro_batch) if isinstance(leaf, Tensor))


def _covers(larger: Shapes, shapes: Shapes) -> bool:
    """Whether every tensor is as large in every dimension: fewer elements, but longer, may hold more."""
    return len(larger) == len(shapes) and all(
        len(ours) == len(theirs) and all(n >= m for n, m in zip(ours, theirs, strict=True))
        for ours, theirs in zip(larger, shapes, strict=True)
    )
