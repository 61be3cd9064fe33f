"""The tape of a loop's window: its calls, which can be run again, and its gradients.

A piece of the tape is connected: calls of the model, the operations between its outputs and its losses,
and these losses, each of them a scalar. A micro-batch is one piece, or several that share a backward
pass or recur in a pattern (labelled and unlabelled samples, real ones and fakes). Tensors that come from
the model are recorded by where they come from, the model's parameters by name, all others (inputs,
targets, masks) by value.
"""

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from gaccum_exp.audit.rerun.passes import Cast
from gaccum_exp.audit.watch.moving_state import MovingState
from gaccum_exp.audit.watch.places import Place, Places
from gaccum_exp.audit.watch.scalars import Factor
from gaccum_exp.audit.watch.slots import Slot
from gaccum_exp.core.gradient import Gradient, identical
from gaccum_exp.core.losses.criterion import CriterionLoss
from gaccum_exp.core.losses.denominator import PER_ELEMENT, is_kind
from gaccum_exp.core.module_state import own_attributes
from gaccum_exp.core.nesting import children_of, mapped, rebuilt, tensors_in

MOST_FEATURES = 1 << 20
"""Elements of a tensor of features at most; what is larger is no input of a loss over the window."""
ELEMENTWISE = (
    *(nn.functional.mse_loss, nn.functional.l1_loss, nn.functional.smooth_l1_loss),
    *(nn.functional.huber_loss, nn.functional.binary_cross_entropy),
    nn.functional.binary_cross_entropy_with_logits,
)
"""Functions that take a loss of each element, of tensors of one shape."""


class OutputRef:
    """A tensor that a taped call has put out: its place among that call's tensors."""

    # No data class, for those are containers to `mapped`, and this is a leaf.
    __slots__ = ("call", "place")

    def __init__(self, call: "TapedCall", place: int) -> None:
        self.call, self.place = call, place

    @property
    def graphless(self) -> bool:
        """Whether it comes from outputs of the model's alone that never had a graph, as a teacher's."""
        if self.call.kind == "model":
            return not self.call.graphs[self.place]
        refs = self.call.refs()
        return bool(refs) and all(ref.graphless for ref in refs)


@dataclass(frozen=True, slots=True)
class ObjectOf:
    """A plain object that holds tensors (a distribution, a namespace), opened to be recorded."""

    kind: type
    attributes: dict[str, Any]


class ParameterRef:
    """A parameter that the loop itself computes with, e.g. for a penalty on the weights."""

    __slots__ = ("_module", "_name")

    def __init__(self, module: nn.Module, name: str) -> None:
        self._module, self._name = module, name

    def tensor(self) -> Any:
        """Return the tensor that stands in for it now."""
        return self._module._parameters[self._name]


