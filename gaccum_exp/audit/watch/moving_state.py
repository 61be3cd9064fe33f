"""State that moves inside a window: a teacher's weights, a centre, a queue, a counter.

The large batch meets every state as it was when the window began. So the reruns of a window begin there,
each micro-batch run again meets what it met in the loop, and what came from a module beside the model (a
teacher's outputs) is computed again at its first state. Whether a state matters is left to the
experiments: it is held, and the gradient compared. What moved is found by versions and by values.
"""

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from gaccum_exp.audit.rerun.sandbox import NamedModules
from gaccum_exp.audit.watch.slots import Place, Slot, copied, places_of, same_mark, same_state
from gaccum_exp.core.module_state import version_of
from gaccum_exp.core.nesting import mapped, tensors_in

LOADS = frozenset(
    {"copy_", "__setitem__", "set_", "fill_", "zero_", "normal_", "uniform_", "random_", "bernoulli_"}
)
"""Operations that give a tensor new values, whatever it held: a loop may reuse one for its data."""


STARTS = 4
"""At how many places at most, where judged passes may begin, a state is kept."""


@dataclass(eq=False, slots=True)
class Made:
    """Making of a tensor outside the model: by a module beside it, or by an operation of the loop's."""

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


class MadeRef:
    """Tensor that something made: its place among what that puts out."""

    __slots__ = ("made", "place")

    def __init__(self, made: Made, place: int) -> None:
        self.made, self.place = made, place


@dataclass(slots=True)
class Use:
    """The use of a tensor in a micro-batch, as an argument that no call of the model has put out."""

    kept: Tensor
    """A copy of what it was."""
    version: int
    number: float
    """Of the micro-batch; infinite before the first one."""
    since: float
    """Number of the earliest micro-batch that it is made of."""
    ref: MadeRef | None
    """What made it; None: it is a state, or data."""
    uses: list["Use"]
    """All uses of the tensor since it was loaded, in order."""
    owner: str | None = None
    """Type of what it belongs to, if it is a state for sure."""
    written: bool = False
    """Whether an operation was seen to write to it since its use before."""


class MovingState:
    """What a loop's window met, and what of it has moved.

    Args:
        modules: of model and loss; the parameters that are stepped do not count.
        also: modules, tensors and objects with tensors that the loop uses and nothing shows.
    """

    def __init__(self, modules: NamedModules, also: Sequence[Any] = ()) -> None:
        self.modules, self._also = modules, also
        self.slots: list[Slot] = []
        """Of model, loss and what was given besides; from the window's first call on."""
        self.beside: dict[int, tuple[nn.Module, list[Slot]]] = {}
        """The modules beside the model that were called, and their state."""
        self.begin()

    def forget(self) -> None:
        """Let go of everything."""
        self.slots, self.beside = [], {}
        self.begin()

    def begin(self) -> None:
        """Forget the window before, but for copies of what did not move in it."""
        self._copies = {id(s.value): s for s in self.all_slots() if isinstance(s.value, Tensor)}
        self.slots, self.beside = [], {}
        self.given: list[Slot] = []
        self.loose: list[Slot] = []
        self._in_losses: set[int] = set()
        """Modules beside the model that a loss calls."""
        self._running: list[nn.Module] = []
        self._made: Any = WeakIdKeyDictionary()
        self._carried_from: Any = WeakIdKeyDictionary()
        self._uses: Any = WeakIdKeyDictionary()
        self._written: Any = WeakIdKeyDictionary()
        self.all_uses: dict[int, Use] = {}
        """By the identity of the copy."""
        self.own_moves: list[tuple[Made, list[Tensor], list[Any]]] = []
        """Calls of modules on the model's outputs that moved their own state: what they put out, by
        value and where that is on the tape."""
        self._moved: list[Slot] | None = None
        self._may_begin = 0
        self.judged_since = 0
        """Number of the last backward pass of the first micro-batch that is judged."""

    # In the loop.

    def before_call(self) -> list[tuple[Slot, Any]]:
        """Return, before a call of model or loss, the states that something else has moved."""
        if not self.slots:
            compared = {id(self.modules.parameters()[n]) for n in self.modules.compared}
            self.slots = [self._slot(*s) for m in self.modules for s in places_of(m, compared)]
            self.given = [self._slot(*s) for each in self._also for s in _places_in(each)]
            self.slots += self.given
            self.loose += self.given
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
        if id(module) not in self.beside:
            places = (place for m in module.modules() for place in places_of(m, set()))
            own = [self._slot(module, *place[1:]) for place in places]
            self.beside[id(module)] = module, own
        own = self.beside[id(module)][1]
        if inside and id(module) not in self._in_losses:
            self._in_losses.add(id(module))
            self.slots += own
            self.loose += own
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
        """Note what a module beside the model puts out, and of what; `start` None: a loss ran it."""
        self._running.pop()
        moved = [slot.look() for slot in self.beside[id(module)][1]]
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
            self.own_moves.append((made, [t.detach().clone() for t in outputs], refs))
            return
        for place, tensor in enumerate(outputs):
            self._made[tensor] = MadeRef(made, place)

    def run(
        self, function: Any, args: Any, kwargs: Any, from_model: Callable[[Tensor], Any], number: float
    ) -> Any:
        """Run an operation of the loop's, and note what it made of what, and what it wrote to."""
        if self._running:
            return function(*args, **kwargs)
        tensors = tensors_in([args, kwargs])
        known = any(t in self._made for t in tensors)
        refs = [ref for t in tensors if (ref := from_model(t)) is not None]
        since = self._made_since(tensors, min((ref.call.since for ref in refs), default=math.inf))
        name = getattr(function, "__name__", "")
        targets = tensors_in(args[:1]) if writes(name) else []
        versions = [version_of(t) for t in targets]
        made = self._made_by(function, args, kwargs, number) if known else None
        output = function(*args, **kwargs)
        for target, version in zip(targets, versions, strict=True):
            if target in self._made and made is not None:
                self._made[target] = MadeRef(made, 0)
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
                self._made[tensor] = MadeRef(made, place)
            elif since < math.inf:
                self._carried_from[tensor] = since
        return output

    def _made_by(self, function: Any, args: Any, kwargs: Any, number: float) -> Made:
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
        device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        kind = "cpu" if device is None else device.type
        autocast = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
        return Made(function, mapped(leaf, args), mapped(leaf, kwargs), autocast, since)

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
        uses: list[Use] = self._uses[tensor]
        use = Use(kept, version, number, since, ref, uses, written=written is not None)
        if uses and uses[-1].version == version:
            use.written |= uses[-1].written
        if uses and uses[0].version != version:
            use.owner = next(
                (type(slot.owner).__name__ for slot in self.all_slots() if slot.value is tensor),
                "Parameter" if isinstance(tensor, nn.Parameter) else None,
            )
        uses.append(use)
        self.all_uses[id(kept)] = use

    def all_slots(self) -> list[Slot]:
        """Return the state of model, loss, and all modules beside them."""
        return [*self.slots, *(slot for _, own in self.beside.values() for slot in own)]

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
            self._moved = list({id(slot): slot for slot in (*moved, *self.loose)}.values())
        with ExitStack() as stack:
            for slot in self._moved:
                stack.enter_context(slot.at(slot.start(self.judged_since)))
            yield


def writes(name: str) -> bool:
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
