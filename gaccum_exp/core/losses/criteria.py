"""Criteria that `torch.nn` does not have in the form that people need them."""

from collections.abc import Callable
from functools import partial
from inspect import signature
from typing import Any

from torch import Tensor, nn

from gaccum_exp.errors import BadInputError


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
        function = self.function.func if isinstance(self.function, partial) else self.function
        return str(getattr(function, "__qualname__", type(function).__qualname__))

    @staticmethod
    def takes(function: Callable[..., Any]) -> bool:
        """Whether it is such a function, and no module or class."""
        if isinstance(getattr(function, "func", function), (nn.Module, type)):
            return False
        try:
            return "reduction" in signature(function).parameters
        except (TypeError, ValueError):  # it does not say what it takes
            return False
