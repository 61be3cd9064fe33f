"""A taped window that can be run again: in its micro-batches, and with all samples at once."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gaccum_exp.audit.bench import Parts
from gaccum_exp.audit.record import Call, MicroBatch, Ref, leaves, loss_in
from gaccum_exp.audit.samples import (
    NotJoinableError,
    joined,
    mapped,
    picked,
    sample_dim,
    size_of,
    tensors_in,
)
from gaccum_exp.audit.trial import Around
from gaccum_exp.core.loss import CriterionLoss

Lift = Callable[[Any], Any]
Outputs = dict[Call, list[Tensor]]


class RecordedWindow:
    """The micro-batches of a tape as a `Window`.

    Each micro-batch's loss ℓᵢ is the loop's own, and `weights[i]` what the loop back-propagated it with;
    the one pass is `reference` × ℓ of all samples.

    Args:
        parts: the modules.
        micro_batches: of the tape.
        dim: the dimension of the model's inputs that counts samples.

    Raises:
        NotJoinableError: they do not make one batch.
    """

    def __init__(self, parts: Parts, micro_batches: Sequence[MicroBatch], dim: int) -> None:
        self.parts = parts
        self._dim = dim
        self._units = list(micro_batches)
        if len({(len(u.models), len(u.losses)) for u in self._units}) != 1:
            raise NotJoinableError("micro-batches differ in how often they call model and loss")
        self.sizes = [size_of([u.first.args, u.first.kwargs], dim) for u in self._units]
        self._bases = [self._base(unit) for unit in self._units]
        self.weights = [base[0] for base in self._bases]
        self.reference = 1.0
        self.shares: list[float] | None = None
        """What of the one pass's gradient each ∇ℓᵢ makes; None: it is no sum of theirs."""
        columns = range(len(self._units[0].models))
        self._inputs = [self._constants([u.models[j] for u in self._units]) for j in columns]
        columns = range(len(self._units[0].losses))
        self._raw = [self._raw_inputs([u.losses[j] for u in self._units]) for j in columns]
        if self._couples():
            raise CouplingError("samples are mixed between the model's outputs and the loss")

    def accumulate(self, around: Around, lift: Lift) -> None:
        """Run the micro-batches as the loop did."""
        for index, unit in enumerate(self._units):
            with around(index):
                losses = self._losses(unit, lift)
            weight = self.weights[index]
            cotangents = [b.to(x) * weight for b, x in zip(self._bases[index][1], losses, strict=True)]
            torch.autograd.backward(losses, cotangents)

    def one_pass(self, around: AbstractContextManager[None], lift: Lift, order: Tensor | None) -> None:
        """Run all samples at once, through the loop's own model and loss."""
        with around:
            losses = self._whole_losses(lift, order)
        bases = self._whole_bases(losses, order)
        torch.autograd.backward(losses, [b * self.reference for b in bases])

    def forward(self, index: int | None, lift: Lift) -> tuple[Tensor, Any]:
        """Return the loss, and what it counts where the criterion says so (NaN else)."""
        if index is None:
            losses = self._whole_losses(lift, None)
            bases = self._whole_bases(losses, None)
            counts = self.counts()
            return _weighed(losses, bases), math.nan if counts is None else sum(counts)
        losses = self._losses(self._units[index], lift)
        counts = self.counts()
        return _weighed(losses, self._bases[index][1]), math.nan if counts is None else counts[index]

    def additive(self, parts: Sequence[tuple[float, Any]], whole: tuple[float, Any]) -> bool:
        """Whether the one pass's gradient is a sum of the micro-batches' gradients."""
        return self.shares is not None

    def recounted(self, counts: Sequence[float]) -> "RecordedWindow | None":
        """Return the window with each micro-batch's share as its weight."""
        if self.shares is None:
            return None
        other = RecordedWindow(self.parts, self._units, self._dim)
        other.weights = [share * self.reference for share in self.shares]
        other.reference, other.shares = self.reference, self.shares
        return other

    def counts(self) -> list[float] | None:
        """Return what each micro-batch's loss counts, for criteria that are known to count."""
        if len(self._units[0].losses) != 1:
            return None
        found = [_count(unit.losses[0]) for unit in self._units]
        known = [n for n in found if n is not None]
        return known if len(known) == len(found) else None

    @property
    def sums(self) -> bool:
        """Whether the loss says that it is a sum."""
        return all(_reduction(unit.losses[0]) == "sum" for unit in self._units)

    def _base(self, unit: MicroBatch) -> tuple[float, list[Tensor]]:
        """Return weight and unit cotangents: weight × cotangents is what the loop back-propagated."""
        given = [loss.cotangent for loss in unit.losses if loss.cotangent is not None]
        first = given[0]
        if first.ndim == 0:
            weight = float(first) or 1.0
            return weight, [c.double() / weight for c in given]
        counted = first != 0
        values = first[counted]
        if (
            len(given) > 1
            or not values.numel()
            or bool((values - values[0]).abs().max() > 1e-5 * values[0].abs())
        ):
            raise NotJoinableError(
                "the loss's elements are weighed one by one: give watch the whole loss as a function"
            )
        n = int(counted.sum())
        return float(values[0]) * n, [counted.double() / n]

    def _whole_bases(self, losses: list[Tensor], order: Tensor | None) -> list[Tensor]:
        first = self._bases[0][1]
        if first[0].ndim == 0:
            return [base.to(x) for base, x in zip(first, losses, strict=True)]
        counted = torch.cat([(bases[0] != 0) for _, bases in self._bases])
        return [(counted / counted.sum()).to(losses[0]).reshape(losses[0].shape)]

    def _constants(self, calls: list[Call]) -> Any:
        given = [[call.args, call.kwargs] for call in calls]
        if any(isinstance(leaf, Ref) for leaf in leaves(given)):
            return None
        sizes = [size_of(g, self._dim) for g in given]
        return joined(given, sizes, self._dim)

    def _raw_inputs(self, calls: list[Call]) -> Any:
        return None if any(call.sources() for call in calls) else self._constants(calls)

    def _losses(self, unit: MicroBatch, lift: Lift) -> list[Tensor]:
        outputs: Outputs = {}
        for call in unit.models:
            outputs[call] = tensors_in(_run(call, *_resolved([call.args, call.kwargs], outputs, lift)))
        return [
            _loss(_run(loss, *_resolved([loss.args, loss.kwargs], outputs, lift)))
            for loss in unit.losses
        ]

    def _whole_losses(self, lift: Lift, order: Tensor | None) -> list[Tensor]:
        first, total = self._units[0], sum(self.sizes)
        each: list[Outputs] = [{} for _ in self._units]
        for j, call in enumerate(first.models):
            inputs = self._inputs[j]
            if inputs is None:
                inputs = self._joined_inputs([u.models[j] for u in self._units], each, lift)
                outputs = tensors_in(_run(call, *inputs))
            else:
                chosen = inputs if order is None else picked(inputs, order, total, self._dim)
                outputs = tensors_in(_run(call, *lift(chosen)))
            for index, unit in enumerate(self._units):
                each[index][unit.models[j]] = self._rows(unit.models[j], outputs, index, order)
        losses = []
        for j, loss in enumerate(first.losses):
            raw = self._raw[j]
            if raw is not None:
                chosen = raw if order is None else picked(raw, order, total, self._dim)
                losses.append(_loss(_run(loss, *lift(chosen))))
            elif loss.function is itself:
                losses.append(each[0][loss.refs()[0].call][loss.refs()[0].place])
            else:
                inputs = self._joined_inputs([u.losses[j] for u in self._units], each, lift)
                losses.append(_loss(_run(loss, *inputs)))
        return losses

    def _joined_inputs(self, calls: list[Call], each: list[Outputs], lift: Lift) -> Any:
        given = [
            _resolved([call.args, call.kwargs], outputs, lift)
            for call, outputs in zip(calls, each, strict=True)
        ]
        return joined(given, [size_of(g) for g in given])

    def _rows(self, call: Call, whole: list[Tensor], index: int, order: Tensor | None) -> list[Tensor]:
        """Return a micro-batch's own rows of what the model put out for all samples."""
        start, size, total = sum(self.sizes[:index]), self.sizes[index], sum(self.sizes)
        where = torch.arange(total) if order is None else torch.argsort(order)
        rows = []
        for tensor, shape in zip(whole, call.shapes, strict=True):
            dim = sample_dim(tuple(tensor.shape), shape, total, size) if len(self.sizes) > 1 else None
            if dim is None:
                rows.append(tensor)
                continue
            per = tensor.shape[dim] // total
            mine = where[start : start + size, None] * per + torch.arange(per)
            rows.append(tensor.index_select(dim, mine.flatten().to(tensor.device)))
        return rows

    def _couples(self) -> bool:
        """Whether the operations between model and loss mix samples, tried on made-up outputs."""
        unit, size = self._units[0], self.sizes[0]
        between = [loss for loss in unit.losses if any(r.call.kind == "between" for r in loss.refs())]
        if size < 2 or not between:
            return False
        generator = torch.Generator().manual_seed(0)
        base: Outputs = {
            call: [_made_up(s, d, generator) for s, d in zip(call.shapes, call.dtypes, strict=True)]
            for call in unit.models
        }
        device = next(
            (leaf.device for leaf in leaves([c.args for c in unit.models]) if isinstance(leaf, Tensor)),
            None,
        )
        base = {c: [t.to(device) for t in ts] for c, ts in base.items()}
        with torch.no_grad():
            return any(self._mixes(loss, base, size, generator) for loss in between)

    def _mixes(self, loss: Call, base: Outputs, size: int, generator: torch.Generator) -> bool:
        def rows_changed(chosen: Tensor) -> list[Tensor]:
            moved = {c: [_moved(t, chosen, size, generator) for t in ts] for c, ts in base.items()}
            after = tensors_in(_resolved([loss.args, loss.kwargs], moved, _as_is))
            return [
                (a != b).reshape(a.shape[0] if a.ndim else 1, -1).any(1)
                for a, b in zip(after, before, strict=True)
            ]

        before = tensors_in(_resolved([loss.args, loss.kwargs], base, _as_is))
        numbers = torch.arange(size)
        for bit in range((size - 1).bit_length()):  # any two samples differ in a bit of their numbers
            chosen = (numbers >> bit) & 1 == 1
            for one, other in zip(rows_changed(chosen), rows_changed(~chosen), strict=True):
                if bool((one & other).any()):
                    return True
        return False


