"""The training loop: one window, one optimizer step, measured."""

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gaccum_exp.audit.result import Audit
from gaccum_exp.core.accumulate import WindowLoss, accumulate_gradients
from gaccum_exp.core.feed import Window, windows
from gaccum_exp.core.gradient_norm import gradient_norm
from gaccum_exp.core.losses.micro_batch import tokens_in
from gaccum_exp.core.modes import eagerly
from gaccum_exp.core.seeding import derive_seed, seed_model
from gaccum_exp.errors import BadInputError
from gaccum_exp.memory.available import out_of_memory
from gaccum_exp.memory.meter import (
    FORWARD_BACKWARD,
    OPTIMIZER_STEP,
    Meter,
    Peak,
    TrackedWindow,
)
from gaccum_exp.tracking import metrics
from gaccum_exp.tracking.progress import Progress
from gaccum_exp.tracking.sink import Sink
from gaccum_exp.train.audits import RunAudits
from gaccum_exp.train.clock import WindowClock
from gaccum_exp.train.compiled import check_compiled
from gaccum_exp.train.evaluation import evaluate
from gaccum_exp.train.memory_meters import MEASURED_WINDOW, RunMeters
from gaccum_exp.train.out_of_memory import MemoryGuard
from gaccum_exp.train.runtime import needs_closure
from gaccum_exp.train.state import Experiment

log = logging.getLogger(__name__)
Phase = Callable[[str], AbstractContextManager[None]]


def train(
    experiment: Experiment, sink: Sink, progress: Progress, budget_bytes: int | None = None
) -> Audit | None:
    """Train to the end; everything measured goes to the sink.

    Args:
        experiment: its model is trained.
        sink: takes metrics and tags.
        progress: tells of it while it lasts.
        budget_bytes: what a window may hold on a CPU under `accum.on_oom=increase_steps`.

    Returns:
        The worst audit of the run's windows; None where none was audited.

    Raises:
        NonFiniteLossError: the loss became NaN or infinite; the curve up to there is delivered.
    """
    settings, total = experiment.settings, experiment.total_steps
    every = settings.train.eval_every_steps
    clock = WindowClock(experiment.device)
    meters = RunMeters(experiment)
    audits = RunAudits(experiment, sink)
    if settings.runtime.compile:
        sink.record(0, check_compiled(experiment))
    guard = MemoryGuard(experiment, sink, budget_bytes)
    feed = training_windows(experiment)
    tally = _Tally()
    for step in range(1, total + 1):
        if not tally.steps and step > MEASURED_WINDOW:
            meters.postpone(step - 1)  # there is no optimizer state yet
        while True:
            try:
                with guard.attempt():
                    if step - 1 in meters.due or audits.due(step - 1):  # neither is a measure of time
                        values = _observed_step(experiment, next(feed), step - 1, audits, meters, guard)
                    else:
                        values = _timed_step(experiment, feed, step - 1, clock, guard)
                break
            except (RuntimeError, MemoryError) as error:
                if not (guard.active and out_of_memory(error)):
                    raise
                reason = _first_line(error)
            guard.split_finer(step - 1, reason)
            feed = training_windows(experiment, step - 1)
        sink.record(step, values)
        tally.count(values)
        due = step % every == 0 if every else experiment.plan.ends_epoch(step - 1)
        if experiment.eval_data is not None and (due or step == total):
            sink.record(step, evaluate(experiment))
        if sink.due or step == total:
            progress.note(sink.deliver())
        progress.advance(step)
    sink.record(total, tally.numbers())
    tally.require_a_step()
    _record_time(sink, experiment, clock)
    meters.record(sink)
    sink.deliver()
    return audits.worst


@dataclass(slots=True)
class _Tally:
    """How many windows were steps, and how many were none."""

    steps: int = 0
    empty: int = 0
    skipped: int = 0

    def count(self, values: Mapping[str, float | Tensor]) -> None:
        """Take the metrics of a window.

        Raises:
            BadInputError: no later window can be a step.
        """
        self.empty += not values
        self.skipped += bool(values) and not _is_step(values)
        self.steps += _is_step(values)
        if values.get(metrics.LOSS_SCALE) == 0:
            raise BadInputError(
                f"runtime.precision=fp16: the loss scale has sunk to 0 after {self.skipped} windows "
                "without a finite gradient; use runtime.precision=bf16 or a smaller learning rate"
            )

    def numbers(self) -> dict[str, float]:
        """Return the metrics of windows that were no steps, where there are such."""
        counts = {metrics.EMPTY_WINDOWS: self.empty, metrics.SKIPPED_WINDOWS: self.skipped}
        return {key: float(count) for key, count in counts.items() if count}

    def require_a_step(self) -> None:
        """Refuse to call a training finished that never began."""
        if self.steps:
            return
        if not self.skipped:
            raise BadInputError("nothing in data.train counts: the denominator of every window is 0")
        raise BadInputError(
            "runtime.precision=fp16: no window had a finite gradient, so none was a step"
        )


