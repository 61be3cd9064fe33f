"""The same pass again: in float64 throughout, and with the random numbers that another run has drawn.

Both are done below autograd, where every operator of a model passes by whatever code calls it.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from gaccum_exp.audit.rerun.samples import sample_dim
from gaccum_exp.core.modes import EagerMode

aten = torch.ops.aten
_PURE = frozenset(
    packet
    for name in (
        *("bernoulli", "bernoulli_", "uniform_", "uniform", "normal_", "normal", "exponential_"),
        *("rand", "rand_like", "randn", "randn_like", "randint", "randint_like", "random_", "random"),
        *("geometric_", "log_normal_", "cauchy_", "poisson", "multinomial", "_standard_gamma"),
        *("exponential", "geometric", "log_normal", "cauchy", "binomial", "_sample_dirichlet"),
        *("normal_functional", "bernoulli_p"),
    )
    if (packet := getattr(aten, name, None)) is not None
)
"""Operators whose result is their draw; those that compute with it are taken one by one."""
_DROPOUT = (aten.native_dropout, getattr(aten, "_fused_dropout", None))


@dataclass(slots=True)
class Draw:
    """What one operator drew in one pass."""

    op: str
    module: str | None
    """Dotted name of the innermost module that drew it; None: outside of any."""
    value: Tensor | None
    """None where it cannot be held."""


@dataclass(slots=True)
class Draws:
    """The random numbers of a window's passes, by micro-batch and in order."""

    sizes: list[int]
    """Samples of each micro-batch."""
    passes: list[list[Draw]] = field(default_factory=list)
    not_held: list[str] = field(default_factory=list)
    """What could not be replayed sample by sample, a clause each."""
    first_not_held: str | None = None
    """The module whose draw that was first."""
    foreign: bool = False
    """Whether some come from where they can neither be held nor made constant."""
    neutral: bool = False
    """Replace every draw by a constant, to see what remains without randomness."""
    shared: set[int] = field(default_factory=set)
    """Which draws of a pass are noise that all its samples share: the first pass's hold for all."""

    @property
    def any(self) -> bool:
        """Whether anything was drawn at all."""
        return any(self.passes) or bool(self.not_held)

    @property
    def modules(self) -> list[str]:
        """The modules that drew, in order of execution."""
        named = (d.module for p in self.passes for d in p if d.module is not None)
        return list(dict.fromkeys(named))

    def refuse(self, why: str, module: str | None, *, foreign: bool = False) -> None:
        """Note that something cannot be held."""
        self.foreign |= foreign
        if not self.not_held:
            self.first_not_held = module
        if why not in self.not_held:
            self.not_held.append(why)


