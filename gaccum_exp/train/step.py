"""One optimizer step on one window."""

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from gaccum_exp.core.accumulate import accumulate
from gaccum_exp.core.feed import Window
from gaccum_exp.core.gradient import gradient_norm
from gaccum_exp.core.seeding import derive_seed, seed_model
from gaccum_exp.core.window_loss import WindowLoss
from gaccum_exp.errors import BadInputError, first_line
from gaccum_exp.memory.available import out_of_memory
from gaccum_exp.tracking import metrics
from gaccum_exp.train.device_and_precision import needs_closure
from gaccum_exp.train.hooks import OPTIMIZER_STEP, PASSES, Hooks, Values
from gaccum_exp.train.state import TrainState

NO_HOOKS = Hooks()


def take_step(state: TrainState, window: Window, hooks: Hooks = NO_HOOKS) -> Values:
    """Take one optimizer step on one window, on the host, and bring the schedule to the next one.

    Returns:
        The metrics of this step, as tensors where reading them would wait for the device; empty where
        nothing in the window counted, and then no step was taken.
    """
    optimizer, scaler = state.optimizer, state.scaler
    scaled: dict[str, float | Tensor] = {}
    with _rates_of_step(state):
        rate = optimizer.param_groups[0]["lr"]
        if needs_closure(type(optimizer).step):
            with hooks.around(OPTIMIZER_STEP, state, window):  # which holds the passes too
                loss, norm = _step_with_closure(state, window, hooks)
        else:
            with hooks.around(PASSES, state, window):
                loss, norm = window_gradients(state, window, hooks)
            if loss.denominator != 0:
                with hooks.around(OPTIMIZER_STEP, state, window), _irreversible():
                    if scaler is None:
                        state.strategy.step_of(optimizer)()
                    else:
                        scale = scaler.get_scale()
                        scaler.step(optimizer)
                        scaler.update()
                        # Nothing is finite once divided by 0.
                        skipped = scaler.get_scale() < scale or scale == 0
                        scaled = {metrics.LOSS_SCALE: scale, metrics.SKIPPED: float(skipped)}
    values: dict[str, float | Tensor] = {}
    if loss.denominator != 0:
        values = {
            metrics.TRAIN_LOSS: loss.mean,
            **{metrics.of_term(metrics.TRAIN_LOSS, k): term.mean for k, term in loss.terms.items()},
            metrics.LEARNING_RATE: rate,
            **({} if norm is None else {metrics.GRADIENT_NORM: norm}),
            **scaled,
        }
    moved = moves_weights(values)
    _follow_schedule(state, moved)
    if not moved:  # what is not finite is no measure, and no end of the training either
        return {k: v for k, v in values.items() if math.isfinite(float(v))}
    return values


def _follow_schedule(state: TrainState, moved: bool) -> None:
    """Bring the schedule to the next window; one in samples passes by a window that was no step."""
    if state.scheduler is None or not (moved or state.growth is not None):
        return
    with nullcontext() if moved else warnings.catch_warnings(action="ignore"):  # which torch warns of
        for _ in range(state.schedule_steps_of(state.global_step)):
            state.scheduler.step()


def moves_weights(values: Values) -> bool:
    """Whether a window of these metrics was an optimizer step: something counted, and was finite."""
    return bool(values) and not values.get(metrics.SKIPPED)


def window_gradients(
    state: TrainState, window: Window, hooks: Hooks = NO_HOOKS
) -> tuple[WindowLoss, Tensor | None]:
    """Leave in `.grad` what the optimizer is to get of a window: accumulated, unscaled, clipped.

    A window that was interrupted goes on from `state.begun`.

    Returns:
        What the window added up to, and the gradient's norm before it was clipped, 0-dim; None: the
        strategy leaves no gradient.
    """
    begun, state.begun = state.begun, None
    if begun is None:
        state.begun_sizes = state.begun_at_start = None  # of a window that went on before
        seed_model(derive_seed(state.settings.seed, "model", state.global_step), state.device)
        for parameter in state.parameters:  # a tenth of the time of the optimizer's own zero_grad
            parameter.grad = None
    loss = accumulate(
        state.model,
        state.loss_fn,
        window,
        state.reduction_at(state.global_step),
        state.strategy,
        backward=state.backward,
        begun=begun,
        around=hooks.around_micro_batch(state, window),
        after=hooks.after_micro_batch(state),
    )
    if not state.strategy.leaves_gradient:
        return loss, None
    if state.scaler is not None and loss.denominator != 0:
        state.scaler.unscale_(state.optimizer)
    norm = gradient_norm(state.parameters)
    limit = state.settings.accum.max_grad_norm
    if limit is not None:
        torch.nn.utils.clip_grads_with_norm_(state.parameters, limit, norm)
    return loss, norm


@contextmanager
def _rates_of_step(state: TrainState) -> Iterator[None]:
    """Have the learning rates of a step, while the state knows those of the schedule."""
    factor = state.rate_factor(state.global_step)
    if factor == 1.0:
        yield
        return
    with rates_scaled(state.optimizer, factor) as state.rates:
        try:
            yield
        finally:
            state.rates = None


@contextmanager
def rates_scaled(optimizer: torch.optim.Optimizer, factor: float) -> Iterator[list[Any]]:
    """Multiply the learning rates for the length of a step; yield what the schedule holds."""
    rates = [group["lr"] for group in optimizer.param_groups]
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate * factor
    try:
        yield rates
    finally:
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate


def _step_with_closure(
    state: TrainState, window: Window, hooks: Hooks
) -> tuple[WindowLoss, Tensor | None]:
    """Let an optimizer evaluate the window as often as it likes, as L-BFGS does.

    Returns:
        What its first evaluation found; where nothing in the window counts, no step is taken.
    """
    found: list[tuple[WindowLoss, Tensor | None]] = []

    def evaluate_window() -> Tensor:
        # Hooks inside the window see its first evaluation only.
        loss, norm = window_gradients(state, window, NO_HOOKS if found else hooks)
        found.append((loss, norm))
        if loss.denominator == 0:
            raise _NothingCountsError
        return loss.mean

    try:
        with _irreversible():
            state.optimizer.step(evaluate_window)  # type: ignore[arg-type]  # a closure that gives a tensor
    except _NothingCountsError:
        pass
    return found[0]


@contextmanager
def _irreversible() -> Iterator[None]:
    """Refuse to run out of memory in an optimizer step: what it has moved cannot be repeated."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        raise BadInputError(
            "out of memory in the optimizer step, which no N makes smaller "
            f"({first_line(error)}); a fused optimizer (+optimizer.fused=true) needs less"
        ) from error


class _NothingCountsError(Exception):
    """The window's denominator is zero, so that no step is taken."""
