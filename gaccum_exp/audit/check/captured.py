"""A captured window of a loop, run again at any N on copies of model and optimizers.

A micro-batch of the window is the pattern: its calls of model, loss and what lies between run again on
other samples of the window, which are put in the place of its own.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import Optimizer

from gaccum_exp.audit.rerun.sandbox import NamedModules, sandbox
from gaccum_exp.audit.watch.tape import (
    TapedCall,
    TapedMicroBatch,
    leaves,
    loss_in,
    made_of,
    resolved,
)
from gaccum_exp.core.checkpointing import checkpoint_blocks
from gaccum_exp.core.modes import eagerly
from gaccum_exp.core.seeding import random_state_kept
from gaccum_exp.memory.fake import copies, fake_copies, fake_mode
from gaccum_exp.memory.meter import FORWARD_BACKWARD, OPTIMIZER_STEP, Meter
from gaccum_exp.memory.plan import BF16, CHECKPOINTING, FUSED, Change
from gaccum_exp.memory.plan_memory import fuse
from gaccum_exp.memory.predict import MeteredStep, decisive_sizes

SHAPING = frozenset({"view", "reshape", "expand", "repeat", "unflatten", "new_zeros", "new_ones"})
"""Operations that are told sizes as numbers."""


class NotRepeatableError(ValueError):
    """A window that cannot be run at another N; the message says why."""


@dataclass(frozen=True, slots=True)
class CapturedWindow:
    """A window that a loop has run."""

    micro_batches: Sequence[TapedMicroBatch]
    sizes: Sequence[int]
    """Samples of each."""
    dim: int
    """The dimension of the model's inputs that counts samples."""
    modules: NamedModules
    """Of model and loss."""
    optimizers: Sequence[Optimizer]
    """That stepped on it."""
    shares: bool
    """Whether what calls behind the first are given alike in all micro-batches belongs to no sample."""

    @property
    def device(self) -> torch.device:
        """Where it ran."""
        return next((p.device for p in self.modules.parameters().values()), torch.device("cpu"))

    @property
    def held_bytes(self) -> int:
        """What weights, gradients and optimizer state take now, which a window's peak counts again."""
        parameters = list(self.modules.parameters().values())
        state = (v for o in self.optimizers for s in o.state.values() for v in s.values())
        held = [*parameters, *(p.grad for p in parameters), *(v for v in state if isinstance(v, Tensor))]
        return sum(t.nbytes for t in held if t is not None and t.device == self.device)


@dataclass(slots=True)
class StepsAtAnyN:
    """The steps of a captured window, one at a time: a new one ends the one before.

    Raises:
        NotRepeatableError: its loss takes in more than its own micro-batch.
    """

    window: CapturedWindow
    _scope: ExitStack = field(default_factory=ExitStack)

    def __enter__(self) -> "StepsAtAnyN":
        return self

    def __exit__(self, *error: Any) -> None:
        self._scope.close()

    @property
    def uniform(self) -> bool:
        """Whether all micro-batches have the same shapes, but for how many samples they hold."""
        return _Pattern(self.window).uniform

    def real(self, *, whole: bool = False) -> MeteredStep:
        """Return the step on real copies; its windows are `whole`, or have what decides their peak."""
        return self._step(None, None, whole=whole)

    def fake(self, change: Change | None = None) -> MeteredStep:
        """Return the step on copies without memory, with a change; raise if that does not apply."""
        return self._step(fake_mode(), change)

    def _step(
        self, mode: FakeTensorMode | None, change: Change | None, *, whole: bool = False
    ) -> MeteredStep:
        self._scope.close()
        self._scope, window = ExitStack(), self.window
        pattern = _Pattern(window)
        modules, device = window.modules, window.device

        @contextmanager
        def context() -> Iterator[None]:
            with random_state_kept(), eagerly(), torch.enable_grad(), mode or nullcontext():
                yield

        originals = modules.parameters()
        if change == CHECKPOINTING:
            self._scope.enter_context(_classes_put_back(modules))
            if not checkpoint_blocks(modules.by_name[""]):
                raise ValueError(f"{change.name} does not apply")
        with context():
            made = self._scope.enter_context(sandbox(modules, recomputation=True))
        memo: dict[int, Any] = {id(p): made[name] for name, p in originals.items()}
        given = tuple(window.optimizers)
        copied = copies(given, memo) if mode is None else fake_copies(mode, given, device, memo)
        if change == FUSED and not sum(map(fuse, copied)):
            raise ValueError(f"{change.name} does not apply")
        half = torch.bfloat16 if change == BF16 else None

        def loss_fn(model: Any, micro_batch: Any) -> tuple[Tensor, float]:
            return pattern.loss(micro_batch, half), 1.0

        def take(window: list[Any], meter: Meter) -> None:
            for optimizer in copied:
                optimizer.zero_grad()
            with meter.phase(FORWARD_BACKWARD):
                metered = meter.loss_fn(loss_fn)
                for micro_batch in window:
                    result: Any = metered(root, micro_batch)
                    torch.autograd.backward(result[0])
            with meter.phase(OPTIMIZER_STEP):
                for optimizer in copied:
                    optimizer.step()

        def micro_batches(sizes: Sequence[int]) -> list[Any]:
            with context():
                return pattern.micro_batches(sizes if whole else decisive_sizes(sizes))

        root = nn.ModuleList(modules)
        return MeteredStep(root, _Several.of(copied), device, micro_batches, take, context)


