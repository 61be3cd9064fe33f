"""The tape of a loop's window: its calls, which can be run again, and its gradients.

A micro-batch is a connected piece of the tape: calls of the model, the operations between its outputs
and the loss, and calls of the loss. Tensors that come from the model are recorded by where they come
from, all others (inputs, targets, masks) by value.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from gaccum_exp.audit.rerun.passes import Cast
from gaccum_exp.audit.rerun.slots import Slot
from gaccum_exp.audit.watch.moving_state import MovingState
from gaccum_exp.core.gradient import Gradient
from gaccum_exp.core.joined_samples import mapped, tensors_in
from gaccum_exp.core.losses.criterion import CriterionLoss


class OutputRef:
    """A tensor that a taped call has put out: its place among that call's tensors."""

    # No data class, for those are containers to `mapped`, and this is a leaf.
    __slots__ = ("call", "place")

    def __init__(self, call: "TapedCall", place: int) -> None:
        self.call, self.place = call, place


@dataclass(eq=False, slots=True)
class TapedCall:
    """One call of the model, of an operation between model and loss, or of the loss."""

    kind: str
    """model | between | loss"""
    function: Callable[..., Any]
    arguments: dict[int | str, Any]
    """By position and by name."""
    order: int
    attributes: list[tuple[dict[str, Any], dict[str, Any]]] = field(default_factory=list)
    """Of a criterion and the modules in it: their `vars`, and the plain values of these at the call."""
    states: list[tuple[Slot, Any]] = field(default_factory=list)
    """What had moved since the window began, other than inside such calls, and what it was then."""
    autocast: tuple[bool, torch.dtype] = (False, torch.bfloat16)
    start: list[Any] = field(default_factory=list)
    """The random states before it; empty for operations between."""
    cotangent: Tensor | None = None
    """Of a loss: d(what was back-propagated) / d(this loss). None: no backward pass went through it."""
    backward: int | None = None
    """Number of that backward pass in the window."""
    outputs: list[tuple[tuple[int, ...], torch.dtype]] = field(default_factory=list)
    """Shape and type of each tensor that it put out."""
    has_graph: bool = False
    """Whether it put out a tensor with a graph."""
    read: bool = False
    """Whether the loop read this loss's value, or that of something made of it."""

    def run(self, arguments: Mapping[int | str, Any], states: Sequence[tuple[Slot, Any]] = ()) -> Any:
        """Call the function again with these arguments and states, under the same autocast."""
        for slot, state in states:
            slot.put(state)
        device = next((t.device.type for t in tensors_in(arguments)), "cpu")
        args = [value for key, value in arguments.items() if isinstance(key, int)]
        kwargs = {key: value for key, value in arguments.items() if isinstance(key, str)}
        before = [(attributes, dict(attributes)) for attributes, _ in self.attributes]
        try:
            for attributes, then in self.attributes:
                attributes.update(then)
            with torch.autocast(device, dtype=self.autocast[1], enabled=self.autocast[0]):
                return self.function(*args, **kwargs)
        finally:
            for (attributes, then), (_, now) in zip(self.attributes, before, strict=True):
                attributes.update({key: now[key] for key in then if key in now})

    def refs(self) -> list[OutputRef]:
        """Return where its arguments come from."""
        return [leaf for leaf in leaves(self.arguments) if isinstance(leaf, OutputRef)]

    def sources(self) -> set["TapedCall"]:
        """Return the model's calls that it depends on."""
        found: set[TapedCall] = set()
        for ref in self.refs():
            found |= {ref.call} if ref.call.kind == "model" else ref.call.sources()
        return found


@dataclass(slots=True)
class TapedMicroBatch:
    """One micro-batch on the tape."""

    models: list[TapedCall]
    losses: list[TapedCall]

    @property
    def first(self) -> TapedCall:
        """The call that it began with."""
        return min([*self.models, *self.losses], key=lambda call: call.order)

    @property
    def last_backward(self) -> int:
        """Number of its last backward pass in the window."""
        return max(loss.backward or 0 for loss in self.losses)


@dataclass(slots=True)
class Tape:
    """The calls of one window, in order."""

    calls: list[TapedCall] = field(default_factory=list)
    backwards: int = 0
    """Backward passes so far."""
    moving: MovingState | None = None
    """What else the loop's calls met."""
    _origins: WeakIdKeyDictionary = field(default_factory=WeakIdKeyDictionary)

    @property
    def number(self) -> float:
        """Number of the micro-batch in progress; infinite before the window's first call."""
        return self.backwards if self.calls else math.inf

    def recorded(self, value: Any) -> Any:
        """Return arguments to keep: references, or copies, since a loop may reuse its tensors."""

        def leaf(x: Any) -> Any:
            if not isinstance(x, Tensor):
                return x
            origin = self.origin(x)
            if origin is not None:
                return origin
            kept = x.detach().clone()
            if self.moving is not None:
                self.moving.note(x, kept, self.backwards)
            return kept

        return mapped(leaf, value)

    def origin(self, tensor: Tensor) -> OutputRef | None:
        """Return the call that made this tensor, if it is on the tape."""
        found: OutputRef | None = self._origins.get(tensor)  # type: ignore[no-untyped-call]  # torch's own
        return found

    def add(self, call: TapedCall, output: Any) -> None:
        """Record a call and what it put out."""
        self.calls.append(call)
        for place, tensor in enumerate(tensors_in(output)):
            call.has_graph |= tensor.requires_grad
            self._origins[tensor] = OutputRef(call, place)
            call.outputs.append((tuple(tensor.shape), tensor.dtype))

    def micro_batches(self) -> list[TapedMicroBatch]:
        """Return the losses that were back-propagated, with the model's calls that they share."""
        groups: list[TapedMicroBatch] = []
        for loss in (c for c in self.calls if c.kind == "loss" and c.cotangent is not None):
            sources = loss.sources()
            sharing = [g for g in groups if sources & set(g.models)]
            for group in sharing:
                groups.remove(group)
            models = {*sources, *(m for g in sharing for m in g.models)}
            losses = [*(earlier for g in sharing for earlier in g.losses), loss]
            groups.append(TapedMicroBatch(sorted(models, key=lambda c: c.order), losses))
        return sorted(groups, key=lambda g: g.first.order)


