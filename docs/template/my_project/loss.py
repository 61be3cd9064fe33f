"""A loss: the sum over a micro-batch, and what it is to be divided by."""

from collections.abc import Mapping

from torch import Tensor, nn
from torch.nn import functional as F


def huber_where_known(
    model: nn.Module, micro_batch: Mapping[str, Tensor], delta: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Return the sum of Huber's loss over the known values, and how many these are."""
    known = micro_batch["known"]
    denoised = model(micro_batch["noisy"])
    loss = F.huber_loss(denoised, micro_batch["clean"], reduction="none", delta=delta)
    return (loss * known).sum(), known.sum()
