"""Find out whether the operations between a model's outputs and its loss mix samples.

They are tried on random outputs: some samples' are drawn anew, and the loss's arguments compared row by
row.
"""

import torch
from torch import Tensor

from gaccum_exp.audit.watch.tape import Outputs, TapedCall, TapedMicroBatch, leaves, resolved
from gaccum_exp.core.joined_samples import tensors_in


def couples_samples(micro_batch: TapedMicroBatch, size: int, dim: int = 0) -> bool:
    """Whether the operations between model and loss mix a micro-batch's samples, along `dim`."""
    losses = [loss for loss in micro_batch.losses if any(r.call.kind == "between" for r in loss.refs())]
    if size < 2 or not losses:
        return False
    generator = torch.Generator().manual_seed(0)
    given = leaves([call.arguments for call in micro_batch.models])
    device = next((leaf.device for leaf in given if isinstance(leaf, Tensor)), None)
    outputs: Outputs = {
        call: [
            torch.randn(shape, generator=generator).to(device, dtype)
            if dtype.is_floating_point
            else torch.zeros(shape, dtype=dtype, device=device)
            for shape, dtype in call.outputs
        ]
        for call in micro_batch.models
    }
    with torch.no_grad():
        return any(_mixes(loss, outputs, size, dim, generator) for loss in losses)


def _mixes(loss: TapedCall, outputs: Outputs, size: int, dim: int, generator: torch.Generator) -> bool:
    before = tensors_in(resolved(loss.arguments, dict(outputs)))

    def rows_changed(chosen: Tensor) -> list[Tensor]:
        redrawn = {
            call: [_redrawn(t, chosen, size, dim, generator) for t in tensors]
            for call, tensors in outputs.items()
        }
        after = tensors_in(resolved(loss.arguments, redrawn))
        return [_by_sample(a != b, size, dim) for a, b in zip(after, before, strict=True)]

    numbers = torch.arange(size)
    for bit in range((size - 1).bit_length()):  # any two samples differ in a bit of their numbers
        chosen = (numbers >> bit) & 1 == 1
        for one, other in zip(rows_changed(chosen), rows_changed(~chosen), strict=True):
            if bool((one & other).any()):
                return True
    return False


def _by_sample(changed: Tensor, size: int, dim: int) -> Tensor:
    """Return which samples of a tensor have changed, or which of its rows, (samples,) or (rows,)."""
    if not changed.ndim:
        return changed.reshape(1)
    own = dim if dim < changed.ndim and changed.shape[dim] == size else 0
    return changed.movedim(own, 0).reshape(changed.shape[own], -1).any(1)


def _redrawn(tensor: Tensor, chosen: Tensor, size: int, dim: int, generator: torch.Generator) -> Tensor:
    fitting = [d for d, n in enumerate(tensor.shape) if n == size]
    if not fitting or not tensor.is_floating_point():
        return tensor
    own = dim if dim in fitting else fitting[0]
    mask = chosen.to(tensor.device).reshape([-1 if d == own else 1 for d in range(tensor.ndim)])
    return torch.where(mask, torch.randn(tensor.shape, generator=generator).to(tensor), tensor)
