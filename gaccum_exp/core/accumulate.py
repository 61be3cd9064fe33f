"""Window in, gradients out: the arithmetic of gradient accumulation.

For micro-batches i = 1..N with loss sums Sᵢ and denominators nᵢ, n = Σnᵢ:

    global mean   g = (1/n) Σ ∇Sᵢ             the large batch's mean gradient, always
    mean          g = (1/N) Σ ∇(Sᵢ/nᵢ)        equal to it if and only if all nᵢ are equal (or by luck)
    sum           g = Σ ∇Sᵢ                   the large batch's sum gradient, always: n × the mean one
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from gaccum_exp.core.denominator import Denominator
from gaccum_exp.core.loss import LossFn, as_loss_fn, count, loss_sum

Reduction = Literal["global_mean", "mean", "sum"]


class WindowLoss(NamedTuple):
    """What a window added up to. Their quotient is the loss over all that counts in the window."""

    loss_sum: Tensor
    """Σ Sᵢ, a 0-dim tensor on the model's device, detached."""
    denominator: Denominator
    """Σ nᵢ; 0 where nothing in the window counts, and then no gradient was added. A number, or a 0-dim
    tensor where the window's targets lie on a device."""


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

    Nothing waits for the device, unless the loss function cannot count a micro-batch beforehand: then
    the host reads the window's denominator once.

    Raises:
        BadInputError: the criterion has no such reduction.
        ValueError: an unknown reduction, or an empty window.
    """
    micro_batches = window if isinstance(window, Sequence) else list(window)
    if not micro_batches:
        raise ValueError("the window holds no micro-batch")
    if reduction not in ("global_mean", "mean", "sum"):
        raise ValueError(f"reduction={reduction!r}: not one of global_mean, mean, sum")
    if sum_divisor != 1.0 and reduction != "sum":
        raise ValueError(f"sum_divisor={sum_divisor} has no meaning under reduction={reduction!r}")
    loss_fn = as_loss_fn(loss_fn, reduction)
    counts = [count(loss_fn, micro_batch) for micro_batch in micro_batches]
    known = [n for n in counts if n is not None]
    total = sum(known)
    if len(known) == len(counts) and isinstance(total, (int, float)) and total == 0:
        return _nothing_counts(model)
    if reduction == "sum":
        return _accumulate(model, loss_fn, micro_batches, counts, lambda n: sum_divisor)
    if reduction == "mean":
        return _accumulate(model, loss_fn, micro_batches, counts, lambda n: len(counts) * n)
    if len(known) == len(counts):
        return _accumulate(model, loss_fn, micro_batches, counts, lambda n: total)
    return _global_mean_counted_late(model, loss_fn, micro_batches)


def _accumulate(
    model: nn.Module,
    loss_fn: LossFn,
    micro_batches: Sequence[Any],
    counts: Sequence[Denominator | None],
    divisor: Callable[[Denominator], Denominator],
) -> WindowLoss:
    """Σ ∇Sᵢ / divisor(nᵢ).

    Each loss is divided, not the gradients afterwards: that neither overflows float16 nor rescales
    gradients that were there before.
    """
    window_loss: Tensor | None = None
    window_denominator: Denominator = 0
    for micro_batch, counted in zip(micro_batches, counts, strict=True):
        loss, n = _backward(model, loss_fn, micro_batch, counted, divisor)
        window_loss = loss if window_loss is None else window_loss + loss
        window_denominator = window_denominator + n
    assert window_loss is not None
    if any(
        n is None for n in counts
    ):  # counted late: whether anything counted at all has to be known on the host
        window_denominator = float(window_denominator)
    return WindowLoss(window_loss, window_denominator)


def _backward(
    model: nn.Module,
    loss_fn: LossFn,
    micro_batch: Any,
    counted: Denominator | None,
    divisor: Callable[[Denominator], Denominator],
) -> tuple[Tensor, Denominator]:
    """Back-propagate one micro-batch's share; a function, so that nothing of it outlives the call."""
    if counted is None:
        loss, n = loss_fn(model, micro_batch)
    else:
        loss, n = loss_sum(loss_fn, model, micro_batch), counted
    by = divisor(n)
    if isinstance(by, Tensor):
        # On a device the count stays there: x / inf is the zero that zero elements give.
        torch.autograd.backward(loss / torch.where(by == 0, torch.inf, by))
    elif by:
        torch.autograd.backward(loss / by)
    # In half precision a window's sum would lose its last micro-batches.
    return _at_least_float32(loss.detach()), n


def _global_mean_counted_late(
    model: nn.Module, loss_fn: LossFn, micro_batches: Sequence[Any]
) -> WindowLoss:
    """The global mean where a denominator is known only after the forward pass.

    The first micro-batch's count stands in for the window's, which keeps the gradients near their final
    size; then the window's gradient, and no earlier one, is rescaled once. So hooks on gradients see
    them before that, and parameters that neither the model nor its criterion holds are not rescaled.
    """
    stand_in: Denominator | None = None

    def provisional(n: Denominator) -> Denominator:
        nonlocal stand_in
        if stand_in is None:
            stand_in = len(micro_batches) * float(n) or 1.0
        return stand_in

    with _apart_from_earlier_gradients(model, loss_fn) as parameters:
        unknown = [None] * len(micro_batches)
        loss = _accumulate(model, loss_fn, micro_batches, unknown, provisional)
        assert stand_in is not None
        for parameter in parameters:
            if loss.denominator == 0:
                parameter.grad = None
            elif parameter.grad is not None:
                parameter.grad *= stand_in / loss.denominator
    return loss


@contextmanager
def _apart_from_earlier_gradients(model: nn.Module, loss_fn: LossFn) -> Iterator[list[nn.Parameter]]:
    """Set earlier gradients aside and add them again, as if autograd had accumulated on them."""
    criterion = getattr(loss_fn, "criterion", None)
    modules = nn.ModuleList([model, *([criterion] if isinstance(criterion, nn.Module) else [])])
    parameters = list(modules.parameters())
    earlier = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    try:
        yield parameters
    finally:
        for parameter, grad in zip(parameters, earlier, strict=True):
            if grad is not None:
                parameter.grad = grad if parameter.grad is None else grad.add_(parameter.grad)


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _nothing_counts(model: nn.Module) -> WindowLoss:
    parameter = next(model.parameters(), torch.empty(0))
    return WindowLoss(torch.zeros((), device=parameter.device), 0)