@dataclass(eq=False, slots=True)
class TapedCall:
    """One call of the model, of an operation between model and loss, or of a loss."""

    kind: str
    """model | between | loss"""
    function: Callable[..., Any]
    arguments: dict[int | str, Any]
    """By position and by name."""
    order: int
    site: int = 0
    """Where the loop calls it: equal for calls from one place, by way of the same functions."""
    fed: bool = False
    """Whether an argument has a graph of modules that are not watched."""
    since: int = 0
    """Backward passes of the window before it; of others than the model's, before the first of what it
    is made of."""
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
    marks: list[Tensor | None] = field(default_factory=list)
    """A number for each row of each of them that has a graph."""
    graphs: list[bool] = field(default_factory=list)
    """Which of them have a graph."""
    has_graph: bool = False
    """Whether it put out a tensor with a graph."""
    left: list[tuple[dict[str, Any], str, int]] = field(default_factory=list)
    """Tensors with a graph that it left in attributes of modules: their `vars`, the name, and the place
    among the tensors there, from the end."""
    within: list[tuple["TapedCall", float]] = field(default_factory=list)
    """Of a loss that the model has put out: others that it is a part of, and their derivatives by it."""
    of_scalars: bool = False
    """Whether it is linear in scalars: a weighted one, a sum, or several of them in one tensor."""
    factors: tuple[Factor, ...] = ()
    """Of an operation on scalars, or of all after a loss: what they multiply it by."""
    functions: tuple[tuple[int, CodeType], ...] = ()
    """Those that were running, the innermost first: a number of each one's call, and its code."""
    place: Place | None = None
    """Of a loss: the user's line that it was called from."""
    read: bool = False
    """Whether the loop read this loss's value, or that of something made of it."""

    def run(self, arguments: Mapping[int | str, Any], states: Sequence[tuple[Slot, Any]] = ()) -> Any:
        """Call the function again with these arguments and states, under the same autocast."""
        for slot, state in states:
            slot.put(state)
        device = next((t.device.type for t in tensors_in(arguments)), "cpu")
        arguments = _closed(arguments)
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

    def put_out(
        self, arguments: Mapping[int | str, Any], states: Sequence[tuple[Slot, Any]] = ()
    ) -> list[Tensor]:
        """Run it again; return the tensors that it puts out and leaves in attributes."""
        returned = tensors_out(self.run(arguments, states))
        return [*returned, *(tensors_in(of[name])[place] for of, name, place in self.left)]

    def own_cotangent(self) -> float:
        """Return its cotangent without the part that comes by way of other losses of the same call."""
        whole = 0.0 if self.cotangent is None else float(self.cotangent)
        own = whole - sum(by * loss.own_cotangent() for loss, by in self.within)
        return own if abs(own) > 1e-5 * abs(whole) else 0.0

    def refs(self) -> list[OutputRef]:
        """Return where its arguments come from."""
        return [leaf for leaf in leaves(self.arguments) if isinstance(leaf, OutputRef)]

    @property
    def of_weights_alone(self) -> bool:
        """Whether it is a penalty on the weights: the same for any samples."""
        return not self.start and not self.sources()

    @property
    def of_kept_features(self) -> bool:
        """Whether it was back-propagated to tensors of the loop's own, and through no model."""
        leaf = any(ref.call.function is of_the_loop for ref in _all_refs(self))
        return self.cotangent is not None and leaf and not self.sources()

    def sources(self, *, alive: bool = False) -> set["TapedCall"]:
        """Return the model's calls that it depends on; `alive`, those that a backward pass reaches."""
        found, left = {self}, [self]  # each once: a cell's two states come from one call before
        while left:
            for ref in left.pop().refs():
                ended = alive and ref.call.graphs[ref.place : ref.place + 1] == [False]
                if not ended and ref.call not in found:
                    found.add(ref.call)
                    left.append(ref.call)
        return {call for call in found if call is not self and call.kind == "model"}


