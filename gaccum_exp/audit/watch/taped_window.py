"""A taped window that can be run again: in its micro-batches, and with all samples at once."""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from gaccum_exp.audit.causes.loss_coupling import couples
from gaccum_exp.audit.rerun.passes import Around
from gaccum_exp.audit.rerun.samples import (
    NotJoinableError,
    joined,
    picked,
    ragged,
    sample_dim,
    size_of,
    tensors_in,
)
from gaccum_exp.audit.rerun.sandbox import Parts
from gaccum_exp.audit.watch.playback import (
    Lift,
    Outputs,
    count_of,
    itself,
    loss_of,
    reduction_of,
    resolved,
    run,
)
from gaccum_exp.audit.watch.tape import Call, MicroBatch, Ref, leaves


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
        self.sizes = [size_of(u.first.arguments, dim) for u in self._units]
        self._bases = [self._base(unit) for unit in self._units]
        self._bases = _as_one(self._bases)
        self.weights = [base[0] for base in self._bases]
        self.padded = ragged([unit.first.arguments for unit in self._units], dim)
        """Whether joining the micro-batches pads their sequences."""
        self.reference = 1.0
        self.shares: list[float] | None = None
        """What of the one pass's gradient each ∇ℓᵢ makes; None: it is no sum of theirs."""
        columns = range(len(self._units[0].models))
        self._inputs = [self._constants([u.models[j] for u in self._units]) for j in columns]
        columns = range(len(self._units[0].losses))
        self._raw = [self._raw_inputs([u.losses[j] for u in self._units]) for j in columns]
        if couples(self._units[0], self.sizes[0]):
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
        found = [count_of(unit.losses[0]) for unit in self._units]
        known = [n for n in found if n is not None]
        return known if len(known) == len(found) else None

    @property
    def sums(self) -> bool:
        """Whether the loss says that it is a sum."""
        return all(reduction_of(unit.losses[0]) == "sum" for unit in self._units)

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
        given = [call.arguments for call in calls]
        if any(isinstance(leaf, Ref) for leaf in leaves(given)):
            return None
        sizes = [size_of(g, self._dim) for g in given]
        return joined(given, sizes, self._dim)

    def _raw_inputs(self, calls: list[Call]) -> Any:
        return None if any(call.sources() for call in calls) else self._constants(calls)

    def _losses(self, unit: MicroBatch, lift: Lift) -> list[Tensor]:
        outputs: Outputs = {}
        for call in unit.models:
            outputs[call] = tensors_in(run(call, resolved(call.arguments, outputs, lift)))
        return [loss_of(run(loss, resolved(loss.arguments, outputs, lift))) for loss in unit.losses]

    def _whole_losses(self, lift: Lift, order: Tensor | None) -> list[Tensor]:
        first, total = self._units[0], sum(self.sizes)
        each: list[Outputs] = [{} for _ in self._units]
        for j, call in enumerate(first.models):
            inputs = self._inputs[j]
            if inputs is None:
                inputs = self._joined_inputs([u.models[j] for u in self._units], each, lift)
                outputs = tensors_in(run(call, inputs))
            else:
                chosen = inputs if order is None else picked(inputs, order, total, self._dim)
                outputs = tensors_in(run(call, lift(chosen)))
            for index, unit in enumerate(self._units):
                each[index][unit.models[j]] = self._rows(unit.models[j], outputs, index, order)
        losses = []
        for j, loss in enumerate(first.losses):
            raw = self._raw[j]
            if raw is not None:
                chosen = raw if order is None else picked(raw, order, total, self._dim)
                losses.append(loss_of(run(loss, lift(chosen))))
            elif loss.function is itself:
                losses.append(each[0][loss.refs()[0].call][loss.refs()[0].place])
            else:
                inputs = self._joined_inputs([u.losses[j] for u in self._units], each, lift)
                losses.append(loss_of(run(loss, inputs)))
        return losses

    def _joined_inputs(self, calls: list[Call], each: list[Outputs], lift: Lift) -> Any:
        given = [
            resolved(call.arguments, outputs, lift) for call, outputs in zip(calls, each, strict=True)
        ]
        return joined(given, [size_of(g) for g in given])

    def _rows(self, call: Call, whole: list[Tensor], index: int, order: Tensor | None) -> list[Tensor]:
        """Return a micro-batch's own rows of what the model put out for all samples."""
        start, size, total = sum(self.sizes[:index]), self.sizes[index], sum(self.sizes)
        where = torch.arange(total) if order is None else torch.argsort(order)
        rows = []
        for tensor, shape in zip(whole, call.shapes, strict=True):
            if len(self.sizes) > 1:
                dim = sample_dim(tuple(tensor.shape), shape, total, size)
            else:  # nothing grows that would tell
                dim = next((d for d, n in enumerate(shape) if n == total), None)
            if dim is None:
                rows.append(tensor)
                continue
            per = tensor.shape[dim] // total
            mine = where[start : start + size, None] * per + torch.arange(per)
            rows.append(tensor.index_select(dim, mine.flatten().to(tensor.device)))
        return rows


def _as_one(bases: list[tuple[float, list[Tensor]]]) -> list[tuple[float, list[Tensor]]]:
    """A loop weighs several losses alike in every micro-batch, but for its own precision's rounding."""
    first = bases[0][1]
    for _, base in bases:
        if len(base) < 2 or not all(
            b.ndim == 0 and torch.isclose(b, f, rtol=1e-5, atol=0.0)
            for b, f in zip(base, first, strict=True)
        ):
            return bases
    return [(weight, first) for weight, _ in bases]


class CouplingError(NotJoinableError):
    """The loop mixes samples outside of model and loss."""


def _weighed(losses: list[Tensor], bases: list[Tensor]) -> Tensor:
    total = sum((x.double() * b.to(x.device)).sum() for x, b in zip(losses, bases, strict=True))
    assert isinstance(total, Tensor)
    return total
