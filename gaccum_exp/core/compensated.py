"""Compensated summation of micro gradients, in their own type."""

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from typing import ClassVar

import torch
from torch import Tensor, nn

from gaccum_exp.core.dtypes import is_narrower
from gaccum_exp.core.strategies import AccumulatorState, InPlace, collecting, require_dense
from gaccum_exp.errors import BadInputError


class Compensated(InPlace):
    """Adds micro gradients of half precision up with a second number for what rounding loses.

    Kahan's summation (1965), of a sum s and a compensation c, both in the parameter's own type:

        y = g − c;  t = s + y;  c = (t − s) − y;  s = t

    The error of s then does not grow with N. It holds four bytes an element, as a float32 buffer does
    (`accum.buffer_dtype=float32`), for the three operations more: it is here to be compared with that.
    Parameters of float32 and wider are added up in place.
    """

    name: ClassVar[str] = "compensated"
    buffers_gradients: ClassVar[bool] = True

    def buffered(self, dtype: torch.dtype) -> InPlace:
        """Refuse: the buffers have their type.

        Raises:
            BadInputError: always.
        """
        raise BadInputError(
            "accum.buffer_dtype=float32 and strategy=compensated are two ways to add micro gradients "
            "up: use accum.buffer_dtype=same, or strategy=in_place"
        )

    def collecting(
        self, state: AccumulatorState, parameters: Sequence[nn.Parameter], *, rescaled: bool
    ) -> AbstractContextManager[None]:
        """Enter around a window's passes, as `InPlace.collecting`."""
        narrower = [p for p in parameters if is_narrower(p.dtype, torch.float32)]
        return collecting(state, parameters if rescaled else narrower, torch.float32, _add)

    def rescale(
        self, state: AccumulatorState, parameters: Iterable[nn.Parameter], factor: float
    ) -> None:
        """Multiply what the window has added up, as `InPlace.rescale`.

        What has been lost so far is less than half of the sum's last digit, and so is what this loses.
        """
        state.compensations.clear()
        super().rescale(state, parameters, factor)


@torch.no_grad()
def _add(state: AccumulatorState, parameter: Tensor) -> None:
    """Add a micro gradient to its sum, without memory beside the sum's and the compensation's."""
    assert isinstance(parameter, nn.Parameter)
    gradient, parameter.grad = parameter.grad, None
    assert gradient is not None
    require_dense(gradient, Compensated.name, ", or accum.buffer_dtype=float32")
    before = state.buffers.get(parameter)
    if before is None:
        state.buffers[parameter] = gradient
        state.compensations[parameter] = torch.zeros_like(gradient)
        return
    lost = state.compensations[parameter]
    gradient -= lost
    total = state.buffers[parameter] = torch.add(before, gradient, out=lost)
    state.compensations[parameter] = torch.sub(total, before, out=before).sub_(gradient)