@dataclass(slots=True)
class TapedMicroBatch:
    """One micro-batch on the tape, its calls in their order."""

    models: list[TapedCall]
    losses: list[TapedCall]

    @classmethod
    def of(cls, pieces: Sequence["TapedMicroBatch"]) -> "TapedMicroBatch":
        """Return the pieces as one micro-batch."""
        models, losses = ({c: None for p in pieces for c in of(p)} for of in (_models, _losses))
        return cls(*(sorted(calls, key=lambda c: c.order) for calls in (models, losses)))

    @property
    def calls(self) -> list[TapedCall]:
        """All calls of model and losses, in order."""
        return sorted([*self.models, *self.losses], key=lambda call: call.order)

    @property
    def backwards(self) -> set[int | None]:
        """Numbers of its backward passes."""
        return {loss.backward for loss in self.losses}

    @property
    def of_weights_alone(self) -> bool:
        """Whether it is a penalty on the weights, and no pass over samples."""
        return not any(call.start for call in self.calls)

    @property
    def signature(self) -> tuple[int, ...]:
        """The places that it was called from."""
        return tuple(call.site for call in self.calls)

    @property
    def first(self) -> TapedCall:
        """The call of model or loss that it began with."""
        return next((call for call in self.calls if call.start), self.calls[0])

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
    reached: dict[int | None, set[str]] = field(default_factory=dict)
    """The judged parameters that each of them reached."""
    parameters: Mapping[int, ParameterRef] = field(default_factory=dict)
    """The judged parameters, by the identity of their tensors."""
    moving: MovingState | None = None
    """What else the loop's calls met."""
    roots: list[OutputRef] = field(default_factory=list)
    """What its backward passes began with."""
    _latest: dict[int, TapedCall] = field(default_factory=dict)
    """The model's last call from each place."""
    _origins: WeakIdKeyDictionary = field(default_factory=WeakIdKeyDictionary)
    _asked: WeakIdKeyDictionary = field(default_factory=WeakIdKeyDictionary)
    """Copies of leaves that the model was given, whose gradient may be asked for."""
    _nodes: dict[Any, tuple[TapedCall, Callable[[TapedCall, Tensor], None]]] = field(
        default_factory=dict
    )
    """What has made them, by nodes of the graph."""

    @property
    def number(self) -> float:
        """Number of the micro-batch in progress; infinite before the window's first call."""
        return self.backwards if self.calls else math.inf

    def recorded(self, value: Any, *, to_model: bool = False, site: int = 0) -> Any:
        """Return arguments to keep: references, or copies, since a loop may reuse its tensors.

        Args:
            value: of a call that comes from the `site`.
            to_model: whether the call is the model's.
        """

        def leaf(x: Any) -> Any:
            if not isinstance(x, Tensor):
                return x
            origin = self.origin(x) or self.parameters.get(id(x))
            by_value = (to_model and _of_the_loop(origin)) or self._carried(x, origin, site)
            if origin is not None and not by_value:
                return origin
            kept = x.detach().clone()
            if to_model and x.requires_grad and x.is_leaf:
                self._asked.setdefault(x, []).append(kept)  # type: ignore[no-untyped-call]  # torch's
            if self.moving is not None:
                self.moving.note(x, kept, self.backwards)
            return kept

        return mapped(leaf, opened(value))

    def _carried(self, x: Tensor, origin: OutputRef | ParameterRef | None, site: int) -> bool:
        """Whether it is a value of an earlier micro-batch: no graph, and the model was called again."""
        if x.requires_grad or not isinstance(origin, OutputRef) or origin.call.since >= self.backwards:
            return False
        made = origin.call.sources() | ({origin.call} if origin.call.kind == "model" else set())
        return any(c.site == site or self._latest[c.site].since > c.since for c in made)

    def origin(self, tensor: Tensor) -> OutputRef | None:
        """Return the call that made this tensor, if it is on the tape."""
        found: OutputRef | None = self._origins.get(tensor)  # type: ignore[no-untyped-call]  # torch's own
        made = None if found is not None or not self._nodes else self._nodes.get(tensor.grad_fn)
        if made is not None:  # an operation of the user's own, whose output has had no graph till now
            call, followed = made
            found = self._origins[tensor] = OutputRef(call, tensor.output_nr)
            followed(call, tensor)
        return found

    def go_on_from(self, earlier: "Tape") -> None:
        """Know what an earlier window has put out and not back-propagated yet.

        So a GAN's generator makes its samples before its critic's step, and learns from them after it.
        """
        losses = (c for c in earlier.calls if c.kind == "loss" and c.backward is not None)
        done = {made for loss in losses for made in loss.sources(alive=True)}
        for tensor, ref in earlier._origins.items():  # type: ignore[no-untyped-call]  # torch's own
            made = ref.call.sources() | ({ref.call} if ref.call.kind == "model" else set())
            if tensor.grad_fn is not None and ref.call.kind != "loss" and made and not made & done:
                self._origins[tensor] = ref
                for call in (ref.call, *made):
                    call.since = 0
                self._latest |= {call.site: call for call in made}

    def add(self, call: TapedCall, output: Any) -> None:
        """Record a call and what it put out."""
        self.calls.append(call)
        for tensor in tensors_out(output):
            self._add_output(call, tensor)
        if call.kind == "model":
            self._latest[call.site] = call

    def add_node(
        self, call: TapedCall, node: Any, output: Any, followed: Callable[[TapedCall, Tensor], None]
    ) -> None:
        """Record a call by the node of its outputs, which are no part of a graph yet.

        Args:
            call: of an operation of the user's own.
            node: of the graph.
            output: what it returns.
            followed: gets it, and each of its outputs that is used.
        """
        self.calls.append(call)
        self._nodes[node] = call, followed
        for tensor in tensors_out(output):
            call.graphs.append(True)
            call.outputs.append((tuple(tensor.shape), tensor.dtype))
            call.marks.append(None)
        call.has_graph = True

    def add_asked(self, leaf: Tensor, order: int) -> None:
        """Record a leaf that the model was given and whose gradient is asked for, as in a penalty."""
        copies: list[Tensor] = self._asked.pop(leaf, [])  # type: ignore[no-untyped-call]  # torch's own
        if not copies:
            return
        call = TapedCall("between", asked_for, {0: copies[0]}, order)
        self.add(call, leaf)
        known, ref = {id(kept) for kept in copies}, OutputRef(call, 0)
        for each in self.calls:
            if each.kind == "model":
                each.arguments = mapped(lambda x: ref if id(x) in known else x, each.arguments)

    def add_left(self, call: TapedCall, module: nn.Module) -> list[Tensor]:
        """Record what a call has left with a graph in attributes of a module, and return it."""
        found = []
        for name, value in own_attributes(module).items():
            if isinstance(value, (Tensor, list, tuple, dict)):
                tensors = tensors_in(value)
                for place, tensor in enumerate(tensors, start=-len(tensors)):
                    if tensor.grad_fn is not None and self.origin(tensor) is None:
                        call.left.append((vars(module), name, place))
                        self._add_output(call, tensor)
                        found.append(tensor)
        return found

    def _add_output(self, call: TapedCall, tensor: Tensor) -> None:
        call.graphs.append(tensor.requires_grad)
        call.has_graph |= tensor.requires_grad
        self._origins[tensor] = OutputRef(call, len(call.outputs))
        call.outputs.append((tuple(tensor.shape), tensor.dtype))
        call.marks.append(row_marks(tensor) if tensor.requires_grad else None)

    def micro_batches(self) -> list[TapedMicroBatch]:
        """Return the losses that reached judged parameters, with the model's calls, as micro-batches."""
        self._settle_single_samples()
        pieces: list[TapedMicroBatch] = []
        for loss in self._losses_used():
            sources = loss.sources()
            sharing = [p for p in pieces if sources & set(p.models)]
            for piece in sharing:
                pieces.remove(piece)
            pieces.append(TapedMicroBatch.of([*sharing, TapedMicroBatch(list(sources), [loss])]))
        self._find_factors()
        pieces.sort(key=lambda p: p.first.order)
        return _recurring(_sharing_a_backward_pass(pieces))

    def _settle_single_samples(self) -> None:
        """Take one number in a tensor for the loss of one sample, where the loop reduces it.

        That is so where calls from the same place put out several numbers, or had one sample each.
        """
        alike: dict[int, list[TapedCall]] = {}
        for call in self.calls:
            alike.setdefault(call.site, []).append(call)
        for reduced in (c for c in self.calls if c.kind == "between" and c.cotangent is not None):
            inner = [ref.call for ref in _all_refs(reduced) if ref.call.kind == "loss"]
            for loss in inner:
                if loss.outputs[0][0] and any(_of_samples(c) for c in alike[loss.site]):
                    loss.kind = "between"
            if all(loss.kind == "between" for loss in inner) and not _of_own_scalars(reduced):
                reduced.kind = "loss"

    def _losses_used(self) -> list[TapedCall]:
        """Return the losses that were back-propagated, each once, whatever else is made of it."""
        used = [
            c for c in self.calls
            if c.kind == "loss" and c.cotangent is not None and c.backward in self.reached
        ]  # fmt: skip
        own = [c for c in used if c.function is models_own_loss]
        others = [c for c in used if c.function is not models_own_loss]
        inner = {id(ref.call) for c in others for ref in _all_refs(c)}
        others = [c for c in others if id(c) not in inner]
        exact = [(c, c.own_cotangent()) for c in own if c.within]
        for loss, cotangent in exact:
            loss.cotangent, loss.within = torch.tensor(cotangent, dtype=torch.float64), []
        made_of = {(id(r.call), r.place) for c in others for ref in c.refs() for r in all_of(ref)}
        with_graph = [c for c in self.calls if c.has_graph and c.function is not models_own_loss]
        taken = {
            (id(r.call), r.place) for r in [*self.roots, *(r for c in with_graph for r in c.refs())]
        }
        kept = list(others)
        seen = {c.backward for c in others}
        for loss in own:  # a scalar of the model's may be a temperature, or a part of another one
            ref = loss.refs()[0]
            if (id(ref.call), ref.place) in taken - made_of and loss.own_cotangent():
                kept.append(loss)
                seen.add(loss.backward)
        unseen = [c for c in own if c.backward not in seen and c.refs()[0].place < _returned(c)]
        return sorted([*kept, *unseen], key=lambda call: call.order)

    def _find_factors(self) -> None:
        """Give each loss the factors that the loop multiplies it by."""
        users: dict[tuple[int, int], list[TapedCall]] = {}
        for call in self.calls:
            scalar = call.of_scalars or [s for s, _ in call.outputs] == [()]
            if call.kind == "between" and call.has_graph and scalar:
                for ref in call.refs():
                    users.setdefault((id(ref.call), ref.place), []).append(call)
        for loss in (c for c in self.calls if c.kind == "loss"):
            loss.factors = ()
            own = loss.refs()[0] if loss.function is models_own_loss else OutputRef(loss, 0)
            after = users.get((id(own.call), own.place), [])
            while len(after) == 1:
                loss.factors += after[0].factors
                after = users.get((id(after[0]), 0), [])


