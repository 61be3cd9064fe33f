"""What a loop does in one window, noted as it happens: a tape that can be run again.

A micro-batch is a connected piece of the tape: calls of the model, the operations between its outputs
and the loss, and calls of the loss. Tensors that come from the model are noted by where they come from,
all others (inputs, targets, masks) by value.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from gaccum_exp.audit.rerun.samples import mapped, tensors_in


class Ref:
    """A tensor that a noted call has put out: its place among that call's tensors."""

    __slots__ = ("call", "place")

    def __init__(self, call: "Call", place: int) -> None:
        self.call, self.place = call, place


@dataclass(eq=False, slots=True)
class Call:
    """One call of the model, of an operation between model and loss, or of the loss."""

    kind: str
    """model | between | loss"""
    function: Callable[..., Any]
    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    order: int
    attributes: list[tuple[dict[str, Any], dict[str, Any]]] = field(default_factory=list)
    """Of a criterion and what is in it: their `vars`, and the plain ones' values at the call."""
    autocast: tuple[bool, torch.dtype] = (False, torch.bfloat16)
    start: list[Any] | None = None
    """The random state before it; None for operations between."""
    cotangent: Tensor | None = None
    """Of a loss: d(what was back-propagated) / d(this loss). None: no backward pass went through it."""
    backward: int | None = None
    """Which backward pass of the window that was."""
    shapes: list[tuple[int, ...]] = field(default_factory=list)
    """Of the tensors that it put out."""
    dtypes: list[torch.dtype] = field(default_factory=list)
    graph: bool = False
    """Whether it put out a tensor with a graph."""
    read: bool = False
    """Whether the loop looked at this loss, or at something made of it."""

    @property
    def arguments(self) -> dict[int | str, Any]:
        """Its arguments by position and by name."""
        by_position: dict[int | str, Any] = dict(enumerate(self.args))
        return by_position | dict(self.kwargs)

    def refs(self) -> list[Ref]:
        """Return where its arguments come from."""
        return [leaf for leaf in leaves([self.args, self.kwargs]) if isinstance(leaf, Ref)]

    def sources(self) -> set["Call"]:
        """Return the model's calls that it depends on."""
        found: set[Call] = set()
        for ref in self.refs():
            found |= {ref.call} if ref.call.kind == "model" else ref.call.sources()
        return found


@dataclass(slots=True)
class MicroBatch:
    """One micro-batch on the tape."""

    models: list[Call]
    losses: list[Call]

    @property
    def first(self) -> Call:
        """The call that it began with."""
        return min([*self.models, *self.losses], key=lambda call: call.order)


@dataclass(slots=True)
class Tape:
    """The calls of one window, in order."""

    calls: list[Call] = field(default_factory=list)
    backwards: int = 0
    _made: WeakIdKeyDictionary = field(default_factory=WeakIdKeyDictionary)

    def noted(self, value: Any) -> Any:
        """Return arguments to keep: references, or copies, since a loop may reuse its tensors."""

        def leaf(x: Any) -> Any:
            if not isinstance(x, Tensor):
                return x
            made = self._made.get(x)  # type: ignore[no-untyped-call]  # torch's own
            return x.detach().clone() if made is None else made

        return mapped(leaf, value)

    def origin(self, tensor: Tensor) -> Ref | None:
        """Return the call that made this tensor, if it is on the tape."""
        found: Ref | None = self._made.get(tensor)  # type: ignore[no-untyped-call]  # torch's own
        return found

    def add(self, call: Call, output: Any) -> None:
        """Note a call and what it put out."""
        self.calls.append(call)
        for place, tensor in enumerate(tensors_in(output)):
            call.graph |= tensor.requires_grad
            self._made[tensor] = Ref(call, place)
            call.shapes.append(tuple(tensor.shape))
            call.dtypes.append(tensor.dtype)

    def micro_batches(self) -> list[MicroBatch]:
        """Return the losses that were back-propagated, with the model's calls they share."""
        groups: list[MicroBatch] = []
        for loss in (c for c in self.calls if c.kind == "loss" and c.cotangent is not None):
            sources = loss.sources()
            mine = [g for g in groups if sources & set(g.models)]
            for group in mine:
                groups.remove(group)
            models = {*sources, *(m for g in mine for m in g.models)}
            groups.append(
                MicroBatch(
                    sorted(models, key=lambda c: c.order),
                    [*(old for g in mine for old in g.losses), loss],
                )
            )
        return sorted(groups, key=lambda g: g.first.order)

    @property
    def model_calls(self) -> list[Call]:
        """Every call of the model."""
        return [call for call in self.calls if call.kind == "model"]


def leaves(value: Any) -> list[Any]:
    """Return all leaves of a nesting."""
    found: list[Any] = []
    mapped(found.append, value)
    return found


def loss_in(output: Any) -> Tensor | None:
    """Return the loss in what a function or a model returned: it, its `loss`, or its first scalar."""
    if isinstance(output, Tensor):
        return output if output.requires_grad else None
    named = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if isinstance(named, Tensor) and named.requires_grad:
        return named
    return next((t for t in tensors_in(output) if t.ndim == 0 and t.requires_grad), None)