def _is_step(values: Mapping[str, float | Tensor]) -> bool:
    """Whether a window of these metrics moved the weights: something counted, and was finite."""
    return bool(values) and not values.get(metrics.SKIPPED)


def train_step(
    experiment: Experiment, window: Window, global_step: int, phase: Phase = lambda _: nullcontext()
) -> dict[str, float | Tensor]:
    """Take one optimizer step on one window.

    Args:
        experiment: its model, optimizer and schedule move on by one step.
        window: the micro-batches, on the host.
        global_step: windows before this one; seeds what the model draws.
        phase: entered around the passes and around the step, for whoever measures them.

    Returns:
        The metrics of this step, as tensors where reading them would wait for the device; empty where
        nothing in the window counted, and then no step was taken.
    """
    optimizer = experiment.optimizer
    factor = experiment.rate_factor(global_step)
    with nullcontext() if factor == 1.0 else rates_scaled(optimizer, factor):
        rate = optimizer.param_groups[0]["lr"]
        if needs_closure(type(optimizer).step):
            with phase(OPTIMIZER_STEP):
                loss, norm = _step_with_closure(experiment, window, global_step)
            scaled: dict[str, float | Tensor] = {}
        else:
            with phase(FORWARD_BACKWARD):
                loss, norm = _fresh_gradients(experiment, window, global_step)
            if loss.denominator == 0:
                return {}
            with phase(OPTIMIZER_STEP):
                scaled = _step_of(experiment.scaler, optimizer)
    if loss.denominator == 0:
        return {}
    values: dict[str, float | Tensor] = {
        metrics.TRAIN_LOSS: loss.loss_sum / loss.denominator,
        metrics.LEARNING_RATE: rate,
        metrics.GRADIENT_NORM: norm,
        **scaled,
    }
    if not _is_step(values):  # what is not finite is no measure, and no end of the training either
        return {k: v for k, v in values.items() if math.isfinite(float(v))}
    if experiment.scheduler is not None:
        experiment.scheduler.step()
    return values


def _fresh_gradients(
    experiment: Experiment, window: Window, global_step: int
) -> tuple[WindowLoss, Tensor]:
    """Leave the window's gradient in `.grad`, and of earlier windows nothing."""
    seed_model(derive_seed(experiment.settings.seed, "model", global_step), experiment.device)
    for parameter in experiment.parameters:  # a tenth of the time of the optimizer's own zero_grad
        parameter.grad = None
    return window_gradients(experiment, window, global_step)


def _step_with_closure(
    experiment: Experiment, window: Window, global_step: int
) -> tuple[WindowLoss, Tensor]:
    """Let an optimizer evaluate the window as often as it likes, as L-BFGS does.

    Returns:
        What its first evaluation found; where nothing in the window counts, no step is taken.
    """
    found: list[tuple[WindowLoss, Tensor]] = []

    def evaluate_window() -> Tensor:
        loss, norm = _fresh_gradients(experiment, window, global_step)
        found.append((loss, norm))
        if loss.denominator == 0:
            raise _NothingCountsError
        return loss.loss_sum / loss.denominator

    try:
        with _no_way_back():
            experiment.optimizer.step(evaluate_window)  # type: ignore[arg-type]
    except _NothingCountsError:
        pass
    return found[0]


def window_gradients(
    experiment: Experiment, window: Window, global_step: int
) -> tuple[WindowLoss, Tensor]:
    """Leave in `.grad` what the optimizer is to get of a window: accumulated, unscaled, clipped.

    Returns:
        What the window added up to, and the gradient's norm before it was clipped, 0-dim.
    """
    accum = experiment.settings.accum
    loss = accumulate_gradients(
        experiment.model,
        experiment.loss_fn,
        window,
        reduction=accum.reduction,  # type: ignore[arg-type]  # validated
        sum_divisor=experiment.divisor(global_step),
        backward=experiment.backward,
        buffer_dtype=experiment.buffer_dtype,
    )
    if experiment.scaler is not None and loss.denominator != 0:
        experiment.scaler.unscale_(experiment.optimizer)
    norm = gradient_norm(experiment.parameters)
    if accum.max_grad_norm is not None:
        torch.nn.utils.clip_grads_with_norm_(experiment.parameters, accum.max_grad_norm, norm)
    return loss, norm