@dataclass(slots=True)
class Clipping:
    """A call of `clip_grad_norm_` or `clip_grad_value_`, and the gradients before and after."""

    after_backward: int
    """Backward passes of the window before it."""
    before: Gradient
    after: Gradient = field(default_factory=dict)


@dataclass(slots=True)
class Observations:
    """What was observed of one window."""

    tape: Tape = field(default_factory=Tape)
    at_start: Gradient = field(default_factory=dict)
    """Gradients that were there before its first pass."""
    accumulated: dict[int, Gradient] = field(default_factory=dict)
    """Gradients right after the last backward pass: one entry, by the number of backward passes."""
    zeroed: set[int] = field(default_factory=set)
    """Backward passes so far where gradients were found zeroed at the beginning of a later pass."""
    changed: set[int] = field(default_factory=set)
    """The same where they were found changed in another way."""
    clippings: list[Clipping] = field(default_factory=list)
    scheduler_steps: list[int] = field(default_factory=list)
    """Backward passes of the window before each step of the learning-rate schedule."""
    unscaled: list[int] = field(default_factory=list)
    """The same before each `unscale_` of a GradScaler."""
    retained: list[bool] = field(default_factory=list)
    """Whether each backward pass was told to keep its graph."""
    loss_scale: float = 1.0
    """The GradScaler's."""


def leaves(value: Any) -> list[Any]:
    """Return all leaves of a nesting."""
    found: list[Any] = []
    mapped(found.append, value)
    return found


def shapes_of(arguments: Any) -> Any:
    """Return arguments with a tensor of the right shape, and without values, for every reference."""

    def leaf(x: Any) -> Any:
        if not isinstance(x, OutputRef):
            return x
        shape, dtype = x.call.outputs[x.place]
        return torch.empty(shape, dtype=dtype, device="meta")

    return mapped(leaf, arguments)


def shapes_around(micro_batch: TapedMicroBatch) -> list[tuple[int, ...]]:
    """Return the shapes of a micro-batch's outputs and targets."""
    outputs = [shape for call in micro_batch.models for shape, _ in call.outputs]
    calls = [loss for loss in micro_batch.losses if loss is not micro_batch.first]
    targets = [leaf for call in calls for leaf in leaves(call.arguments) if isinstance(leaf, Tensor)]
    return [*outputs, *(tuple(target.shape) for target in targets)]


def loss_in(output: Any) -> Tensor | None:
    """Return the loss in what a function or a model returned: it, its `loss`, or its first scalar."""
    named = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    scalars = [t for t in tensors_in(output) if t.ndim == 0 or t is output]
    found = [t for t in (named, *scalars) if isinstance(t, Tensor)]
    graphs = torch.is_grad_enabled()  # else no tensor has one
    return next((t for t in found if (t.requires_grad if graphs else t.is_floating_point())), None)


Outputs = dict[TapedCall, list[Tensor]]
"""What calls have put out in this run."""


def models_own_loss(loss: Tensor) -> Tensor:
    """Return the loss that the model itself has put out."""
    return loss


def resolved(
    value: Any,
    outputs: Outputs,
    cast: Cast = lambda value: value,
    values: Mapping[int, Tensor] | None = None,
) -> Any:
    """Return arguments with every reference replaced by its tensor, and all others cast.

    Of those the `values` replace some, by identity.
    """

    def leaf(x: Any) -> Any:
        if not isinstance(x, OutputRef):
            return cast((values or {}).get(id(x), x))
        if x.call not in outputs:
            arguments = resolved(x.call.arguments, outputs, cast, values)
            outputs[x.call] = tensors_in(x.call.run(arguments))
        return outputs[x.call][x.place]

    return mapped(leaf, value)


def count_of(loss: TapedCall) -> float | None:
    """Return the denominator of one call of a criterion, if that is one of torch's."""
    criterion = loss.function
    if criterion is nn.functional.cross_entropy:
        names = ("weight", "ignore_index")
        criterion = nn.CrossEntropyLoss(**{k: v for k, v in loss.arguments.items() if k in names})
    target = loss.arguments.get("target", loss.arguments.get(1))
    if not isinstance(criterion, nn.Module) or not hasattr(criterion, "reduction"):
        return None
    if not isinstance(target, Tensor):
        return None
    try:
        counted = CriterionLoss(criterion, "sum").count((None, target))
    except ValueError:
        return None
    return None if counted is None else float(counted)
