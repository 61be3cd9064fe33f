"""The one contract of a loss in the core: `loss_fn(model, micro_batch) -> (loss_sum, denominator)`.

A micro-batch is any pytree. A loss function that knows a micro-batch's denominator before the model has
run also has `count(micro_batch)`, and then a window is counted before its first backward pass; with
`loss_sum(model, micro_batch)` it need not count again in its forward pass. Denominators are added up
over micro-batches; where a window is divided by another number than their sum, as by max(1, Σnᵢ), the
loss function has `window_denominator(sum)`, and what it gives for each micro-batch are the nᵢ.

A loss of several terms returns a mapping, each term with its own sum, denominator and weight, and its
`count` one of the names to denominators; `terms_of` says what may stand in it.
"""

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from gaccum_exp.core.dtypes import HALF
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
    """Computes the loss sum and the denominator of one micro-batch, or those of its terms.

    A function `loss_fn(model, micro_batch)` returns `(loss_sum, denominator)`: a 0-dim tensor with
    its graph, and a number that adds up over micro-batches. Of a loss of several terms it returns a
    mapping of their names to `(sum, denominator)`, `(sum, denominator, weight)` or
    `(sums, denominator, weight, of)`: the term is weight × Σ sum / Σ denominator over the window, or
    weight × of(Σ sums / Σ denominator). A denominator `at_least(n)` divides by max(1, Σ n), and None
    leaves the sums of a function undivided.

    Where it also has `count(micro_batch)`, that returns the denominator, or those of the terms by name,
    before the model has run.
    """

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

    def loss_sum(self, model: nn.Module, micro_batch: Any, counted: Denominator | None = None) -> Tensor:
        """Run the model on a micro-batch that counts so much; return its loss sum, 0-dim."""
        with self.around(micro_batch) as given:
            return loss_sum(self.wrapped, model, given, counted)

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


def attribute_of(loss_fn: LossFn, name: str) -> Any:
    """Return a loss function's attribute, or that of what it is a partial function of; None: neither."""
    found = getattr(loss_fn, name, None)
    while found is None and isinstance(loss_fn, functools.partial):
        loss_fn = loss_fn.func
        found = getattr(loss_fn, name, None)
    return found


def count(loss_fn: LossFn, micro_batch: Any) -> Counts | None:
    """Return a micro-batch's denominator if the loss function can tell it without a forward pass."""
    counter = attribute_of(loss_fn, "count")
    n: Any = None if counter is None else counter(micro_batch)
    if n is None or isinstance(n, (int, float)):
        return n
    return dict(n) if isinstance(n, Mapping) else _on_host(_checked(n, "count(micro_batch)"))


def window_denominator(loss_fn: LossFn, count: Denominator) -> Denominator:
    """Return the denominator of a window, or a micro-batch, that counts so much.

    It is the count itself, unless the loss function says otherwise: max(1, count), or count + 1e-8.
    """
    method = attribute_of(loss_fn, "window_denominator")
    n: Denominator = count if method is None else method(count)
    return n


def loss_sum(
    loss_fn: LossFn, model: nn.Module, micro_batch: Any, counted: Denominator | None = None
) -> Tensor:
    """Return the loss sum alone, of a loss function whose micro-batch has been counted already.

    Raises:
        BadInputError: the loss function returns another denominator than was counted.
    """
    if isinstance(loss_fn, LossWrapper):
        return loss_fn.loss_sum(model, micro_batch, counted)
    method = getattr(loss_fn, "loss_sum", None)
    if method is not None:
        result: Tensor = method(model, micro_batch)
        return result
    total, n = pair_of(loss_fn(model, micro_batch))
    if counted is not None:
        require_same_count(counted, n)
    return total


