"""Window in, gradients out: gradient accumulation under a reduction (`reductions`) and a strategy."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from types import FunctionType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gaccum_exp.core.cached import CACHED, Cached
from gaccum_exp.core.compensated import Compensated
from gaccum_exp.core.dtypes import out_of_half
from gaccum_exp.core.losses.criterion import as_loss_fn
from gaccum_exp.core.losses.protocol import (
    Denominator,
    LossFn,
    LossResult,
    Term,
    count,
    criterion_of,
    loss_sum,
    pair_of,
    terms_of,
    window_denominator,
)
from gaccum_exp.core.modes import without_graph
from gaccum_exp.core.module_state import held_by, state_put_back
from gaccum_exp.core.reductions import Reduction, ReductionName, quotient, reduction_named
from gaccum_exp.core.seeding import random_state_kept, set_random_states
from gaccum_exp.core.strategies import IN_PLACE, AccumulatorState, InPlace
from gaccum_exp.core.window_loss import WindowLoss, WindowTerms, counted_as, window_counts
from gaccum_exp.errors import BadInputError

StrategyName = Literal["in_place", "cached", "compensated"]
AroundMicroBatch = Callable[[AccumulatorState], AbstractContextManager[Any]]
"""Entered around the passes of each micro-batch."""
AfterMicroBatch = Callable[[AccumulatorState], object]
"""Called after each micro-batch, with what the window holds by now."""
CALLED_AS = (
    "A loss function is called with the model and a micro-batch, and returns (loss_sum, denominator). "
    "Of output and target hand over a torch.nn criterion, or a function whose parameters are called so, "
    "as output and target, logits and labels, x and y."
)
"""What stands below an error that a function of something else gives."""


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
            micro-batches `(input, target)`, or mappings of the model's arguments with `labels`; or a
            function of output and target, with `reduction` or that gives a mean, a sum, or the loss of
            each sample. A loss of several terms returns a mapping, as `LossFn` says.
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
            `compensated` adds half-precision gradients up in their own type, as exactly as a float32
            buffer; one that is made for an optimizer (AdamA) leaves no gradient, and takes its step
            itself.

    Returns:
        The window's loss sum and denominator, whatever the reduction.

    Nothing waits for the device, unless the loss function cannot count a micro-batch beforehand: then
    the host reads the window's denominator once. Terms that it cannot count, and functions of a window's
    sums, take a forward pass more, on all micro-batches but the first: without graph, unless the loss
    function takes gradients itself.

    Raises:
        BadInputError: the criterion has no such reduction; what the loss function returns breaks its
            contract, has a denominator with a gradient, or contradicts its `count`; or `cached` cannot
            be exact, and why.
        ValueError: an unknown reduction or strategy, or an empty window.
    """
    chosen = strategy_named(strategy, buffer_dtype)
    wrapped = as_loss_fn(loss_fn, reduction, whole_window=chosen.takes_window_at_once)
    micro_batches = window if isinstance(window, Sequence) else list(window)
    how = reduction_named(reduction, sum_divisor)
    try:
        return accumulate(model, wrapped, micro_batches, how, chosen, backward=backward)
    except (TypeError, AttributeError) as error:
        if isinstance(wrapped, FunctionType):  # which may be one of output and target
            error.add_note(CALLED_AS)
        raise


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
    after: AfterMicroBatch | None = None,
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
        after: called after each.
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
            return strategy.accumulate(
                model, loss_fn, window, in_one, begun=begun, around=around, after=after
            )
        strategy = held
    state = begun or AccumulatorState([])
    state.counts += [count(loss_fn, micro_batch) for micro_batch in window[len(state.counts) :]]
    if state.generators is not None:
        set_random_states(state.generators)
    known = [n for n in state.counts if n is not None and not isinstance(n, dict)]
    total = window_denominator(loss_fn, sum(known)) if len(known) == len(window) else None
    if isinstance(total, Tensor) and not strategy.leaves_gradient:
        total = float(total)  # what is in the moments stays there, so the host looks first
    if isinstance(total, (int, float)) and total == 0:
        parameter = next(model.parameters(), torch.empty(0))
        return WindowLoss(torch.zeros((), device=parameter.device), 0)
    divided_late = total is None and reduction.needs_window_count
    parameters: list[nn.Parameter] = []
    if divided_late or strategy.buffers_gradients:
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
                _back_propagate(model, loss_fn, window, reduction, state, divisor, backward)
                state.passes_done = index + 1
            if after is not None:
                after(state)
        if state.terms is not None:
            return state.terms.loss()
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
    known = (IN_PLACE, CACHED, Compensated())
    named: dict[Any, InPlace] = {one.name: one for one in known}
    found = strategy if isinstance(strategy, InPlace) else named.get(strategy)
    if found is None:
        raise ValueError(f"strategy={strategy!r}: not one of {', '.join(named)}")
    return found if buffer_dtype is None else found.buffered(buffer_dtype)


