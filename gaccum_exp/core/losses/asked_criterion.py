"""A criterion asked about samples: for its sum or its mean, of random outputs and given targets.

It is asked in float64 on the CPU, and nothing of it moves: what answers is a copy.
"""

import copy
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from types import MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from gaccum_exp.core.dtypes import is_inexact, wide
from gaccum_exp.core.losses.denominator import ReducedAs
from gaccum_exp.core.modes import evaluation_mode
from gaccum_exp.core.module_state import own_attributes, version_of
from gaccum_exp.core.nesting import tensors_in
from gaccum_exp.core.seeding import seed_host

NARROW, WIDE = (0.9, 0.5), (20.0, 0.0)
"""Width and middle of random outputs: inside the domain of probabilities and of logits alike; and where
these have a loss of zero, as those of a hinge may."""


@dataclass(frozen=True, slots=True)
class Samples:
    """What a criterion is asked about: targets, and the outputs that belong to them."""

    shapes: list[tuple[torch.Size, bool]]
    """Of the outputs, and whether these are complex."""
    targets: list[Any]
    outputs: list[Tensor] | None = None
    """Their values, where a denominator is asked that may look at them."""

    @property
    def rows(self) -> int:
        """Number of samples."""
        return self.shapes[0][0][0]

    @property
    def elements(self) -> int:
        """Number of elements of all outputs."""
        return sum(shape.numel() for shape, _ in self.shapes)

    @property
    def held(self) -> int:
        """Number of elements that keeping them takes."""
        return sum(t.numel() for t in tensors_in([self.targets, self.outputs or ()]))

    @property
    def joinable(self) -> bool:
        """Whether all its targets belong to samples, and none to the micro-batch as a whole."""
        return all(t.ndim if isinstance(t, Tensor) else isinstance(t, list) for t in self.targets)

    def cut(self, rows: slice) -> "Samples":
        """Return some of the samples."""

        def of(values: list[Any]) -> list[Any]:
            return [
                t[rows] if isinstance(t, list) or (isinstance(t, Tensor) and t.ndim) else t
                for t in values
            ]

        number = len(range(self.rows)[rows])
        shapes = [(torch.Size((number, *shape[1:])), kind) for shape, kind in self.shapes]
        return Samples(shapes, of(self.targets), None if self.outputs is None else of(self.outputs))

    def draw(self, seed: int, within: tuple[float, float] = NARROW) -> list[Tensor]:
        """Draw outputs; by NumPy, for torch's operators are seen by whoever records what is drawn."""
        generator = np.random.default_rng(seed)
        width, middle = within

        def uniform(shape: torch.Size) -> Tensor:
            return torch.from_numpy((generator.random(tuple(shape)) - 0.5) * width + middle)

        return [
            torch.complex(uniform(shape), uniform(shape)) if is_complex else uniform(shape)
            for shape, is_complex in self.shapes
        ]


def together(*parts: Samples) -> Samples:
    """Return all samples as one batch.

    Raises:
        RuntimeError: they do not make one.
    """

    def of(values: Sequence[Any]) -> Any:
        if isinstance(values[0], Tensor) and values[0].ndim:
            return torch.cat(list(values))
        return [v for value in values for v in value] if isinstance(values[0], list) else values[0]

    shapes = []
    for each in zip(*(part.shapes for part in parts), strict=True):
        if len({(shape[1:], kind) for shape, kind in each}) > 1:
            raise RuntimeError("outputs of different shapes")
        first, kind = each[0]
        shapes.append((torch.Size((sum(shape[0] for shape, _ in each), *first[1:])), kind))
    targets = [of(values) for values in zip(*(part.targets for part in parts), strict=True)]
    given = [part.outputs for part in parts if part.outputs is not None]
    return Samples(shapes, targets, [of(v) for v in zip(*given, strict=True)] if given else None)


def make_one_batch(one: Samples, other: Samples) -> bool:
    """Whether two make one batch: sequences of other lengths do not."""
    alike = zip([*one.targets, *one.shapes], [*other.targets, *other.shapes], strict=True)
    shapes = (
        [t.shape if isinstance(t, Tensor) else t[0] if isinstance(t, tuple) else () for t in pair]
        for pair in alike
    )
    return one is not other and all(a[1:] == b[1:] for a, b in shapes)


