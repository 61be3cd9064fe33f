"""A `torch.nn` criterion as a loss function."""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gaccum_exp.core.losses.denominator import (
    NOT_A_RATIO,
    PER_ELEMENT,
    Probe,
    ReducedAs,
    Refusal,
    closed_form,
    is_kind,
)
from gaccum_exp.core.losses.micro_batch import outputs_in, run_model, split_micro_batch
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

    Outputs and targets in float16 or bfloat16 are given to the criterion in float32, as autocast does:
    a sum over a batch needs more digits than they have.

    Raises:
        BadInputError: no `reduction`, or `global_mean` of a criterion that has none (at the first
            micro-batch of two samples where only a look at the criterion's values can tell).
    """

    def __init__(self, criterion: nn.Module, reduction: str = "global_mean") -> None:
        self._name = type(criterion).__name__
        if not hasattr(criterion, "reduction"):
            raise BadInputError(
                f"criterion {self._name} has no attribute `reduction`: use a criterion that takes "
                "reduction='sum', or a loss_fn(model, micro_batch) -> (loss_sum, denominator)"
            )
        self.criterion = criterion
        self._reduction = reduction_named(reduction)
        self._own = getattr(criterion, "denominator", None)
        self._of_target = None if self._own else closed_form(criterion)
        self._elementwise = self._of_target is not None and is_kind(criterion, PER_ELEMENT)
        self._own_mean = False
        self._reduced = ReducedAs(criterion, "sum")
        self._probe: Probe | None = None
        why = next((why for kind, why in NOT_A_RATIO.items() if is_kind(criterion, [kind])), None)
        if why is not None:
            self._refuse(Refusal(why))
        elif self._of_target is None:
            self._probe = Probe(criterion, self._arguments)

    def count(self, micro_batch: Any) -> Denominator | None:
        """Return the micro-batch's denominator from its target, or None: known after forward only."""
        _, targets = split_micro_batch(micro_batch)
        return self._of_target(targets[0]) if self._of_target and targets else None

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
            loss: Tensor = self.criterion(*self._arguments(outputs, targets))
        return loss

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
            refusal = self._probe.refusal(outputs, targets)
            if refusal is not None:
                self._refuse(refusal)
            elif self._own is not None:
                own: Denominator = self._own(*self._arguments(outputs, targets))
                return own
            else:
                return self._probe.denominator(outputs, targets)
        return int(counted.shape[0])  # there is no denominator: the loss is reported per sample

    def _refuse(self, refusal: Refusal) -> None:
        reduction = self._reduction
        own_mean = reduction.criterion_reduction == "mean"
        if not own_mean and (reduction.needs_window_count or not refusal.has_sum):
            others = "accum.reduction=sum, or " if refusal.has_sum else ""
            raise BadInputError(
                f"accum.reduction={reduction.name} is refused for criterion {self._name}: "
                f"{refusal.why}; use {others}accum.reduction=mean for the criterion's own mean"
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


def as_loss_fn(loss_fn: LossFn | nn.Module, reduction: str) -> LossFn:
    """Wrap a criterion; return anything else, which must be a loss function already, as it is."""
    return CriterionLoss(loss_fn, reduction) if isinstance(loss_fn, nn.Module) else loss_fn


def _widened(outputs: Any, targets: list[Any]) -> list[list[Any]]:
    """Return outputs and targets as lists, half-precision tensors in float32."""
    half = (torch.float16, torch.bfloat16)
    return [
        [t.float() if isinstance(t, Tensor) and t.dtype in half else t for t in values]
        for values in (outputs_in(outputs), targets)
    ]
