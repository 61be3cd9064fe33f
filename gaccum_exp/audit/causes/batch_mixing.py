"""Find the module that makes a sample's output depend on the other samples of its batch.

The window runs forward once whole and once in micro-batches, in float64, and every call of every
module is compared sample by sample. The innermost module whose inputs agree and whose outputs do not is
one that mixes samples; no class name is consulted. Each sample of a tensor is represented by a
fingerprint: its inner products with fixed random vectors, which differ wherever the sample does. An
output that does not grow with the batch though an input does (a loss, a statistic) is not compared.
"""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from gaccum_exp.audit.rerun.passes import Pass, Rerun
from gaccum_exp.core.joined_samples import sample_dim
from gaccum_exp.core.modes import without_graph
from gaccum_exp.core.module_calls import Key, ModuleCall

TOLERANCE = 1e-9
"""Relative to a tensor's size: far above float64 rounding (1e-16 to 1e-12), far below real mixing."""


class ForwardRuns(NamedTuple):
    """The forward passes of a window, whole and in micro-batches."""

    parts: list[tuple[float, float]]
    """Loss sum and denominator of each micro-batch."""
    whole: tuple[float, float]
    """Those of all samples at once."""
    mixing: list[str]
    """Names of the modules that mix samples, in order of execution."""


def compare_forward(rerun: Rerun, how: Pass) -> ForwardRuns:
    """Run the window forward, whole and in micro-batches, and compare every module's output."""
    sizes = rerun.window.sizes

    def compared() -> ForwardRuns:
        comparison = Comparison(sizes)
        rerun.forward(how, 0, comparison.see_shapes)
        whole = rerun.forward(how, None, comparison.see_whole)
        parts = [
            rerun.forward(how, i, partial(comparison.see_part, i) if size else None)
            for i, size in enumerate(sizes)
        ]
        return ForwardRuns(parts, whole, comparison.mixing())

    return without_graph(compared)


@dataclass(slots=True)
class _Fingerprints:
    dim: int | None
    """The dimension that counts samples; None: the tensor does not grow with the batch."""
    values: Tensor
    """(samples, 2), or (1, 2)."""
    size: float
    """Root mean square of the samples' norms."""


@dataclass(slots=True)
class _ComparedCall:
    """A call in the whole pass: its samples' fingerprints, and whether the micro-batches' agree."""

    parent: Key | None
    start: int
    inputs: list[_Fingerprints | None]
    outputs: list[_Fingerprints | None]
    inputs_agree: bool = True
    outputs_agree: bool = True


class Comparison:
    """Compares calls: one micro-batch's (shapes), then the whole pass's, then all parts'."""

    def __init__(self, sizes: list[int]) -> None:
        self._sizes, self._total = sizes, sum(sizes)
        self._shapes: dict[Key, tuple[list[torch.Size], list[torch.Size]]] = {}
        self._whole: dict[Key, _ComparedCall] = {}

    def see_shapes(self, call: ModuleCall) -> None:
        """Take the shapes of a call of the first micro-batch's."""
        self._shapes[call.key] = [t.shape for t in call.inputs], [t.shape for t in call.outputs]

    def see_whole(self, call: ModuleCall) -> None:
        """Take a call of the pass over all samples."""
        shapes = self._shapes.get(call.key)
        if shapes is None or [len(s) for s in shapes] != [len(call.inputs), len(call.outputs)]:
            return

        def of_whole(tensor: Tensor, part: torch.Size) -> _Fingerprints | None:
            dim = sample_dim(tuple(tensor.shape), tuple(part), self._total, self._sizes[0])
            if dim is None and (tensor.shape != part or self._total == self._sizes[0]):
                return None
            return _fingerprints(tensor, dim, self._total)

        inputs, outputs = (
            list(map(of_whole, tensors, part))
            for tensors, part in zip((call.inputs, call.outputs), shapes, strict=True)
        )
        if any(p is not None and p.dim is not None for p in inputs):
            outputs = [p if p is not None and p.dim is not None else None for p in outputs]
        elif inputs and all(p is None for p in inputs):  # nothing shows that the inputs agree
            return
        self._whole[call.key] = _ComparedCall(call.parent, call.start, inputs, outputs)

    def see_part(self, index: int, call: ModuleCall) -> None:
        """Compare a call of a micro-batch with that over all samples."""
        whole = self._whole.get(call.key)
        found = [len(call.inputs), len(call.outputs)]
        if whole is None or found != [len(whole.inputs), len(whole.outputs)]:
            return
        whole.inputs_agree &= self._agree(index, call.inputs, whole.inputs)
        whole.outputs_agree &= self._agree(index, call.outputs, whole.outputs)

    def mixing(self) -> list[str]:
        """Return the names of the modules that mix samples, in order of execution."""
        guilty = {k: c for k, c in self._whole.items() if c.inputs_agree and not c.outputs_agree}
        outer: set[Key] = set()
        for call in guilty.values():
            parent = call.parent
            while parent is not None:
                outer.add(parent)
                parent = self._whole[parent].parent if parent in self._whole else None
        innermost = sorted(guilty.keys() - outer, key=lambda key: guilty[key].start)
        return list(dict.fromkeys(name for name, _ in innermost))

    def _agree(self, index: int, tensors: list[Tensor], whole: list[_Fingerprints | None]) -> bool:
        first_row, size = sum(self._sizes[:index]), self._sizes[index]
        for tensor, prints in zip(tensors, whole, strict=True):
            if prints is None or (prints.dim is not None and tensor.ndim <= prints.dim):
                continue
            rows = prints.values
            if prints.dim is not None:
                if tensor.shape[prints.dim] % size:
                    return False
                rows = rows[first_row : first_row + size]
            gap = (_fingerprints(tensor, prints.dim, size).values - rows).abs().max()
            # Not a <=, so that NaN on both sides is no difference between them.
            if bool(gap > TOLERANCE * prints.size):
                return False
        return True


def _fingerprints(tensor: Tensor, dim: int | None, samples: int) -> _Fingerprints:
    values = tensor.to_dense() if tensor.layout != torch.strided else tensor
    values = values.double() if not values.is_complex() else torch.view_as_real(values).double()
    rows = values.reshape(1, -1) if dim is None else values.movedim(dim, 0).reshape(samples, -1)
    if rows.shape[1] == 0:
        return _Fingerprints(dim, rows.new_zeros(len(rows), 2), 0.0)
    size = torch.linalg.vector_norm(rows) / len(rows) ** 0.5
    return _Fingerprints(dim, rows @ _directions(rows.shape[1]).to(rows.device), float(size))


def _directions(length: int) -> Tensor:
    """Return two fixed random vectors, (length, 2)."""
    global _drawn
    if len(_drawn) < length:
        generator = torch.Generator().manual_seed(0)
        _drawn = torch.rand(2 * length, 2, generator=generator, dtype=torch.float64) - 0.5
    return _drawn[:length]


_drawn = torch.empty(0, 2, dtype=torch.float64)
