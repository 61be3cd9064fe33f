"""A taped window that can be run again: in its micro-batches, and with all samples at once."""

import copy
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from gaccum_exp.audit.causes.loss_coupling import couples_samples
from gaccum_exp.audit.rerun.passes import Cast, ForwardContext
from gaccum_exp.audit.rerun.sandbox import NamedModules
from gaccum_exp.audit.watch import tape
from gaccum_exp.audit.watch.moving_state import FirstValues
from gaccum_exp.audit.watch.tape import Outputs, TapedCall, TapedMicroBatch, resolved
from gaccum_exp.core import joined_samples as samples
from gaccum_exp.core.joined_samples import (
    NotJoinableError,
    SampleLayout,
    sample_dim,
    sample_layouts,
    tensors_in,
)

BESIDE = "beside"
"""Stands for the modules beside model and loss, and for the loop's own tensors."""
Holding = Sequence[Any] | None
"""Modules, and BESIDE; None: everything."""


class CouplingError(NotJoinableError):
    """The loop mixes samples outside of model and loss."""


class TapedWindow:
    """The micro-batches of a tape as a `RerunnableWindow`.

    Each micro-batch's loss ℓᵢ is the loop's own, back-propagated with `weights[i]`; the one pass
    back-propagates ℓ of all samples with `whole_weight`.

    Args:
        modules: of model and loss.
        micro_batches: of the tape.
        layout: where the samples are in the arguments of each one's first call.
        first_values: of what moved beside model and loss.

    Raises:
        NotJoinableError: they do not make one batch.
    """

    def __init__(
        self,
        modules: NamedModules,
        micro_batches: Sequence[TapedMicroBatch],
        layout: SampleLayout,
        first_values: FirstValues | None = None,
    ) -> None:
        self.modules = modules
        self._layout_of_first = layout
        self.first_values = first_values or FirstValues()
        """Of what moved beside model and loss: the one pass meets these."""
        self._holding: Holding = ()
        self.moves = self.first_values.moves
        self.moved_beside = [(each, [each]) for each in self.first_values.inside]
        self.moved_beside += [(name, [BESIDE]) for name in self.first_values.owners[:1]]
        self._micro_batches = micro_batches
        if len({(len(m.models), len(m.losses)) for m in micro_batches}) != 1:
            raise NotJoinableError("micro-batches differ in how often they call model and loss")
        self.sizes = layout.sizes
        self.starts = [m.first.start for m in micro_batches]
        """The random states in which they began."""
        cotangents = [_cotangents(m) for m in micro_batches]
        self.weights = [weight for weight, _ in cotangents]
        """The loop's own, as its precision rounded them."""
        self._cotangents = _with_common_ratios([each for _, each in cotangents])
        """Of each micro-batch's losses, in units of its weight."""
        self.whole_weight = 1.0
        self.coefficients: list[float] | None = None
        """Of the ∇ℓᵢ in the gradient of ℓ, if they have been fitted and it is a combination of them."""
        self._models, self._losses = (
            [
                (calls, layout if calls[0] is micro_batches[0].first else self._layout(calls))
                for calls in zip(*each, strict=True)
            ]
            for each in ([m.models for m in micro_batches], [m.losses for m in micro_batches])
        )
        """Corresponding calls, one of each micro-batch, and where their samples are."""
        layouts = [each for _, each in (*self._models, *self._losses)]
        self.padded = any(each.padded for each in layouts)
        """Whether joining the micro-batches pads their sequences."""
        self.differing = list(dict.fromkeys(name for each in layouts for name in each.differing))
        """Names of arguments that belong to no sample, and differ between micro-batches."""
        self._first_values = False
        if couples_samples(micro_batches[0], self.sizes[0], layout.dim):
            raise CouplingError("samples are mixed between the model's outputs and the loss")

    def of(self, micro_batches: Sequence[TapedMicroBatch], which: Sequence[int]) -> "TapedWindow":
        """Return the window of these micro-batches: by number, those `which` of it."""
        layout = self._layout_of_first.of(which)
        return TapedWindow(self.modules, micro_batches, layout, self.first_values)

    def weighed(
        self, weights: Sequence[float], whole_weight: float, coefficients: list[float] | None = None
    ) -> "TapedWindow":
        """Return the same window under other weights."""
        other = copy.copy(self)
        other.weights, other.whole_weight = list(weights), whole_weight
        other.coefficients = coefficients
        return other

    def accumulate(self, context: ForwardContext, cast: Cast) -> None:
        """Run the micro-batches as the loop did."""
        for index in range(len(self._micro_batches)):
            with context(index):
                losses = self._losses_of(index, cast)
            weight, units = self.weights[index], self._cotangents[index]
            cotangents = [u.to(x) * weight for u, x in zip(units, losses, strict=True)]
            torch.autograd.backward(losses, cotangents)

    def one_pass(self, context: AbstractContextManager[None], cast: Cast, order: Tensor | None) -> None:
        """Run all samples at once, through the loop's own model and loss."""
        with context:
            losses = self._whole_losses(cast, order)
        cotangents = [u * self.whole_weight for u in self._whole_cotangents(losses)]
        torch.autograd.backward(losses, cotangents)

    def forward(self, index: int | None, cast: Cast) -> tuple[Tensor, Any]:
        """Return the loss, and what it counts where the criterion says so (NaN else)."""
        counts = self.counts() or [math.nan] * len(self.sizes)
        if index is None:
            losses = self._whole_losses(cast, None)
            units, count = self._whole_cotangents(losses), sum(counts)
        else:
            losses = self.holding(None)._losses_of(index, cast)
            units, count = self._cotangents[index], counts[index]
        total = sum((x.double() * u.to(x.device)).sum() for x, u in zip(losses, units, strict=True))
        assert isinstance(total, Tensor)
        return total, count

    def additive(self, parts: Sequence[tuple[float, Any]], whole: tuple[float, Any]) -> bool:
        """Whether the one pass's gradient is a combination of the micro-batches' gradients."""
        return self.coefficients is not None

    def recounted(self, counts: Sequence[float]) -> "TapedWindow | None":
        """Return the window with the large batch's weight for each micro-batch."""
        if self.coefficients is None:
            return None
        weights = [coefficient * self.whole_weight for coefficient in self.coefficients]
        return self.weighed(weights, self.whole_weight, self.coefficients)

    def holding(self, owners: Holding) -> "TapedWindow":
        """Return the window in which the state of these keeps still between micro-batches."""
        other = copy.copy(self)
        other._holding = owners
        return other

    def with_first_values(self) -> "TapedWindow | None":
        """Return the window with the first micro-batch's values of what differs; None: nothing does."""
        if not self.differing:
            return None
        other = copy.copy(self)
        other._first_values = True
        return other

    def counts(self) -> list[float] | None:
        """Return what each micro-batch's loss counts, for criteria that are known to count."""
        if len(self._micro_batches[0].losses) != 1:
            return None
        found = [tape.count_of(micro_batch.losses[0]) for micro_batch in self._micro_batches]
        known = [n for n in found if n is not None]
        return known if len(known) == len(found) else None

    @property
    def sums(self) -> bool:
        """Whether the loss reduces by a sum."""
        for loss in (micro_batch.losses[0] for micro_batch in self._micro_batches):
            of_criterion = loss.attributes[0][1] if loss.attributes else {}
            if loss.arguments.get("reduction", of_criterion.get("reduction")) != "sum":
                return False
        return True

    def _whole_cotangents(self, losses: list[Tensor]) -> list[Tensor]:
        first = self._cotangents[0]
        if first[0].ndim == 0:
            return [unit.to(x) for unit, x in zip(first, losses, strict=True)]
        counted = torch.cat([units[0] != 0 for units in self._cotangents])
        return [(counted / counted.sum()).to(losses[0]).reshape(losses[0].shape)]

    def _layout(self, calls: Sequence[TapedCall]) -> SampleLayout:
        """Return where the samples are in the arguments of corresponding calls."""
        given = [tape.shapes_of(call.arguments) for call in calls]
        others = [[shape for shape, _ in call.outputs] for call in calls]
        return sample_layouts(given, others=others, sizes=self.sizes)[0]

    def _losses_of(self, index: int, cast: Cast) -> list[Tensor]:
        outputs: Outputs = {}

        def run(calls: Sequence[TapedCall], layout: SampleLayout) -> Any:
            given = calls[index].arguments
            if self._first_values:
                given = layout.with_first_values([calls[0].arguments, given])[1]
            held, values = self._holding, None
            if held is None or BESIDE in held:
                values = self.first_values.values
            call = calls[index]
            still = {id(owner) for owner in held or ()}
            states = [s for s in call.states if held is not None and id(s[0].owner) not in still]
            return call.run(resolved(given, outputs, cast, values), states)

        for calls, layout in self._models:
            outputs[calls[index]] = tensors_in(run(calls, layout))
        return [_loss_of(run(calls, layout)) for calls, layout in self._losses]

    def _whole_losses(self, cast: Cast, order: Tensor | None) -> list[Tensor]:
        """Run all samples at once; operations between model and loss run on each micro-batch's rows."""
        each: list[Outputs] = [{} for _ in self._micro_batches]

        def run_whole(calls: Sequence[TapedCall], layout: SampleLayout) -> Any:
            done = zip(calls, each, strict=True)
            values = self.first_values.values
            given = [resolved(call.arguments, outputs, cast, values) for call, outputs in done]
            inputs = layout.joined(given)
            if order is not None and not calls[0].refs():  # else they come in the order of the rows
                inputs = layout.picked(inputs, order)
            return calls[0].run(inputs)

        for calls, layout in self._models:
            outputs = tensors_in(run_whole(calls, layout))
            for index, call in enumerate(calls):
                each[index][call] = self._rows(call, outputs, index, order)
        losses = []
        for calls, layout in self._losses:
            if calls[0].function is tape.models_own_loss:
                ref = calls[0].refs()[0]
                losses.append(each[0][ref.call][ref.place])
            else:
                losses.append(_loss_of(run_whole(calls, layout)))
        return losses

    def _rows(
        self, call: TapedCall, whole: list[Tensor], index: int, order: Tensor | None
    ) -> list[Tensor]:
        """Return a micro-batch's own rows of the model's outputs for all samples."""
        start, size, total = sum(self.sizes[:index]), self.sizes[index], sum(self.sizes)
        where = torch.arange(total) if order is None else torch.argsort(order)
        rows = []
        for tensor, (shape, _) in zip(whole, call.outputs, strict=True):
            if len(self.sizes) > 1:
                dim = sample_dim(tuple(tensor.shape), shape, total, size)
            else:  # nothing grows that would tell which dimension counts samples
                dim = next((d for d, n in enumerate(shape) if n == total), None)
            own = where[start : start + size]
            rows.append(tensor if dim is None else samples.picked_rows(tensor, dim, own, total))
        return rows


