"""Whether a sample's output depends on other samples: some are replaced, and the others must not change.

All runs have the same shapes and the same draws, so dropout and the like hide nothing.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gaccum_exp.core.joined_samples import picked_rows, sample_dim, tensors_in


class Swap(NamedTuple):
    """A batch's samples with every second one replaced by its neighbour."""

    rows: Tensor
    """The sample that stands at each place."""
    kept: Tensor
    """The places that hold their own."""


def swaps(size: int) -> list[Swap]:
    """Return both: the samples of even and of odd places replaced.

    >>> [swap.rows.tolist() for swap in swaps(3)]
    [[1, 1, 1], [0, 0, 2]]
    """
    samples = torch.arange(size)
    partners = samples ^ 1
    partners[partners == size] = size - 2
    odd = samples % 2 == 1
    return [
        Swap(torch.where(replaced, partners, samples), samples[~replaced]) for replaced in (~odd, odd)
    ]


def agree(
    ones: Sequence[Tensor], others: Sequence[Tensor], dims: Sequence[int | None], kept: Tensor, size: int
) -> bool:
    """Whether tensors of a batch agree at some of its samples, and throughout where they have none."""

    def seen(tensor: Tensor, dim: int | None) -> Tensor:
        return tensor if dim is None else picked_rows(tensor, dim, kept, size)

    pairs = zip(ones, others, dims, strict=True)
    return all(_close(seen(one, dim), seen(other, dim)) for one, other, dim in pairs)


def mixing_module(model: nn.Module, run: Callable[[Tensor], Any], swap: Swap) -> str:
    """Name the innermost module, the first to run, that mixes: its inputs agree, and its outputs do not.

    Args:
        model: some module of which mixes samples, or its own forward.
        run: runs the model on these samples of a batch.
        swap: shows it.
    """
    size = len(swap.rows)
    samples = torch.arange(size)
    with _traced(model) as calls:
        ends = []
        for rows in (samples, torch.cat([samples, samples[:1]]), swap.rows):
            run(rows)
            ends.append(len(calls))
    runs = calls[: ends[0]], calls[ends[0] : ends[1]], calls[ends[1] :]
    for base, grown, swapped in zip(*runs, strict=False):
        alike = [
            agree(ones, others, _dims(ones, more, size), swap.kept, size)
            for ones, more, others in zip(base[1:], grown[1:], swapped[1:], strict=True)
            if len(ones) == len(more) == len(others)
        ]
        if alike == [True, False]:
            return base.name
    return type(model).__name__


class _ModuleCall(NamedTuple):
    name: str
    inputs: list[Tensor]
    outputs: list[Tensor]


@contextmanager
def _traced(model: nn.Module) -> Iterator[list[_ModuleCall]]:
    """Trace the calls of all modules, in the order in which they end."""
    calls: list[_ModuleCall] = []
    begun: list[list[Tensor]] = []
    handles = []
    for name, module in model.named_modules():
        full = f"{name or 'the model'} ({type(module).__name__})"

        def before(of: nn.Module, args: Any, kwargs: Any) -> None:
            begun.append([t.detach().clone() for t in tensors_in([args, kwargs])])

        def after(of: nn.Module, args: Any, output: Any, full: str = full) -> None:
            made = [t.detach().clone() for t in tensors_in(output)]
            calls.append(_ModuleCall(full, begun.pop(), made))

        handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(module.register_forward_hook(after))
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _dims(ones: Sequence[Tensor], more: Sequence[Tensor], size: int) -> list[int | None]:
    pairs = zip(ones, more, strict=True)
    return [sample_dim(tuple(m.shape), tuple(one.shape), size + 1, size) for one, m in pairs]


def _close(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors agree but for rounding: mixing is far above half of a type's digits."""
    if one.shape != other.shape:
        return False
    if not (one.is_floating_point() or one.is_complex()):
        return torch.equal(one, other)
    finite = one[torch.isfinite(one)]
    largest = float(finite.abs().max()) if finite.numel() else 0.0
    tolerance = torch.finfo(one.dtype).eps ** 0.5 * largest
    return torch.allclose(one, other, rtol=0.0, atol=tolerance, equal_nan=True)