def _of_samples(call: TapedCall) -> bool:
    """Whether a call puts out several numbers, or has a batch of one."""
    if call.outputs and math.prod(call.outputs[0][0]) != 1:
        return True
    given = (x for x in leaves(call.arguments) if isinstance(x, (Tensor, OutputRef)))
    shapes = [tuple(x.shape) if isinstance(x, Tensor) else x.call.outputs[x.place][0] for x in given]
    return bool(shapes) and shapes[0][:1] == (1,)


def _of_own_scalars(call: TapedCall) -> bool:
    """Whether it is made of a scalar that the model itself has put out."""
    every = (r for ref in call.refs() for r in all_of(ref) if r.call.kind == "model")
    return any(ref.call.outputs[ref.place][0] == () for ref in every)


def all_of(ref: OutputRef) -> Iterator[OutputRef]:
    """Yield an output and those that it is made of, up to the model's."""
    waiting, seen = [ref], set[tuple[int, int]]()
    while waiting:
        one = waiting.pop()
        if (id(one.call), one.place) not in seen:
            seen.add((id(one.call), one.place))
            yield one
            waiting += one.call.refs() if one.call.kind != "model" else []


def _returned(own_loss: TapedCall) -> int:
    """Return how many tensors the call returned that has put out this loss."""
    call = own_loss.refs()[0].call
    return len(call.outputs) - len(call.left)


