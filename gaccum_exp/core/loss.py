"""The one contract of the core: `loss_fn(model, micro_batch) -> (loss_sum, denominator)`.

A micro-batch is any pytree. A loss function that can tell a micro-batch's denominator without running
the model also has `count(micro_batch)`, and then a window is counted before its first backward pass. A
`torch.nn` criterion becomes a loss function through `CriterionLoss`, for micro-batches
`(input, target)`, or `(input, *targets)` where the criterion takes several.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from gaccum_exp.core.denominator import (
    NOT_A_RATIO,
    PER_ELEMENT,
    Denominator,
    Place,
    Probe,
    closed_form,
    is_kind,
    reduction_set,
)
from gaccum_exp.errors import BadInputError

LossFn = Callable[[nn.Module, Any], tuple[Tensor, Denominator]]


class CriterionLoss:
    """A `torch.nn` criterion as a loss function.

    Args:
        criterion: a module with an attribute `reduction`, on the device of the model's outputs. What is
            set there does not matter, `batchmean` apart: how to reduce is the window's affair.
        reduction: the window's. It matters only where the criterion's mean is not its sum divided by
            a count: then `mean` takes the criterion's own mean and `global_mean` is refused.

    Raises:
        BadInputError: no `reduction`, or `global_mean` of a criterion that has none (at the first
            micro-batch where only a look at the criterion's values can tell).
    """

    def __init__(self, criterion: nn.Module, reduction: str = "global_mean") -> None:
        self._name = type(criterion).__name__
        if not hasattr(criterion, "reduction"):
            raise BadInputError(
                f"criterion {self._name} has no attribute `reduction`: use a criterion that takes "
                "reduction='sum', or a loss_fn(model, micro_batch) -> (loss_sum, denominator)"
            )
        self.criterion = criterion
        self._reduction = reduction
        self._reduced_as = "sum"
        self._of_target = None if hasattr(criterion, "denominator") else closed_form(criterion)
        self._elementwise = self._of_target is not None and is_kind(criterion, PER_ELEMENT)
        self._probe: Probe | None = None
        if type(criterion) in NOT_A_RATIO:
            self._refuse_ratio(NOT_A_RATIO[type(criterion)])
        elif self._of_target is None:
            self._probe = Probe(criterion)

    def count(self, micro_batch: Any) -> Denominator | None:
        """Return the micro-batch's denominator from its target, or None: known after forward only."""
        targets = _targets(micro_batch)
        return self._of_target(targets[0]) if self._of_target and targets else None

    def __call__(self, model: nn.Module, micro_batch: Any) -> tuple[Tensor, Denominator]:
        """Run the model on one micro-batch; return its loss sum (0-dim) and denominator."""
        return self.of_outputs(model(micro_batch[0]), micro_batch)

    def of_outputs(self, outputs: Any, micro_batch: Any) -> tuple[Tensor, Denominator]:
        """Return loss sum and denominator of what the model has put out for this micro-batch."""
        outputs = tuple(outputs) if isinstance(outputs, (tuple, list)) else (outputs,)
        targets = _targets(micro_batch)
        denominator = self._denominator(outputs, targets)
        with reduction_set(self.criterion, self._reduced_as):
            loss = self.criterion(*self._arguments(outputs, targets))
        return (loss if self._reduced_as == "sum" else loss * denominator), denominator

    def _denominator(self, outputs: tuple[Any, ...], targets: list[Any]) -> Denominator:
        counted = targets[0] if targets else outputs[0]
        if self._of_target is not None:
            if self._elementwise:
                self._refuse_broadcast(outputs[0], counted)
            return self._of_target(counted)
        if self._probe is not None:
            self._require_tensors(outputs)
            place = self._placing(targets)
            refusal = self._probe.refusal(outputs, place)
            if refusal is None:
                return self._probe.denominator(outputs, place)
            self._refuse_ratio(refusal)
        return int(counted.shape[0])  # there is no denominator: the loss is reported per sample

    def _refuse_ratio(self, why: str) -> None:
        if self._reduction == "global_mean":
            raise BadInputError(
                f"accum.reduction=global_mean is refused for criterion {self._name}: {why}; use "
                "accum.reduction=sum, or accum.reduction=mean for the criterion's own mean"
            )
        self._probe = None
        self._reduced_as = self._reduction

    def _refuse_broadcast(self, output: Tensor, target: Tensor) -> None:
        """(64, 1) against (64,) is (64, 64) elements: it mixes samples and nobody means it."""
        if output.shape != target.shape:
            raise BadInputError(
                f"criterion {self._name} would broadcast the model's output {tuple(output.shape)} "
                f"against the target {tuple(target.shape)}: give them the same shape"
            )

    def _require_tensors(self, outputs: tuple[Any, ...]) -> None:
        if not all(isinstance(t, Tensor) for t in outputs):
            raise BadInputError(
                f"criterion {self._name}: the model puts out {type(outputs[0]).__name__} and no "
                "tensor; use a loss_fn(model, micro_batch) -> (loss_sum, denominator)"
            )

    def _arguments(self, outputs: Sequence[Any], targets: Sequence[Any]) -> list[Any]:
        """Outputs and targets in forward's own order, e.g. GaussianNLL's (mean, target, variance)."""
        at = len(outputs)
        if at > 1 and targets:
            names = inspect.signature(self.criterion.forward).parameters
            at = next((i for i, name in enumerate(names) if name.startswith("target")), at)
        return [*outputs[:at], *targets, *outputs[at:]]

    def _placing(self, targets: list[Any]) -> Place:
        def place(outputs: Sequence[Tensor], rows: slice) -> list[Any]:
            here = [_probe_target(t, rows) for t in targets]
            return self._arguments(outputs, here)

        return place


class OnDevice:
    """A loss function that takes micro-batches from the host: counted there, moved one at a time.

    Only one micro-batch is on the device at once; a whole window there would spoil the memory that
    accumulation saves.
    """

    def __init__(self, loss_fn: LossFn, device: torch.device) -> None:
        self._loss_fn = loss_fn
        self._device = device

    def count(self, micro_batch: Any) -> Denominator | None:
        """Count on the host, where the micro-batch still is."""
        return count(self._loss_fn, micro_batch)

    def __call__(self, model: nn.Module, micro_batch: Any) -> tuple[Tensor, Denominator]:
        """Move the micro-batch and compute its loss there; nothing waits for the copy."""
        return self._loss_fn(model, to_device(micro_batch, self._device))


def to_device(micro_batch: Any, device: torch.device) -> Any:
    """Return the pytree with every tensor on the device; copies from pinned memory do not wait."""
    return tree_map_only(Tensor, lambda t: t.to(device, non_blocking=True), micro_batch)


def count(loss_fn: LossFn, micro_batch: Any) -> Denominator | None:
    """Return a micro-batch's denominator if the loss function can tell it without a forward pass."""
    counter = getattr(loss_fn, "count", None)
    return None if counter is None else counter(micro_batch)


def as_loss_fn(loss_fn: LossFn | nn.Module, reduction: str) -> LossFn:
    """Wrap a criterion; return anything else, which must be a loss function already, as it is."""
    return CriterionLoss(loss_fn, reduction) if isinstance(loss_fn, nn.Module) else loss_fn


def _targets(micro_batch: Any) -> list[Any]:
    """`(input, target)` and `(input, (target, lengths))` alike give a flat list of targets."""
    targets: list[Any] = []
    for part in micro_batch[1:]:
        targets.extend(part) if isinstance(part, (tuple, list)) else targets.append(part)
    return targets


def _probe_target(target: Any, rows: slice) -> Any:
    if not isinstance(target, Tensor):
        return target
    target = target.detach().cpu()
    target = target.double() if target.is_floating_point() else target
    return target[rows] if target.ndim else target
