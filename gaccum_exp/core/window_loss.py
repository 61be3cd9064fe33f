"""What a window adds up to: one loss, or the terms of a loss that has several."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from gaccum_exp.core.dtypes import out_of_half
from gaccum_exp.core.losses.protocol import (
    Clamped,
    Counts,
    Denominator,
    LossFn,
    LossResult,
    Term,
    pair_of,
    plain_count,
    require_same_count,
    terms_of,
    window_denominator,
)
from gaccum_exp.core.reductions import Reduction, quotient
from gaccum_exp.errors import BadInputError


class WindowLoss(NamedTuple):
    """What a window added up to."""

    loss_sum: Tensor
    """Σ Sᵢ, a 0-dim tensor on the model's device, detached; of several terms their weighted total."""
    denominator: Denominator
    """Σ nᵢ, or what a loss function with a clamp makes of it; 0 where nothing in the window counts, and
    then no gradient was added. A number, or a 0-dim tensor where the window's targets lie on a device.
    Of several terms, each divided already, 1."""
    terms: Mapping[str, "WindowLoss"] = MappingProxyType({})
    """The terms by name, not weighted, those that count something in the window."""

    @property
    def mean(self) -> Tensor:
        """The loss over all that counts in the window, 0-dim."""
        return self.loss_sum / self.denominator

    def item(self) -> float:
        """Return `mean` as a number."""
        return float(self.mean)

    def __float__(self) -> float:
        return self.item()


