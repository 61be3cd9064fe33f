"""Copy models, optimizers and micro-batches onto fake tensors, which have sizes and no memory.

So the memory of a step is predicted with the code that trains, for batches that no device here holds.
"""

import copy
import functools
import gc
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensor, FakeTensorMode
from torch.nn.parameter import is_lazy
from torch.utils._pytree import SUPPORTED_NODES, is_namedtuple_class, tree_leaves, tree_map_only

from gaccum_exp.core.cached import Cached
from gaccum_exp.core.losses.protocol import Counts, Denominator, LossFn, LossResult, LossWrapper
from gaccum_exp.core.model_outputs import Call, signature
from gaccum_exp.core.sample_reading import size_of
from gaccum_exp.core.strategies import InPlace

_CACHED = type(functools.lru_cache(len))
_settled: list[weakref.ref[Any]] = []  # those of the frozen objects that can hold a fake tensor


def fake_mode() -> FakeTensorMode:
    """Return a mode in which real tensors are treated as fake ones where they occur."""
    return FakeTensorMode(allow_non_fake_inputs=True)


def fake_copies(
    mode: FakeTensorMode,
    objects: tuple[Any, ...],
    device: torch.device,
    memo: dict[int, Any] | None = None,
) -> tuple[Any, ...]:
    """Return copies of modules and optimizers whose tensors are fake, an optimizer's those of its model.

    mode: to be entered where the copies are used; device: of the modules' tensors there; memo: copies
    that there are already, by the identity of what they are copies of.
    """
    memo = {} if memo is None else memo
    optimizers = [o for o in objects if isinstance(o, torch.optim.Optimizer)]
    leaves = tree_leaves([(list(o.state.values()), o.param_groups) for o in optimizers])
    # A count of steps, or a learning rate, is read by the step: it keeps its value.
    scalars = (t for t in leaves if isinstance(t, Tensor) and t.ndim == 0 and t.device.type == "cpu")
    numbers = [(t, t.item()) for t in scalars if not isinstance(t, nn.Parameter)]
    with mode:
        for module in (m for o in objects if isinstance(o, nn.Module) for m in o.modules()):
            # Parameters, buffers, and what lies in attributes, in lists and dictionaries as well.
            for tensor in tree_leaves(vars(module)):
                if isinstance(tensor, Tensor) and not is_lazy(tensor) and id(tensor) not in memo:
                    empty = torch.empty_like(tensor, device=device)
                    if isinstance(tensor, nn.Parameter):
                        empty = nn.Parameter(empty, requires_grad=tensor.requires_grad)
                    memo[id(tensor)] = empty
        for tensor, value in numbers:
            memo[id(tensor)] = torch.tensor(value, dtype=tensor.dtype)
    with FakeCopyMode(mode):
        return copies(objects, memo)


def copies(objects: tuple[Any, ...], memo: dict[int, Any]) -> tuple[Any, ...]:
    """Return deep copies, an optimizer's with all of its attributes: torch itself copies three."""
    made: tuple[Any, ...] = copy.deepcopy(objects, memo)
    for given, copied in zip(objects, made, strict=True):
        if isinstance(given, torch.optim.Optimizer):
            # Not its hooks, nor the step that a schedule of learning rates has wrapped.
            own = {k: v for k, v in vars(given).items() if k not in vars(copied) and not callable(v)}
            vars(copied).update(copy.deepcopy(own, memo))
    return made


def settle() -> None:
    """Collect garbage, then exclude all objects from later garbage collections and searches.

    Most of them were imported, and stay. Call it when nothing else is held than these and what a sweep
    keeps of its arms: cycles that become garbage later are never collected.
    """
    if _settled:  # before the first time there is next to no garbage
        gc.collect()
    _settled.extend(weakref.ref(o) for o in _keepers() if type(o) is _CACHED or _is_real_parameter(o))
    gc.freeze()


@contextmanager
def nothing_left_behind() -> Iterator[None]:
    """Clear fake tensors left outside of the fake copies, where they would meet real tensors."""
    # They lie in the caches of functools, as a mask that is computed once, and in gradients of
    # parameters that only a loss function holds.
    try:
        yield
    finally:
        settled = [found for found in (reference() for reference in _settled) if found is not None]
        for found in (*_keepers(), *settled):
            if type(found) is _CACHED:
                if found.cache_info().currsize and _holds_fake(found):
                    found.cache_clear()
            elif _is_real_parameter(found) and isinstance(found.grad, FakeTensor):
                found.grad = None


def resized(micro_batch: Any, samples: int, device: torch.device) -> Any:
    """Return a micro-batch like the given one, with another number of samples and no memory of its own.

    Args:
        micro_batch: a pytree; tensors without samples in their first dimension are left as they are.
        samples: how many; beyond those there are, the first one is repeated.
        device: of what is on `meta`.
    """
    given = samples_in(micro_batch)

    def leaf(tensor: Tensor) -> Tensor:
        if tensor.ndim == 0 or tensor.shape[0] != given:
            return tensor
        if tensor.device.type == "meta":
            return torch.empty(samples, *tensor.shape[1:], dtype=tensor.dtype, device=device)
        return tensor[:samples] if samples <= given else tensor[:1].expand(samples, *tensor.shape[1:])

    return tree_map_only(Tensor, leaf, micro_batch)


