"""The loss that a model computes itself, as the models of transformers do."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gaccum_exp.core.dtypes import out_of_half
from gaccum_exp.core.losses.model_probe import Counter, LossQuery, infer_counters
from gaccum_exp.core.losses.protocol import Denominator
from gaccum_exp.core.reductions import reduction_named
from gaccum_exp.errors import BadInputError


class ModelLoss:
    """`model(**micro_batch).loss` as a loss function.

    Such a loss is a mean, over the labels that are not ignored, or, where the model shifts the labels
    itself, over all of these but the first of each sequence. Where the model takes the window's count
    (`num_items_in_batch`) it is asked for a sum, and its loss is not divided a second time; else its
    mean is multiplied by what it counts. Which of these holds is inferred from the first samples
    (`model_probe`), and a loss that is not a mean over its labels is refused, except under `mean`. It
    takes two samples in the first micro-batch to see whether the loss of one depends on the other.

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
        self._query = LossQuery(labels, count_argument, ignore_index)
        self.reduction = reduction
        self._takes_count = False
        self._counter: Counter | None = None

    def assume(self, micro_batch: Any) -> None:
        """Assume a mean over all labels where values cannot be read: passes hold the same memory."""
        if self._counter is None:
            self._counter = self._query.counters(micro_batch[self._query.labels])[0]

    def count(self, micro_batch: Any) -> Denominator | None:
        """Return the micro-batch's denominator; None before the model has been seen."""
        if self._counter is None:
            return None
        n = self._counter(micro_batch[self._query.labels])
        return float(n) if n.device.type == "cpu" else n

    def loss_sum(self, model: nn.Module, micro_batch: Any) -> Tensor:
        """Run the model on one micro-batch; return its loss sum, 0-dim, in float32 at least."""
        if self._takes_count:
            return out_of_half(self._query.loss(model, micro_batch, 1))
        assert self._counter is not None
        labels = micro_batch[self._query.labels]
        n = self._counter(labels)
        if not labels.is_floating_point():
            # The mean of nothing is NaN, and so may be its gradient: let all count, and times 0.
            counting = torch.where(n > 0, labels, self._query.label_other_than())
            micro_batch = {**micro_batch, self._query.labels: counting}
        loss = out_of_half(self._query.loss(model, micro_batch))
        return loss * n.to(loss.device)

    def __call__(self, model: nn.Module, micro_batch: Any) -> tuple[Tensor, Denominator]:
        """Run the model on one micro-batch; return its loss sum and denominator.

        Raises:
            BadInputError: the first time, where the model's loss is not a mean over its labels.
        """
        if self._counter is None:
            self._infer_counter(model, micro_batch)
        denominator = self.count(micro_batch)
        assert denominator is not None
        return self.loss_sum(model, micro_batch), denominator

    def _infer_counter(self, model: nn.Module, micro_batch: Any) -> None:
        key = self._query.labels
        if not isinstance(micro_batch, Mapping) or not isinstance(micro_batch.get(key), Tensor):
            keys = ", ".join(map(str, micro_batch)) if isinstance(micro_batch, Mapping) else "none"
            raise BadInputError(
                f"a model's own loss needs micro-batches that are mappings with a tensor {key!r} (their "
                f"keys are: {keys})"
            )
        found = infer_counters(model, self._query, micro_batch)
        if not found.counters and reduction_named(self.reduction).criterion_reduction != "mean":
            raise BadInputError(
                f"accum.reduction={self.reduction} is refused for the loss of {type(model).__name__}: "
                f"{found.why}; use accum.reduction=mean, or a "
                "loss_fn(model, micro_batch) -> (loss_sum, denominator)"
            )
        if found.counters:
            self._refuse_two_shifts(model, micro_batch, found.counters[0])
        # Under `mean` it may be the mean of the model's own means, whatever those divide by.
        self._takes_count = found.takes_count and bool(found.counters)
        self._counter = (*found.counters, *self._query.counters(micro_batch[key]))[0]

    def _refuse_two_shifts(
        self, model: nn.Module, micro_batch: Mapping[str, Any], counter: Counter
    ) -> None:
        """Raise where labels are the next tokens already, and the model shifts them once more."""
        key = self._query.labels
        labels = micro_batch[key]
        alike = torch.full((1, 3), self._query.label_other_than(), device=labels.device)
        if labels.ndim != 2 or labels.shape[1] < 3 or int(counter(alike)) != 2:
            return
        for name, tokens in micro_batch.items():
            if name == key or not isinstance(tokens, Tensor) or tokens.shape != labels.shape:
                continue
            counts = labels[:, :-1] != self._query.ignore_index
            following = labels[:, :-1][counts], tokens[:, 1:][counts]
            same = labels[:, :-1][counts], tokens[:, :-1][counts]
            if torch.equal(*following) and not torch.equal(*same):
                raise BadInputError(
                    f"{key!r} are already the tokens that follow {name!r}, and {type(model).__name__} "
                    f"shifts them itself, so that it would learn the token after the next: give {key!r} "
                    f"that equal {name!r} (of built-in text data.shift_labels=false)"
                )