def _of_the_loop(origin: OutputRef | ParameterRef | None) -> bool:
    return isinstance(origin, OutputRef) and origin.call.function is of_the_loop


def _models(piece: TapedMicroBatch) -> list[TapedCall]:
    return piece.models


def _losses(piece: TapedMicroBatch) -> list[TapedCall]:
    return piece.losses


def _all_refs(call: TapedCall) -> list[OutputRef]:
    """Return the outputs that a loss is made of, from near to far."""
    if call.function is gradient_asked_for:  # the gradient of a loss is not made of its value
        return []
    return [r for ref in call.refs() if ref.call.kind != "model" for r in (ref, *_all_refs(ref.call))]


def _sharing_a_backward_pass(pieces: Sequence[TapedMicroBatch]) -> list[TapedMicroBatch]:
    """Join pieces from different places in the loop that were back-propagated together."""
    # A loop that adds up the losses of all micro-batches first calls them from one place.
    found: list[list[TapedMicroBatch]] = []
    pieces = _penalties_joined(pieces)
    penalties = sum(piece.of_weights_alone for piece in pieces)
    for piece in pieces:
        last = found[-1] if found else []
        places = {site for p in last for site in p.signature}
        repeats = places & set(piece.signature) and not piece.of_weights_alone
        together = bool(last) and piece.backwards & last[-1].backwards and not repeats
        once = bool(last) and penalties == 1
        afterwards = once and piece.of_weights_alone and piece is pieces[-1]
        beforehand = once and last == pieces[:1] and last[0].of_weights_alone
        if together or afterwards or beforehand:
            last.append(piece)
        else:
            found.append([piece])
    return [TapedMicroBatch.of(each) for each in found]


def _penalties_joined(pieces: Sequence[TapedMicroBatch]) -> list[TapedMicroBatch]:
    """Join the penalties on several weights that had a backward pass to themselves."""
    of_samples = {number for p in pieces if not p.of_weights_alone for number in p.backwards}
    found: list[TapedMicroBatch] = []
    for piece in pieces:
        last = found[-1] if found else piece
        alone = piece.of_weights_alone and last.of_weights_alone and not piece.backwards & of_samples
        if found and alone and piece.backwards == last.backwards:
            found[-1] = TapedMicroBatch.of([last, piece])
        else:
            found.append(piece)
    return found