def samples_in(micro_batch: Any) -> int:
    """Return the number of samples of a micro-batch: its first tensor's, of those with a dimension."""
    tensors = (t for t in tree_leaves(micro_batch) if isinstance(t, Tensor) and t.ndim)
    return next((int(tensor.shape[0]) for tensor in tensors), 0)


class SizesOnly(LossWrapper):
    """Runs a loss function for its sizes alone: no value is read, so nothing is counted."""

    def __init__(self, loss_fn: LossFn, micro_batch: Any) -> None:
        super().__init__(loss_fn)
        self._terms: list[str] | None = None if not hasattr(loss_fn, "loss_sum") else []
        """Their names; a loss that is one sum has none. None: it has not been called yet."""
        if hasattr(loss_fn, "assume"):  # what it would infer from values
            loss_fn.assume(micro_batch)

    def count(self, micro_batch: Any) -> Counts | None:
        """Return any denominator; None for terms that are counted in a pass of their own."""
        if self._terms == []:
            return 1.0
        known = self._terms is not None and hasattr(self.wrapped, "count")
        return dict.fromkeys(self._terms or (), 1.0) if known else None

    def loss_sum(self, model: nn.Module, micro_batch: Any, counted: Denominator | None = None) -> Tensor:
        """Run the model on one micro-batch; return its loss sum, which no count is compared with."""
        return super().loss_sum(model, micro_batch)

    def __call__(self, model: nn.Module, micro_batch: Any) -> LossResult:
        """Run the model on one micro-batch; return what needs no value of denominators and weights."""
        if self._terms == []:
            return self.loss_sum(model, micro_batch), 1.0
        with self.around(micro_batch) as given:
            result = self.wrapped(model, given)
        if not isinstance(result, Mapping):
            self._terms = []
            return result[0], 1.0
        self._terms = list(result)
        weights = [term[2] if len(term) > 2 else 1.0 for term in result.values()]
        return {
            name: (term[0] * weight, 1.0, 1.0, *term[3:])
            for (name, term), weight in zip(result.items(), weights, strict=True)
        }


def sizes_only(strategy: InPlace) -> InPlace:
    """Return the strategy for tensors without values."""
    return CachedSizes(strategy.held) if isinstance(strategy, Cached) else strategy


class CachedSizes(Cached):
    """Predicts a window's passes from its first micro-batches: a larger one stands for all others.

    That one is never run, and its outputs are made like those of the first.
    """

    reads_values = False
    _first_size = 0

    def accumulate(
        self, model: nn.Module, loss_fn: LossFn, window: Sequence[Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Take a window's passes."""
        self._first_size = 0
        if model not in self._known:
            self.inspect(model, loss_fn, window)
        self._first_size = size_of(window[0], 0)
        self._like = [
            replace(call, tensors=[t.new_empty(()).expand(t.shape) for t in call.tensors])
            for call in self.first_pass(model, loss_fn, window[0])
        ]
        return super().accumulate(model, loss_fn, window, *args, **kwargs)

    def first_pass(
        self, model: nn.Module, loss_fn: LossFn, micro_batch: Any, *, graph: bool = False
    ) -> list[Call]:
        """Return what the model puts out for a micro-batch, or would."""
        if not self._stands_for_others(micro_batch):
            return super().first_pass(model, loss_fn, micro_batch, graph=graph)
        size, first = size_of(micro_batch, 0), self._first_size
        known = self._known[model][signature(model, self._like)]

        def grown(like: Tensor, dim: int | None) -> Tensor:
            shape = [n // first * size if d == dim else n for d, n in enumerate(like.shape)]
            return torch.empty(shape, dtype=like.dtype, device=like.device)

        return [
            replace(call, tensors=list(map(grown, call.tensors, dims)))
            for call, dims in zip(self._like, known, strict=True)
        ]

    def second_pass(self, model: nn.Module, loss_fn: LossFn, micro_batch: Any, *gradients: Any) -> None:
        """Run a micro-batch again, unless it stands for others."""
        if not self._stands_for_others(micro_batch):
            super().second_pass(model, loss_fn, micro_batch, *gradients)

    def _stands_for_others(self, micro_batch: Any) -> bool:
        return 0 < self._first_size < size_of(micro_batch, 0)


def _keepers() -> list[Any]:
    """Return the caches and the tensors among all objects that garbage collections look at."""
    objects = gc.get_objects()
    # Asked of each kind once: there are a hundred thousand objects, and this is done for every arm.
    kinds = {kind for kind in set(map(type, objects)) if kind is _CACHED or issubclass(kind, Tensor)}
    return [found for found in objects if type(found) in kinds]


def _holds_fake(cache: Any) -> bool:
    """Whether a cache holds a tensor without values, in what it was given or in what it gave."""
    left, seen = gc.get_referents(cache), set[int]()
    while left:
        value = left.pop()
        kind = type(value)
        if kind is tuple or kind is list or kind is dict:
            if id(value) not in seen:
                seen.add(id(value))
                left += value.values() if kind is dict else value
        elif issubclass(kind, Tensor):
            if isinstance(value, FakeTensor) or value.is_meta:
                return True
        elif kind in SUPPORTED_NODES or is_namedtuple_class(kind):
            left += tree_leaves(value)
    return False


def _is_real_parameter(found: Any) -> bool:
    if not issubclass(type(found), Tensor) or issubclass(type(found), FakeTensor):
        return False
    return bool(found.requires_grad and found.is_leaf)
