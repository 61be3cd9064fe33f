"""State that moves inside a window: a teacher's weights, a centre, a queue, a counter.

The large batch meets every state as it was when the window began. So the reruns of a window begin there,
each micro-batch run again meets what it met in the loop, and what came from a module beside the model (a
teacher's outputs) is computed again at its first state. Whether a state matters is left to the
experiments: it is held, and the gradient compared. What moved is found by versions and by values.
"""

import math
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from gaccum_exp.audit.rerun.sandbox import NamedModules, sandbox
from gaccum_exp.audit.rerun.slots import (
    Place,
    Slot,
    copied,
    places_of,
    same_mark,
    same_state,
    version_of,
)
from gaccum_exp.core.joined_samples import mapped, tensors_in
from gaccum_exp.core.seeding import random_state_kept, set_random_states

LOADS = frozenset(
    {"copy_", "__setitem__", "set_", "fill_", "zero_", "normal_", "uniform_", "random_", "bernoulli_"}
)
"""Operations that give a tensor new values, whatever it held: a loop may reuse one for its data."""


STARTS = 4
"""At how many places at most, where judged passes may begin, a state is kept."""
CARRIED = "a value of an earlier micro-batch enters a later one's loss"


@dataclass(eq=False, slots=True)
class _Made:
    """What made a tensor that is no output of the model: a module beside it, or an operation."""

    function: Callable[..., Any]
    args: Any
    """Tensors that something made are references, all others copies."""
    kwargs: Any
    autocast: tuple[bool, torch.dtype]
    since: float
    """Number of the earliest micro-batch that it is made of; infinite before the first one.

    Numbers are those of backward passes, and become micro-batches' where the window is judged."""
    training: list[tuple[nn.Module, bool]] = field(default_factory=list)
    """Of a module, the modes of all modules in it."""
    start: list[Any] = field(default_factory=list)
    """Of a module, the random states before it."""


class _Ref:
    __slots__ = ("made", "place")

    def __init__(self, made: _Made, place: int) -> None:
        self.made, self.place = made, place


@dataclass(slots=True)
class _Use:
    """The use of a tensor in a micro-batch, as an argument that no call of the model has put out."""

    kept: Tensor
    """A copy of what it was."""
    version: int
    number: float
    """Of the micro-batch; infinite before the first one."""
    since: float
    """Number of the earliest micro-batch that it is made of."""
    ref: _Ref | None
    """What made it; None: it is a state, or data."""
    uses: list["_Use"]
    """All uses of the tensor since it was loaded, in order."""
    owner: str | None = None
    """Type of what it belongs to, if it is a state for sure."""
    written: bool = False
    """Whether an operation was seen to write to it since its use before."""


@dataclass(slots=True)
class FirstValues:
    """What the large batch would have met in place of what has moved."""

    values: dict[int, Tensor] = field(default_factory=dict)
    """By the identity of the copy on the tape."""
    owners: list[str] = field(default_factory=list)
    """Types of the modules or objects that moved."""
    refused: list[str] = field(default_factory=list)
    """Why some could not be computed again, a clause each."""
    inside: list[Any] = field(default_factory=list)
    """Modules and objects, none of model's or loss's, that moved, and that a loss may run again."""
    modules: list[nn.Module] = field(default_factory=list)
    """All modules that a rerun of the window runs, and whose state moved."""
    moves: dict[str, int] = field(default_factory=dict)
    """How often the state of a module or object of this type was seen to move in the window."""