def _back_propagate(
    model: nn.Module,
    loss_fn: LossFn,
    window: Sequence[Any],
    reduction: Reduction,
    state: AccumulatorState,
    divisor: Callable[[Denominator], Denominator],
    backward: Callable[[Tensor], None],
) -> None:
    """Back-propagate the next micro-batch's share, and add its loss up in the window's state.

    A function, so that nothing of its graph outlives it.
    """
    micro_batch, counted = window[state.passes_done], state.counts[state.passes_done]
    if counted is None or isinstance(counted, dict):
        result = loss_fn(model, micro_batch)
        if isinstance(result, Mapping) or counted is not None or state.terms is not None:
            share = _share_of_terms(model, loss_fn, window, result, reduction, state)
            if share is not None and share.requires_grad:
                backward(share)
            return
        loss, n = pair_of(result)
    else:
        loss, n = loss_sum(loss_fn, model, micro_batch, counted), counted
    state.last_share = n, divisor(n)
    share = quotient(loss, state.last_share[1])
    if share is not None:
        if not share.requires_grad:
            raise BadInputError(
                f"the loss sum of micro-batch {state.passes_done + 1} has no graph to go back through: "
                "return it as the model's outputs give it, neither detached nor a number of its own"
            )
        backward(share)
    loss = out_of_half(loss.detach())
    state.loss_sum = loss if state.loss_sum is None else state.loss_sum + loss
    state.denominator = state.denominator + n


def _share_of_terms(
    model: nn.Module,
    loss_fn: LossFn,
    window: Sequence[Any],
    result: LossResult,
    reduction: Reduction,
    state: AccumulatorState,
) -> Tensor | None:
    """Return what is to be back-propagated of a micro-batch with terms; None: nothing counts."""
    terms = counted_as(terms_of(result), state.counts[state.passes_done])
    if state.terms is None:
        if state.passes_done:
            raise BadInputError(
                f"the loss function returns terms in micro-batch {state.passes_done + 1} of a window, "
                "and a pair before: return a mapping from all"
            )
        state.terms = WindowTerms(len(window), window_counts(state.counts))
        late = [n for n, term in terms.items() if term.of or n not in state.terms.window_counts]
        if len(window) > 1 and reduction.needs_window_count and (late or None in state.counts):
            _count_terms(model, loss_fn, window, terms, state)
    state.terms.add(terms)
    return state.terms.share(terms, reduction)


def _count_terms(
    model: nn.Module,
    loss_fn: LossFn,
    window: Sequence[Any],
    first: dict[str, Term],
    state: AccumulatorState,
) -> None:
    """Count the window's terms: a pass without graph over all micro-batches after the first.

    They draw the random numbers that their own passes are going to draw, and what they move is put back.
    Of the first the graph is kept meanwhile, so that it need not run twice.
    """
    assert state.terms is not None

    def counted() -> tuple[WindowTerms, dict[str, Term]]:
        counting, functions = WindowTerms(len(window)), {n: term for n, term in first.items() if term.of}
        counting.add(first)
        with random_state_kept(), state_put_back([model, *held_by(loss_fn)]):
            for micro_batch, counts in zip(window[1:], state.counts[1:], strict=True):
                terms = counted_as(terms_of(loss_fn(model, micro_batch)), counts)
                counting.add(terms)
                functions |= {n: term for n, term in terms.items() if term.of}
        return counting, functions

    counting, functions = without_graph(counted)
    torch.clear_autocast_cache()  # of weights that were cast without graph, which older torch gives out
    counting.differentiate(functions)
    state.terms.slopes, state.terms.means = counting.slopes, counting.means
    # What counts decides whether there is a step, so the host reads it.
    counted_late = {name: float(n) for name, n in counting.counts.items()}
    state.terms.window_counts = {**counted_late, **state.terms.window_counts}
