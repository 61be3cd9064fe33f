"""Norms of gradients, and how far apart two of them are."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from gaccum_exp.core.dtypes import HALF, reals, wide

Gradient = dict[str, Tensor]
"""By parameter name; parameters that got none are not in it."""


def gradient_of(parameters: Mapping[str, nn.Parameter]) -> Gradient:
    """Take the gradients away from the parameters, sparse ones as dense."""
    taken = {}
    for name, parameter in parameters.items():
        if parameter.grad is not None:
            taken[name] = dense(parameter.grad.detach())
        parameter.grad = None
    return taken


def dense(gradient: Tensor) -> Tensor:
    """Return a gradient with all its elements, where it is sparse."""
    return gradient.to_dense() if gradient.layout != torch.strided else gradient


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Return the Euclidean norm of all gradients taken together, 0-dim, on their device.

    Of gradients in half precision in float32: their norm in their own has two or three digits.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    # A sparse gradient may list a row twice; only its coalesced values have the gradient's norm.
    dense = [g.coalesce().values() if g.is_sparse else g for g in gradients]
    half = [g for g in dense if g.dtype in HALF]
    others = [g for g in dense if g.dtype not in HALF] if half else dense
    norms: list[Tensor] = []
    if others:
        norms += torch._foreach_norm(others)  # as torch's own clipping takes them
    if half:
        norms += torch._foreach_norm(half, dtype=torch.float32)
    if not norms:
        return torch.tensor(0.0)
    total: Tensor = torch.linalg.vector_norm(torch.stack([n.to(norms[0].device) for n in norms]))
    return total


def norm(gradient: Gradient) -> float:
    """Return the Euclidean norm over all parameters, accumulated in float64."""
    return _root(gradient.values())


def dot(one: Gradient, other: Gradient) -> float:
    """Return the inner product over all parameters, accumulated in float64.

    Complex gradients are taken as the pairs of real numbers that they are: Re⟨one, other⟩.
    """
    # In the order of names and not of a set: that differs between processes, and with it the last bit.
    shared = [name for name in one if name in other]
    return sum(float((reals(wide(one[k])) * reals(wide(other[k]))).sum()) for k in shared)


def gaps(one: Gradient, other: Gradient, factor: float = 1.0) -> Iterator[tuple[str, Tensor]]:
    """Yield `one − factor × other` in float64, a parameter at a time; a missing gradient is zero.

    One at a time, since of a large model a whole further gradient in float64 may not fit.
    """
    for name in dict.fromkeys([*one, *other]):  # in an order that is the same in every process
        if name not in other:
            yield name, wide(one[name])
        elif name not in one:
            yield name, wide(other[name]) * -factor
        else:
            yield name, torch.sub(wide(one[name]), wide(other[name]), alpha=factor)


class Deviation(NamedTuple):
    """How far a gradient lies from a reference, by parameter: squares of Euclidean norms."""

    gap: dict[str, float]
    """‖one − reference‖²."""
    reference: dict[str, float]
    """‖reference‖²; what is missing is zero."""

    @property
    def distance(self) -> float:
        """‖one − reference‖ / ‖reference‖ over all parameters."""
        return relative(_root_of(self.gap.values()), _root_of(self.reference.values()))

    def norm(self, names: Iterable[str]) -> float:
        """Return ‖reference‖ over the parameters of these names."""
        return _root_of(self.reference.get(name, 0.0) for name in names)

    def of(self, names: Sequence[str]) -> float:
        """Return ‖one − reference‖ / ‖reference‖ over the parameters of these names."""
        return relative(_root_of(self.gap.get(name, 0.0) for name in names), self.norm(names))


def deviation(one: Gradient, reference: Gradient) -> Deviation:
    """Return how far a gradient lies from a reference, by parameter."""
    return Deviation({name: _square(gap) for name, gap in gaps(one, reference)}, squares(reference))


def difference(one: Gradient, other: Gradient) -> Gradient:
    """Return `one − other` in float64; a missing gradient is zero."""
    return dict(gaps(one, other))


def add(total: Gradient, gradient: Gradient) -> None:
    """Add a gradient to a sum in float64, in place."""
    for name, g in gradient.items():
        total[name] = total[name].add_(wide(g)) if name in total else wide(g).clone()


def distance(one: Gradient, reference: Gradient, factor: float = 1.0) -> float:
    """Return ‖one − factor × reference‖ / ‖reference‖; from a reference of zero it is 0 or infinite."""
    return relative(_root(gap for _, gap in gaps(one, reference, factor)), norm(reference))


def scaled(gradient: Gradient, factor: float) -> Gradient:
    """Return the gradient times a number, in float64."""
    return {name: wide(g) * factor for name, g in gradient.items()}


def identical(one: Gradient, other: Gradient) -> bool:
    """Whether they agree bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def finite(gradient: Gradient) -> bool:
    """Whether it holds no NaN and no infinity."""
    return all(bool(torch.isfinite(g).all()) for g in gradient.values())


def coarse(gradient: Gradient, accum_steps: int) -> bool:
    """Whether every element, or N times it, is a number of a lower precision than its own."""

    def is_coarse(g: Tensor, dtype: torch.dtype) -> bool:
        numbers = reals(g)
        return any(
            torch.equal((numbers * by).to(dtype).to(numbers.dtype), numbers * by)
            for by in (1, accum_steps)
        )

    lower = [torch.bfloat16, torch.float16]
    if all(g.dtype in (torch.float64, torch.complex128) for g in gradient.values()):
        lower.append(torch.float32)
    return any(all(is_coarse(g, dtype) for g in gradient.values()) for dtype in lower)


def relative(gap: float, size: float) -> float:
    """Return gap / size; of a size of zero 0 or infinity."""
    if size == 0:
        return 0.0 if gap == 0 else math.inf
    return gap / size


def squares(gradient: Gradient) -> dict[str, float]:
    """Return the square of each parameter's Euclidean norm, accumulated in float64."""
    return {name: _square(g) for name, g in gradient.items()}


def _root(tensors: Iterable[Tensor]) -> float:
    return _root_of(map(_square, tensors))


def _root_of(squares: Iterable[float]) -> float:
    return math.sqrt(sum(squares))


def _square(tensor: Tensor) -> float:
    return float(reals(wide(tensor)).square().sum())