class CouplingError(NotJoinableError):
    """The loop mixes samples outside of model and loss."""


def itself(loss: Tensor, place: int) -> Tensor:
    """Return the loss that the model has put out; `place` is where among its outputs."""
    return loss


def _run(call: Call, args: Any, kwargs: Any) -> Any:
    device = next((t.device.type for t in tensors_in([args, kwargs])), "cpu")
    with torch.autocast(device, dtype=call.autocast[1], enabled=call.autocast[0]):
        return call.function(*args, **kwargs)


def _loss(output: Any) -> Tensor:
    loss = loss_in(output) if torch.is_grad_enabled() else _value_in(output)
    if loss is None:
        raise NotJoinableError("run again, the loss has no gradient")
    return loss


def _value_in(output: Any) -> Tensor | None:
    if isinstance(output, Tensor):
        return output
    with torch.enable_grad():
        marked = mapped(
            lambda x: (
                x.clone().requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x
            ),
            output,
        )
        return loss_in(marked)


def _resolved(value: Any, outputs: Outputs, lift: Lift) -> Any:
    """Return arguments with every reference replaced by the tensor that it stands for."""

    def leaf(x: Any) -> Any:
        if not isinstance(x, Ref):
            return lift(x)
        if x.call not in outputs:
            args, kwargs = _resolved([x.call.args, x.call.kwargs], outputs, lift)
            outputs[x.call] = tensors_in(x.call.function(*args, **kwargs))
        return outputs[x.call][x.place]

    return mapped(leaf, value)


