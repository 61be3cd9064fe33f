"""Window in, gradients out: the arithmetic of gradient accumulation.

For micro-batches i = 1..N with loss sums Sᵢ and denominators nᵢ, n = Σnᵢ:

    global mean   g = (1/n) Σ ∇Sᵢ             the large batch's mean gradient, always
    mean          g = (1/N) Σ ∇(Sᵢ/nᵢ)        equal to it if and only if all nᵢ are equal (or by luck)
    sum           g = Σ ∇Sᵢ                   the large batch's sum gradient, always: n × the mean one
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from gaccum_exp.core.denominator import Denominator
from gaccum_exp.core.loss import LossFn, as_loss_fn, count

Reduction = Literal["global_mean", "mean", "sum"]


class WindowLoss(NamedTuple):
    """What a window added up to. Their quotient is the loss over all that counts in the window."""

    loss_sum: Tensor
    """Σ Sᵢ, a 0-dim tensor on the model's device, detached."""
    denominator: Denominator
    """Σ nᵢ; 0 where nothing in the window counts, and then no gradient was added."""


def accumulate_gradients(
    model: nn.Module,
    loss_fn: LossFn | nn.Module,
    window: Iterable[Any],
    *,
    reduction: Reduction = "global_mean",
    sum_divisor: float = 1.0,
) -> WindowLoss:
    """Add the window's gradient to every parameter's `.grad`, one micro-batch at a time.

    For equal micro-batches of a mean-reduced criterion it is this loop:

        for input, target in window:
            (criterion(model(input), target) / len(window)).backward()

    and with `global_mean` it stays the large batch's mean gradient where that loop does not.

    Args:
        model: called by the loss function.
        loss_fn: `loss_fn(model, micro_batch) -> (loss_sum, denominator)`, or a `torch.nn` criterion for
            micro-batches `(input, target)`.
        window: the micro-batches of one optimizer step.
        reduction: how micro gradients become the window's gradient.
        sum_divisor: what `sum` divides by, a constant (1: the literal sum).

    Returns:
        The window's loss sum and denominator, whatever the reduction.

    Raises:
        BadInputError: the criterion has no such reduction.
        ValueError: an unknown reduction, or an empty window.
    """
    micro_batches = window if isinstance(window, Sequence) else list(window)
    if not micro_batches:
        raise ValueError("the window holds no micro-batch")
    if reduction not in ("global_mean", "mean", "sum"):
        raise ValueError(f"reduction={reduction!r}: not one of global_mean, mean, sum")
    loss_fn = as_loss_fn(loss_fn, reduction)
    if reduction == "mean":
        return _mean_of_means(model, loss_fn, micro_batches)
    if reduction == "sum":
        return _scaled_sum(model, loss_fn, micro_batches, sum_divisor)
    counts = [count(loss_fn, micro_batch) for micro_batch in micro_batches]
    if any(n is None for n in counts):
        return _global_mean_counted_late(model, loss_fn, micro_batches)
    return _scaled_sum(model, loss_fn, micro_batches, sum(counts))  # type: ignore[arg-type]


def _scaled_sum(
    model: nn.Module, loss_fn: LossFn, micro_batches: Sequence[Any], divisor: Denominator
) -> WindowLoss:
    """(1/divisor) Σ ∇Sᵢ. Dividing each loss, not the gradients afterwards, neither overflows float16
    nor rescales gradients that were there before."""
    if isinstance(divisor, (int, float)) and divisor == 0:
        return _nothing_counts(model)
    return _total(_backward(model, loss_fn, m, divisor) for m in micro_batches)


def _mean_of_means(model: nn.Module, loss_fn: LossFn, micro_batches: Sequence[Any]) -> WindowLoss:
    """(1/N) Σ ∇(Sᵢ/nᵢ); a micro-batch in which nothing counts adds nothing."""
    parts = len(micro_batches)
    return _total(_backward(model, loss_fn, m, parts, own_mean=True) for m in micro_batches)


def _backward(
    model: nn.Module,
    loss_fn: LossFn,
    micro_batch: Any,
    divisor: Denominator,
    *,
    own_mean: bool = False,
) -> WindowLoss:
    """Back-propagate one micro-batch's share. A function, so that nothing of it outlives the call."""
    loss_sum, n = loss_fn(model, micro_batch)
    if own_mean:
        divisor = divisor * n
    if isinstance(divisor, Tensor):
        # On a device the count stays there: x / inf is the zero that a window of zero elements gives.
        torch.autograd.backward(loss_sum / torch.where(divisor == 0, torch.inf, divisor))
    elif divisor:
        torch.autograd.backward(loss_sum / divisor)
    return WindowLoss(loss_sum.detach(), n)


def _total(parts: Iterator[WindowLoss]) -> WindowLoss:
    loss_sum, n = next(parts)
    for part in parts:
        loss_sum = loss_sum + part.loss_sum
        n = n + part.denominator
    return WindowLoss(loss_sum, n)


def _global_mean_counted_late(
    model: nn.Module, loss_fn: LossFn, micro_batches: Sequence[Any]
) -> WindowLoss:
    """The global mean where a denominator is known only after the forward pass.

    The first micro-batch's count stands in for the window's, which keeps the gradients near their final
    size, and the window's gradient alone is rescaled once at the end.
    """
    stand_in: Denominator = 1.0

    def backward(index: int, micro_batch: Any) -> WindowLoss:
        nonlocal stand_in
        loss_sum, n = loss_fn(model, micro_batch)
        if index == 0:
            stand_in = len(micro_batches) * float(n) or 1.0
        torch.autograd.backward(loss_sum / stand_in)
        return WindowLoss(loss_sum.detach(), n)

    with _apart_from_earlier_gradients(model, loss_fn) as parameters:
        total = _total(backward(i, m) for i, m in enumerate(micro_batches))
        n = float(total.denominator)
        for parameter in parameters:
            if n == 0:
                parameter.grad = None
            elif parameter.grad is not None:
                parameter.grad *= stand_in / n
    return total


@contextmanager
def _apart_from_earlier_gradients(model: nn.Module, loss_fn: LossFn) -> Iterator[list[nn.Parameter]]:
    """Set earlier gradients aside and add them again, as if autograd had accumulated on them."""
    criterion = getattr(loss_fn, "criterion", None)
    modules = nn.ModuleList([model, *([criterion] if isinstance(criterion, nn.Module) else [])])
    parameters = list(modules.parameters())
    earlier = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    yield parameters
    for parameter, grad in zip(parameters, earlier, strict=True):
        if grad is not None:
            parameter.grad = grad if parameter.grad is None else grad.add_(parameter.grad)


def _nothing_counts(model: nn.Module) -> WindowLoss:
    parameter = next(model.parameters(), torch.empty(0))
    return WindowLoss(torch.zeros((), device=parameter.device), 0)
