"""A `torch.nn` criterion as a loss function."""

import inspect
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor, nn

from gaccum_exp.core.dtypes import out_of_half
from gaccum_exp.core.losses.criteria import (
    HAND_OVER,
    FunctionCriterion,
    PlainCriterion,
    as_criterion,
    name_of,
)
from gaccum_exp.core.losses.denominator import (
    NOT_A_RATIO,
    PER_ELEMENT,
    ReducedAs,
    closed_form,
    is_kind,
    one_loss,
)
from gaccum_exp.core.losses.micro_batch import Keywords, outputs_in, run_model, split_micro_batch
from gaccum_exp.core.losses.probe import Probe, Refusal
from gaccum_exp.core.losses.protocol import Denominator, LossFn
from gaccum_exp.core.reductions import reduction_named
from gaccum_exp.errors import BadInputError


class CriterionLoss:
    """A `torch.nn` criterion as a loss function. Make it once and keep it.

    Args:
        criterion: a module with an attribute `reduction`, on the device of the model's outputs. What
            is set there does not matter, `batchmean` apart: how to reduce is the window's affair.
        reduction: the window's. It matters only where the criterion's mean is not its sum divided by
            a count: then `mean` takes the criterion's own mean and `global_mean` is refused.
        whole_window: every call is of a whole window: then `global_mean` is the criterion's own mean,
            whatever that divides by, and a criterion without `reduction` is taken as it is.

    Outputs and targets in float16 or bfloat16 are given to the criterion in float32, as autocast does:
    a sum over a batch needs more digits than they have.

    Raises:
        BadInputError: no `reduction`, or `global_mean` of a criterion that has none (at the first
            micro-batch that shows it, where only a look at the criterion's values can tell).
    """

    def __init__(
        self, criterion: nn.Module, reduction: str = "global_mean", *, whole_window: bool = False
    ) -> None:
        plain = isinstance(criterion, (FunctionCriterion, PlainCriterion))
        self._name = name_of(criterion.function) if plain else type(criterion).__name__
        own_mean = whole_window and reduction != "sum"
        if not hasattr(criterion, "reduction") and not own_mean:
            raise BadInputError(
                f"criterion {self._name} has no attribute `reduction`: use a criterion that takes "
                "reduction='sum', or a loss_fn(model, micro_batch) -> (loss_sum, denominator)"
            )
        self.criterion = criterion
        self._reduction = reduction_named(reduction)
        self._of_target = None if hasattr(criterion, "denominator") else closed_form(criterion)
        self._elementwise = self._of_target is not None and is_kind(criterion, PER_ELEMENT)
        self._own_mean = own_mean and self._of_target is None
        self._reduced: AbstractContextManager[Any] = nullcontext()
        if hasattr(criterion, "reduction"):
            self._reduced = ReducedAs(criterion, "mean" if self._own_mean else "sum")
        self._probe: Probe | None = None
        if self._own_mean:
            return
        why = next((why for kind, why in NOT_A_RATIO.items() if is_kind(criterion, [kind])), None)
        if why is not None:
            self._refuse(Refusal(why))
        elif self._of_target is None:
            self._probe = Probe(criterion, self._arguments)

    def count(self, micro_batch: Any) -> Denominator | None:
        """Return the micro-batch's denominator from its target, or None: known after forward only."""
        _, targets = split_micro_batch(micro_batch)
        return self._of_target(targets[0]) if self._of_target and targets else None

    def window_denominator(self, count: Denominator) -> Denominator:
        """Return what a window that counts so much is divided by: a clamp is of the window's count."""
        if self._probe is None:
            return count
        found = self._probe.window_denominator(float(count))
        if not isinstance(found, Refusal):
            return found
        self._refuse(found)
        return count

    def outputs(self, model: nn.Module, micro_batch: Any) -> Any:
        """Run the model alone on one micro-batch."""
        return run_model(model, split_micro_batch(micro_batch)[0])

    def without_inputs(self, micro_batch: Any) -> Any:
        """Return the micro-batch's targets alone, as a micro-batch."""
        inputs, targets = split_micro_batch(micro_batch)
        if isinstance(inputs, Keywords):
            return {key: value for key, value in micro_batch.items() if key not in inputs}
        return (None, *targets)

    def loss_sum(self, model: nn.Module, micro_batch: Any) -> Tensor:
        """Run the model on one micro-batch; return its loss sum, 0-dim."""
        inputs, targets = split_micro_batch(micro_batch)
        return self.sum_of_outputs(run_model(model, inputs), targets)

    def __call__(self, model: nn.Module, micro_batch: Any) -> tuple[Tensor, Denominator]:
        """Run the model on one micro-batch; return its loss sum (0-dim) and denominator."""
        inputs, targets = split_micro_batch(micro_batch)
        return self.of_outputs(run_model(model, inputs), targets)

    split = staticmethod(split_micro_batch)

    def sum_of_outputs(self, outputs: Any, targets: list[Any]) -> Tensor:
        """Return the loss sum of the model's outputs for these targets."""
        return self._loss(*_widened(outputs, targets))

    def of_outputs(self, outputs: Any, targets: list[Any]) -> tuple[Tensor, Denominator]:
        """Return loss sum and denominator of the model's outputs for these targets."""
        outputs, targets = _widened(outputs, targets)
        denominator = self._denominator(outputs, targets)
        loss = self._loss(outputs, targets)
        return (loss * denominator if self._own_mean else loss), denominator

    def _loss(self, outputs: Sequence[Any], targets: Sequence[Any]) -> Tensor:
        if self._elementwise and outputs[0].shape != targets[0].shape:
            # (64, 1) against (64,) is (64, 64) elements: it mixes samples, and nobody means it.
            raise BadInputError(
                f"criterion {self._name} would broadcast the model's output {tuple(outputs[0].shape)} "
                f"against the target {tuple(targets[0].shape)}: give them the same shape"
            )
        with self._reduced:
            loss = self.criterion(*self._arguments(outputs, targets))
        return one_loss(loss, self.criterion)

    def _denominator(self, outputs: Sequence[Any], targets: Sequence[Any]) -> Denominator:
        counted = targets[0] if targets else outputs[0]
        if self._of_target is not None:
            return self._of_target(counted)
        if self._probe is not None:
            if not all(isinstance(t, Tensor) for t in outputs):
                raise BadInputError(
                    f"criterion {self._name}: the model puts out {type(outputs[0]).__name__} and no "
                    "tensor; use a loss_fn(model, micro_batch) -> (loss_sum, denominator)"
                )
            found = self._probe.count(outputs, targets)
            if not isinstance(found, Refusal):
                return found
            self._refuse(found)
        # There is no denominator: the loss is reported per sample.
        return int(counted.shape[0]) if isinstance(counted, Tensor) and counted.ndim else 1

    def _refuse(self, refusal: Refusal) -> None:
        reduction = self._reduction
        own_mean = reduction.criterion_reduction == "mean"
        if not own_mean and (reduction.needs_window_count or not refusal.has_sum):
            others = "use accum.reduction=sum, or " if refusal.has_sum else "use "
            if isinstance(self.criterion, PlainCriterion):  # whose sum is what we made of its mean
                others = f"hand over {HAND_OVER}; or use "
            raise BadInputError(
                f"accum.reduction={reduction.name} is refused for criterion {self._name}: "
                f"{refusal.why}; {others}accum.reduction=mean for the criterion's own mean of each "
                "micro-batch, or strategy=cached for that of the window"
            )
        self._probe = None
        self._own_mean = own_mean
        self._reduced = ReducedAs(self.criterion, reduction.criterion_reduction)

    def _arguments(self, outputs: Sequence[Any], targets: Sequence[Any]) -> list[Any]:
        """Return outputs and targets in forward's own order, e.g. (mean, target, variance)."""
        if len(outputs) < 2 or not targets:
            return [*outputs, *targets]
        names = inspect.signature(self.criterion.forward).parameters
        at = next((i for i, name in enumerate(names) if name.startswith("target")), len(outputs))
        return [*outputs[:at], *targets, *outputs[at:]]


def as_loss_fn(loss_fn: LossFn | nn.Module, reduction: str, *, whole_window: bool = False) -> LossFn:
    """Wrap a criterion, a module or a function; return a loss function as it is."""
    criterion = loss_fn if isinstance(loss_fn, nn.Module) else as_criterion(loss_fn)
    if criterion is None:
        return loss_fn
    return CriterionLoss(criterion, reduction, whole_window=whole_window)


def _widened(outputs: Any, targets: list[Any]) -> list[list[Any]]:
    """Return outputs and targets as lists, half-precision tensors in float32."""
    return [
        [out_of_half(t) if isinstance(t, Tensor) else t for t in values]
        for values in (outputs_in(outputs), targets)
    ]