@dataclass(slots=True)
class WindowTerms:
    """The terms of a window that has begun."""

    accum_steps: int
    """N"""
    window_counts: dict[str, Denominator] = field(default_factory=dict)
    """n, of the terms that were counted before their first backward pass."""
    sums: dict[str, Tensor] = field(default_factory=dict)
    """Σ Sᵢ over the passes done, detached, in float32 at least."""
    counts: dict[str, Denominator] = field(default_factory=dict)
    """Σ nᵢ over these."""
    divisors: dict[str, Denominator] = field(default_factory=dict)
    """What the sums are divided by for their mean: of a term counted late, over the passes done."""
    weights: dict[str, list[Denominator]] = field(default_factory=dict)
    """The first one, or that of each pass where they are to be compared on a device."""
    values: dict[str, Tensor] = field(default_factory=dict)
    """Functions of the means over the passes done."""
    slopes: dict[str, Tensor] = field(default_factory=dict)
    """Their gradients at the window's means."""
    means: dict[str, Tensor] = field(default_factory=dict)
    """The window's means, where what weight and function hold themselves has no gradient yet."""

    def add(self, terms: Mapping[str, Term]) -> None:
        """Add one micro-batch.

        Raises:
            BadInputError: a weight is another than before.
        """
        for name, term in terms.items():
            if not _is_empty(term):
                self._add_weight(name, term.weight)
            sums = out_of_half(term.sum.detach())
            if name in self.sums and self.sums[name].shape != sums.shape:
                raise BadInputError(
                    f"term {name!r}: its sums have the shapes {tuple(self.sums[name].shape)} and "
                    f"{tuple(sums.shape)} in two micro-batches of a window"
                )
            self.sums[name] = self.sums[name] + sums if name in self.sums else sums
            self.counts[name] = self.counts.get(name, 0) + term.denominator
            self.divisors[name] = term.divides_by(self.window_counts.get(name, self.counts[name]))
            if term.of is not None:
                mean = quotient(self.sums[name], term.divides_by(self.counts[name]))
                if mean is not None:
                    with torch.no_grad():
                        self.values[name] = _value_of(name, term, mean)

    def share(self, terms: Mapping[str, Term], reduction: Reduction) -> Tensor | None:
        """Return what is back-propagated of one micro-batch, 0-dim; None: nothing in it counts.

        Raises:
            BadInputError: the reduction has no such term, or the window was not counted for it.
        """
        total: Tensor | None = None
        for name, term in terms.items():
            share = self._share_of(name, term, reduction)
            if share is not None:
                total = share if total is None else total + share
        return total

    def _share_of(self, name: str, term: Term, reduction: Reduction) -> Tensor | None:
        n = term.divides_by(term.denominator)
        window_count = self.window_counts.get(name)
        if window_count is not None:
            window_count = term.divides_by(window_count)
        elif self.accum_steps == 1:
            window_count = n
        elif reduction.needs_window_count:
            raise _not_counted(name)
        by = reduction.of_term(name).divisor(n, window_count, self.accum_steps)
        if term.of is None:
            part = quotient(term.sum, by)
            return None if part is None else term.weight * part
        if not reduction.has_means:
            raise BadInputError(
                f"accum.reduction={reduction.name} is refused for term {name!r}: it is a function of "
                "means, which a sum has not; use global_mean"
            )
        if not reduction.needs_window_count or self.accum_steps == 1:
            mean = quotient(out_of_half(term.sum), n)
            return None if mean is None else term.weight * _value_of(name, term, mean) / self.accum_steps
        if name not in self.slopes:
            if isinstance(by, Tensor) or by:
                raise _not_counted(name)
            return None
        part = quotient((self.slopes[name] * term.sum).sum(), by)
        weight = term.weight.detach() if isinstance(term.weight, Tensor) else term.weight
        if name not in self.means:
            return None if part is None else weight * part
        own = term.weight * _value_of(name, term, self.means.pop(name))
        return own if part is None else own + weight * part

    def differentiate(self, functions: Mapping[str, Term]) -> None:
        """Take the gradients of functions at the means of all that was added."""
        for name, term in functions.items():
            mean = quotient(self.sums[name], term.divides_by(self.counts[name]))
            if mean is not None:
                self.means[name] = mean
                with torch.enable_grad():
                    at = mean.detach().requires_grad_()
                    value = _value_of(name, term, at)
                (self.slopes[name],) = torch.autograd.grad(value, at, materialize_grads=True)

    def loss(self) -> WindowLoss:
        """Return the loss of all that was added.

        Where the loss function counts late, the host reads the counts here, which waits for the device.

        Raises:
            BadInputError: a weight has changed.
        """
        found: dict[str, WindowLoss] = {}
        total: Any = torch.zeros(())
        counted: Any = 0.0
        for name, sums in self.sums.items():
            n = self.divisors[name] if name in self.window_counts else float(self.divisors[name])
            if not isinstance(n, Tensor) and not n:
                continue
            weight = self._weight(name)
            of_means = self.values.get(name)
            found[name] = WindowLoss(sums, n) if of_means is None else WindowLoss(of_means, 1.0)
            value = quotient(sums, n) if of_means is None else of_means
            assert value is not None, "what counts nothing is left out"
            total = weight * value + total
            counted = counted + (n != 0)
        counted = (counted > 0).float() if isinstance(counted, Tensor) else float(counted > 0)
        return WindowLoss(total, counted, found)

    def state_dict(self) -> dict[str, Any]:
        """Return a copy, as plain values."""
        state = {f.name: getattr(self, f.name) for f in fields(self)}
        copied: dict[str, Any] = tree_map_only(Tensor, lambda t: t.detach().clone(), state)
        return copied

    def _add_weight(self, name: str, weight: Denominator) -> None:
        now = weight.detach() if isinstance(weight, Tensor) else weight
        given = self.weights.setdefault(name, [now])
        if isinstance(now, Tensor) and now.device.type != "cpu":
            given.append(now)  # compared when the window ends: nothing waits for the device before
        elif given[0] is not now:
            _require_equal(name, float(given[0]), float(now))

    def _weight(self, name: str) -> Denominator:
        # None was given where nothing counts and a clamp is divided by: times its sum of 0.
        first, *others = self.weights.get(name, [1.0])
        if others:
            values = torch.stack([w for w in others if isinstance(w, Tensor)]).tolist()
            for value in values:
                _require_equal(name, values[0], value)
        return first