def _recurring(pieces: list[TapedMicroBatch]) -> list[TapedMicroBatch]:
    """Join the pieces of a pattern that the loop repeats, e.g. a pass on real samples, one on fakes."""
    signatures = [piece.signature for piece in pieces]
    period = len(set(signatures))
    repeats, rest = divmod(len(pieces), period) if period else (0, 0)
    if period < 2 or repeats < 2 or rest or signatures != signatures[:period] * repeats:
        return pieces
    starts = range(0, len(pieces), period)
    return [TapedMicroBatch.of(pieces[start : start + period]) for start in starts]


@dataclass(slots=True)
class Clipping:
    """A call of `clip_grad_norm_` or `clip_grad_value_`, and the gradients before and after."""

    after_backward: int
    """Backward passes of the window before it."""
    before: Gradient
    at_loss_scale: bool = False
    """Whether a GradScaler had not unscaled them yet."""
    after: Gradient = field(default_factory=dict)
    bound: float = 0.0
    """What it lets through at most; infinite: everything, as where a loop only asks for the norm."""

    @property
    def binds(self) -> bool:
        """Whether it changed the gradients."""
        return not identical(self.before, self.after)


@dataclass(slots=True)
class Observations:
    """What was observed of one window."""

    tape: Tape = field(default_factory=Tape)
    at_start: Gradient = field(default_factory=dict)
    """Gradients that were there before its first pass."""
    passes_unseen: bool = False
    """Whether they are of passes before anything was traced."""
    accumulated: dict[int, Gradient] = field(default_factory=dict)
    """Gradients right after the last backward pass: one entry, by the number of backward passes."""
    zeroed: set[int] = field(default_factory=set)
    """Backward passes so far where gradients were found zeroed at the beginning of a later pass."""
    changed: set[int] = field(default_factory=set)
    """The same where they were found changed in another way."""
    clippings: list[Clipping] = field(default_factory=list)
    clipped_by_hand: float | None = None
    """The norm to which the loop itself has scaled what it accumulated, if it is a chosen one."""
    looked_at: int = 0
    """Backward passes before the loop last took a norm, or the like, of the gradients."""
    scheduler_steps: list[tuple[int, int]] = field(default_factory=list)
    """Which schedule was stepped (its id), after how many backward passes of the window."""
    average_moved: bool = False
    """Whether an average of the weights was moved after several backward passes of the window."""
    unscaled: list[int] = field(default_factory=list)
    """Backward passes of the window before each `unscale_` of a GradScaler."""
    retained: list[bool] = field(default_factory=list)
    """Whether each backward pass was told to keep its graph."""
    other_steps: list[int] = field(default_factory=list)
    """The same before each step of another optimizer."""
    loss_scale: float = 1.0
    """The GradScaler's, as the last loss was scaled."""
    loss_scales: list[tuple[int, float]] = field(default_factory=list)
    """Every scaler (its id) with every scale that it had in the window, in order."""
    stepped: set[str] = field(default_factory=set)
    """The parameters whose optimizers took the step: of several, each may step at another time."""
    carried: set[str] = field(default_factory=set)
    """Those of them that hold gradients from before another optimizer's step."""
    states: list[list[Any]] = field(default_factory=lambda: [[], []])
    """The random states right after the last backward pass, and when the first of them stepped."""
    stepped_in_backward: bool = False
    """Whether an optimizer stepped while a backward pass was running."""
    weights: dict[str, Tensor] = field(default_factory=dict)
    """Parameters as they were in the passes, where they have moved since."""
    moved: set[int] = field(default_factory=set)
    """Backward passes after which the weights were found changed though no optimizer had stepped."""
    zeroed_at_other_weights: list[Tape] = field(default_factory=list)
    """Earlier passes whose gradients were zeroed when the weights changed: SAM's ascent."""
    evaluation: int = 0
    """How often the closure was evaluated before in the same step, as L-BFGS does."""
    places: Places = field(default_factory=Places)
    """The lines that passes, steps, clipping, clearing and schedules were called from."""
    hidden: list[str] = field(default_factory=list)
    """Names of compiled functions in which nothing is seen."""
    shares: bool = False
    """Whether it was judged so that what calls behind the first are given alike in all micro-batches is
    shared by these."""
    loss_function: Callable[..., Any] | None = None
    """What computes its loss, where that mixes samples and could not be judged line by line."""

    @property
    def clippings_inside(self) -> list[Clipping]:
        """Those between the window's backward passes."""
        return [c for c in self.clippings if 0 < c.after_backward < self.tape.backwards]


