"""Window in, gradients out: the arithmetic of gradient accumulation.

For micro-batches i = 1..N with loss sums Sᵢ and denominators nᵢ, n = Σnᵢ:

    global mean   g = (1/n) Σ ∇Sᵢ             the large batch's mean gradient, always
    mean          g = (1/N) Σ ∇(Sᵢ/nᵢ)        equal to it if and only if all nᵢ are equal (or by luck)
    sum           g = Σ ∇Sᵢ                   the large batch's sum gradient, always: n × the mean one
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from gaccum_exp.core.buffers import GradientBuffers
from gaccum_exp.core.losses.criterion import LossFn, as_loss_fn, count, loss_sum
from gaccum_exp.core.losses.denominator import Denominator

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
    backward: Callable[[Tensor], None] = torch.autograd.backward,
    buffer_dtype: torch.dtype | None = None,
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
    passes = _Passes(model, as_loss_fn(loss_fn, reduction), micro_batches, backward, buffer_dtype)
    counts = passes.counts
    known = [n for n in counts if n is not None]
    total = sum(known)
    if len(known) == len(counts) and isinstance(total, (int, float)) and total == 0:
        return _nothing_counts(model)
    if reduction == "sum":
        return passes.run(lambda n: sum_divisor)
    if reduction == "mean":
        return passes.run(lambda n: len(counts) * n)
    if len(known) == len(counts):
        return passes.run(lambda n: total)
    return _global_mean_counted_late(passes)


class _Passes:
    """The micro-batches of a window, and how each is taken forward and backward."""

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFn,
        micro_batches: Sequence[Any],
        backward: Callable[[Tensor], None],
        buffer_dtype: torch.dtype | None,
    ) -> None:
        self._model, self._loss_fn = model, loss_fn
        self._micro_batches, self._backward_of = micro_batches, backward
        self._buffer_dtype = buffer_dtype
        self.counts = [count(loss_fn, micro_batch) for micro_batch in micro_batches]
        """Each micro-batch's denominator, None where it is known after its forward pass only."""

    def _parameters(self) -> list[nn.Parameter]:
        """Those of the model, and of the criterion where that is a module."""
        criterion = getattr(self._loss_fn, "criterion", None)
        beside = [criterion] if isinstance(criterion, nn.Module) else []
        return list(nn.ModuleList([self._model, *beside]).parameters())

    def run(
        self,
        divisor: Callable[[Denominator], Denominator],
        rescaled: Callable[[WindowLoss], float] | None = None,
    ) -> WindowLoss:
        """Add Σ ∇Sᵢ / divisor(nᵢ) to the gradients, times `rescaled(the window's loss)` if that counts.

        Each loss is divided, not the gradients afterwards: that neither overflows float16 nor rescales
        gradients that were there before.
        """
        window_loss: Tensor | None = None
        window_denominator: Denominator = 0
        parameters = self._parameters() if self._buffer_dtype or rescaled else ()
        apart = rescaled is not None
        with GradientBuffers(parameters, self._buffer_dtype, apart=apart) as buffers:
            for micro_batch, counted in zip(self._micro_batches, self.counts, strict=True):
                loss, n = self._backward(micro_batch, counted, divisor)
                window_loss = loss if window_loss is None else window_loss + loss
                window_denominator = window_denominator + n
            assert window_loss is not None
            if any(n is None for n in self.counts):
                # Counted late: whether anything counted at all has to be known on the host.
                window_denominator = float(window_denominator)
            result = WindowLoss(window_loss, window_denominator)
            if rescaled is not None:
                if result.denominator:
                    buffers.scale(rescaled(result))
                else:
                    buffers.forget()
        return result

    def _backward(
        self,
        micro_batch: Any,
        counted: Denominator | None,
        divisor: Callable[[Denominator], Denominator],
    ) -> tuple[Tensor, Denominator]:
        """Back-propagate one micro-batch's share; a method, so that nothing of it outlives the call."""
        if counted is None:
            loss, n = self._loss_fn(self._model, micro_batch)
        else:
            loss, n = loss_sum(self._loss_fn, self._model, micro_batch), counted
        by = divisor(n)
        if isinstance(by, Tensor):
            # On a device the count stays there: x / inf is the zero that zero elements give.
            self._backward_of(loss / torch.where(by == 0, torch.inf, by))
        elif by:
            self._backward_of(loss / by)
        # In half precision a window's sum would lose its last micro-batches.
        return _at_least_float32(loss.detach()), n


def _global_mean_counted_late(passes: _Passes) -> WindowLoss:
    """The global mean where a denominator is known only after the forward pass.

    The first micro-batch's count stands in for the window's, which keeps the gradients near their final
    size; then the window's gradient, and no earlier one, is rescaled once. So hooks on gradients see
    them before that, and parameters that neither the model nor its criterion holds are not rescaled.
    """
    stand_in: Denominator | None = None

    def provisional(n: Denominator) -> Denominator:
        nonlocal stand_in
        if stand_in is None:
            stand_in = len(passes.counts) * float(n) or 1.0
        return stand_in

    def final(loss: WindowLoss) -> float:
        assert stand_in is not None
        return float(stand_in / loss.denominator)

    return passes.run(provisional, final)


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _nothing_counts(model: nn.Module) -> WindowLoss:
    parameter = next(model.parameters(), torch.empty(0))
    return WindowLoss(torch.zeros((), device=parameter.device), 0)