def require_same_count(counted: Denominator, returned: Denominator, of: str = "") -> None:
    """Raise a `BadInputError` where a count and the denominator that was returned differ.

    On a device they are not compared, since the host would have to wait for it.
    """
    if any(isinstance(n, Tensor) and n.device.type != "cpu" for n in (counted, returned)):
        return
    one, other = float(counted), float(returned)
    # A sum of weights may be added up in float32, and one in half precision is rounded at the end.
    if math.isclose(one, other, rel_tol=1e-6, abs_tol=1e-6) or any(
        float(torch.tensor(one, dtype=dtype)) == other for dtype in HALF
    ):
        return
    raise BadInputError(
        f"{of}count(micro_batch) gives {one:.10g}, and the loss function returns the denominator "
        f"{other:.10g} for the same micro-batch: let both count the same"
    )


def pair_of(result: LossResult) -> tuple[Tensor, Denominator]:
    """Return loss sum and denominator of a loss that is one sum.

    Raises:
        BadInputError: it has terms, which its `count` has not; or it is no such pair.
    """
    if isinstance(result, Mapping):
        raise BadInputError(
            f"the loss function returns the terms {', '.join(map(str, result))}, and its count one "
            "number: let it return a mapping of their names to numbers, or None"
        )
    if not isinstance(result, (tuple, list)) or len(result) != 2:
        raise BadInputError(
            f"the loss function returns {described(result)}: let it return (loss_sum, denominator), "
            "both 0-dim, or a mapping of names to terms"
        )
    total, n = result
    if isinstance(n, Clamped):
        raise BadInputError(
            "the loss function returns one sum over a clamped denominator: let it return a mapping, "
            '{"loss": (sum, at_least(n))}, or have a method window_denominator(count)'
        )
    n = _checked(n, "the loss function: its denominator")
    given: Any = total
    if isinstance(given, (int, float)) and not isinstance(n, Tensor) and not n:
        return torch.tensor(float(given)), n  # (0.0, 0): nothing counts
    if not isinstance(given, Tensor) or given.numel() != 1:
        raise BadInputError(
            f"the loss function: its loss sum is {described(given)}, and has to be a 0-dim tensor: the "
            "sum of the micro-batch's losses, with its graph"
        )
    return total, n


def described(value: Any) -> str:
    """Return what a value is, in words and without its numbers."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}" if value.ndim else "a 0-dim tensor"
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of {len(value)}"
    return "None" if value is None else f"a {type(value).__name__}"


def _checked(n: Any, whose: str) -> Any:
    """Return a denominator as it was given.

    Raises:
        BadInputError: it is no number; or it has a gradient, which is lost where a sum is divided by it.
    """
    if isinstance(n, Tensor) and n.requires_grad:
        raise BadInputError(
            f"{whose} has a gradient, which is lost where the window's sum is divided by it: detach it, "
            "n.detach(), where it only counts; where it belongs to the loss, return a function of the "
            'window\'s sums, {"loss": (torch.stack([loss_sum, n]), None, 1.0, lambda v: v[0] / v[1])}'
        )
    # What else can be made a number, e.g. NumPy's, is one.
    if n.numel() != 1 if isinstance(n, Tensor) else not hasattr(n, "__float__"):
        raise BadInputError(
            f"{whose} is {described(n)}, and has to be a number or a 0-dim tensor: what the micro-batch "
            "counts, e.g. mask.sum()"
        )
    return n


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
    is_term = isinstance(total, (Tensor, int, float)) and (of is None or callable(of))
    if not is_term or (n is None and of is None):
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
    if weight.numel() != 1 if isinstance(weight, Tensor) else not hasattr(weight, "__float__"):
        raise BadInputError(
            f"term {name!r}: its weight is {described(weight)}, and has to be a number or a 0-dim tensor"
        )
    if n is None:  # undivided, and there in every window: max(1, 0)
        n = at_least(0.0)
    window = n.window if isinstance(n, Clamped) else None
    return Term(total, plain_count(n, f"term {name!r}: its denominator"), weight, of, window)


def plain_count(n: Denominator | Clamped, whose: str = "count(micro_batch)") -> Denominator:
    """Return a denominator that adds up, as a number where it is on the host."""
    return _on_host(_checked(n.denominator if isinstance(n, Clamped) else n, whose))


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
    criterion = attribute_of(loss_fn, "criterion")
    return criterion if isinstance(criterion, nn.Module) else None