def made_of(calls: Sequence[TapedCall]) -> Iterator[TapedCall]:
    """Return these calls and all that their arguments come from, each once."""
    waiting, seen = list(calls), set[TapedCall]()
    while waiting:
        call = waiting.pop()
        if call not in seen:
            seen.add(call)
            yield call
            waiting += [ref.call for ref in call.refs()]


def row_marks(tensor: Tensor) -> Tensor | None:
    """Return a number for each row, (rows,), by which it is known again; None: they are no features."""
    plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided
    if not plain or tensor.ndim < 2 or tensor.numel() > MOST_FEATURES or not tensor.is_floating_point():
        return None
    rows = tensor.detach().flatten(1).double()
    places = torch.arange(1, rows.shape[1] + 1, dtype=torch.float64, device=rows.device)
    return (rows * torch.sin(places * places)).sum(1)


def opened(value: Any) -> Any:
    """Return a nesting with plain objects that hold tensors as what is in them."""

    def leaf(x: Any) -> Any:
        return ObjectOf(type(x), {k: opened(v) for k, v in vars(x).items()}) if _holds(x) else x

    return mapped(leaf, value)


def _holds(value: Any, depth: int = 3) -> bool:
    """Whether a plain object holds tensors, itself or by others."""
    if isinstance(value, (Tensor, nn.Module, type)) or callable(value) or not hasattr(value, "__dict__"):
        return False
    return depth > 0 and any(
        isinstance(x, Tensor) or _holds(x, depth - 1) for v in vars(value).values() for x in leaves(v)
    )


def _closed(value: Any) -> Any:
    if isinstance(value, ObjectOf):
        made: Any = object.__new__(value.kind)
        vars(made).update({k: _closed(v) for k, v in value.attributes.items()})
        return made
    children = children_of(value)
    return rebuilt(value, [_closed(child) for child in children]) if children else value


def tensors_out(output: Any) -> list[Tensor]:
    """Return all tensors that a call has put out, in order."""
    return tensors_in(opened(output))


def leaves(value: Any) -> list[Any]:
    """Return all leaves of a nesting."""
    found: list[Any] = []
    mapped(found.append, value)
    return found


def shapes_of(arguments: Any, values: Mapping[int, Tensor] | None = None) -> Any:
    """Return arguments with a tensor of the right shape, and without values, for every reference.

    Of the others the `values` replace some, by identity.
    """

    def leaf(x: Any) -> Any:
        if not isinstance(x, OutputRef):
            return (values or {}).get(id(x), x)
        shape, dtype = x.call.outputs[x.place]
        if x.call.of_weights_alone:  # the same in all micro-batches
            return torch.zeros((), dtype=dtype).expand(shape)
        return torch.empty(shape, dtype=dtype, device="meta")

    return mapped(leaf, arguments)


def shapes_around(micro_batches: Sequence[TapedMicroBatch]) -> list[list[tuple[int, ...]]]:
    """Return the shapes of each micro-batch's outputs and targets, without what is the same in all."""
    every = []
    for micro_batch in micro_batches:
        calls = [loss for loss in micro_batch.losses if loss is not micro_batch.first]
        given = [leaf for call in calls for leaf in leaves(call.arguments)]
        every.append([leaf for leaf in given if isinstance(leaf, Tensor)])
    own = [
        column
        for column in zip(*every, strict=False)
        if len(column) == 1
        or any(t.shape != column[0].shape for t in column)
        or not all(torch.equal(t, column[0]) for t in column)
    ]
    return [
        [shape for call in m.models for shape, _ in call.outputs] + [tuple(c[i].shape) for c in own]
        for i, m in enumerate(micro_batches)
    ]


def loss_in(output: Any) -> Tensor | None:
    """Return the loss in what a function or a model returned: it, its `loss`, or its first scalar."""
    named = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    scalars = [t for t in tensors_in(output) if t.ndim == 0 or t is output]
    found = [t for t in (named, *scalars) if isinstance(t, Tensor)]
    graphs = torch.is_grad_enabled()  # else no tensor has one
    return next((t for t in found if (t.requires_grad if graphs else t.is_floating_point())), None)


Outputs = dict[TapedCall, list[Tensor]]
"""What calls have put out in this run."""


def of_the_loop(tensor: Tensor) -> Tensor:
    """Return a tensor of the loop's own that gets a gradient, and is no parameter."""
    return tensor


