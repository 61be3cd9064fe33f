"""The seeds of an arm as one training: one window of each, one vmapped pass, one optimizer step.

Each seed has its own weights, its own samples and its own sink, and gets the curve that it has alone.
What is not measured here is time and memory: those of one seed alone cannot be seen.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from gaccum_exp.audit.result import Audit
from gaccum_exp.core.stack import (
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
from gaccum_exp.tracking.sink import NonFiniteLossError, Sink
from gaccum_exp.train.audits import RunAudits
from gaccum_exp.train.build import optimizer_of
from gaccum_exp.train.evaluation import Sums, evaluate
from gaccum_exp.train.loop import rates_scaled
from gaccum_exp.train.state import Experiment

OfSeeds = Mapping[str, float | Tensor]
"""Metrics of all seeds: (seeds,), or a number where all have the same."""


class StackedTraining:
    """Experiments that differ in their seed, trained as one.

    Args:
        experiments: one for each seed. Their models are trained, and can be read at any time; their
            optimizers and schedules stay as they are, since one of each is built for all.
    """

    def __init__(self, experiments: Sequence[Experiment]) -> None:
        self.experiments = experiments
        self._first = first = experiments[0]
        self._stack = Stack([experiment.modules for experiment in experiments])
        self._trained = self._stack.trained
        self._optimizer, self._scheduler = optimizer_of(first.settings, self._trained, first.total_steps)

    def windows(self) -> Iterator[StackedWindow]:
        """Yield the windows of all seeds for every step of the training."""
        first = self._first
        return stacked_windows(
            first.train_data,
            [experiment.plan for experiment in self.experiments],
            accum_steps=first.accum_steps,
            global_steps=range(first.total_steps),
        )

    def step(self, window: StackedWindow, global_step: int) -> tuple[OfSeeds, list[int]]:
        """Take one optimizer step.

        Returns:
            Its metrics, and the numbers of the seeds in whose window nothing counts: alone they would
            have taken no step, and here they have taken one with a gradient of zero.
        """
        accum, optimizer = self._first.settings.accum, self._optimizer
        for parameter in self._trained:
            parameter.grad = None
        with rates_scaled(optimizer, self._first.rate_factor(global_step)):
            rate = optimizer.param_groups[0]["lr"]
            loss = accumulate_stacked(
                self._stack,
                self._first.loss_fn,
                window,
                reduction=accum.reduction,
                sum_divisors=[experiment.divisor(global_step) for experiment in self.experiments],
            )
            norms = gradient_norms(self._trained)
            if accum.max_grad_norm is not None:
                clip_gradients(self._trained, accum.max_grad_norm, norms)
            optimizer.step()
        if self._scheduler is not None:
            self._scheduler.step()
        values: OfSeeds = {
            metrics.TRAIN_LOSS: loss.loss_sums / loss.denominators.to(loss.loss_sums),
            metrics.LEARNING_RATE: rate,
            metrics.GRADIENT_NORM: norms,
        }
        return values, (loss.denominators == 0).nonzero().flatten().tolist()

    def evaluate(self) -> OfSeeds:
        """Return each seed's metrics on the held-out data, in one pass over them."""

        def over(of_model: Any) -> Sums:
            sums: Sums = self._stack(of_model)
            return sums

        return evaluate(self._first, over)


@dataclass(slots=True)
class End:
    """How the training of one seed ended."""

    error: Exception | None = None
    """What ended it before its time; the others went on."""
    audit: Audit | None = None
    """The worst of its windows."""


def train_stacked(training: StackedTraining, sinks: Sequence[Sink], progress: Progress) -> list[End]:
    """Train to the end; what is measured of a seed goes to its sink.

    Returns:
        How each seed ended: one whose loss is not finite has its curve up to there delivered.
    """
    first, total = training.experiments[0], training.experiments[0].total_steps
    every = first.settings.train.eval_every_steps
    seeds = [
        _Seed(experiment.settings.seed, sink, RunAudits(experiment, sink))
        for experiment, sink in zip(training.experiments, sinks, strict=True)
    ]
    for step, window in enumerate(training.windows(), 1):
        for number, seed in enumerate(seeds):
            if seed.goes_on and seed.audits.due(step - 1):
                seed.audits.judge([part.each[number] for part in window], step - 1)
        values, empty = training.step(window, step - 1)
        for number in empty:
            seeds[number].end_without_step(step)
        _record(seeds, step, values)
        due = step % every == 0 if every else first.plan.ends_epoch(step - 1)
        if first.eval_data is not None and (due or step == total):
            _record(seeds, step, training.evaluate())
        if step == total or any(seed.sink.due for seed in seeds if seed.goes_on):
            for seed in seeds:
                seed.deliver(progress)
            if not any(seed.goes_on for seed in seeds):
                break
        progress.advance(step)
    return [End(seed.error, seed.audits.worst) for seed in seeds]


@dataclass(slots=True)
class _Seed:
    """One seed while it is trained beside others."""

    seed: int
    sink: Sink
    audits: RunAudits
    error: Exception | None = None

    @property
    def goes_on(self) -> bool:
        return self.error is None

    def deliver(self, progress: Progress) -> None:
        if not self.goes_on:
            return
        try:
            progress.note(self.sink.deliver())
        except NonFiniteLossError as error:
            self.error = error

    def end_without_step(self, step: int) -> None:
        """Alone it would go on, one step behind the others in its schedule and its optimizer's state."""
        self.error = self.error or BadInputError(
            f"sweep.vectorize=seed: nothing in the window of step {step} counts under seed={self.seed}, "
            "which cannot be trained beside others; train it without sweep.vectorize"
        )


def _record(seeds: Sequence[_Seed], step: int, values: OfSeeds) -> None:
    columns = {k: v.unbind() if isinstance(v, Tensor) and v.ndim else v for k, v in values.items()}
    for number, seed in enumerate(seeds):
        if seed.goes_on:
            own = {k: v[number] if isinstance(v, tuple) else v for k, v in columns.items()}
            seed.sink.record(step, own)
