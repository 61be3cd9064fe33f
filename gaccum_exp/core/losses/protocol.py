"""The one contract of a loss in the core: `loss_fn(model, micro_batch) -> (loss_sum, denominator)`.

A micro-batch is any pytree. A loss function that knows a micro-batch's denominator before the model has
run also has `count(micro_batch)`, and then a window is counted before its first backward pass; with
`loss_sum(model, micro_batch)` it need not count again in its forward pass. Denominators are added up
over micro-batches; where a window is divided by another number than their sum, as by max(1, Σnᵢ), the
loss function has `window_denominator(sum)`, and what it gives for each micro-batch are the nᵢ.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from torch import Tensor, nn

Denominator = float | Tensor
"""A number of samples, elements or tokens, or a sum of class weights; a 0-dim tensor on a device."""


class LossFn(Protocol):
    """Computes the loss sum and the denominator of one micro-batch."""

    def __call__(self, model: nn.Module, micro_batch: Any, /) -> tuple[Tensor, Denominator]:
        """Run the model on the micro-batch; return the loss sum, 0-dim, and the denominator."""
        ...


class LossWrapper:
    """A loss function around another one: what it does not change, it forwards.

    A subclass says what is done `around` a pass, or overrides `count`.
    """

    def __init__(self, loss_fn: LossFn) -> None:
        self.wrapped = loss_fn

    @property
    def criterion(self) -> nn.Module | None:
        """The criterion inside, where there is one: it may have parameters of its own."""
        return criterion_of(self.wrapped)

    @contextmanager
    def around(self, micro_batch: Any) -> Iterator[Any]:
        """Enter around a pass; yield the micro-batch that the wrapped loss function gets."""
        yield micro_batch

    def count(self, micro_batch: Any) -> Denominator | None:
        """Return the denominator; None: it is known after the forward pass only."""
        return count(self.wrapped, micro_batch)

    def window_denominator(self, count: Denominator) -> Denominator:
        """Return what a window that counts so much is divided by."""
        return window_denominator(self.wrapped, count)

    def loss_sum(self, model: nn.Module, micro_batch: Any) -> Tensor:
        """Run the model on a micro-batch that has been counted; return its loss sum, 0-dim."""
        with self.around(micro_batch) as given:
            return loss_sum(self.wrapped, model, given)

    def outputs(self, model: nn.Module, micro_batch: Any) -> Any:
        """Run the model on one micro-batch, and the loss if it cannot do without."""
        with self.around(micro_batch) as given:
            return outputs(self.wrapped, model, given)

    def without_inputs(self, micro_batch: Any) -> Any:
        """Return what the loss needs of a micro-batch beside the model's outputs."""
        return without_inputs(self.wrapped, micro_batch)

    def __call__(self, model: nn.Module, micro_batch: Any) -> tuple[Tensor, Denominator]:
        """Run the model on one micro-batch; return its loss sum, 0-dim, and denominator."""
        with self.around(micro_batch) as given:
            return self.wrapped(model, given)


def count(loss_fn: LossFn, micro_batch: Any) -> Denominator | None:
    """Return a micro-batch's denominator if the loss function can tell it without a forward pass."""
    counter = getattr(loss_fn, "count", None)
    n: Denominator | None = None if counter is None else counter(micro_batch)
    return n.item() if isinstance(n, Tensor) and n.device.type == "cpu" else n


def window_denominator(loss_fn: LossFn, count: Denominator) -> Denominator:
    """Return the denominator of a window, or a micro-batch, that counts so much.

    It is the count itself, unless the loss function says otherwise: max(1, count), or count + 1e-8.
    """
    method = getattr(loss_fn, "window_denominator", None)
    n: Denominator = count if method is None else method(count)
    return n


def loss_sum(loss_fn: LossFn, model: nn.Module, micro_batch: Any) -> Tensor:
    """Return the loss sum alone, of a loss function whose micro-batch has been counted already."""
    method = getattr(loss_fn, "loss_sum", None)
    result: Tensor = loss_fn(model, micro_batch)[0] if method is None else method(model, micro_batch)
    return result


def outputs(loss_fn: LossFn, model: nn.Module, micro_batch: Any) -> Any:
    """Run the model on a micro-batch as the loss function does, and the loss if it cannot do without."""
    return getattr(loss_fn, "outputs", loss_fn)(model, micro_batch)


def without_inputs(loss_fn: LossFn, micro_batch: Any) -> Any:
    """Return a micro-batch without what the loss function gives to the model only, where it knows."""
    method = getattr(loss_fn, "without_inputs", None)
    return micro_batch if method is None else method(micro_batch)


def criterion_of(loss_fn: LossFn) -> nn.Module | None:
    """Return the criterion that a loss function is made of, where that is a module."""
    criterion = getattr(loss_fn, "criterion", None)
    return criterion if isinstance(criterion, nn.Module) else None
