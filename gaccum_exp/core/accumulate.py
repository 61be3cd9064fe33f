"""Window in, gradients out: gradient accumulation under a reduction (`reductions`) and a strategy."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from gaccum_exp.core.cached import CACHED, Cached
from gaccum_exp.core.losses.criterion import as_loss_fn
from gaccum_exp.core.losses.protocol import (
    Denominator,
    LossFn,
    count,
    criterion_of,
    loss_sum,
    window_denominator,
)
from gaccum_exp.core.reductions import Reduction, ReductionName, reduction_named
from gaccum_exp.core.seeding import set_random_states
from gaccum_exp.core.strategies import IN_PLACE, AccumulatorState, Buffered, InPlace

StrategyName = Literal["in_place", "cached"]
AroundMicroBatch = Callable[[AccumulatorState], AbstractContextManager[Any]]
"""Entered around the passes of each micro-batch."""


class WindowLoss(NamedTuple):
    """What a window added up to."""

    loss_sum: Tensor
    """Σ Sᵢ, a 0-dim tensor on the model's device, detached."""
    denominator: Denominator
    """Σ nᵢ, or what a loss function with a clamp makes of it; 0 where nothing in the window counts, and
    then no gradient was added. A number, or a 0-dim tensor where the targets lie on a device."""

    @property
    def mean(self) -> Tensor:
        """The loss over all that counts in the window, 0-dim."""
        return self.loss_sum / self.denominator


def accumulate_gradients(
    model: nn.Module,
    loss_fn: LossFn | nn.Module,
    window: Iterable[Any],
    *,
    reduction: ReductionName = "global_mean",
    sum_divisor: float = 1.0,
    backward: Callable[[Tensor], None] = torch.autograd.backward,
    buffer_dtype: torch.dtype | None = None,
    strategy: StrategyName | InPlace = "in_place",
) -> WindowLoss:
    """Add the window's gradient to every parameter's `.grad`, one micro-batch at a time.

    For equal micro-batches of a mean-reduced criterion it is this loop:

        for input, target in window:
            (criterion(model(input), target) / len(window)).backward()

    and with `global_mean` it stays the large batch's mean gradient where that loop does not.

    Args:
        model: called by the loss function.
        loss_fn: `loss_fn(model, micro_batch) -> (loss_sum, denominator)`, or a `torch.nn` criterion for
            micro-batches `(input, target)`, or mappings of the model's arguments with `labels`.
        window: the micro-batches of one optimizer step.
        reduction: how micro gradients become the window's gradient.
        sum_divisor: what `sum` divides by, a constant (1: the literal sum).
        backward: how a micro-batch's share of the loss is back-propagated, e.g.
            `lambda loss: scaler.scale(loss).backward()` under a GradScaler.
        buffer_dtype: in which micro gradients are added up where the parameters' own type is too coarse,
            e.g. torch.float32 for bfloat16 parameters; rounded to the parameters' type once, at the end.
        strategy: `in_place`, for a loss that is a sum over samples; or `cached`, for any loss of the
            window's outputs (contrastive, ranking, a criterion of one's own that couples samples): one
            forward pass more, then the gradient is the large batch's whatever the loss. Under it
            `loss_fn` is called on the joined window too, and a criterion's mean is its own.

    Returns:
        The window's loss sum and denominator, whatever the reduction.

    Nothing waits for the device, unless the loss function cannot count a micro-batch beforehand: then
    the host reads the window's denominator once.

    Raises:
        BadInputError: the criterion has no such reduction; or `cached` cannot be exact, and why.
        ValueError: an unknown reduction or strategy, or an empty window.
    """
    chosen = strategy_named(strategy, buffer_dtype)
    return accumulate(
        model,
        as_loss_fn(loss_fn, reduction, whole_window=chosen.takes_window_at_once),
        window if isinstance(window, Sequence) else list(window),
        reduction_named(reduction, sum_divisor),
        chosen,
        backward=backward,
    )