class LossTotal:
    """The loss of a loss function over many batches, of which none is back-propagated."""

    def __init__(self, loss_fn: LossFn) -> None:
        self._loss_fn = loss_fn
        self._sum: Any = 0.0
        self._denominator: Any = 0.0
        self._terms: WindowTerms | None = None

    def add(self, result: LossResult, counts: Counts | None = None) -> None:
        """Add what a loss function has returned, and what it has counted."""
        if isinstance(result, Mapping) or self._terms is not None:
            self._terms = self._terms or WindowTerms(1)
            self._terms.add(counted_as(terms_of(result), counts))
        else:
            self.add_pair(*pair_of(result))

    def add_pair(self, loss: Tensor, denominator: Any) -> None:
        """Add a loss sum and what it is divided by, of one model or of several models side by side."""
        self._sum, self._denominator = self._sum + out_of_half(loss), self._denominator + denominator

    def loss(self) -> WindowLoss:
        """Return the loss over all of them."""
        if self._terms is None:
            return WindowLoss(self._sum, window_denominator(self._loss_fn, self._denominator))
        return self._terms.loss()

    def denominators(self, scale: float) -> float | dict[str, float]:
        """Return the denominator of `scale` times as much, or of each term that counts something."""
        if self._terms is None:
            return float(window_denominator(self._loss_fn, float(self._denominator) * scale))
        every = {name: float(n) * scale for name, n in self._terms.divisors.items()}
        return {name: n for name, n in every.items() if n}


def window_counts(counts: Sequence[Counts | None]) -> dict[str, Denominator]:
    """Return n of the terms that every micro-batch's count could tell; where one names none it has 0."""
    if not all(isinstance(of, dict) for of in counts):
        return {}
    total: dict[str, Denominator] = {}
    for of in counts:
        assert isinstance(of, dict)
        for name, n in of.items():
            total[name] = total.get(name, 0) + plain_count(n)
    return total


def counted_as(terms: Mapping[str, Term], counts: Counts | None) -> dict[str, Term]:
    """Return the terms of a micro-batch with the denominators that it was counted to have.

    Raises:
        BadInputError: they are others than the loss function has returned.
    """
    if not isinstance(counts, dict):
        return dict(terms)
    found = dict(terms)
    for name, n in counts.items():
        # One that is left out counts nothing.
        returned = terms[name].denominator if name in terms else 0.0
        require_same_count(plain_count(n), returned, f"term {name!r}: ")
        if name in terms:
            found[name] = terms[name]._replace(denominator=plain_count(n))
            if isinstance(n, Clamped):
                found[name] = found[name]._replace(window=n.window)
    return found


def _is_empty(term: Term) -> bool:
    """Whether a term of a micro-batch adds nothing, as (0.0, 0) does: its weight does not matter."""
    if isinstance(term.denominator, Tensor) or term.denominator:
        return False
    return term.window is None or (term.sum.is_cpu and not term.sum.any())


def _value_of(name: str, term: Term, mean: Tensor) -> Tensor:
    assert term.of is not None
    value = term.of(mean)
    if not isinstance(value, Tensor) or value.ndim:
        said = f"the shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise BadInputError(f"term {name!r}: its function gives {said}, and has to give a 0-dim tensor")
    return value


def _not_counted(name: str) -> BadInputError:
    return BadInputError(
        f"term {name!r} was not there when the window was counted: return it in the first micro-batch "
        "too, as sums of 0 over 0; one that is no function may be named in count(micro_batch) instead"
    )


def _require_equal(name: str, first: float, now: float) -> None:
    if first != now:
        raise BadInputError(
            f"term {name!r}: its weight is {first!r} and, later in the same window, {now!r}; a weight "
            "is constant over a window: let it change between optimizer steps, or weigh inside the sum"
        )