def asked_for(tensor: Tensor) -> Tensor:
    """Return a leaf of the loop's own, whose gradient goes into its loss."""
    return tensor.detach().requires_grad_()


def gradient_asked_for(outputs: Any, inputs: Any, grad_outputs: Any = None, **how: Any) -> Any:
    """Return the gradient that a loop takes for its loss.

    Where nothing has a graph, as while operations are tried, what depends row by row on the outputs.
    """
    given = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    if not torch.is_grad_enabled() or not any(t.requires_grad for t in given):
        asked = [inputs] if isinstance(inputs, Tensor) else list(inputs)
        return tuple(_by_rows(t, given) for t in asked)
    how |= {"create_graph": True, "retain_graph": True}
    return torch.autograd.grad(outputs, inputs, grad_outputs, **how)


def _by_rows(like: Tensor, outputs: Sequence[Tensor]) -> Tensor:
    found = torch.zeros_like(like)
    for rows in (t.detach().flatten(1).sum(1) for t in outputs if t.ndim and len(t) == len(like)):
        found = found + rows.to(found.dtype).reshape(-1, *[1] * (like.ndim - 1))
    return found


def gradient_by_weights(*args: Any, **how: Any) -> Any:
    """Refuse the gradient by weights that a loop takes for its loss: all samples share it."""
    raise NotImplementedError("a gradient by the weights is no sum over samples")


def surrogate(output: Tensor, gradient: Tensor) -> Tensor:
    """Return a loss whose gradient at a model's output is the given one."""
    return (output * gradient).sum()


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
        if isinstance(x, ParameterRef):
            return x.tensor()
        if not isinstance(x, OutputRef):
            return cast((values or {}).get(id(x), x))
        if x.call not in outputs:
            arguments = resolved(x.call.arguments, outputs, cast, values)
            outputs[x.call] = x.call.put_out(arguments)
        return outputs[x.call][x.place]

    return mapped(leaf, value)


def count_of(loss: TapedCall) -> float | None:
    """Return the denominator of one call of a criterion, if that is one of torch's."""
    criterion, arguments = loss.function, loss.arguments
    if criterion is nn.functional.cross_entropy:
        order = list(inspect.signature(criterion).parameters)
        arguments = {order[k] if isinstance(k, int) else k: v for k, v in arguments.items()}
        names = ("weight", "ignore_index")
        criterion = nn.CrossEntropyLoss(**{k: v for k, v in arguments.items() if k in names})
    target = arguments.get("target", arguments.get(1))
    if not isinstance(criterion, nn.Module) or not hasattr(criterion, "reduction"):
        return None
    if not isinstance(target, Tensor):
        return None
    try:
        counted = CriterionLoss(criterion, "sum").count((None, target))
    except ValueError:
        return None
    return None if counted is None else float(counted)


def ignored_label(loss: TapedCall) -> int | None:
    """Return the label that one call of a criterion does not count, if that is one of torch's."""
    named = [of for of, _ in loss.attributes[:1]] + [loss.arguments]
    given = [of["ignore_index"] for of in named if isinstance(of.get("ignore_index"), int)]
    torchs = loss.function in (nn.functional.cross_entropy, nn.functional.nll_loss)
    return given[-1] if given else -100 if torchs else None


def by_element(losses: Sequence[TapedCall]) -> bool:
    """Whether calls of a criterion of torch's, of other lengths, take a loss of each element."""
    function, attributes = losses[0].function, losses[0].attributes
    if isinstance(function, nn.Module):
        own = attributes[0][1] if attributes else vars(function)
        known = is_kind(function, PER_ELEMENT) and own.get("reduction") in ("mean", "sum")
        known = known and not any(True for _ in (*function.parameters(), *function.buffers()))
    else:
        known = function in ELEMENTWISE and losses[0].arguments.get("reduction", "mean") in (
            "mean",
            "sum",
        )
    shapes = [{tuple(t.shape) for t in tensors_in(shapes_of(loss.arguments))} for loss in losses]
    lengths = {shape[1:] for each in shapes for shape in each}
    return known and len(lengths) > 1 and all(len(each) == 1 for each in shapes)


def losses_in(output: Any) -> list[Tensor]:
    """Return the losses that a model put out: its `loss`, or every scalar with a graph."""
    named = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if isinstance(named, Tensor) and named.ndim == 0:
        return [named] if named.requires_grad else []
    return [t for t in tensors_out(output) if t.ndim == 0 and t.requires_grad]
