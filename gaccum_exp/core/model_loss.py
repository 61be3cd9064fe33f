"""The loss that a model computes itself, as those of transformers do."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gaccum_exp.core.denominator import Denominator
from gaccum_exp.core.modes import evaluation_mode
from gaccum_exp.errors import BadInputError

SAME = 1e-3
"""Relative: two losses that differ by less are one."""
ALIKE = 0.1
"""Relative: two weights that differ by less are one; in a probe the candidates lie 25 % apart."""
PROBE_LENGTH = 16
"""Labels of a probe's sequence, few, so that one that is left out shows."""


class ModelLoss:
    """`model(**micro_batch).loss` as a loss function.

    Such a loss is a mean, over the labels that are not ignored, or, where the model shifts the labels
    itself, over all of these but the first of each sequence. Where the model takes the window's count
    (`num_items_in_batch`) it is asked for a sum, and its loss is not divided a second time; else its
    mean is multiplied by what it counts. Which of this holds is not taken from a name: it is found out
    on the first samples, and a loss that is no mean over its labels is refused, but under `mean`.

    Args:
        labels: the key of the labels.
        count_argument: by which the model takes the count.
        ignore_index: of labels that do not count.
        reduction: the window's.
    """

    def __init__(
        self,
        labels: str = "labels",
        count_argument: str = "num_items_in_batch",
        ignore_index: int = -100,
        reduction: str = "global_mean",
    ) -> None:
        self._labels, self._argument, self._ignored = labels, count_argument, ignore_index
        self._reduction = reduction
        self._takes_count = False
        self._counter: Callable[[Tensor], Tensor] | None = None

    def count(self, micro_batch: Any) -> Denominator | None:
        """Return the micro-batch's denominator; None before the model has been seen."""
        if self._counter is None:
            return None
        n = self._counter(micro_batch[self._labels])
        return float(n) if n.device.type == "cpu" else n

    def loss_sum(self, model: nn.Module, micro_batch: Any) -> Tensor:
        """Run the model on one micro-batch; return its loss sum, 0-dim."""
        if self._takes_count:
            return self._loss(model, micro_batch, 1)
        assert self._counter is not None
        n = self._counter(micro_batch[self._labels])
        loss = self._loss(model, micro_batch)
        # The mean of nothing is NaN, and its sum is zero.
        return torch.where(n > 0, loss, loss.new_zeros(())) * n

    def __call__(self, model: nn.Module, micro_batch: Any) -> tuple[Tensor, Denominator]:
        """Run the model on one micro-batch; return its loss sum and denominator.

        Raises:
            BadInputError: the first time, where the model's loss is no mean over its labels.
        """
        if self._counter is None:
            self._counter = self._inspected(model, micro_batch)
        denominator = self.count(micro_batch)
        assert denominator is not None
        return self.loss_sum(model, micro_batch), denominator

    def _inspected(self, model: nn.Module, micro_batch: Any) -> Callable[[Tensor], Tensor]:
        if not isinstance(micro_batch, Mapping) or self._labels not in micro_batch:
            keys = ", ".join(map(str, micro_batch)) if isinstance(micro_batch, Mapping) else "none"
            raise BadInputError(
                f"a model's own loss needs micro-batches that are mappings with {self._labels!r} among "
                f"their keys (these have: {keys})"
            )
        device = micro_batch[self._labels].device
        with torch.no_grad(), evaluation_mode(model), torch.autocast(device.type, enabled=False):
            probe = self._probe(micro_batch)
            self._takes_count = self._follows_count(model, probe)
            weigh = self._told_weight if self._takes_count else self._fitted_weight
            weight = weigh(model, probe)
        labels = probe[self._labels]
        for counter in self._counters(labels):
            expected = float(counter(labels[:1]) / counter(labels))
            if abs(weight - expected) <= ALIKE * expected:
                return counter
        if self._reduction == "mean":
            self._takes_count = False  # the mean of its own means, whatever those divide by
            return self._counters(labels)[0]
        first, second = (int(self._counters(labels)[0](row)) for row in labels.split(1))
        raise BadInputError(
            f"accum.reduction={self._reduction} is refused for the loss of {type(model).__name__}: it "
            f"is no mean over its {self._labels} (of two samples with {first} and {second} labels that "
            f"count the first has a weight of {weight:.3g}); use accum.reduction=mean, or a "
            "loss_fn(model, micro_batch) -> (loss_sum, denominator)"
        )

    def _follows_count(self, model: nn.Module, micro_batch: Any) -> bool:
        """Whether a count that is given is what the loss is divided by."""
        try:
            one, two = (float(self._loss(model, micro_batch, n)) for n in (1, 2))
        except TypeError:  # it takes no such argument
            return False
        return one != 0 and abs(one - 2 * two) <= SAME * abs(one)

    def _told_weight(self, model: nn.Module, probe: dict[str, Any]) -> float:
        """Return the first sample's share in the count: sum over mean, of it and of both."""
        first = self._rows(probe, slice(0, 1))
        counts = [float(self._loss(model, m, 1) / self._loss(model, m)) for m in (first, probe)]
        return counts[0] / counts[1]

    def _fitted_weight(self, model: nn.Module, probe: dict[str, Any]) -> float:
        """Return the first sample's weight w in the mean of both: m = w m₁ + (1 − w) m₂."""
        first, second = (self._rows(probe, slice(i, i + 1)) for i in (0, 1))
        m1, m2, m = (float(self._loss(model, b)) for b in (first, second, probe))
        return (m - m2) / (m1 - m2) if m1 != m2 else math.nan

    def _probe(self, micro_batch: Any) -> dict[str, Any]:
        """Return the sample with the most labels twice, cut short; the first with three labels alone.

        Every other label counts, so that what a model leaves out of its count (the first label, where it
        shifts them) shows in the weights.
        """
        labels = micro_batch[self._labels]
        if labels.is_floating_point() or labels.ndim != 2:
            rows = [0, len(labels) - 1]
            return self._rows(micro_batch, torch.tensor(rows, device=labels.device))
        best = int((labels != self._ignored).sum(1).argmax())
        probe = self._rows(micro_batch, torch.tensor([best, best], device=labels.device))
        for key, value in probe.items():
            if isinstance(value, Tensor) and value.shape[:2] == (2, labels.shape[1]):
                probe[key] = value[:, :PROBE_LENGTH]
        one = probe[self._labels]
        counting = one[one != self._ignored]
        filled = torch.where(one == self._ignored, counting[:1] if len(counting) else 0, one)
        filled[0, 3:] = self._ignored
        return {**probe, self._labels: filled}

    def _rows(self, micro_batch: Any, rows: slice | Tensor) -> dict[str, Any]:
        size = len(micro_batch[self._labels])
        return {
            key: value[rows] if isinstance(value, Tensor) and value.shape[:1] == (size,) else value
            for key, value in micro_batch.items()
        }

    def _counters(self, labels: Tensor) -> list[Callable[[Tensor], Tensor]]:
        if labels.is_floating_point():  # a regression: its elements
            return [lambda t: torch.tensor(t.numel(), device=t.device)]
        every: Callable[[Tensor], Tensor] = lambda t: (t != self._ignored).sum()  # noqa: E731
        if labels.ndim < 2:
            return [every]
        return [every, lambda t: (t[:, 1:] != self._ignored).sum()]

    def _loss(self, model: nn.Module, micro_batch: Any, n: int | None = None) -> Tensor:
        counted = {} if n is None else {self._argument: n}
        outputs = model(**micro_batch, **counted)
        loss = outputs["loss"] if isinstance(outputs, Mapping) else getattr(outputs, "loss", None)
        if not isinstance(loss, Tensor):
            raise BadInputError(f"{type(model).__name__} returns no loss: {type(outputs).__name__}")
        return loss
