"""The device and precision in which micro-batches meet the model."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from gaccum_exp.core.dtypes import in_precision, is_inexact
from gaccum_exp.core.losses.protocol import LossFn, LossWrapper


@dataclass(frozen=True, slots=True)
class Placement:
    """What is done to a micro-batch from the host before the model sees it, and around the model."""

    device: torch.device | None
    """None: where it is."""
    dtype: torch.dtype | None = None
    """How precise its real and complex tensors are; None: as they are."""
    autocast: torch.dtype | None = None
    """What `torch.autocast` computes in; None: the precision of weights and inputs."""
    device_type: str = "cpu"
    """Of the model's device."""
    compiled: bool = False
    """Whether a compiled model is to expect micro-batches of any size, and sequences of any length."""

    @property
    def changes_nothing(self) -> bool:
        """Whether a micro-batch from the host is used as it is."""
        moves = self.device is not None and self.device.type != "cpu"
        return not (moves or self.dtype or self.autocast or self.compiled)

    def place(self, micro_batch: Any) -> Any:
        """Return the pytree as the model gets it; copies from pinned memory do not wait."""

        def leaf(tensor: Tensor) -> Tensor:
            dtype = in_precision(tensor.dtype, self.dtype)
            placed = tensor.to(self.device, dtype, non_blocking=True)
            if self.compiled and placed.ndim > 0:
                # Else every N, and the last window of an epoch, would be compiled anew.
                tokens = placed.ndim == 2 and not is_inexact(placed)
                torch._dynamo.maybe_mark_dynamic(placed, [0, 1] if tokens else 0)
            return placed

        return tree_map_only(Tensor, leaf, micro_batch)

    def passes(self) -> AbstractContextManager[Any]:
        """Enter around forward passes."""
        if self.autocast is None:
            return nullcontext()
        return torch.autocast(self.device_type, dtype=self.autocast)


class Placed(LossWrapper):
    """A loss function that takes micro-batches from the host: counted there, moved one at a time.

    Only one micro-batch is on the device at once; a whole window there would spoil the memory that
    accumulation saves.
    """

    def __init__(self, loss_fn: LossFn, placement: Placement) -> None:
        super().__init__(loss_fn)
        self.placement = placement
        """What is done to a micro-batch before the loss function sees it."""

    @contextmanager
    def around(self, micro_batch: Any) -> Iterator[Any]:
        """Place the micro-batch, within the precision of the passes; nothing waits for the copy."""
        with self.placement.passes():
            yield self.placement.place(micro_batch)


def on_device(loss_fn: LossFn) -> LossFn:
    """Return the loss function for micro-batches that are on the model's device already."""
    if isinstance(loss_fn, Placed):
        return Placed(loss_fn.wrapped, replace(loss_fn.placement, device=None))
    return loss_fn


def placed(loss_fn: LossFn, placement: Placement) -> LossFn:
    """Return the loss function for micro-batches from the host."""
    return loss_fn if placement.changes_nothing else Placed(loss_fn, placement)
