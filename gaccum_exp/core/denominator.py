"""What a criterion divides by for its mean.

`global_mean` needs, for every micro-batch, the loss sum Sᵢ and the number nᵢ by which the criterion
itself would divide it: samples, elements, tokens not ignored, or a sum of class weights. torch does not
expose that number. It comes, in this order, from

1. the criterion's own method `denominator(*arguments)`, with forward's arguments, if it has one;
2. a closed form for the criteria of `torch.nn`, which needs the target only, so that a window can be
   counted before its first forward pass;
3. a probe: loss sum over loss mean, in float64, on random outputs of the same shape. Never on the live
   loss, where it is NaN at loss 0 and 0.6 % off in bfloat16.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

Denominator = float | Tensor
"""A number of samples, elements or tokens, or a sum of class weights; a 0-dim tensor on a device."""

Place = Callable[[Sequence[Tensor], slice], list[Any]]
"""Gives a criterion's arguments for some outputs and those rows of the targets."""

PER_ELEMENT: tuple[type[nn.Module], ...] = (
    nn.L1Loss, nn.MSELoss, nn.SmoothL1Loss, nn.HuberLoss, nn.BCELoss, nn.BCEWithLogitsLoss,
    nn.SoftMarginLoss, nn.KLDivLoss, nn.PoissonNLLLoss, nn.GaussianNLLLoss, nn.HingeEmbeddingLoss,
    nn.MarginRankingLoss,
)  # fmt: skip
PER_SAMPLE: tuple[type[nn.Module], ...] = (
    nn.MultiMarginLoss, nn.MultiLabelMarginLoss, nn.MultiLabelSoftMarginLoss,
    nn.CosineEmbeddingLoss, nn.TripletMarginLoss, nn.TripletMarginWithDistanceLoss,
)  # fmt: skip
PER_LABEL: tuple[type[nn.Module], ...] = tuple(
    getattr(nn, name)
    for name in ("CrossEntropyLoss", "NLLLoss", "LinearCrossEntropyLoss")
    if hasattr(nn, name)  # LinearCrossEntropyLoss is younger than the oldest torch supported
)
NOT_A_RATIO: dict[type[nn.Module], str] = {
    nn.CTCLoss: "its mean divides each sample's loss by its own target length, "
    "so its sum and its mean are different losses"
}


def is_kind(criterion: nn.Module, kinds: Sequence[type[nn.Module]]) -> bool:
    """Whether the criterion averages as one of these: a forward of its own may do as it likes."""
    return any(type(criterion).forward is kind.forward for kind in kinds)


def closed_form(criterion: nn.Module) -> Callable[[Tensor], Denominator] | None:
    """Return the denominator as a function of the target alone, or None where it is not known.

    The triplet losses have no target; any one of their inputs serves, since only the batch counts.
    """
    if is_kind(criterion, PER_LABEL):
        return _LabelCount(criterion)
    if is_kind(criterion, PER_SAMPLE) or getattr(criterion, "reduction", None) == "batchmean":
        return lambda target: target.shape[0]
    if is_kind(criterion, PER_ELEMENT):
        return lambda target: target.numel()
    return None


@contextmanager
def reduction_set(criterion: nn.Module, reduction: str) -> Iterator[None]:
    """Let the criterion, and any criterion inside it, reduce in another way for a moment."""
    modules = [m for m in criterion.modules() if hasattr(m, "reduction")]
    before = [m.reduction for m in modules]
    for module in modules:
        module.reduction = reduction  # type: ignore[assignment]  # nn.Module types attributes as tensors
    try:
        yield
    finally:
        for module, value in zip(modules, before, strict=True):
            module.reduction = value


