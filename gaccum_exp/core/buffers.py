"""Where micro gradients are added up."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn


class GradientBuffers:
    """Adds micro gradients up in another type than the parameters', and rounds them once, at the end.

    In bfloat16, 256 + 1 is 256: a parameter's own type loses what small micro gradients add to a large
    sum. Inside the `with` block every micro gradient is moved into a buffer as soon as a backward pass
    has finished it; at its end `.grad` holds the sum, in the parameter's type.

    Args:
        parameters: whose gradients are to be added up.
        dtype: of the buffers, for parameters of a narrower type; None: `.grad` itself is the buffer, as
            in plain autograd.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], dtype: torch.dtype | None) -> None:
        self._parameters = list(parameters)
        self._dtype = dtype
        self._buffers: dict[nn.Parameter, Tensor] = {}

    def __enter__(self) -> "GradientBuffers":
        self._hooks = [
            parameter.register_post_accumulate_grad_hook(self._take)  # type: ignore[no-untyped-call]  # torch's
            for parameter in self._parameters
            if parameter.requires_grad and self._is_narrower(parameter)
        ]
        return self

    def scale(self, factor: float) -> None:
        """Multiply what has been added up."""
        for parameter in self._parameters:
            grad = self._buffers.get(parameter, parameter.grad)
            if grad is not None:
                grad *= factor

    def __exit__(self, *error: object) -> None:
        for hook in self._hooks:
            hook.remove()
        for parameter in list(self._buffers):
            parameter.grad = self._buffers.pop(parameter).to(parameter.dtype)

    def _is_narrower(self, parameter: nn.Parameter) -> bool:
        return self._dtype is not None and parameter.dtype.itemsize < self._dtype.itemsize

    def _take(self, parameter: Tensor) -> None:
        assert isinstance(parameter, nn.Parameter)
        assert parameter.grad is not None
        if parameter in self._buffers:
            self._buffers[parameter] += parameter.grad
        else:  # what was there before the window as well
            self._buffers[parameter] = parameter.grad.to(self._dtype)
        parameter.grad = None
