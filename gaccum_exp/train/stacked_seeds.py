"""The seeds of an arm as one training: one window of each, one vmapped pass, one optimizer step.

Each seed has its own weights, its own samples and its own sink, and gets the curve that it has alone.
What is not measured here is time and memory: those of one seed alone cannot be seen.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from gaccum_exp.audit.result import Audit
from gaccum_exp.core.reductions import stacked
from gaccum_exp.core.stack import (
    MicroBatches,
    Stack,
    StackedWindow,
    accumulate_stacked,
    clip_gradients,
    gradient_norms,
    stacked_windows,
)
from gaccum_exp.errors import BadInputError
from gaccum_exp.tracking import metrics
from gaccum_exp.tracking.progress import Progress
from gaccum_exp.tracking.sink import NonFiniteLossError, Point, Sink
from gaccum_exp.train.audits import WindowAudits
from gaccum_exp.train.build import scheduler_of
from gaccum_exp.train.evaluation import Evaluation, Sums
from gaccum_exp.train.hooks import OPTIMIZER_STEP, PASSES, Hook, Hooks, Stopping, Values
from gaccum_exp.train.loop import train
from gaccum_exp.train.optimizers import optimizer_of
from gaccum_exp.train.recording import recording_hooks
from gaccum_exp.train.state import TrainState
from gaccum_exp.train.step import rates_scaled
from gaccum_exp.train.stopping import NEVER, Stop

log = logging.getLogger(__name__)


class StackedState:
    """The state of trainings that differ in their seed, trained as one: values are (seeds,).

    Args:
        seeds: the state of each. Their models are trained, and can be read at any time; their optimizers
            and schedules stay as they are, since one of each is built for all.
    """

    split_factor = 1

    def __init__(self, seeds: Sequence[TrainState]) -> None:
        self.seeds = seeds
        self.errors: list[Exception | None] = [None for _ in seeds]
        """Of each seed, what ended it before its time; the others go on."""
        first = seeds[0]
        self.total_steps = first.total_steps
        self.stack = Stack([seed.modules for seed in seeds])
        self.trained = self.stack.trained
        self.optimizer = optimizer_of(first.settings, first.modules, self.trained)
        self.scheduler = scheduler_of(first.settings, self.optimizer, first.schedule_steps)

    @property
    def global_step(self) -> int:
        """Windows used so far, by every seed."""
        return self.seeds[0].global_step

    @global_step.setter
    def global_step(self, global_step: int) -> None:
        for seed in self.seeds:
            seed.global_step = global_step

    @property
    def done(self) -> bool:
        """Whether no window is left, or no seed."""
        return self.global_step >= self.total_steps or all(self.errors)

    def windows_from(self, first: int) -> Iterator[StackedWindow]:
        """Yield the windows of all seeds in order, from a global step on."""
        return stacked_windows(
            self.seeds[0].train_data,
            [seed.plan for seed in self.seeds],
            accum_steps=self.seeds[0].accum_steps,
            global_steps=range(first, self.total_steps),
        )

    def over(self, of_model: Any) -> Sums:
        """Return what a function of a model gives for each seed, in one pass."""
        sums: Sums = self.stack(of_model)
        return sums


def take_stacked_step(state: StackedState, window: StackedWindow, hooks: Hooks) -> Values:
    """Take one optimizer step of all seeds; return its metrics, (seeds,) or a number for all."""
    first, optimizer, global_step = state.seeds[0], state.optimizer, state.global_step
    for parameter in state.trained:
        parameter.grad = None
    factor = first.rate_factor(global_step)
    with nullcontext() if factor == 1.0 else rates_scaled(optimizer, factor):
        rate = optimizer.param_groups[0]["lr"]
        with hooks.around(PASSES, state, window):
            reduction = stacked([seed.reduction_at(global_step) for seed in state.seeds])
            loss = accumulate_stacked(state.stack, first.loss_fn, window, reduction)
            norms = gradient_norms(state.trained)
            limit = first.settings.accum.max_grad_norm
            if limit is not None:
                clip_gradients(state.trained, limit, norms)
        with hooks.around(OPTIMIZER_STEP, state, window):
            optimizer.step()
    if state.scheduler is not None:
        for _ in range(first.schedule_steps_of(global_step)):
            state.scheduler.step()
    for number in (loss.denominators == 0).nonzero().flatten().tolist():
        # Alone it would go on, one step behind the others in its schedule and its optimizer's state.
        state.errors[number] = state.errors[number] or BadInputError(
            f"sweep.vectorize=seed: nothing in the window of step {global_step + 1} counts under "
            f"seed={state.seeds[number].settings.seed}, which cannot be trained beside others; train it "
            "without sweep.vectorize"
        )
    return {
        metrics.TRAIN_LOSS: loss.mean,
        metrics.LEARNING_RATE: rate,
        metrics.GRADIENT_NORM: norms,
    }


class OfEachSeed(Hook):
    """Lifts a hook of one training over those of the seeds: each looks at its own windows beforehand."""

    def __init__(self, hooks: Sequence[Hook]) -> None:
        self._hooks = hooks

    def before(self, state: StackedState, window: Sequence[MicroBatches]) -> None:
        """Let each seed that goes on look at its own micro-batches."""
        for number, (seed, hook) in enumerate(zip(state.seeds, self._hooks, strict=True)):
            if state.errors[number] is None:
                hook.before(seed, [part.each[number] for part in window])


class StackedSink(Sink):
    """Takes metrics of all seeds, and gives each seed that goes on its own."""

    def __init__(self, sinks: Sequence[Sink], state: StackedState) -> None:
        super().__init__()
        self._sinks, self._errors = sinks, state.errors
        self.last = sinks[0].last  # which progress shows

    @property
    def due(self) -> bool:
        """Whether it is time for a delivery of any."""
        return any(self._sinks[number].due for number in self._going_on())

    def record(self, global_step: int, values: Values) -> None:
        """Take the metrics of a global step: (seeds,), or a number where all agree."""
        columns = {k: v.unbind() if isinstance(v, Tensor) and v.ndim else v for k, v in values.items()}
        for number in self._going_on():
            own = {k: v[number] if isinstance(v, tuple) else v for k, v in columns.items()}
            self._sinks[number].record(global_step, own)

    def deliver(self) -> list[Point]:
        """Deliver of each; return all."""
        return [point for number in self._going_on() for point in self._sinks[number].deliver()]

    def flush(self) -> None:
        """Send what was recorded of each."""
        for number in self._going_on():
            self._sinks[number].flush()

    def require_finite(self) -> None:
        """End the seeds whose loss is not finite."""
        for number in self._going_on():
            try:
                self._sinks[number].require_finite()
            except NonFiniteLossError as error:
                self._errors[number] = error

    def _going_on(self) -> list[int]:
        return [number for number, error in enumerate(self._errors) if error is None]


@dataclass(slots=True)
class End:
    """How the training of one seed ended."""

    error: Exception | None = None
    """What ended it before its time; the others went on."""
    audit: Audit | None = None
    """The worst of its windows."""


def train_stacked(
    state: StackedState, sinks: Sequence[Sink], progress: Progress, stop: Stop = NEVER
) -> list[End]:
    """Train to the end, or until it is stopped; what is measured of a seed goes to its sink.

    Returns:
        How each seed ended: one whose loss is not finite has its curve up to there delivered.
    """
    when = state.seeds[0].settings.checkpoint
    if when.every_steps or when.every_minutes:
        log.info("sweep.vectorize=seed: no checkpoints; what is interrupted begins again")
    sink = StackedSink(sinks, state)
    audits = [WindowAudits(seed, own, stop) for seed, own in zip(state.seeds, sinks, strict=True)]
    evaluation = Evaluation(sink, state.seeds[0], state.over, stop)
    hooks = Hooks([Stopping(stop), *recording_hooks(sink, progress, evaluation), OfEachSeed(audits)])
    train(state, hooks, take_stacked_step)
    return [End(error, own.worst) for error, own in zip(state.errors, audits, strict=True)]
