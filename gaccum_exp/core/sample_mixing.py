"""Whether a sample's output depends on other samples: some are replaced, and the others must not change.

All runs have the same shapes and the same draws, so dropout and the like hide nothing.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gaccum_exp.core.joined_samples import picked_rows, sample_dim
from gaccum_exp.core.module_calls import Key, ModuleCall, ModuleTracer


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
    size, modules = len(swap.rows), dict(model.named_modules())
    samples = torch.arange(size)
    runs: list[dict[Key, ModuleCall]] = []

    def keep(call: ModuleCall) -> None:
        call.outputs = [t.clone() for t in call.outputs]  # the next module may write to them
        runs[-1][call.key] = call

    tracer = ModuleTracer(modules, keep)
    with tracer():
        for rows in (samples, torch.cat([samples, samples[:1]]), swap.rows):
            runs.append({})
            tracer.begin()
            run(rows)
    base, grown, swapped = runs
    for key in (key for key in base if key in grown and key in swapped):  # in the order of their ends
        alike = []
        for of in ("inputs", "outputs"):
            ones, more, others = (getattr(calls[key], of) for calls in runs)
            if len(ones) == len(more) == len(others):
                pairs = zip(more, ones, strict=True)
                dims = [sample_dim(tuple(m.shape), tuple(one.shape), size + 1, size) for m, one in pairs]
                alike.append(agree(ones, others, dims, swap.kept, size))
        if alike == [True, False]:
            named = f'module "{key[0]}"' if key[0] else "the model"
            return f"{named} ({type(modules[key[0]]).__name__})"
    return type(model).__name__


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
