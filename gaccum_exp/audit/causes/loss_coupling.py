"""Find out whether the operations between a model's outputs and its losses mix samples.

They are tried on random outputs: some samples' are drawn anew, and the losses' arguments compared row by
row. A row that no sample of the micro-batch moves belongs to another one's samples.
"""

import functools
import math
from collections.abc import Callable, Container
from itertools import pairwise

import torch
from torch import Tensor

from gaccum_exp.audit.watch.tape import Outputs, TapedCall, TapedMicroBatch, all_of, leaves, resolved
from gaccum_exp.core.dtypes import is_inexact
from gaccum_exp.core.nesting import tensors_in

MIXED = "samples are mixed between the model's outputs and the loss"
MOST_ROWS = 256
"""Rows of a call's outputs that are drawn anew one by one, at most."""
DRAWS = 8
"""How often samples are drawn anew: once may not show, where a loss takes the largest, or a margin."""
MOST_DRAWN = 1 << 16
"""Elements of a micro-batch's outputs, at most, where they are drawn more than once."""
SPLITTING = frozenset(
    {"__getitem__", "chunk", "split", "tensor_split", "unbind", "select", "narrow", "split_with_sizes"}
)
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
    calls = (x for x in micro_batch.calls if x not in apart)
    between = [x for x in calls if any(r.call.kind == "between" for r in x.refs())]
    sizes = {call: sizes[call] for call in micro_batch.models}
    if not between or max(sizes.values(), default=0) < 1:
        return None
    generator = torch.Generator().manual_seed(0)
    given = leaves([call.arguments for call in micro_batch.models])
    device = next((leaf.device for leaf in given if isinstance(leaf, Tensor)), None)

    def drawn(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        if not (dtype.is_floating_point or dtype.is_complex):
            return torch.zeros(shape, dtype=dtype, device=device)
        return torch.randn(shape, generator=generator).to(device, dtype)

    outputs: Outputs = {
        call: [drawn(shape, dtype) for shape, dtype in call.outputs] for call in micro_batch.models
    }
    with torch.no_grad():
        return next(
            (why for x in between if (why := _coupling(x, outputs, sizes, dim, generator))), None
        )


def _coupling(
    call: TapedCall,
    outputs: Outputs,
    sizes: dict[TapedCall, int],
    dim: int,
    generator: torch.Generator,
) -> str | None:
    largest = max(sizes.values())

    def changed(chosen: Callable[[Tensor], Tensor] | None) -> list[Tensor]:
        """Return where each argument changes if samples are drawn anew: all (None), or those chosen."""
        base, redrawn = Outputs(), Outputs()
        for of, tensors in outputs.items():
            rows = None if chosen is None else chosen(torch.arange(sizes[of]))
            base[of] = [_redrawn(t, None, sizes[of], dim, generator) for t in tensors]
            redrawn[of] = [_redrawn(t, rows, sizes[of], dim, generator) for t in base[of]]
        before, again = (tensors_in(resolved(call.arguments, made)) for made in (base, redrawn))
        # A scalar is made of all samples, by right.
        pairs = ((a, b) for a, b in zip(again, before, strict=True) if b.ndim > 0)
        return [(a != b) & ~(a.isnan() & b.isnan()) for a, b in pairs]

    def often(chosen: Callable[[Tensor], Tensor]) -> list[Tensor]:
        every = [changed(chosen) for _ in range(1 if many else DRAWS)]
        return [functools.reduce(torch.logical_or, each) for each in zip(*every, strict=True)]

    many = sum(t.numel() for tensors in outputs.values() for t in tensors) > MOST_DRAWN
    shapes = [b.shape for b in tensors_in(resolved(call.arguments, dict(outputs))) if b.ndim > 0]
    dims = [{0, *(d for d, n in enumerate(shape) if n == largest)} for shape in shapes]
    for bit in range((largest - 1).bit_length()):  # any two samples differ in a bit of their numbers
        ones, others = (often(functools.partial(_of_bit, bit, value)) for value in (1, 0))
        for one, other, own in zip(ones, others, dims, strict=True):
            if all(bool((_rows(one, d) & _rows(other, d)).any()) for d in own):
                return None if _pairs_of(often, largest, _splits(call)) else MIXED
    # Rows of an output's own leading dimensions (samples, or tokens) may stay for a mask's sake.
    explained = {
        math.prod(t.shape[:d]) for ts in outputs.values() for t in ts for d in range(t.ndim + 1)
    }
    for moved in changed(None) if call.kind == "loss" else ():
        by_row = _rows(moved, dim if dim < moved.ndim and moved.shape[dim] == largest else 0)
        own_rows = int(by_row.sum())
        if 0 < own_rows < len(by_row) and len(by_row) > largest and len(by_row) not in explained:
            return FOREIGN.format(rows=len(by_row), own=own_rows)
    return None


def _of_bit(bit: int, value: int, numbers: Tensor) -> Tensor:
    return (numbers >> bit) & 1 == value


def _rows(changed: Tensor, dim: int) -> Tensor:
    return changed.movedim(dim, 0).reshape(changed.shape[dim], -1).any(1)


def _splits(call: TapedCall) -> bool:
    """Whether what a call is made of was split into single rows."""
    made = {ref.call for own in call.refs() for ref in all_of(own) if ref.call.kind == "between"}
    rows = [
        [shape[:1] for shape, _ in each.outputs] for each in made
        if getattr(each.function, "__name__", "") in SPLITTING
    ]  # fmt: skip
    return any(all(of == (1,) for of in each) for each in rows)


def _pairs_of(
    often: Callable[[Callable[[Tensor], Tensor]], list[Tensor]], largest: int, splits: bool
) -> bool:
    """Whether a sample has several rows in one call, as chosen and rejected ones that were joined.

    Each of an argument's rows is then made of rows of its own, at equal distances from the next one's.
    Where there is a single one, it has to be made of rows that the loop has split.
    """
    if largest > MOST_ROWS:
        return False
    by_row = [often(functools.partial(torch.eq, other=row)) for row in range(largest)]
    for of_argument in zip(*by_row, strict=True):
        matrix = torch.stack([_rows(each, 0) for each in of_argument])  # (model's rows, own rows)
        if bool((matrix.sum(1) > 1).any()):
            return False
        made_of = [column.nonzero().flatten() for column in matrix.T if bool(column.any())]
        if matrix.shape[1] == 1 and not splits:
            return False
        if any(len(rows) != len(made_of[0]) for rows in made_of):
            return False
        steps = [after - rows for rows, after in pairwise(made_of)]
        if any(bool((step != steps[0][0]).any()) for step in steps):
            return False
    return True


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