def _as_is(value: Any) -> Any:
    return value


def _weighed(losses: list[Tensor], bases: list[Tensor]) -> Tensor:
    total = sum((x.double() * b.to(x.device)).sum() for x, b in zip(losses, bases, strict=True))
    assert isinstance(total, Tensor)
    return total


def _made_up(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    if not dtype.is_floating_point:
        return torch.zeros(shape, dtype=dtype)
    return torch.randn(shape, generator=generator).to(dtype)


def _moved(tensor: Tensor, chosen: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Return made-up outputs with some samples' values drawn anew."""
    dim = next((d for d, n in enumerate(tensor.shape) if n == size), None)
    if dim is None or not tensor.is_floating_point():
        return tensor
    mask = chosen.to(tensor.device).reshape([-1 if d == dim else 1 for d in range(tensor.ndim)])
    return torch.where(mask, torch.randn(tensor.shape, generator=generator).to(tensor), tensor)


def _reduction(loss: Call) -> str | None:
    given = loss.kwargs.get("reduction", getattr(loss.function, "reduction", None))
    return given if isinstance(given, str) else None


def _count(loss: Call) -> float | None:
    """Return what one call of a criterion counts, if that is one of torch's."""
    criterion = loss.function
    if criterion is nn.functional.cross_entropy:
        names = ("weight", "ignore_index")
        criterion = nn.CrossEntropyLoss(**{k: v for k, v in loss.kwargs.items() if k in names})
    target = loss.kwargs.get("target", loss.args[1] if len(loss.args) > 1 else None)
    if not isinstance(criterion, nn.Module) or not hasattr(criterion, "reduction"):
        return None
    if not isinstance(target, Tensor):
        return None
    try:
        counted = CriterionLoss(criterion, "sum").count((None, target))
    except ValueError:
        return None
    return None if counted is None else float(counted)


@contextmanager
def weighed(window: RecordedWindow, weights: Sequence[float], reference: float) -> Iterator[None]:
    """Run the window with other weights for the length of the block."""
    before = window.weights, window.reference
    window.weights, window.reference = list(weights), reference
    try:
        yield
    finally:
        window.weights, window.reference = before
