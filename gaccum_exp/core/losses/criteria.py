"""Criteria that `torch.nn` does not have in the form that people need them."""

import math
import re
from collections.abc import Callable, Sequence
from functools import partial
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from gaccum_exp.core.modes import unobserved
from gaccum_exp.core.seeding import random_state_kept
from gaccum_exp.errors import BadInputError

MODELS = frozenset({"model", "net", "network", "module"})
"""Names of the first parameter of a loss function, which calls the model itself."""
OUTPUT = re.compile(
    r"(inputs?|out|[ohpxz]|scores?|prob(s|abilities)?|log_probs?|estimates?|embeddings?|features?)"
    r"|(output|logit|pred).*|.*(_hat|yhat|_pred|_logits|_output|_outputs)"
)
"""Names of the first parameter of a function of output and target."""
TARGET = re.compile(r"(y|t|gt|truth|true|expected)(_.*)?|.*_true|.*(target|label|truth).*")
"""Names of the second parameter of a function of output and target."""
MADE_UP = (1.0, -1.0, 0.01, 100.0, -100.0)
"""Sizes of made-up outputs on which an unknown function is looked at, until it gives a loss."""
HAND_OVER = (
    "a criterion of torch.nn, a function of output and target that takes `reduction`, or "
    "loss_fn(model, micro_batch) -> (loss_sum, denominator)"
)


