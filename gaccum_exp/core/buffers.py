"""Where micro gradients are added up."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn


class GradientBuffers:
    """Adds a window's micro gradients up in another type than the parameters', and rounds them once.

    In bfloat16, 256 + 1 is 256: a parameter's own type loses what small micro gradients add to a large
    sum. Inside the `with` block every micro gradient is moved into a buffer as soon as a backward pass
    has finished it; at its end the buffer is added to what `.grad` held before, in place as autograd
    does, and the result is rounded to the parameter's type.

    Args:
        parameters: whose gradients are to be added up.
        dtype: of the buffers, for parameters of a narrower type; None: `.grad` itself is the buffer, as
            in plain autograd.
        apart: the window's gradient will be rescaled, so no earlier one may be in any buffer.
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], dtype: torch.dtype | None, *, apart: bool = False
    ) -> None:
        self._dtype = dtype
        self._parameters = [p for p in parameters if apart or self._is_narrower(p)]
        self._buffers: dict[nn.Parameter, Tensor] = {}
        self._earlier: dict[nn.Parameter, Tensor] = {}

    def __enter__(self) -> "GradientBuffers":
        for parameter in self._parameters:
            if parameter.grad is not None:
                self._earlier[parameter] = parameter.grad
                parameter.grad = None
        self._hooks = [
            parameter.register_post_accumulate_grad_hook(self._take)  # type: ignore[no-untyped-call]  # torch's
            for parameter in self._parameters
            if parameter.requires_grad and self._is_narrower(parameter)
        ]
        return self

    def scale(self, factor: float) -> None:
        """Multiply what the window has added up."""
        for parameter in self._parameters:
            grad = self._buffers.get(parameter, parameter.grad)
            if grad is not None:
                grad *= factor

    def forget(self) -> None:
        """Drop what the window has added up."""
        self._buffers.clear()
        for parameter in self._parameters:
            parameter.grad = None

    def __exit__(self, *error: object) -> None:
        for hook in self._hooks:
            hook.remove()
        if not self._parameters:
            return
        with torch.no_grad():
            for parameter in self._parameters:
                added = self._buffers.pop(parameter, parameter.grad)
                earlier = self._earlier.pop(parameter, None)
                parameter.grad = earlier if added is None else _total(earlier, added, parameter.dtype)

    def _is_narrower(self, parameter: nn.Parameter) -> bool:
        return self._dtype is not None and parameter.dtype.itemsize < self._dtype.itemsize

    def _take(self, parameter: Tensor) -> None:
        assert isinstance(parameter, nn.Parameter)
        assert parameter.grad is not None
        if parameter in self._buffers:
            self._buffers[parameter] += parameter.grad
        else:
            self._buffers[parameter] = parameter.grad.to(self._dtype)
        parameter.grad = None


def _total(earlier: Tensor | None, added: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the sum, computed in the wider type of the two and then rounded."""
    if added.is_sparse:  # a row may be listed more than once, and is to be rounded once
        total = added if earlier is None else earlier + added
        return (total.coalesce() if total.is_sparse else total).to(dtype)
    return added.to(dtype) if earlier is None else earlier.add_(added)