def accumulate(
    model: nn.Module,
    loss_fn: LossFn,
    window: Sequence[Any],
    reduction: Reduction,
    strategy: InPlace,
    *,
    backward: Callable[[Tensor], None] = torch.autograd.backward,
    begun: AccumulatorState | None = None,
    around: AroundMicroBatch | None = None,
) -> WindowLoss:
    """Add the window's gradient to every parameter's `.grad`, as `accumulate_gradients` does.

    Where the window's denominator is known only at its end, under a reduction that divides by it, the
    first micro-batch's count times N stands in for it, which keeps the gradients near their final size;
    then the window's gradient, and no earlier one, is rescaled once. So hooks on gradients see them
    before that, and parameters that neither the model nor its criterion holds are not rescaled.

    Args:
        model: as there; `loss_fn`, `window` and `backward` as well.
        reduction: how micro gradients become the window's gradient.
        strategy: where they are held.
        begun: the state of a window that was interrupted after a micro-batch; None: it begins.
        around: entered around each micro-batch's passes.
    """
    if not window:
        raise ValueError("the window holds no micro-batch")
    strategy.require(reduction)
    if isinstance(strategy, Cached):
        held = strategy.held
        if len(window) > 1:
            # The loss over the outputs is a window of one pass: in place, whatever the strategy.
            in_one = partial(
                accumulate, loss_fn=loss_fn, reduction=reduction, strategy=held, backward=backward
            )
            return strategy.accumulate(model, loss_fn, window, in_one, begun=begun, around=around)
        strategy = held
    state = begun or AccumulatorState([count(loss_fn, micro_batch) for micro_batch in window])
    if state.generators is not None:
        set_random_states(state.generators)
    known = [n for n in state.counts if n is not None]
    total = window_denominator(loss_fn, sum(known)) if len(known) == len(window) else None
    if isinstance(total, (int, float)) and total == 0:
        parameter = next(model.parameters(), torch.empty(0))
        return WindowLoss(torch.zeros((), device=parameter.device), 0)
    divided_late = total is None and reduction.needs_window_count
    parameters: list[nn.Parameter] = []
    if divided_late or isinstance(strategy, Buffered):
        modules = [m for m in (model, criterion_of(loss_fn)) if m is not None]
        parameters = list(nn.ModuleList(modules).parameters())

    def divisor(count: Denominator) -> Denominator:
        n = window_denominator(loss_fn, count)
        if not divided_late:
            return reduction.divisor(n, total, len(window))
        if state.provisional_divisor is None:
            state.provisional_divisor = len(window) * float(n) or 1.0
        return state.provisional_divisor

    with strategy.collecting(state, parameters, rescaled=divided_late):
        for index in range(state.passes_done, len(window)):
            with around(state) if around else nullcontext():
                counted = state.counts[index]
                loss, n = _back_propagate(model, loss_fn, window[index], counted, divisor, backward)
                state.loss_sum = loss if state.loss_sum is None else state.loss_sum + loss
                state.denominator = state.denominator + n
                state.passes_done += 1
        assert state.loss_sum is not None
        if total is None:
            # Counted late: whether anything counted at all has to be known on the host.
            state.denominator = float(state.denominator)
        denominator = window_denominator(loss_fn, state.denominator)
        if divided_late:
            assert state.provisional_divisor is not None
            factor = float(state.provisional_divisor / denominator) if denominator else 0.0
            strategy.rescale(state, parameters, factor)
    return WindowLoss(state.loss_sum, denominator)


def strategy_named(strategy: StrategyName | InPlace, buffer_dtype: torch.dtype | None) -> InPlace:
    """Return the strategy of this name, or the given one, with micro gradients added up in this type.

    Raises:
        ValueError: there is no such strategy.
    """
    named: dict[Any, InPlace] = {"in_place": IN_PLACE, "cached": CACHED}
    found = strategy if isinstance(strategy, InPlace) else named.get(strategy)
    if found is None:
        raise ValueError(f"strategy={strategy!r}: not one of {', '.join(named)}")
    return found if buffer_dtype is None else found.buffered(buffer_dtype)


def _back_propagate(
    model: nn.Module,
    loss_fn: LossFn,
    micro_batch: Any,
    counted: Denominator | None,
    divisor: Callable[[Denominator], Denominator],
    backward: Callable[[Tensor], None],
) -> tuple[Tensor, Denominator]:
    """Back-propagate one micro-batch's share; a function, so that nothing of its graph outlives it.

    Returns:
        Its loss sum, detached and in float32 at least, and its denominator.
    """
    if counted is None:
        loss, n = loss_fn(model, micro_batch)
    else:
        loss, n = loss_sum(loss_fn, model, micro_batch), counted
    by = divisor(n)
    if isinstance(by, Tensor):
        # On a device the count stays there: x / inf is the zero that zero elements give.
        backward(loss / torch.where(by == 0, torch.inf, by))
    elif by:
        backward(loss / by)
    loss = loss.detach()
    # In half precision a window's sum would lose its last micro-batches.
    return (loss.float() if loss.dtype in (torch.float16, torch.bfloat16) else loss), n