class _Pattern:
    """A micro-batch of the window, the largest, whose samples are exchanged for others."""

    def __init__(self, window: CapturedWindow) -> None:
        every = [_given(m) for m in window.micro_batches]
        numbers = [sum(t.numel() for t, _ in given) for given in every]
        which = max(range(len(every)), key=numbers.__getitem__)
        pattern, self._size = window.micro_batches[which], window.sizes[which]
        self._losses = pattern.losses
        self._calls = _calls(pattern)
        if not {call for call in self._calls if call.kind == "model"} <= set(pattern.models):
            raise NotRepeatableError("a micro-batch's loss takes in what others have put out")
        alike = len({len(given) for given in every}) == 1
        first = len(leaves(self._calls[0].arguments)) if window.shares else len(every[which])
        self._inputs = [
            _Input(
                tensor, mates, self._size, window.dim, [each[k][0] for each in every] if alike else [],
                shares=k >= first,
            )
            for k, (tensor, mates) in enumerate(every[which])
        ]  # fmt: skip

    @property
    def uniform(self) -> bool:
        """Whether all micro-batches have the same shapes, but for how many samples they hold."""
        return all(given.uniform for given in self._inputs)

    def micro_batches(self, sizes: Sequence[int]) -> list[list[Tensor]]:
        """Return micro-batches of so many samples: the tensors that the pattern's calls are given."""
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        return [
            [given.rows(start, size) for given in self._inputs]
            for start, size in zip(starts, sizes, strict=True)
        ]

    def loss(self, micro_batch: Sequence[Tensor], half: torch.dtype | None) -> Tensor:
        """Run model and loss on these samples; return the sum of the losses that are back-propagated."""
        values, now = {}, self._size
        for given, tensor in zip(self._inputs, micro_batch, strict=True):
            values[given.identity] = tensor
            now = now if given.dim is None else given.samples_in(tensor)
        outputs: dict[TapedCall, list[Tensor]] = {}
        losses = []
        for call in self._calls:
            arguments = resolved(call.arguments, outputs, values=values)
            arguments = _resized(call, arguments, self._size, now)
            before = call.autocast
            call.autocast = (True, half) if half is not None else before
            try:
                found = call.put_out(arguments)
            finally:
                call.autocast = before
            outputs[call] = found
            if call in self._losses:
                losses.append(loss_in(found[0] if len(found) == 1 else found))
        alive = [loss for loss in losses if loss is not None and loss.requires_grad]
        if not alive:
            raise NotRepeatableError("run again, its loss has no gradient")
        return torch.stack([loss.float().sum() for loss in alive]).sum()


