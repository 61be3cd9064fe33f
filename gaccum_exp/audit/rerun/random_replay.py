"""A pass run again: in float64 throughout, and with the random numbers that another run has drawn.

Both are done below autograd, where every operator of a model is seen, whatever code calls it.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from gaccum_exp.core.dtypes import in_precision, is_inexact, wide
from gaccum_exp.core.joined_samples import picked_rows
from gaccum_exp.core.modes import EagerMode
from gaccum_exp.core.module_calls import ModuleTracer

aten = torch.ops.aten
_PURE = frozenset(
    getattr(aten, name)
    for name in (
        *("bernoulli", "bernoulli_", "uniform_", "uniform", "normal_", "normal", "exponential_"),
        *("rand", "rand_like", "randn", "randn_like", "randint", "randint_like", "random_", "random"),
        *("geometric_", "log_normal_", "cauchy_", "poisson", "multinomial", "_standard_gamma"),
        *("exponential", "geometric", "log_normal", "cauchy", "binomial", "_sample_dirichlet"),
        *("normal_functional", "bernoulli_p"),
    )
    if hasattr(aten, name)
)
"""Operators whose result is their draw; those that compute with it are handled one by one."""
_DROPOUT = (aten.native_dropout, getattr(aten, "_fused_dropout", None))
_RRELU = (aten.rrelu_with_noise, aten.rrelu_with_noise_)
_WIDE = {torch.float64, torch.complex128}
DrawsAre = Literal["recorded", "replayed", "constant"]
"""What is done with the random numbers of a pass."""


class Draw(NamedTuple):
    """What one operator drew in one pass; None where it cannot be held."""

    value: Tensor | None
    module: str | None
    """Dotted name of the innermost module that drew it; None: outside of any."""


@dataclass(slots=True)
class Draws:
    """The random numbers of a window's passes, by micro-batch and in order."""

    passes: list[list[Draw]] = field(default_factory=list)
    not_replayed: list[str] = field(default_factory=list)
    """What could not be replayed sample by sample, a clause each."""
    foreign: bool = False
    """Whether some can be neither replayed nor made constant."""
    shared: set[int] = field(default_factory=set)
    """Which draws of a pass are noise that all its samples share: the first pass's hold for all."""

    @property
    def any(self) -> bool:
        """Whether anything was drawn at all."""
        return any(self.passes) or bool(self.not_replayed)

    @property
    def modules(self) -> list[str]:
        """The modules that drew, in order of execution."""
        return list(dict.fromkeys(d.module for p in self.passes for d in p if d.module is not None))

    def refuse(self, why: str, *, foreign: bool = False) -> None:
        """Note that something cannot be replayed."""
        self.foreign |= foreign
        if why not in self.not_replayed:
            self.not_replayed.append(why)


