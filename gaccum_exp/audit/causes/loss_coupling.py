"""Find out whether the operations between a model's outputs and its losses mix samples.

They are tried on random outputs: some samples' are drawn anew, and the losses' arguments compared row by
row. A row that no sample of the micro-batch moves belongs to another one's samples.
"""

import math
from collections.abc import Container

import torch
from torch import Tensor

from gaccum_exp.audit.watch.tape import Outputs, TapedCall, TapedMicroBatch, leaves, resolved
from gaccum_exp.core.dtypes import is_inexact
from gaccum_exp.core.nesting import tensors_in

MIXED = "samples are mixed between the model's outputs and the loss"
FOREIGN = (
    "the loss of each micro-batch is taken over {rows} rows, of which {own} come from its own samples "
    "and the others from elsewhere (features kept from other passes?): what it is over the whole window "
    "cannot be seen from outside"
)


def coupling_of(
    micro_batch: TapedMicroBatch,
    sizes: dict[TapedCall, int],
    dim: int,
    apart: Container[TapedCall] = (),
) -> str | None:
    """Return how the operations between model and losses mix samples; None where they do not.

    Args:
        micro_batch: of the tape.
        sizes: the samples of each call of the model's.
        dim: along which the model's inputs count them.
        apart: losses that are known to mix them.
    """
    between = [x for x in micro_batch.losses if any(r.call.kind == "between" for r in x.refs())]
    losses = [loss for loss in between if loss not in apart]
    sizes = {call: sizes[call] for call in micro_batch.models}
    if not losses or max(sizes.values(), default=0) < 1:
        return None
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
        return next((why for x in losses if (why := _coupling(x, outputs, sizes, dim, generator))), None)


def _coupling(
    loss: TapedCall,
    outputs: Outputs,
    sizes: dict[TapedCall, int],
    dim: int,
    generator: torch.Generator,
) -> str | None:
    before = tensors_in(resolved(loss.arguments, dict(outputs)))
    largest = max(sizes.values())

    def rows_changed(bit: int, value: int) -> list[Tensor]:
        """Return which samples of each argument change, or which of its rows, if these samples' do."""
        redrawn: Outputs = {}
        for call, tensors in outputs.items():
            chosen = ((torch.arange(sizes[call]) >> bit) & 1 == value) if bit >= 0 else None
            redrawn[call] = [_redrawn(t, chosen, sizes[call], dim, generator) for t in tensors]
        changed = []
        for a, b in zip(tensors_in(resolved(loss.arguments, redrawn)), before, strict=True):
            if b.ndim > 0:  # a scalar is made of all samples, by right
                own = dim if dim < b.ndim and b.shape[dim] == largest else 0
                changed.append((a != b).movedim(own, 0).reshape(b.shape[own], -1).any(1))
        return changed

    for bit in range((largest - 1).bit_length()):  # any two samples differ in a bit of their numbers
        for one, other in zip(rows_changed(bit, 1), rows_changed(bit, 0), strict=True):
            if bool((one & other).any()):
                return MIXED
    # Rows of an output's own leading dimensions (samples, or tokens) may stay for a mask's sake.
    explained = {
        math.prod(t.shape[:d]) for ts in outputs.values() for t in ts for d in range(t.ndim + 1)
    }
    for moved in rows_changed(-1, 0):
        own = int(moved.sum())
        if 0 < own < len(moved) and len(moved) > largest and len(moved) not in explained:
            return FOREIGN.format(rows=len(moved), own=own)
    return None


def _redrawn(
    tensor: Tensor, chosen: Tensor | None, size: int, dim: int, generator: torch.Generator
) -> Tensor:
    fitting = [d for d, n in enumerate(tensor.shape) if n == size]
    if not is_inexact(tensor) or (not fitting and chosen is not None):
        return tensor
    drawn = torch.randn(tensor.shape, generator=generator).to(tensor)
    if chosen is None:
        return drawn
    own = dim if dim in fitting else fitting[0]
    mask = chosen.to(tensor.device).reshape([-1 if d == own else 1 for d in range(tensor.ndim)])
    return torch.where(mask, drawn, tensor)
