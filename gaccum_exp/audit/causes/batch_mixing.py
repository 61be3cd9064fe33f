"""Which module makes a sample's output depend on the other samples of its batch?

The window runs forward once whole and once in micro-batches, in float64, and every call of every
module is compared sample by sample. The innermost module whose inputs agree and whose outputs do not is
one that mixes samples; no class name is consulted. What is kept of a tensor is a fingerprint of each
sample: its inner products with fixed random vectors, which differ wherever the sample does. An output
that does not grow with the batch though an input does (a loss, a statistic) is not compared.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from gaccum_exp.audit.rerun.samples import sample_dim, tensors_in
from gaccum_exp.audit.rerun.sandbox import Parts

TOLERANCE = 1e-9
"""Relative to a tensor's size: far above float64 rounding (1e-16 to 1e-12), far below real mixing."""

Key = tuple[str, int]
"""A module's dotted name, and which call of it."""


@dataclass(slots=True)
class Call:
    """One call of one module, in one run."""

    key: Key
    parent: Key | None
    start: int
    inputs: list[Tensor] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)


class Follower:
    """Follows the calls of all modules.

    Args:
        parts: whose modules.
        see: gets each call at its end, tensors and all.
        enter: gets the name of the innermost module whenever that changes.
    """

    def __init__(
        self,
        parts: Parts,
        see: Callable[[Call], None] | None = None,
        enter: Callable[[str | None], None] = lambda name: None,
    ) -> None:
        self._parts = parts
        self._see, self._enter = see, enter
        self._stack: list[Call] = []
        self._calls: dict[str, int] = {}
        self._started = 0

    def begin(self) -> None:
        """Forget the calls so far: the next pass begins."""
        self._stack, self._calls, self._started = [], {}, 0

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Follow for the length of the block."""
        handles = []
        for module in self._parts.modules:
            try:
                handles.append(module.register_forward_pre_hook(self._before, with_kwargs=True))
                handles.append(module.register_forward_hook(self._after, with_kwargs=True))
            except RuntimeError:
                continue  # a scripted module takes no such hook; its parent is seen
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _before(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        name = self._parts.name(module)
        nth = self._calls[name] = self._calls.get(name, 0) + 1
        call = Call((name, nth), self._stack[-1].key if self._stack else None, self._started)
        self._started += 1
        # Before the module runs, since it may change its input in place.
        if self._see is not None:
            with _disable_current_modes():
                call.inputs = [t.detach().clone() for t in tensors_in([args, kwargs])]
        self._stack.append(call)
        self._enter(name)

    def _after(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        name = self._parts.name(module)
        while self._stack and self._stack[-1].key[0] != name:
            self._stack.pop()  # a call that ended in an exception which somebody caught
        if not self._stack:
            return
        call = self._stack.pop()
        if self._see is not None:
            with _disable_current_modes():  # what is measured here is none of the model's own
                call.outputs = [t.detach() for t in tensors_in(output)]
                self._see(call)
        self._enter(self._stack[-1].key[0] if self._stack else None)


@dataclass(slots=True)
class _Seen:
    """A call of the whole pass: fingerprints of the samples, and what the comparison found."""

    key: Key
    parent: Key | None
    start: int
    inputs: list["_Prints | None"]
    outputs: list["_Prints | None"]
    inputs_agree: bool = True
    outputs_agree: bool = True


@dataclass(slots=True)
class _Prints:
    dim: int | None
    """The dimension that counts samples; None: the tensor does not grow with the batch."""
    values: Tensor
    """(samples, 2), or (1, 2)."""
    size: float
    """Root mean square of the samples' norms."""