def sample_readings(micro_batches: Sequence[TapedMicroBatch], dim: int | None) -> list[SampleLayout]:
    """Return where the samples of the micro-batches' first calls may be, the likeliest first.

    Args:
        micro_batches: of the tape.
        dim: the dimension of the model's inputs that counts samples; None: what the shapes agree on.

    Raises:
        NotJoinableError: they do not make one batch.
    """
    given = [tape.shapes_of(m.first.arguments) for m in micro_batches]
    return sample_layouts(given, others=[tape.shapes_around(m) for m in micro_batches], dim=dim)


def _loss_of(output: Any) -> Tensor:
    loss = tape.loss_in(output)
    if loss is None:
        raise NotJoinableError("run again, the loss has no gradient")
    return loss


def _cotangents(micro_batch: TapedMicroBatch) -> tuple[float, list[Tensor]]:
    """Return a weight, and cotangents: the loop back-propagated their product with the weight.

    Raises:
        NotJoinableError: a loss with a value per element, and not all of one weight.
    """
    given = [loss.cotangent for loss in micro_batch.losses if loss.cotangent is not None]
    first = given[0]
    if first.ndim == 0:
        weight = float(first) or 1.0
        return weight, [c.double() / weight for c in given]
    counted = first != 0
    values, n = first[counted], int(counted.sum())
    if len(given) > 1 or not n or bool((values - values[0]).abs().max() > 1e-5 * values[0].abs()):
        raise NotJoinableError(
            "the loss's elements are weighed one by one: give watch the whole loss as a function"
        )
    return float(values[0]) * n, [counted.double() / n]


def _with_common_ratios(every: list[list[Tensor]]) -> list[list[Tensor]]:
    """Give all micro-batches the first one's ratios of several losses, where rounding alone differs."""
    first = every[0]
    pairs = [pair for units in every for pair in zip(units, first, strict=True)]
    common = all(u.ndim == 0 and torch.isclose(u, f, rtol=1e-5, atol=0.0) for u, f in pairs)
    return [first] * len(every) if len(first) > 1 and common else every
