"""The one contract of a loss in the core: `loss_fn(model, micro_batch) -> (loss_sum, denominator)`.

A micro-batch is any pytree. A loss function that knows a micro-batch's denominator before the model has
run also has `count(micro_batch)`, and then a window is counted before its first backward pass; with
`loss_sum(model, micro_batch)` it need not count again in its forward pass. Denominators are added up
over micro-batches; where a window is divided by another number than their sum, as by max(1, Σnᵢ), the
loss function has `window_denominator(sum)`, and what it gives for each micro-batch are the nᵢ.

A loss of several terms returns a mapping, each term with its own sum, denominator and weight, and its
`count` one of the names to denominators; `terms_of` says what may stand in it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from gaccum_exp.errors import BadInputError

Denominator = float | Tensor
"""A number of samples, elements or tokens, or a sum of class weights; a 0-dim tensor on a device."""


class Clamped(NamedTuple):
    """A denominator that is no sum of its micro-batches': a clamp is of the window's count."""

    denominator: Denominator
    """nᵢ, which adds up."""
    window: Callable[[Denominator], Denominator]
    """Returns what Σ nᵢ stands for, e.g. max(1, Σ nᵢ)."""


def at_least(n: Denominator, least: float = 1.0) -> Clamped:
    """Return the denominator max(least, Σ nᵢ)."""

    def window(total: Denominator) -> Denominator:
        return total.clamp(min=least) if isinstance(total, Tensor) else max(total, least)

    return Clamped(n, window)


class Term(NamedTuple):
    """One summand of a loss, in one micro-batch."""

    sum: Tensor
    """Sᵢ, 0-dim; of any shape where there is a function `of` it."""
    denominator: Denominator
    """nᵢ, which adds up."""
    weight: Denominator = 1.0
    """The same in all of a window; a 0-dim tensor gets its own gradient."""
    of: Callable[[Tensor], Tensor] | None = None
    """What is taken of Σ Sᵢ / Σ nᵢ, 0-dim; None: that itself is the term."""
    window: Callable[[Denominator], Denominator] | None = None
    """Returns what the window divides by for Σ nᵢ; None: that itself."""

    def divides_by(self, n: Denominator) -> Denominator:
        """Return what is divided by for so large a count."""
        return n if self.window is None else self.window(n)


Counts = Denominator | dict[str, Denominator | Clamped]
"""A micro-batch's denominator, or those of its terms."""
LossResult = tuple[Tensor, Denominator] | Mapping[str, Any]
"""A loss sum and its denominator, or terms."""


class LossFn(Protocol):
    """Computes the loss sum and the denominator of one micro-batch, or those of its terms."""

    def __call__(self, model: nn.Module, micro_batch: Any, /) -> LossResult:
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

    def count(self, micro_batch: Any) -> Counts | None:
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

    def __call__(self, model: nn.Module, micro_batch: Any) -> LossResult:
        """Run the model on one micro-batch; return its loss sum, 0-dim, and denominator, or terms."""
        with self.around(micro_batch) as given:
            return self.wrapped(model, given)


def count(loss_fn: LossFn, micro_batch: Any) -> Counts | None:
    """Return a micro-batch's denominator if the loss function can tell it without a forward pass."""
    counter = getattr(loss_fn, "count", None)
    n: Any = None if counter is None else counter(micro_batch)
    if n is None or isinstance(n, (int, float)):
        return n
    return dict(n) if isinstance(n, Mapping) else _on_host(n)


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
    if method is not None:
        result: Tensor = method(model, micro_batch)
        return result
    return pair_of(loss_fn(model, micro_batch))[0]


def pair_of(result: LossResult) -> tuple[Tensor, Denominator]:
    """Return loss sum and denominator of a loss that is one sum.

    Raises:
        BadInputError: it has terms, which its `count` has not; or its denominator is no number.
    """
    if isinstance(result, Mapping):
        raise BadInputError(
            f"the loss function returns the terms {', '.join(map(str, result))}, and its count one "
            "number: let it return a mapping of their names to numbers, or None"
        )
    total, n = result
    if isinstance(n, Clamped):
        raise BadInputError(
            "the loss function returns one sum over a clamped denominator: let it return a mapping, "
            '{"loss": (sum, at_least(n))}, or have a method window_denominator(count)'
        )
    return total, n


def terms_of(result: LossResult) -> dict[str, Term]:
    """Return the terms of what a loss function of several has returned.

    Of each name `(sum, denominator)`, `(sum, denominator, weight)` or `(sums, denominator, weight, of)`:
    the term is weight × Σ sum / Σ denominator, or weight × of(Σ sums / Σ denominator), over the window.
    A denominator `at_least(n)` divides by max(1, Σ n), and None leaves the sums of a function undivided:
    weight × of(Σ sums).

    Raises:
        BadInputError: anything else.
    """
    if not isinstance(result, Mapping):
        raise BadInputError(
            "the loss function has counted terms or returned them before in this window, and now "
            f"returns a {type(result).__name__}: return a mapping, without those that are not there"
        )
    return {name: _term(name, given) for name, given in result.items()}


def _term(name: str, given: Any) -> Term:
    parts: Sequence[Any] = (
        given if isinstance(given, (tuple, list)) and 2 <= len(given) <= 4 else (None, None)
    )
    values: list[Any] = [*parts, *(1.0, None)[len(parts) - 2 :]]
    total, n, weight, of = values
    if total is None or (n is None and of is None):
        raise BadInputError(
            f"term {name!r}: is neither (sum, denominator) nor (sum, denominator, weight) nor "
            "(sums, denominator, weight, of)"
        )
    total = total if isinstance(total, Tensor) else torch.tensor(float(total))
    if of is None and total.ndim:
        raise BadInputError(
            f"term {name!r}: its sum has the shape {tuple(total.shape)} and has to be 0-dim; several "
            "sums need a function: (sums, denominator, weight, of)"
        )
    if n is None:  # undivided, and there in every window: max(1, 0)
        n = at_least(0.0)
    window = n.window if isinstance(n, Clamped) else None
    return Term(total, plain_count(n), weight, of, window)


def plain_count(n: Denominator | Clamped) -> Denominator:
    """Return a denominator that adds up, as a number where it is on the host."""
    return _on_host(n.denominator if isinstance(n, Clamped) else n)


def _on_host(n: Denominator) -> Denominator:
    return n.item() if isinstance(n, Tensor) and n.device.type == "cpu" else n


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