class _LabelCount:
    """Labels that are not ignored, or the sum of their class weights; soft targets: all of them."""

    def __init__(self, criterion: nn.Module) -> None:
        ignored = getattr(criterion, "ignore_index", None)
        self._ignore_index: int = -100 if ignored is None else ignored
        weight = getattr(criterion, "weight", None)
        # A copy for each device asked about: windows are counted on the host, criteria live elsewhere.
        self._weights: dict[torch.device, Tensor] = {} if weight is None else {weight.device: weight}

    def __call__(self, target: Tensor) -> Denominator:
        if target.is_floating_point():  # class probabilities, (batch, classes, ...): never weighted
            return target.numel() // target.shape[1]
        valid = target != self._ignore_index
        counted = self._weight_on(target.device)[target[valid]] if self._weights else valid
        return counted.sum().item() if target.device.type == "cpu" else counted.sum()

    def _weight_on(self, device: torch.device) -> Tensor:
        if device not in self._weights:
            self._weights[device] = next(iter(self._weights.values())).to(device)
        return self._weights[device]


class Probe:
    """The denominator of a criterion of which nothing is known but that it has a `reduction`.

    Whether there is such a number at all is checked once, on the first micro-batch of two samples or
    more: the gradients of its sum and its mean must be parallel, their ratio must not depend on the
    outputs, and sum and denominator must be additive over samples.
    """

    def __init__(self, criterion: nn.Module) -> None:
        self._criterion = copy.deepcopy(criterion).double().cpu()
        self._own = getattr(self._criterion, "denominator", None)
        self._inspected = False

    def denominator(self, outputs: Sequence[Tensor], place: Place) -> float:
        """Return what the mean divides by, for outputs of these shapes; their values are not used."""
        return self._denominator(_random_like(outputs, seed=0), place, slice(None))

    def refusal(self, outputs: Sequence[Tensor], place: Place) -> str | None:
        """Return why there is no denominator, in words that follow the criterion's name."""
        batch = outputs[0].shape[0]
        if self._inspected or batch < 2:
            return None
        self._inspected = True
        xs, every = _random_like(outputs, seed=0), slice(None)
        n = self._denominator(xs, place, every)
        if self._own is None:
            other = self._denominator(_random_like(outputs, seed=1), place, every)
            if not _close(n, other) or not self._gradients_parallel(xs, place, n):
                return "its mean is not its sum divided by a count"
        halves = [slice(0, batch // 2), slice(batch // 2, batch)]
        parts = [([x[rows] for x in xs], place, rows) for rows in halves]
        if not _close(
            sum(self._reduced("sum", *p) for p in parts), self._reduced("sum", xs, place, every)
        ):
            return "its sum over a batch is not the sum over the batch's parts"
        if not _close(sum(self._denominator(*p) for p in parts), n):
            return "its denominator over a batch is not the sum over the batch's parts"
        return None

    def _denominator(self, outputs: Sequence[Tensor], place: Place, rows: slice) -> float:
        if self._own is not None:
            return float(self._own(*place(outputs, rows)))
        mean = self._reduced("mean", outputs, place, rows)
        return self._reduced("sum", outputs, place, rows) / mean if mean else 0.0

    def _reduced(self, reduction: str, outputs: Sequence[Tensor], place: Place, rows: slice) -> float:
        with torch.no_grad(), reduction_set(self._criterion, reduction):
            return float(self._criterion(*place(outputs, rows)))

    def _gradients_parallel(self, outputs: Sequence[Tensor], place: Place, n: float) -> bool:
        leaves = [t.clone().requires_grad_() for t in outputs]
        gradients = []
        for reduction in ("sum", "mean"):
            with reduction_set(self._criterion, reduction):
                value = self._criterion(*place(leaves, slice(None)))
            gradients.append(torch.autograd.grad(value, leaves, materialize_grads=True))
        return all(
            torch.allclose(of_sum, n * of_mean, rtol=1e-6, atol=1e-12)
            for of_sum, of_mean in zip(*gradients, strict=True)
        )


def _random_like(outputs: Sequence[Tensor], seed: int) -> list[Tensor]:
    """Values in (0.05, 0.95): inside the domain of probabilities and of logits alike."""
    generator = torch.Generator().manual_seed(seed)
    draws = (torch.rand(t.shape, generator=generator, dtype=torch.float64) for t in outputs)
    return [draw * 0.9 + 0.05 for draw in draws]


def _close(a: float, b: float) -> bool:
    return abs(a - b) <= 1e-6 * max(abs(a), abs(b))