class TokenCrossEntropy(nn.CrossEntropyLoss):
    """Cross entropy over tokens, with the classes in the last dimension, as language models have them.

    `nn.CrossEntropyLoss` wants them in the second, (batch, classes, length). Which of the two a tensor
    has cannot be told from its shape where length and vocabulary happen to be equal, so it is said by
    the choice of criterion. All arguments are those of `nn.CrossEntropyLoss`; its mean divides by the
    labels that are not `ignore_index` (-100).
    """

    class_dim = -1
    """Where the classes are in the model's output."""

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the loss of logits (..., classes) for integer labels (...).

        Raises:
            BadInputError: shapes that do not fit, or labels that are no integers.
        """
        if logits.shape[:-1] != labels.shape or labels.is_floating_point():
            raise BadInputError(
                f"criterion {type(self).__name__} takes logits (..., classes) and integer labels (...); "
                f"the model puts out {tuple(logits.shape)}, the labels are {tuple(labels.shape)} "
                f"{str(labels.dtype).removeprefix('torch.')}"
            )
        loss = super().forward(logits.reshape(-1, logits.shape[-1]), labels.reshape(-1))
        return loss.view(labels.shape) if self.reduction == "none" else loss


class FunctionCriterion(nn.Module):
    """A function of output and target that takes `reduction`, as those of `torch.nn.functional` do.

    Args:
        function: `function(output, target, reduction=...)`; what else it takes is bound to it, as by
            `functools.partial`.
    """

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function, self.reduction = function, "mean"

    def forward(self, *outputs_and_targets: Any) -> Tensor:
        """Call the function with the reduction that is asked for."""
        return self.function(*outputs_and_targets, reduction=self.reduction)

    def extra_repr(self) -> str:
        """Name the function."""
        return name_of(self.function)


class PlainCriterion(nn.Module):
    """A function of output and target that gives its mean, its sum, or a loss of each sample.

    Which of them is found out at the first call: of the samples twice over a sum is twice as large, and
    a mean the same. A mean is taken for one over all elements of the target. Whether its sum adds up
    over micro-batches then is checked as that of any criterion (`probe`), and whether halves add up to
    each micro-batch, which waits for the device: ignored labels may come late.

    Args:
        function: `function(output, target)`.
    """

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function, self.reduction = function, "mean"
        self._is_sum: bool | None = None

    def forward(self, *outputs_and_targets: Any) -> Tensor:
        """Call the function, and reduce what it gives as is asked for.

        Raises:
            BadInputError: it gives neither a sum nor a mean, or a mean over something else.
        """
        loss = self.function(*outputs_and_targets)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            if not isinstance(loss, Tensor) or self.reduction == "none":
                return loss
            return loss.sum() if self.reduction == "sum" else loss.mean()
        self._require_tensors(outputs_and_targets[:2])
        counted = [t for t in outputs_and_targets[1:] if isinstance(t, Tensor) and t.ndim]
        number = counted[0].numel() if counted else 1
        is_sum = self._gives_sum(outputs_and_targets)
        if self.reduction == "sum":
            if not is_sum:
                self._require_every_element_counts(outputs_and_targets, loss)
            return loss if is_sum else loss * number
        return loss / number if is_sum else loss

    def _require_tensors(self, given: Sequence[Any]) -> None:
        for what, each in zip(("the model's output", "the target"), given, strict=False):
            if isinstance(each, (tuple, list, dict)):
                raise BadInputError(
                    f"criterion {self.extra_repr()}: {what} is a {type(each).__name__}, and whether it "
                    f"gives a mean or a sum is found out on tensors alone. Let it give a loss of each "
                    f"sample, or hand over {HAND_OVER}"
                )

    def _gives_sum(self, given: Sequence[Any]) -> bool:
        # Of shapes alone it cannot be told, and does not matter.
        if self._is_sum is None and not any(map(_has_no_values, given)):
            with unobserved(), torch.no_grad():
                self._is_sum = self._looked_at(given)
        return bool(self._is_sum)

    def _require_every_element_counts(self, given: Sequence[Any], loss: Tensor) -> None:
        tensors = [t for t in given if isinstance(t, Tensor) and t.ndim]
        lengths = {t.shape[0] for t in tensors}
        length = lengths.pop() if len(lengths) == 1 else 0
        if length < 2 or not isinstance(given[1], Tensor) or any(map(_has_no_values, tensors)):
            return
        halves = []
        with unobserved(), torch.no_grad(), random_state_kept():
            for rows in (slice(length // 2), slice(length // 2, None)):
                part = [t[rows] if isinstance(t, Tensor) and t.ndim else t for t in given]
                halves.append(float(self.function(*part)) * part[1].numel())
        whole, total = float(loss.detach()) * given[1].numel(), sum(halves)
        most = math.sqrt(torch.finfo(loss.dtype).eps) * sum(map(abs, halves))
        if math.isfinite(whole) and not abs(whole - total) <= most:
            raise BadInputError(
                f"criterion {self.extra_repr()}: the means of a micro-batch's halves do not add up by "
                f"the elements of the target ({total:.4g}, and {whole:.4g} of the whole): it counts "
                f"something else, as where labels are ignored. Hand over {HAND_OVER}"
            )

    def _looked_at(self, given: Sequence[Any]) -> bool:
        def varied(t: Any, size: float) -> Any:
            places = torch.arange(t.numel(), device=t.device).view(t.shape)
            return (size * (0.5 + 0.4 * torch.sin(places + 1.0))).to(t.dtype)

        def twice(t: Any) -> Any:
            return torch.cat([t, t]) if isinstance(t, Tensor) and t.ndim else t

        once = both = 0.0
        for size in MADE_UP:  # lest the loss be zero, as a hinge is beyond its margin
            made = [varied(given[0], size), *given[1:]]
            one, two = self.function(*made), self.function(*map(twice, made))
            if two.numel() > one.numel():
                return True  # losses of single samples, of which there is one
            once, both = float(one), float(two)
            for times, is_sum in ((1.0, False), (2.0, True)):
                if once and math.isclose(both, times * once, rel_tol=1e-3):
                    return is_sum
            if once and math.isfinite(once):
                break
        raise BadInputError(
            f"criterion {self.extra_repr()}: of the samples twice over it gives {both:.4g}, and of "
            f"these {once:.4g}: neither a mean nor a sum over samples. Hand over {HAND_OVER}"
        )

    def extra_repr(self) -> str:
        """Name the function."""
        return name_of(self.function)


def as_criterion(function: Any) -> nn.Module | None:
    """Return a function of output and target as a criterion; None: it is none, as far as it says.

    It takes `reduction`, and its first parameter has no model's name; or its first two parameters have
    names of an output and a target.
    """
    made = getattr(function, "func", function)
    if isinstance(made, (nn.Module, type)) or hasattr(function, "count"):
        return None
    try:
        names = [*signature(function).parameters]
    except (TypeError, ValueError):  # it does not say what it takes
        return None
    if names[:1] and names[0] in MODELS:
        return None
    if "reduction" in names:
        return FunctionCriterion(function)
    plain = names[1:] and OUTPUT.fullmatch(names[0]) and TARGET.fullmatch(names[1])
    return PlainCriterion(function) if plain else None


def _has_no_values(given: Any) -> bool:
    return isinstance(given, Tensor) and (given.is_meta or type(given).__name__ == "FakeTensor")


def name_of(function: Any) -> str:
    """Return what a function is called."""
    function = function.func if isinstance(function, partial) else function
    return str(getattr(function, "__qualname__", type(function).__qualname__))