class CriterionCopies:
    """Copies of a criterion in float64 on the CPU, each as the criterion is when it is asked.

    Every answer is given from the same state and with the same random numbers, whatever the criterion
    counts or draws, so that a sum and a mean differ in the reduction alone.
    """

    def __init__(self, criterion: nn.Module, arguments: Callable[[Any, Any], list[Any]]) -> None:
        self._criterion, self._arguments = criterion, arguments
        self._state: list[Any] = []
        self._copy: tuple[nn.Module, list[Any]] | None = None
        """With its state when it was made."""
        self.changes = 0
        """How often the criterion has been found changed."""
        self.as_in_evaluation = False
        """Whether they answer as in evaluation mode."""
        self.is_coarse = False
        """Whether an answer was in a lower precision than was asked for."""

    def sum(self, samples: Samples, outputs: list[Tensor], seed: int = 0) -> float:
        """Return the criterion's sum for these outputs; the seed is of what it draws itself."""
        return float(self._answer("sum", samples, outputs, seed))

    def mean(self, samples: Samples, outputs: list[Tensor], seed: int = 0) -> float:
        """Return the criterion's mean for these outputs; the seed is of what it draws itself."""
        return float(self._answer("mean", samples, outputs, seed))

    def own_denominator(self, samples: Samples) -> float:
        """Return what the criterion's own method says."""
        assert samples.outputs is not None
        copied: Any = self._copied()
        return float(copied.denominator(*self._arguments(samples.outputs, samples.targets)))

    def gradients_parallel(self, samples: Samples, outputs: list[Tensor], n: float) -> bool:
        """Whether the gradient of the sum is n times that of the mean."""
        leaves = [t.clone().requires_grad_() for t in outputs]
        gradients = []
        with torch.enable_grad():
            for reduction in ("sum", "mean"):
                value = self._answer(reduction, samples, leaves, 0)
                gradients.append(torch.autograd.grad(value, leaves, materialize_grads=True))
        return not n > 0 or all(
            torch.allclose(of_sum, n * of_mean, rtol=1e-6, atol=1e-12)
            for of_sum, of_mean in zip(*gradients, strict=True)
        )

    def _answer(self, reduction: str, samples: Samples, outputs: list[Tensor], seed: int) -> Tensor:
        module = self._copied()
        seed_host(seed)
        quiet = evaluation_mode(module) if self.as_in_evaluation else nullcontext()
        with ReducedAs(module, reduction), quiet:
            value: Tensor = module(*self._arguments(outputs, samples.targets))
        self.is_coarse |= value.dtype != torch.float64
        return value

    def look(self) -> None:
        """Look whether the criterion has changed since it was copied."""
        now = list(_state_of(self._criterion))
        if now != self._state:
            self._state, self._copy = now, None
            self.changes += 1

    def _copied(self) -> nn.Module:
        if self._copy is not None:
            copied, state = self._copy
            if state == list(_state_of(copied)):
                return copied
        memo: dict[int, Any] = {}
        for module in self._criterion.modules():
            # A method is the hook of somebody who watches the criterion, and would be copied with it.
            for hooks in (module._forward_pre_hooks, module._forward_hooks):
                own = {k: h for k, h in hooks.items() if not isinstance(h, MethodType)}
                memo[id(hooks)] = OrderedDict(own)
            # Those in attributes as well, e.g. self.alpha; what has a graph could not be copied else.
            for leaf in tree_leaves(vars(module)):
                if isinstance(leaf, nn.Parameter):
                    memo[id(leaf)] = nn.Parameter(as_asked(leaf, copied=True), leaf.requires_grad)
                elif isinstance(leaf, Tensor):
                    memo[id(leaf)] = as_asked(leaf, copied=True)
        copied = copy.deepcopy(self._criterion, memo)
        self._copy = copied, list(_state_of(copied))
        return copied


@dataclass(frozen=True, slots=True, eq=False)
class _Version:
    """A tensor and how often it has been written to; another one in its place is never the same."""

    tensor: weakref.ref[Tensor]
    writes: int

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, _Version) and self.tensor is other.tensor and self.writes == other.writes
        )


def _state_of(criterion: nn.Module) -> Iterator[Any]:
    """Yield what tells whether a criterion has changed: its numbers, and its tensors' versions."""
    for module in criterion.modules():
        tensors = (*module._parameters.values(), *module._buffers.values())
        for value in (*tensors, *own_attributes(module).values()):
            for leaf in tree_leaves(value) if isinstance(value, (list, dict, deque)) else (value,):
                if isinstance(leaf, Tensor):
                    yield _Version(weakref.ref(leaf), version_of(leaf))
                else:
                    yield leaf if isinstance(leaf, (int, float, str, type(None))) else id(leaf)


def as_asked(tensor: Any, copied: bool = False) -> Any:
    """Return a tensor in float64 on the CPU, integers as they are; anything else unchanged."""
    if not isinstance(tensor, Tensor):
        return tensor
    here = tensor.detach().cpu()
    probed = wide(here) if is_inexact(here) else here
    return probed.clone() if copied and probed.data_ptr() == tensor.data_ptr() else probed
