"""Do the operations between a model's outputs and its loss mix samples?

Tried on made-up outputs: some samples' are drawn anew, and the loss's arguments compared row by row.
"""

import torch
from torch import Tensor

from gaccum_exp.audit.rerun.samples import tensors_in
from gaccum_exp.audit.watch.playback import Outputs, as_is, resolved
from gaccum_exp.audit.watch.tape import Call, MicroBatch, leaves


def couples(unit: MicroBatch, size: int) -> bool:
    """Whether the operations between model and loss mix samples, tried on made-up outputs."""
    between = [loss for loss in unit.losses if any(r.call.kind == "between" for r in loss.refs())]
    if size < 2 or not between:
        return False
    generator = torch.Generator().manual_seed(0)
    base: Outputs = {
        call: [_made_up(s, d, generator) for s, d in zip(call.shapes, call.dtypes, strict=True)]
        for call in unit.models
    }
    device = next(
        (leaf.device for leaf in leaves([c.args for c in unit.models]) if isinstance(leaf, Tensor)),
        None,
    )
    base = {c: [t.to(device) for t in ts] for c, ts in base.items()}
    with torch.no_grad():
        return any(_mixes(loss, base, size, generator) for loss in between)


def _mixes(loss: Call, base: Outputs, size: int, generator: torch.Generator) -> bool:
    def rows_changed(chosen: Tensor) -> list[Tensor]:
        moved = {c: [_moved(t, chosen, size, generator) for t in ts] for c, ts in base.items()}
        after = tensors_in(resolved(loss.arguments, moved, as_is))
        return [
            (a != b).reshape(a.shape[0] if a.ndim else 1, -1).any(1)
            for a, b in zip(after, before, strict=True)
        ]

    before = tensors_in(resolved(loss.arguments, dict(base), as_is))
    numbers = torch.arange(size)
    for bit in range((size - 1).bit_length()):  # any two samples differ in a bit of their numbers
        chosen = (numbers >> bit) & 1 == 1
        for one, other in zip(rows_changed(chosen), rows_changed(~chosen), strict=True):
            if bool((one & other).any()):
                return True
    return False


def _made_up(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    if not dtype.is_floating_point:
        return torch.zeros(shape, dtype=dtype)
    return torch.randn(shape, generator=generator).to(dtype)


def _moved(tensor: Tensor, chosen: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Return made-up outputs with some samples' values drawn anew."""
    dim = next((d for d, n in enumerate(tensor.shape) if n == size), None)
    if dim is None or not tensor.is_floating_point():
        return tensor
    mask = chosen.to(tensor.device).reshape([-1 if d == dim else 1 for d in range(tensor.ndim)])
    return torch.where(mask, torch.randn(tensor.shape, generator=generator).to(tensor), tensor)