class Replay(EagerMode):  # type: ignore[no-untyped-call]  # torch's own
    """Runs operators as they are, in float64 if asked for, with draws recorded or given.

    Args:
        draws: of the window.
        record: note what is drawn; else hold it.
        float64: undo casts to lower precision, and lift what is of lower precision beside float64.
    """

    def __init__(self, draws: Draws, *, record: bool, float64: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's own
        self._draws, self._record, self._float64 = draws, record, float64
        self._pass: int | None = None
        self._order: Tensor | None = None
        self._count = 0
        self.module: str | None = None
        """Set by whoever follows the modules as they run."""

    @contextmanager
    def micro_batch(self, index: int) -> Iterator[None]:
        """Run the forward pass of one micro-batch."""
        self._pass, self._order, self._count = index, None, 0
        if self._record:
            self._draws.passes.append([])
        yield
        if not self._record and self._count < len(self._draws.passes[index]):
            self._draws.refuse("a pass drew fewer random numbers when it was run again", None)

    @contextmanager
    def whole(self, order: Tensor | None) -> Iterator[None]:
        """Run the forward pass of all samples at once, in this order."""
        self._pass, self._order, self._count = None, order, 0
        yield
        if self._count < len(self._draws.passes[0]):
            self._draws.refuse("the one pass drew fewer random numbers than a micro-batch", None)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if self._float64:
            args, kwargs = _lifted(func, args, kwargs)
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **kwargs)
        return self._drawn(func, args, kwargs)

    def _drawn(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        before = _generator_states(args, kwargs)
        result = func(*args, **kwargs)
        if kwargs.get("generator") is None and _same(before, _generator_states(args, kwargs)):
            return result  # tagged, and drew nothing: attention with a dropout of 0
        index, self._count = self._count, self._count + 1
        if self._record:
            draw = Draw(str(func.overloadpacket.__name__), self.module, _draw_of(func, args, result))
            if draw.value is None or not draw.value.is_floating_point():
                constant = func.overloadpacket in _DROPOUT
                why = f"{draw.op} cannot be replayed sample by sample"
                if draw.value is None:
                    self._draws.refuse(why, self.module, foreign=True)
                self._draws.foreign |= not constant
            self._draws.passes[-1].append(draw)
            return result
        drawn = _draw_of(func, args, result)
        if self._draws.neutral and drawn is not None:
            return _with_draw(func, args, result, torch.full_like(drawn, _constant(func, drawn)))
        held = self._held(index, drawn)
        return result if held is None else _with_draw(func, args, result, held)

    def _held(self, index: int, drawn: Tensor | None) -> Tensor | None:
        """Return the recorded numbers in the shape of what was just drawn."""
        every = [p[index].value if index < len(p) else None for p in self._draws.passes]
        if drawn is None or any(value is None for value in every):
            if any(index >= len(p) for p in self._draws.passes):
                self._draws.refuse("passes drew different numbers of random numbers", self.module)
            return None
        values = [v for v in every if v is not None]
        if self._pass is not None:
            value = values[0 if index in self._draws.shared else self._pass]
            return value if value.shape == drawn.shape else self._shared(index, values, drawn)
        return self._joined(index, values, drawn)

    def _joined(self, index: int, values: list[Tensor], drawn: Tensor) -> Tensor | None:
        sizes = self._draws.sizes
        total = sum(sizes)
        if len(sizes) == 1:  # nothing grows that would tell which dimension counts samples
            grown = next((d for d, n in enumerate(drawn.shape) if n % total == 0), None)
            if values[0].shape != drawn.shape or grown is None or self._order is None:
                return values[0] if values[0].shape == drawn.shape else None
            return picked_rows(values[0], grown, self._order, total)
        dim = sample_dim(tuple(drawn.shape), tuple(values[0].shape), total, sizes[0])
        if dim is None:
            return self._shared(index, values, drawn)
        whole = torch.cat(values, dim)
        if whole.shape != drawn.shape:
            return self._shared(index, values, drawn)
        return whole if self._order is None else picked_rows(whole, dim, self._order, total)

    def _shared(self, index: int, values: list[Tensor], drawn: Tensor) -> Tensor | None:
        """Noise that is no sample's own: the first pass's holds for all, where it has one shape."""
        self._draws.refuse("noise is shared by all samples of a pass", self.module)
        self._draws.shared.add(index)
        return values[0] if values[0].shape == drawn.shape else None


def picked_rows(tensor: Tensor, dim: int, order: Tensor, total: int) -> Tensor:
    """Return the tensor with its samples in another order; a sample may own several rows of `dim`."""
    rows = tensor.shape[dim] // total
    index = (
        order.to(tensor.device)[:, None] * rows + torch.arange(rows, device=tensor.device)
    ).flatten()
    return tensor.index_select(dim, index)


def _draw_of(func: Any, args: Sequence[Any], result: Any) -> Tensor | None:
    packet = func.overloadpacket
    if packet in _PURE and isinstance(result, Tensor):
        return result.detach().clone()
    if packet in _DROPOUT:
        mask: Tensor = result[1]
        return mask.detach().clone()
    if packet in (aten.rrelu_with_noise, aten.rrelu_with_noise_):
        noise: Tensor = args[1]
        return noise.detach().clone()
    return None


def _constant(func: Any, drawn: Tensor) -> float:
    """Return what stands for a draw: what is kept, the middle of an interval, the mean."""
    name = func.overloadpacket.__name__
    if (
        "normal" in name
        or "randn" in name
        or not (drawn.is_floating_point() or drawn.dtype == torch.bool)
    ):
        return 0
    return 0.5 if "uniform" in name or name in ("rand", "rand_like") else 1


def _with_draw(func: Any, args: Sequence[Any], result: Any, held: Tensor) -> Any:
    packet = func.overloadpacket
    if packet in _PURE:
        result.copy_(held)
        return result
    if packet in (aten.rrelu_with_noise, aten.rrelu_with_noise_):
        noise = args[1]
        noise.copy_(held)
        scaled = args[0] * noise  # noise is 1 where the input is not negative
        return args[0].copy_(scaled) if packet is aten.rrelu_with_noise_ else scaled
    mask, p = held.to(result[1].dtype), args[1]
    scale = 1 / (1 - p) if packet is aten.native_dropout else 1 / p
    return args[0] * mask * scale, mask


def _lifted(
    func: Any, args: Sequence[Any], kwargs: dict[str, Any]
) -> tuple[Sequence[Any], dict[str, Any]]:
    asked = kwargs.get("dtype")
    if asked is not None and asked.is_floating_point:
        tensors = _tensors(args, kwargs)
        # A cast of float64, or a new tensor; a cast of anything else (labels, images) may stay.
        if not tensors or any(t.dtype == torch.float64 for t in tensors):
            kwargs["dtype"] = torch.float64
    kinds = {t.dtype for t in _tensors(args, kwargs) if t.is_floating_point()}
    if len(kinds) < 2 or torch.float64 not in kinds:
        return args, kwargs
    # An operator writes to its first argument where it changes one in place; that one must stay itself.
    keep = args[0] if args and func._schema.is_mutable else None

    def lift(tensor: Tensor) -> Tensor:
        return tensor.double() if tensor.is_floating_point() and tensor is not keep else tensor

    return tree_map_only(Tensor, lift, tuple(args)), tree_map_only(Tensor, lift, kwargs)


def _tensors(args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """Operators take tensors, and flat lists of them."""
    found: list[Tensor] = []
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found.extend(v for v in value if isinstance(v, Tensor))
    return found


def _generator_states(args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
    states = [torch.get_rng_state()]
    devices = {t.device for t in _tensors(args, kwargs)}
    if isinstance(kwargs.get("device"), torch.device):
        devices.add(kwargs["device"])
    for device in devices - {torch.device("cpu")}:
        states.append(torch.get_device_module(device).get_rng_state(device))
    return states


def _same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