class _Input:
    """A tensor that the pattern's calls are given, and those in its place in other micro-batches.

    Args:
        tensor: the pattern's.
        mates: lengths of what its call is given besides by other calls.
        size: samples of the pattern.
        dim: the dimension of the model's inputs that counts samples.
        others: those in its place in all micro-batches.
        shares: whether it belongs to no sample where it is the same in all.
    """

    def __init__(
        self,
        tensor: Tensor,
        mates: set[int],
        size: int,
        dim: int,
        others: Sequence[Tensor],
        *,
        shares: bool,
    ) -> None:
        self._first, self.identity = tensor, id(tensor)
        along = (d for d in dict.fromkeys((0, dim)) if d < tensor.ndim and tensor.shape[d] == size)
        same = len(others) > 1 and all(_equal(t, tensor) for t in others)
        self.dim, self.per_sample = None if shares and same else next(along, None), 1
        length = tensor.shape[0] if tensor.ndim else 0
        # Several rows of each sample, as of its tokens; what is the same in all belongs to none.
        several = length in mates or (len(others) > 1 and not same)
        if self.dim is None and length and length % size == 0 and several and not (shares and same):
            self.dim, self.per_sample = 0, length // size
        self._all = tensor
        self.uniform = all(_like(t, tensor, self.dim) for t in others)
        if self.dim is not None:
            pool = [t for t in others if t is not tensor and _like(t, tensor, self.dim)]
            self._all = torch.cat([tensor, *pool], self.dim) if pool else tensor

    def rows(self, start: int, size: int) -> Tensor:
        """Return the rows of so many samples from a place on; past the window's end it begins anew."""
        if self.dim is None:
            return self._first
        every, by = self._all, self.per_sample
        held = every.shape[self.dim]
        if (start + size) * by <= held:
            return every.narrow(self.dim, start * by, size * by)
        index = torch.arange(start * by, (start + size) * by, device=every.device) % held
        return every.index_select(self.dim, index)

    def samples_in(self, tensor: Tensor) -> int:
        """Return of how many samples these rows are."""
        assert self.dim is not None
        return int(tensor.shape[self.dim]) // self.per_sample


class _Several:
    """Some optimizers, of which the state is asked for."""

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        self._optimizers = optimizers

    @classmethod
    def of(cls, optimizers: Sequence[Optimizer]) -> Any:
        """Return them as one."""
        return optimizers[0] if len(optimizers) == 1 else cls(optimizers)

    @property
    def state(self) -> Mapping[Any, Any]:
        """The state of all parameters."""
        return {p: state for each in self._optimizers for p, state in each.state.items()}


def _calls(micro_batch: TapedMicroBatch) -> list[TapedCall]:
    """Return its calls of model, loss and what lies between, in order."""
    return sorted(made_of([*micro_batch.models, *micro_batch.losses]), key=lambda call: call.order)


def _given(micro_batch: TapedMicroBatch) -> list[tuple[Tensor, set[int]]]:
    """Return the tensors that its calls are given, each with the lengths of outputs given beside it."""
    found = []
    for call in _calls(micro_batch):
        shapes = [ref.call.outputs[ref.place][0] for ref in call.refs()]
        mates = {shape[0] for shape in shapes if shape}
        found += [(leaf, mates) for leaf in leaves(call.arguments) if isinstance(leaf, Tensor)]
    return found


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and bool(torch.equal(one, other))


def _like(tensor: Tensor, first: Tensor, dim: int | None) -> bool:
    """Whether two tensors differ in the length of this dimension at most."""
    shapes = [[n for d, n in enumerate(t.shape) if d != dim] for t in (tensor, first)]
    return shapes[0] == shapes[1] and tensor.dtype == first.dtype


def _resized(call: TapedCall, arguments: Any, before: int, now: int) -> Any:
    """Return an operation's arguments with the sizes among them in proportion to the samples."""
    name = getattr(call.function, "__name__", "")
    if call.kind != "between" or name not in SHAPING or before == now:
        return arguments
    length = call.outputs[0][0][0] if call.outputs and call.outputs[0][0] else None
    if length is None or length % before:
        return arguments

    def sized(value: Any) -> Any:
        if isinstance(value, (tuple, list)):
            return type(value)(sized(each) for each in value)
        return value // before * now if value == length and type(value) is int else value

    # The first number is of the dimension that counts samples; others may be equal to it by chance.
    found = dict(arguments)
    for key, value in arguments.items():
        if isinstance(value, (tuple, list)) and value:
            found[key] = type(value)([sized(value[0]), *value[1:]])
            break
        if type(value) is int:
            found[key] = sized(value)
            break
    return found


@contextmanager
def _classes_put_back(modules: NamedModules) -> Iterator[None]:
    before: list[tuple[Any, Callable[..., Any]]] = [(module, type(module)) for module in modules]
    try:
        yield
    finally:
        for module, kind in before:
            module.__class__ = kind
