"""Find out whether the operations between a model's outputs and its loss mix samples.

They are tried on random outputs: some samples' are drawn anew, and the loss's arguments compared row by
row.
"""

import torch
from torch import Tensor

from gaccum_exp.audit.watch.tape import Outputs, TapedCall, TapedMicroBatch, leaves, resolved
from gaccum_exp.core.dtypes import is_inexact
from gaccum_exp.core.joined_samples import tensors_in


def couples_samples(micro_batch: TapedMicroBatch, size: int) -> bool:
    """Whether the operations between model and loss mix a micro-batch's samples."""
    losses = [loss for loss in micro_batch.losses if any(r.call.kind == "between" for r in loss.refs())]
    if size < 2 or not losses:
        return False
    generator = torch.Generator().manual_seed(0)
    given = leaves([call.arguments for call in micro_batch.models])
    device = next((leaf.device for leaf in given if isinstance(leaf, Tensor)), None)
    outputs: Outputs = {
        call: [
            torch.randn(shape, generator=generator).to(device, dtype)
            if dtype.is_floating_point or dtype.is_complex
            else torch.zeros(shape, dtype=dtype, device=device)
            for shape, dtype in call.outputs
        ]
        for call in micro_batch.models
    }
    with torch.no_grad():
        return any(_mixes(loss, outputs, size, generator) for loss in losses)


def _mixes(loss: TapedCall, outputs: Outputs, size: int, generator: torch.Generator) -> bool:
    before = tensors_in(resolved(loss.arguments, dict(outputs)))

    def rows_changed(chosen: Tensor) -> list[Tensor]:
        redrawn = {
            call: [_redrawn(t, chosen, size, generator) for t in tensors]
            for call, tensors in outputs.items()
        }
        after = tensors_in(resolved(loss.arguments, redrawn))
        return [
            (a != b).reshape(a.shape[0] if a.ndim else 1, -1).any(1)
            for a, b in zip(after, before, strict=True)
        ]

    numbers = torch.arange(size)
    for bit in range((size - 1).bit_length()):  # any two samples differ in a bit of their numbers
        chosen = (numbers >> bit) & 1 == 1
        for one, other in zip(rows_changed(chosen), rows_changed(~chosen), strict=True):
            if bool((one & other).any()):
                return True
    return False


def _redrawn(tensor: Tensor, chosen: Tensor, size: int, generator: torch.Generator) -> Tensor:
    dim = next((d for d, n in enumerate(tensor.shape) if n == size), None)
    if dim is None or not is_inexact(tensor):
        return tensor
    mask = chosen.to(tensor.device).reshape([-1 if d == dim else 1 for d in range(tensor.ndim)])
    return torch.where(mask, torch.randn(tensor.shape, generator=generator).to(tensor), tensor)