class Replay(EagerMode):  # type: ignore[no-untyped-call]  # torch's own
    """Runs operators as they are, or in float64, with draws recorded, replayed or constant.

    In float64 casts to lower precision are undone, and what meets float64 in lower precision is
    promoted. `sizes` are the samples of each micro-batch; `tracer` knows which module draws.
    """

    def __init__(
        self,
        draws: Draws,
        sizes: Sequence[int],
        tracer: ModuleTracer,
        draws_are: DrawsAre,
        *,
        float64: bool,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's own
        self._draws, self._sizes, self._tracer = draws, sizes, tracer
        self._draws_are, self._float64 = draws_are, float64
        self._pass: int | None = None
        self._order: Tensor | None = None
        self._count = 0
        self._again = False

    @contextmanager
    def micro_batch(self, index: int) -> Iterator[None]:
        """Run the forward pass of one micro-batch."""
        self._begin(index, None)
        self._again = index < len(self._draws.passes)
        if self._draws_are == "recorded" and not self._again:
            self._draws.passes.append([])
        yield
        if self._count < len(self._draws.passes[index]):
            self._draws.refuse("a pass drew fewer random numbers when it was run again")

    @contextmanager
    def loss_of_outputs(self) -> Iterator[None]:
        """Run the loss alone, over outputs that are there."""
        passes, before = self._draws.passes, self._count
        recorded = len(passes[-1])
        yield
        del passes[-1][recorded:]
        if self._count > before:
            self._draws.refuse("the loss of the whole window draws numbers of its own", foreign=True)

    @contextmanager
    def whole(self, order: Tensor | None) -> Iterator[None]:
        """Run the forward pass of all samples at once, in this order."""
        self._begin(None, order)
        yield
        if self._count < len(self._draws.passes[0]):
            self._draws.refuse("the one pass drew fewer random numbers than a micro-batch")

    def _begin(self, index: int | None, order: Tensor | None) -> None:
        self._pass, self._order, self._count = index, order, 0
        self._tracer.begin()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if self._float64:
            args, kwargs = _promoted(func, args, kwargs)
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **kwargs)
        return self._drawn(func, args, kwargs)

    def _drawn(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        before = _generator_states(args, kwargs)
        result = func(*args, **kwargs)
        unmoved = all(map(torch.equal, before, _generator_states(args, kwargs)))
        if kwargs.get("generator") is None and unmoved:
            return result  # tagged, and drew nothing: attention with a dropout of 0
        index, self._count = self._count, self._count + 1
        drawn = _draw_of(func, args, result)
        if self._draws_are == "recorded":
            if drawn is None:
                name = func.overloadpacket.__name__
                self._draws.refuse(f"{name} cannot be replayed sample by sample", foreign=True)
            elif not is_inexact(drawn):
                # No constant stands for integers; for the mask of a dropout it does.
                self._draws.foreign |= func.overloadpacket not in _DROPOUT
            if self._again:
                self._compare(index, drawn)
            else:
                self._draws.passes[-1].append(Draw(drawn, self._tracer.module))
            return result
        if self._draws_are == "constant" and drawn is not None:
            return _with_draw(func, args, result, torch.full_like(drawn, _constant(func, drawn)))
        replayed = self._replayed(index, drawn)
        return result if replayed is None else _with_draw(func, args, result, replayed)

    def _compare(self, index: int, drawn: Tensor | None) -> None:
        """Compare a draw of a pass that comes again with the one before."""
        of_pass = self._draws.passes[self._pass or 0]
        before = of_pass[index].value if index < len(of_pass) else None
        alike = before is drawn if before is None or drawn is None else torch.equal(before, drawn)
        if not alike:
            raise RuntimeError("a pass that comes twice drew other random numbers the second time")

    def _replayed(self, index: int, drawn: Tensor | None) -> Tensor | None:
        """Return the recorded numbers in the shape of the new draw."""
        passes = self._draws.passes
        values = [p[index].value if index < len(p) else None for p in passes]
        known = [value for value in values if value is not None]
        if drawn is None or len(known) < len(values):
            if any(index >= len(p) for p in passes):
                self._draws.refuse("passes drew different numbers of random numbers")
            return None
        if self._pass is not None:
            value = known[0 if index in self._draws.shared else self._pass]
            if value.ndim != drawn.ndim or any(map(int.__gt__, value.shape, drawn.shape)):
                return self._shared(index, known, drawn)
            drawn[tuple(map(slice, value.shape))] = value  # what is left belongs to padding
            return drawn
        return self._joined(index, known, drawn)

    def _joined(self, index: int, values: list[Tensor], drawn: Tensor) -> Tensor | None:
        sizes, total = self._sizes, sum(self._sizes)
        if len(sizes) == 1:  # nothing grows that would tell which dimension counts samples
            grown = next((d for d, n in enumerate(drawn.shape) if n % total == 0), None)
            if values[0].shape != drawn.shape:
                return None
            if grown is None or self._order is None:
                return values[0]
            return picked_rows(values[0], grown, self._order, total)
        dim = self._sample_dim(values, drawn)
        if dim is None:
            return self._shared(index, values, drawn)
        whole, row = drawn.clone(), 0  # what no pass has drawn belongs to padding
        for value in values:
            place = [slice(n) for n in value.shape]
            place[dim] = slice(row, row := row + value.shape[dim])
            whole[tuple(place)] = value
        return whole if self._order is None else picked_rows(whole, dim, self._order, total)

    def _sample_dim(self, values: list[Tensor], drawn: Tensor) -> int | None:
        """Return the one dimension in which the passes' draws make up the one pass's, as samples do.

        In the others shorter sequences are padded at their ends, where micro-batches are joined.
        """
        total, shape = sum(self._sizes), drawn.shape
        if any(v.ndim != drawn.ndim for v in values):
            return None
        fitting = [
            d
            for d, n in enumerate(shape)
            if n % total == 0
            and all(v.shape[d] * total == n * size for v, size in zip(values, self._sizes, strict=True))
            and all(max(v.shape[k] for v in values) == shape[k] for k in range(len(shape)) if k != d)
        ]
        return fitting[0] if len(fitting) == 1 else None

    def _shared(self, index: int, values: list[Tensor], drawn: Tensor) -> Tensor | None:
        """Return noise that all samples share: the first pass's, where all passes' have one shape."""
        if any(value.shape != drawn.shape for value in values):
            self._draws.refuse("numbers are drawn in shapes that do not tell which sample has which")
            return None
        self._draws.refuse("noise is shared by all samples of a pass")
        self._draws.shared.add(index)
        return values[0]


def _draw_of(func: Any, args: Sequence[Any], result: Any) -> Tensor | None:
    packet = func.overloadpacket
    drawn: Any = None
    if packet in _PURE:
        drawn = result
    elif packet in _DROPOUT:
        drawn = result[1]
    elif packet in _RRELU:
        drawn = args[1]
    return drawn.detach().clone() if isinstance(drawn, Tensor) else None


def _constant(func: Any, drawn: Tensor) -> float:
    """Return the constant for a draw: a mask keeps all, an interval its middle, a normal its mean."""
    name = func.overloadpacket.__name__
    integers = not is_inexact(drawn) and drawn.dtype != torch.bool
    if integers or "normal" in name or "randn" in name:
        return 0
    return 0.5 if "uniform" in name or name in ("rand", "rand_like") else 1


def _with_draw(func: Any, args: Sequence[Any], result: Any, held: Tensor) -> Any:
    packet = func.overloadpacket
    if packet in _PURE:
        result.copy_(held)
        return result
    if packet in _RRELU:
        noise = args[1]
        noise.copy_(held)
        scaled = args[0] * noise  # noise is 1 where the input is not negative
        return args[0].copy_(scaled) if packet is aten.rrelu_with_noise_ else scaled
    mask, p = held.to(result[1].dtype), args[1]
    scale = 1 / (1 - p) if packet is aten.native_dropout else 1 / p
    return args[0] * mask * scale, mask


def _promoted(
    func: Any, args: Sequence[Any], kwargs: dict[str, Any]
) -> tuple[Sequence[Any], dict[str, Any]]:
    tensors = _tensors(args, kwargs)
    kinds = {t.dtype for t in tensors if is_inexact(t)}
    is_wide = not _WIDE.isdisjoint(kinds)
    # A cast of float64, or a new tensor; a cast of something else (labels, images) stays.
    if is_wide or not tensors:
        args = [_widest(value) for value in args]  # a view's type is given by position
        kwargs = {key: _widest(value) for key, value in kwargs.items()}
    if not is_wide or kinds <= _WIDE:
        return args, kwargs
    # An in-place operator writes to its first argument, which must stay the same tensor.
    keep = args[0] if args and func._schema.is_mutable else None

    def promote(tensor: Tensor) -> Tensor:
        return wide(tensor) if is_inexact(tensor) and tensor is not keep else tensor

    return tree_map_only(Tensor, promote, tuple(args)), tree_map_only(Tensor, promote, kwargs)


def _widest(value: Any) -> Any:
    """Return an argument, a type of real or complex numbers as the widest of its kind."""
    return in_precision(value, torch.float64) if isinstance(value, torch.dtype) else value


def _tensors(args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """Return the tensors among an operator's arguments: it takes tensors, and flat lists of them."""
    given = (*args, *kwargs.values())
    flat = (v for value in given for v in (value if isinstance(value, (list, tuple)) else [value]))
    return [value for value in flat if isinstance(value, Tensor)]


def _generator_states(args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
    states = [torch.get_rng_state()]
    devices = {t.device for t in _tensors(args, kwargs)}
    if isinstance(kwargs.get("device"), torch.device):
        devices.add(kwargs["device"])
    for device in devices - {torch.device("cpu")}:
        states.append(torch.get_device_module(device).get_rng_state(device))
    return states