class Mixing:
    """The comparison. Feed it the calls of one micro-batch for their shapes, the whole, and all parts.

    Args:
        sizes: samples of each micro-batch.
    """

    def __init__(self, sizes: list[int]) -> None:
        self._sizes, self._total = sizes, sum(sizes)
        self._shapes: dict[Key, tuple[list[torch.Size], list[torch.Size]]] = {}
        self._whole: dict[Key, _Seen] = {}
        self._first_row, self._size = 0, 0

    def see_shapes(self, call: Call) -> None:
        """Take a call of the first micro-batch."""
        self._shapes[call.key] = [t.shape for t in call.inputs], [t.shape for t in call.outputs]

    def see_whole(self, call: Call) -> None:
        """Take a call of the pass over all samples."""
        shapes = self._shapes.get(call.key)
        if shapes is None or [len(s) for s in shapes] != [len(call.inputs), len(call.outputs)]:
            return
        inputs, outputs = (
            [self._of_whole(t, shape) for t, shape in zip(tensors, part, strict=True)]
            for tensors, part in ((call.inputs, shapes[0]), (call.outputs, shapes[1]))
        )
        if any(p is not None and p.dim is not None for p in inputs):
            outputs = [p if p is None or p.dim is not None else None for p in outputs]
        self._whole[call.key] = _Seen(call.key, call.parent, call.start, inputs, outputs)

    def begin_part(self, index: int) -> None:
        """The calls that follow are those of this micro-batch."""
        self._first_row, self._size = sum(self._sizes[:index]), self._sizes[index]

    def see_part(self, call: Call) -> None:
        """Take a call of a micro-batch and compare it with the whole's."""
        seen = self._whole.get(call.key)
        found = [len(call.inputs), len(call.outputs)]
        if seen is None or found != [len(seen.inputs), len(seen.outputs)]:
            return
        seen.inputs_agree &= self._agree(call.inputs, seen.inputs)
        seen.outputs_agree &= self._agree(call.outputs, seen.outputs)

    def culprits(self) -> list[str]:
        """Return the names of the modules that mix samples, in order of execution."""
        guilty = {s.key: s for s in self._whole.values() if s.inputs_agree and not s.outputs_agree}
        inside: set[Key] = set()
        for seen in guilty.values():
            parent = seen.parent
            while parent is not None:
                inside.add(parent)
                parent = self._whole[parent].parent if parent in self._whole else None
        innermost = sorted((s for k, s in guilty.items() if k not in inside), key=lambda s: s.start)
        return list(dict.fromkeys(seen.key[0] for seen in innermost))

    def _of_whole(self, tensor: Tensor, part: torch.Size) -> _Prints | None:
        dim = sample_dim(tuple(tensor.shape), tuple(part), self._total, self._sizes[0])
        if dim is None and (tensor.shape != part or self._total == self._sizes[0]):
            return None
        values, size = _fingerprints(tensor, dim, self._total)
        return _Prints(dim, values, size)

    def _agree(self, tensors: list[Tensor], whole: list["_Prints | None"]) -> bool:
        for tensor, prints in zip(tensors, whole, strict=True):
            if prints is None or (prints.dim is not None and tensor.ndim <= prints.dim):
                continue
            if prints.dim is not None and tensor.shape[prints.dim] % self._size:
                return False
            values, _ = _fingerprints(tensor, prints.dim, self._size)
            rows = prints.values
            if prints.dim is not None:
                rows = rows[self._first_row : self._first_row + self._size]
            gap = (values - rows).abs().max()
            # Not a <=, so that NaN on both sides is no difference between them.
            if values.shape != rows.shape or bool(gap > TOLERANCE * prints.size):
                return False
        return True


def _fingerprints(tensor: Tensor, dim: int | None, samples: int) -> tuple[Tensor, float]:
    """Return (samples, 2) inner products, and the root mean square of the samples' norms."""
    values = tensor.to_dense() if tensor.layout != torch.strided else tensor
    values = values.double() if not values.is_complex() else torch.view_as_real(values).double()
    rows = values.reshape(1, -1) if dim is None else values.movedim(dim, 0).reshape(samples, -1)
    if rows.shape[1] == 0:
        return rows.new_zeros(len(rows), 2), 0.0
    size = torch.linalg.vector_norm(rows) / len(rows) ** 0.5
    return rows @ _directions(rows.shape[1]).to(rows.device), float(size)


def _directions(length: int) -> Tensor:
    """Return two fixed random vectors, (length, 2)."""
    global _drawn
    if len(_drawn) < length:
        generator = torch.Generator().manual_seed(0)
        _drawn = torch.rand(2 * length, 2, generator=generator, dtype=torch.float64) - 0.5
    return _drawn[:length]


_drawn = torch.empty(0, 2, dtype=torch.float64)
