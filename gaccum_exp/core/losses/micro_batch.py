"""The parts of a micro-batch: the model's inputs, and the targets of its outputs."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gaccum_exp.errors import BadInputError

TARGETS = ("labels", "label", "targets", "target")
"""The keys under which a mapping has its target, the first that is there."""


class Keywords(dict[str, Any]):
    """Arguments that a model is called with by name."""


def split_micro_batch(micro_batch: Any) -> tuple[Any, list[Any]]:
    """Split a micro-batch into the model's inputs and the targets.

    Of `(input, target)`, `(input, *targets)` and `(input, (target, ...))` that is the first part and
    the rest. Of a mapping, e.g. `{"input_ids": …, "attention_mask": …, "labels": …}`, the target is the
    entry of one of TARGETS, and every other is an argument of the model's by that name.

    Raises:
        BadInputError: it is neither, so a criterion cannot be applied to it.
    """
    if isinstance(micro_batch, (tuple, list)):
        targets: list[Any] = []
        for part in micro_batch[1:]:
            targets.extend(part) if isinstance(part, (tuple, list)) else targets.append(part)
        return micro_batch[0], targets
    if not isinstance(micro_batch, Mapping):
        raise BadInputError(
            f"a criterion takes micro-batches (input, target) or mappings with labels, and this one is "
            f"{type(micro_batch).__name__}; use a loss_fn(model, micro_batch) -> (loss_sum, denominator)"
        )
    key = next((key for key in TARGETS if key in micro_batch), None)
    if key is None:
        raise BadInputError(
            f"a criterion needs targets, and a micro-batch with the keys "
            f"{', '.join(map(str, micro_batch))} has none of {', '.join(TARGETS)}; use a "
            "loss_fn(model, micro_batch) -> (loss_sum, denominator)"
        )
    return Keywords({k: v for k, v in micro_batch.items() if k != key}), [micro_batch[key]]


def run_model(model: nn.Module, inputs: Any) -> Any:
    """Call the model with what `split_micro_batch` gave."""
    return model(**inputs) if isinstance(inputs, Keywords) else model(inputs)


def tokens_in(micro_batch: Any, ignore_index: int = -100) -> Tensor | None:
    """Count the labels that are not ignored, 0-dim; None where the target is not a sequence of labels.

    Sequences of labels are integers, (batch, length).
    """
    try:
        _, targets = split_micro_batch(micro_batch)
    except BadInputError:
        return None
    labels = targets[0] if targets else None
    if not isinstance(labels, Tensor) or labels.dtype != torch.int64 or labels.ndim != 2:
        return None
    return (labels != ignore_index).sum()


def outputs_in(outputs: Any) -> list[Any]:
    """Return a model's outputs as a list; of an object with `logits`, as in transformers, those.

    A tuple with names stays a tuple: torchvision's Inception puts out auxiliary logits beside `logits`.
    """
    if isinstance(outputs, Tensor):
        return [outputs]
    if isinstance(outputs, (tuple, list)):
        return list(outputs)
    named = isinstance(outputs, Mapping)
    logits = outputs.get("logits") if named else getattr(outputs, "logits", None)
    return [outputs if logits is None else logits]