class MovingState:
    """What a loop's window met, and what of it has moved.

    Args:
        modules: of model and loss; the parameters that are stepped do not count.
        also: modules, tensors and objects with tensors that the loop uses and nothing shows.
    """

    def __init__(self, modules: NamedModules, also: Sequence[Any] = ()) -> None:
        self._modules, self._also = modules, also
        self.slots: list[Slot] = []
        """Of model, loss and what was given besides; from the window's first call on."""
        self._beside: dict[int, tuple[nn.Module, list[Slot]]] = {}
        """The modules beside the model that were called, and their state."""
        self.begin()

    def forget(self) -> None:
        """Let go of everything."""
        self.slots, self._beside = [], {}
        self.begin()

    def begin(self) -> None:
        """Forget the window before, but for copies of what did not move in it."""
        self._copies = {id(s.value): s for s in self._all_slots() if isinstance(s.value, Tensor)}
        self.slots, self._beside = [], {}
        self._given: list[Slot] = []
        self._loose: list[Slot] = []
        self._in_losses: set[int] = set()
        """Modules beside the model that a loss calls."""
        self._running: list[nn.Module] = []
        self._made: Any = WeakIdKeyDictionary()
        self._carried_from: Any = WeakIdKeyDictionary()
        self._uses: Any = WeakIdKeyDictionary()
        self._written: Any = WeakIdKeyDictionary()
        self._all_uses: dict[int, _Use] = {}
        """By the identity of the copy."""
        self._own_moves: list[tuple[_Made, list[Tensor], list[Any]]] = []
        """Calls of modules on the model's outputs that moved their own state: what they put out, by
        value and where that is on the tape."""
        self._moved: list[Slot] | None = None
        self._may_begin = self._since = 0
        self._ends: Sequence[int] = ()

    # In the loop.

    def before_call(self) -> list[tuple[Slot, Any]]:
        """Look before a call of model or loss; return the states that no rerun would bring about."""
        if not self.slots:
            compared = {id(self._modules.parameters()[n]) for n in self._modules.compared}
            self.slots = [self._slot(*s) for m in self._modules for s in places_of(m, compared)]
            self._given = [self._slot(*s) for each in self._also for s in _places_in(each)]
            self.slots += self._given
            self._loose += self._given
        for slot in self.slots:
            slot.outside |= self._look(slot)
        return [(slot, copied(slot.now)) for slot in self.slots if slot.outside]

    def after_call(self) -> None:
        """Look after a call of model or loss: what moved inside it moves again when it is run again."""
        for slot in self.slots:
            slot.look()

    def before_module(self, module: nn.Module, *, inside: bool) -> bool:
        """Look at a module before it runs, beside the model or `inside` a loss that calls it.

        Returns whether it is the outermost one.
        """
        if self._running:
            return False
        self._running.append(module)
        if id(module) not in self._beside:
            places = (place for m in module.modules() for place in places_of(m, set()))
            own = [self._slot(module, *place[1:]) for place in places]
            self._beside[id(module)] = module, own
        own = self._beside[id(module)][1]
        if inside and id(module) not in self._in_losses:
            self._in_losses.add(id(module))
            self.slots += own
            self._loose += own
        for slot in own:
            slot.outside |= self._look(slot)
        return True

    def may_begin(self, backwards: int) -> None:
        """Note that judged passes may begin here: another optimizer stepped, gradients were zeroed."""
        self._may_begin = backwards

    def _look(self, slot: Slot) -> bool:
        moved = slot.look()
        last = slot.starts[-1][0] if slot.starts else 0
        if slot.moves and last < self._may_begin and len(slot.starts) < STARTS:
            slot.starts.append((self._may_begin, copied(slot.now)))
        return moved

    def runs(self, module: nn.Module) -> bool:
        """Whether it is the outermost module beside the model that is running."""
        return self._running[-1:] == [module]

    def after_module(
        self,
        module: nn.Module,
        args: Any,
        kwargs: Any,
        output: Any,
        start: list[Any] | None,
        from_model: Callable[[Tensor], Any],
        number: float,
    ) -> None:
        """Note what a module beside the model has put out, and of what; `start` None: it ran inside."""
        self._running.pop()
        moved = [slot.look() for slot in self._beside[id(module)][1]]
        outputs = tensors_in(output)
        if start is None or not outputs:
            return
        refs = [ref for tensor in outputs if (ref := from_model(tensor)) is not None]
        if refs and not any(moved):
            return  # its operations are on the tape
        training = [(m, m.training) for m in module.modules()]
        made = self._made_by(module, args, kwargs, number)
        made.training, made.start = training, start
        if refs:
            self._own_moves.append((made, [t.detach().clone() for t in outputs], refs))
            return
        for place, tensor in enumerate(outputs):
            self._made[tensor] = _Ref(made, place)

    def run(
        self, function: Any, args: Any, kwargs: Any, from_model: Callable[[Tensor], Any], number: float
    ) -> Any:
        """Run an operation of the loop's, and note what it made of what, and what it wrote to."""
        if self._running:
            return function(*args, **kwargs)
        tensors = tensors_in([args, kwargs])
        known = any(t in self._made for t in tensors)
        since = self._made_since(tensors, number if any(map(from_model, tensors)) else math.inf)
        name = getattr(function, "__name__", "")
        targets = tensors_in(args[:1]) if _writes(name) else []
        versions = [version_of(t) for t in targets]
        made = self._made_by(function, args, kwargs, number) if known else None
        output = function(*args, **kwargs)
        for target, version in zip(targets, versions, strict=True):
            if target in self._made and made is not None:
                self._made[target] = _Ref(made, 0)
            elif version_of(target) != version and self._written.get(target) != "load":
                mixed = known or since < math.inf
                self._carried_from.pop(target, None)
                self._written[target] = "load" if name in LOADS and not mixed else "update"
                if mixed:  # what is made of it is made of this micro-batch, too
                    self._carried_from[target] = min(since, number)
        if targets:
            return output
        for place, tensor in enumerate(tensors_in(output)):
            if any(tensor is t for t in tensors) or from_model(tensor):
                continue
            if made is not None:
                self._made[tensor] = _Ref(made, place)
            elif since < math.inf:
                self._carried_from[tensor] = since
        return output

    def _made_by(self, function: Any, args: Any, kwargs: Any, number: float) -> _Made:
        def leaf(x: Any) -> Any:
            if not isinstance(x, Tensor):
                return x
            ref = self._made.get(x)
            if ref is not None:
                return ref
            kept = x.detach().clone()
            self.note(x, kept, number)
            return kept

        since = self._made_since(tensors_in([args, kwargs]), number)
        return _Made(function, mapped(leaf, args), mapped(leaf, kwargs), _autocast(), since)

    def _made_since(self, tensors: Sequence[Tensor], number: float) -> float:
        """Return the number of the earliest micro-batch that these are made of, or `number`."""
        made: list[float] = [self._made[t].made.since for t in tensors if t in self._made]
        made += [self._carried_from[t] for t in tensors if t in self._carried_from]
        return min([number, *made])

    def note(self, tensor: Tensor, kept: Tensor, number: float) -> None:
        """Note an argument of model, loss or an operation, and the copy that is kept of it."""
        ref, version, written = (
            self._made.get(tensor),
            version_of(tensor),
            self._written.pop(tensor, None),
        )
        since = self._carried_from.get(tensor, number) if ref is None else ref.made.since
        if written == "load" or tensor not in self._uses:
            self._uses[tensor] = []
        uses: list[_Use] = self._uses[tensor]
        use = _Use(kept, version, number, since, ref, uses, written=written is not None)
        if uses and uses[-1].version == version:
            use.written |= uses[-1].written
        if uses and uses[0].version != version:
            use.owner = self._owner(tensor)
        uses.append(use)
        self._all_uses[id(kept)] = use

    def _owner(self, tensor: Tensor) -> str | None:
        """Return the type of what a tensor belongs to, if it is a state for sure."""
        for slot in self._all_slots():
            if slot.value is tensor:
                return type(slot.owner).__name__
        return "Parameter" if isinstance(tensor, nn.Parameter) else None

    def _all_slots(self) -> list[Slot]:
        return [*self.slots, *(slot for _, own in self._beside.values() for slot in own)]

    def _slot(self, owner: Any, registry: dict[str, Any] | None, key: str, value: Any) -> Slot:
        slot = Slot(owner, registry, key, value, None)
        slot.look()
        last = self._copies.get(id(value))
        same = last is not None and last.value is value and same_mark(last.begun, slot.begun)
        slot.first = last.first if last is not None and same else copied(value)
        return slot

    # When the window is judged.

    @contextmanager
    def as_at_first(self) -> Iterator[None]:
        """Put everything that moved as it was when the judged passes began."""
        if self._moved is None:
            moved = [s for s in self.slots if s.moves or not same_state(s.now, s.first)]
            self._moved = list({id(slot): slot for slot in (*moved, *self._loose)}.values())
        with ExitStack() as stack:
            for slot in self._moved:
                stack.enter_context(slot.at(slot.start(self._since)))
            yield

    def first_values(self, calls: Iterable[Any], ends: Sequence[int], since: int) -> FirstValues:
        """Compute what the large batch would have met in place of what has moved.

        Args:
            calls: of the tape, those that the judged losses are made of.
            ends: number of the last backward pass of each of the window's micro-batches, in order.
            since: that of the first one that is judged.
        """
        self._ends, self._since = ends, since
        entered = {id(leaf) for call in calls for leaf in tensors_in(list(call.arguments.values()))}
        found, done = FirstValues(), dict[int, list[Tensor]]()
        moved = {
            id(module)
            for module, slots in self._beside.values()
            if any(s.moves or not same_state(s.now, s.first) for s in slots)
        }
        uses = [use for key, use in self._all_uses.items() if key in entered]
        for use in uses:
            first = self._moved_since(use)
            if first is not None and use.owner is None and not use.written:
                found.refused.append("a tensor that is used again was written to, unseen")
                continue
            if first is None and self._micro_batch(use.since) < self._micro_batch(use.number):
                found.refused.append(CARRIED)
            who = [use.owner or "Tensor"] if first is not None else list(self._movers(use.ref, moved))
            if not who:
                continue
            try:
                value = first.kept if first is not None else self._computed(use.ref, done)
            except Exception as error:  # a module of the loop's may refuse to run again
                found.refused.append(f"{who[0]} cannot be run again: {type(error).__name__}")
                continue
            if value.shape == use.kept.shape and torch.equal(value, use.kept):
                continue
            if first is None and self._micro_batch(use.number) <= self._micro_batch(since):
                found.refused.append(f"{who[0]}, run again, puts out something else")
                continue
            found.values[id(use.kept)] = value
            found.owners += who
        found.owners = list(dict.fromkeys(found.owners))
        found.inside = list({id(s.owner): s.owner for s in self._loose if s.moves}.values())
        own = {id(module) for module in self._modules}
        for owner in {id(s.owner): s.owner for s in self.slots if s.moves}.values():
            if isinstance(owner, nn.Module):
                found.modules += [owner] if id(owner) in own else owner.modules()
        for slot in self._all_slots():
            kind = type(slot.owner).__name__
            found.moves[kind] = max(found.moves.get(kind, 0), slot.moves)
        found.refused += self._of_own_moves(set(calls), done)
        found.refused = list(dict.fromkeys([*found.refused, *self._unseen()]))
        return found

    def _of_own_moves(self, calls: set[Any], done: dict[int, list[Tensor]]) -> list[str]:
        """Return the modules, run on the model's outputs, whose own moves change what they put out."""
        found = []
        for made, outputs, refs in self._own_moves:
            if not any(ref.call in calls for ref in refs):
                continue
            try:
                again = [self._computed(_Ref(made, i), done) for i in range(len(outputs))]
                same = all(map(same_state, again, outputs))
            except Exception:  # a module of the loop's may refuse to run again
                same = False
            if not same:
                found.append(f"{type(made.function).__name__} has a state that every pass of it moves")
        return found

    def _unseen(self) -> list[str]:
        """Return what was given besides, moves in the window, and enters nothing that is seen."""
        seen = {id(s.value) for _, slots in self._beside.values() for s in slots}
        used = {use.owner for use in self._all_uses.values() if self._moved_since(use) is not None}
        moved = (s for s in self._given if s.outside and id(s.value) not in seen)
        kinds = dict.fromkeys(type(slot.owner).__name__ for slot in moved)
        said = "moves in the window, and what it enters is not seen"
        return [f"{kind} {said}" for kind in kinds if kind not in used]

    def _movers(self, ref: _Ref | None, moved: set[int]) -> Iterator[str]:
        """Yield the types of the states that moved, and that a tensor was made by."""
        if ref is None:
            return
        if id(ref.made.function) in moved:
            yield type(ref.made.function).__name__
        found: list[Any] = []
        mapped(found.append, [ref.made.args, ref.made.kwargs])
        for leaf in found:
            use = self._all_uses.get(id(leaf))
            if isinstance(leaf, _Ref):
                yield from self._movers(leaf, moved)
            elif use is not None and self._moved_since(use) is not None:
                yield use.owner or "Tensor"

    def _micro_batch(self, number: float) -> float:
        """Return which micro-batch is in progress after so many backward passes."""
        return number if math.isinf(number) else bisect_left(self._ends, number)

    def _moved_since(self, use: _Use) -> _Use | None:
        """Return the first use of a state in the judged passes, if it moved between micro-batches."""
        if use.ref is not None:
            return None
        begun = self._micro_batch(self._since)
        first = next(u for u in use.uses if self._micro_batch(u.number) >= begun or u is use)
        before = begun if math.isinf(first.number) else self._micro_batch(first.number)
        moved = use.version != first.version and self._micro_batch(use.number) > before
        return first if moved and not math.isinf(use.number) else None

    def _computed(self, ref: _Ref | None, done: dict[int, list[Tensor]]) -> Tensor:
        assert ref is not None
        made = ref.made
        if id(made) not in done:
            writing = _writes(getattr(made.function, "__name__", ""))

            def leaf(x: Any) -> Any:
                found = self._computed(x, done) if isinstance(x, _Ref) else x
                use = self._all_uses.get(id(x))
                first = None if use is None else self._moved_since(use)
                if first is not None:
                    found = first.kept
                return found.clone() if writing and isinstance(found, Tensor) else found

            args, kwargs = mapped(leaf, made.args), mapped(leaf, made.kwargs)
            device = next((t.device.type for t in tensors_in([args, kwargs])), "cpu")
            autocast = torch.autocast(device, made.autocast[1], enabled=made.autocast[0])
            with torch.no_grad(), random_state_kept(), autocast:
                done[id(made)] = [t.detach() for t in tensors_in(self._called(made, args, kwargs))]
        return done[id(made)][ref.place]

    def _called(self, made: _Made, args: Any, kwargs: Any) -> Any:
        if not isinstance(made.function, nn.Module):
            return made.function(*args, **kwargs)
        with sandbox(NamedModules(made.function)):
            for slot in self._beside[id(made.function)][1]:
                slot.put(slot.start(self._since))
            for module, training in made.training:
                module.training = training
            set_random_states(made.start)
            return made.function(*args, **kwargs)


def _writes(name: str) -> bool:
    """Whether an operation of this name writes to its first argument."""
    if name.endswith("__"):
        others = ("__invert__", "__index__", "__int__")
        return name == "__setitem__" or (name.startswith("__i") and name not in others)
    return name.endswith("_")


def _places_in(value: Any, owner: Any = None, depth: int = 3) -> Iterator[Place]:
    """Yield the state in something that was given besides."""
    owner = value if owner is None else owner
    if isinstance(value, Tensor):
        yield owner, None, "", value
    elif isinstance(value, nn.Module):
        for module in value.modules():
            yield from ((owner, *place[1:]) for place in places_of(module, set()))
    elif depth:
        inside: Iterable[Any] = ()
        if isinstance(value, (list, tuple, deque)):
            inside = value
        elif isinstance(value, dict):
            inside = value.values()
        elif not isinstance(value, type):
            inside = getattr(value, "__dict__", {}).values()
        for each in inside:
            yield from _places_in(each, owner, depth - 1)


def _autocast() -> tuple[bool, torch.dtype]:
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    kind = "cpu" if device is None else device.type
    return torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