@contextmanager
def _no_way_back() -> Iterator[None]:
    """Around an optimizer step: what it has moved when memory runs out cannot be repeated."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        raise BadInputError(
            "out of memory in the optimizer step, which no N makes smaller "
            f"({_first_line(error)}); a fused optimizer (+optimizer.fused=true) needs less"
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _step_of(
    scaler: torch.amp.GradScaler | None, optimizer: torch.optim.Optimizer
) -> dict[str, float | Tensor]:
    """Step; under a scaler, unless the gradient is not finite. Return what the scaler did."""
    with _no_way_back():
        if scaler is None:
            optimizer.step()
            return {}
        scale = scaler.get_scale()
        scaler.step(optimizer)
    scaler.update()
    skipped = scaler.get_scale() < scale or scale == 0  # nothing is finite once divided by 0
    return {metrics.LOSS_SCALE: scale, metrics.SKIPPED: float(skipped)}


@contextmanager
def rates_scaled(optimizer: torch.optim.Optimizer, factor: float) -> Iterator[None]:
    """Multiply the learning rates for the length of a step: what the schedule holds stays its own."""
    if factor == 1.0:
        yield
        return
    rates = [group["lr"] for group in optimizer.param_groups]
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate * factor
    try:
        yield
    finally:
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate


def _timed_step(
    experiment: Experiment,
    feed: Iterator[Window],
    global_step: int,
    clock: WindowClock,
    guard: MemoryGuard,
) -> dict[str, float | Tensor]:
    """Fetch a window and take its step; a full one of the arm's N is a measure of time."""
    stage = experiment.settings.stages[experiment.plan.stage_of(global_step)]
    named = stage.accum_steps == experiment.settings.accum_steps
    if not (named and experiment.plan.is_full(global_step)):
        return _guarded_step(experiment, next(feed), global_step, guard)
    start = clock.now()
    window = next(feed)
    values = _guarded_step(experiment, window, global_step, guard)
    clock.count_window(start)
    if experiment.counts_tokens:
        ignored = experiment.ignore_index
        counts = (tokens_in(micro_batch, ignored) for micro_batch in window)
        clock.count_tokens(sum(int(n) for n in counts if n is not None))
    return values


def _guarded_step(
    experiment: Experiment, window: Window, global_step: int, guard: MemoryGuard
) -> dict[str, float | Tensor]:
    """Take a step, within the budget where there is one."""
    if guard.follows(window):
        return measured_step(experiment, window, global_step, guard.tracked)[0]
    return train_step(experiment, window, global_step)


def _observed_step(
    experiment: Experiment,
    window: Window,
    global_step: int,
    audits: RunAudits,
    meters: RunMeters,
    guard: MemoryGuard,
) -> dict[str, float | Tensor]:
    """Take a step whose window is audited first, or whose memory is measured, or both."""
    if audits.due(global_step):
        audits.judge(window, global_step)
    if global_step not in meters.due:
        return _guarded_step(experiment, window, global_step, guard)
    kind = meters.due[global_step]
    meter = guard.tracked if kind is TrackedWindow else kind
    values, peak = measured_step(experiment, window, global_step, meter)
    if not _is_step(values):
        meters.postpone(global_step)
    elif peak is not None:
        meters.take(peak)
    return values


def measured_step(
    experiment: Experiment, window: Window, global_step: int, kind: Callable[..., Meter]
) -> tuple[dict[str, float | Tensor], Peak | None]:
    """Take the same step while a meter follows its memory; no peak where the meter cannot."""
    buffers = [(buffer, buffer.clone()) for buffer in experiment.modules.buffers()]
    meter: Meter | None = None
    try:
        meter = kind(experiment.modules, experiment.optimizer, experiment.device)
        # A tracker does not see into compiled kernels.
        with meter, eagerly() if isinstance(meter, TrackedWindow) else nullcontext():
            watched = replace(experiment, loss_fn=meter.loss_fn(experiment.loss_fn))
            values = train_step(watched, window, global_step, meter.phase)
        return values, meter.peak()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        if meter is not None and OPTIMIZER_STEP in meter.begun:
            raise  # weights may have moved already
        # Either the tracker cannot follow this model, or the step itself fails and will do so again.
        failure = f"{type(error).__name__}: {error}"
    for buffer, before in buffers:
        buffer.copy_(before)
    values = train_step(experiment, window, global_step)
    log.warning("memory was not measured: %s", failure)
    return values, None


def training_windows(experiment: Experiment, first: int = 0) -> Iterator[Window]:
    """Yield the windows of the training in order, from a global step on."""
    return windows(
        experiment.train_data,
        replace(experiment.plan, control_seed=experiment.settings.audit.control_seed),
        accum_steps=experiment.accum_steps,
        global_steps=range(first, experiment.total_steps),
        workers=experiment.settings.data.workers,
        pin=experiment.device.type != "cpu",
    )


def _record_time(sink: Sink, experiment: Experiment, clock: WindowClock) -> None:
    step_s = clock.step_time_s()
    if step_s is not None:
        samples_per_s = experiment.plan.full_window / step_s
        values = {metrics.STEP_TIME_S: step_s, metrics.SAMPLES_PER_S: samples_per_s}
        tokens_per_s = clock.tokens_per_s()
        if tokens_per_s:
            values[metrics.TOKENS_PER_S] = tokens_per_s
        sink.record(experiment.total_steps, values)


class _NothingCountsError(Exception):
    """The window's denominator is zero: there is no step to take."""
