"""Denominators: the numbers that criteria divide by for their means.

`global_mean` needs, for every micro-batch, the loss sum Sᵢ and the number nᵢ by which the criterion
itself would divide it: samples, elements, tokens not ignored, or a sum of class weights. torch does not
expose that number. It comes, in this order, from

1. the criterion's own method `denominator(*arguments)`, with forward's arguments, if it has one;
2. a closed form for the criteria of `torch.nn`, which needs the target only, so that a window can be
   counted before its first forward pass;
3. a probe (`probe`): loss sum over loss mean, asked of a copy in float64, of the model's outputs, or of
   random ones where that loss is 0. Never of the live loss, which is 0.6 % off in bfloat16.

What 1 and 3 give need not add up over samples: a clamp or an ε in it is of the window's count, and a
loss function says so by `window_denominator`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gaccum_exp.core.losses.criteria import TokenCrossEntropy
from gaccum_exp.core.losses.protocol import Denominator, described
from gaccum_exp.errors import BadInputError

PER_ELEMENT: tuple[type[nn.Module], ...] = (
    nn.L1Loss, nn.MSELoss, nn.SmoothL1Loss, nn.HuberLoss, nn.BCELoss, nn.BCEWithLogitsLoss,
    nn.SoftMarginLoss, nn.KLDivLoss, nn.PoissonNLLLoss, nn.GaussianNLLLoss, nn.HingeEmbeddingLoss,
    nn.MarginRankingLoss,
)  # fmt: skip
PER_SAMPLE: tuple[type[nn.Module], ...] = (
    nn.MultiMarginLoss, nn.MultiLabelMarginLoss, nn.MultiLabelSoftMarginLoss,
    nn.CosineEmbeddingLoss, nn.TripletMarginLoss, nn.TripletMarginWithDistanceLoss,
)  # fmt: skip
PER_LABEL: tuple[type[nn.Module], ...] = (
    TokenCrossEntropy,
    *(
        getattr(nn, name)
        for name in ("CrossEntropyLoss", "NLLLoss", "LinearCrossEntropyLoss")
        if hasattr(nn, name)  # LinearCrossEntropyLoss is younger than the oldest torch supported
    ),
)
NOT_A_RATIO: dict[type[nn.Module], str] = {
    nn.CTCLoss: "its mean divides each sample's loss by its own target length, "
    "so its sum and its mean are different losses"
}


def is_kind(criterion: nn.Module, kinds: Sequence[type[nn.Module]]) -> bool:
    """Whether the criterion averages as one of these do."""
    # A subclass with a forward of its own may average as it likes.
    return any(type(criterion).forward is kind.forward for kind in kinds)


def closed_form(criterion: nn.Module) -> Callable[[Tensor], Denominator] | None:
    """Return the denominator as a function of the target alone, or None where it needs more.

    The triplet losses have no target; any one of their inputs serves, since only the batch counts.
    """
    if is_kind(criterion, PER_LABEL):
        return _LabelCount(criterion)
    if is_kind(criterion, PER_SAMPLE) or getattr(criterion, "reduction", None) == "batchmean":
        return lambda target: target.shape[0]
    if is_kind(criterion, PER_ELEMENT):
        return lambda target: target.numel()
    return None


class ReducedAs:
    """Makes a criterion reduce in another way for the length of a `with` block.

    A criterion inside it follows if it reduces as the outer one does (a wrapper hands its `reduction`
    on); one that gives single losses for the outer one to weigh and reduce (`none`) stays as it is.
    """

    def __init__(self, criterion: nn.Module, reduction: str) -> None:
        outer: Any = criterion.reduction
        inner = [m for m in criterion.modules() if getattr(m, "reduction", None) == outer]
        # By way of __dict__: nn.Module's own assignment is slow, and this runs in every pass.
        self._attributes = [vars(m) for m in (inner if outer != "none" else [criterion])]
        self._before, self._reduction = outer, reduction

    def __enter__(self) -> None:
        for attributes in self._attributes:
            attributes["reduction"] = self._reduction

    def __exit__(self, *error: object) -> None:
        for attributes in self._attributes:
            attributes["reduction"] = self._before


def one_loss(value: Any, criterion: nn.Module) -> Tensor:
    """Return what a criterion gives, where that is one loss.

    Raises:
        BadInputError: it gives losses per sample, or several in a nesting.
    """
    if isinstance(value, Tensor) and value.numel() == 1:
        return value
    raise BadInputError(
        f"criterion {type(criterion).__name__} returns {described(value)}, whatever its `reduction`: "
        "let it return one loss, a 0-dim tensor, their sum under reduction='sum'; or use a "
        "loss_fn(model, micro_batch) -> (loss_sum, denominator), or of several terms a mapping"
    )


class _LabelCount:
    """Counts labels that are not ignored, or sums their class weights; of soft targets it counts all."""

    def __init__(self, criterion: nn.Module) -> None:
        self._criterion: Any = criterion
        # nn.Module's own way to a buffer is slow; but a criterion may keep its weight in another.
        buffers = vars(criterion)["_buffers"]
        self._holder = buffers if "weight" in buffers else None
        self._copies: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def __call__(self, target: Tensor) -> Denominator:
        if target.is_floating_point():  # class probabilities, (batch, classes, ...): never weighted
            classes = int(target.shape[1]) if target.ndim > 1 else 1
            return target.numel() // classes
        ignored = -100 if self._criterion.ignore_index is None else self._criterion.ignore_index
        weight = self._holder["weight"] if self._holder else self._criterion.weight
        if weight is None and type(target) is Tensor and target.is_cpu:
            # NumPy takes a quarter of torch's time, and this runs for every micro-batch.
            return float(np.count_nonzero(target.numpy() != ignored))
        counted = valid = target != ignored
        if weight is not None:
            counted = self._weight_on(weight, target.device)[torch.where(valid, target, 0)] * valid
        total: Tensor = counted.sum()
        return float(total.item()) if target.device.type == "cpu" else total

    def _weight_on(self, weight: Tensor, device: torch.device) -> Tensor:
        """Return the class weights on a device, copied once: windows are counted on the host."""
        source, copied = self._copies.get(device, (None, weight))
        if source is not weight:
            copied = weight.to(device)
            self._copies[device] = (weight, copied)
        return copied
