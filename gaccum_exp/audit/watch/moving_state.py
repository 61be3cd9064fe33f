"""State that moves inside a window: a teacher's weights, a centre, a queue, a counter.

The large batch meets every state as it was when the window began. So the reruns of a window begin there,
each micro-batch run again meets what it met in the loop, and what came from a module beside the model (a
teacher's outputs) is computed again at its first state. Whether a state matters is left to the
experiments: it is held, and the gradient compared. What moved is found by versions and by values.
"""

import math
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from gaccum_exp.audit.rerun.sandbox import NamedModules
from gaccum_exp.audit.watch.scalars import calling_frame
from gaccum_exp.audit.watch.slots import (
    Place,
    Slot,
    copied,
    enclosed_by,
    places_of,
    same_mark,
    same_state,
)
from gaccum_exp.audit.watch.user_functions import calls_unreported
from gaccum_exp.core.module_state import version_of
from gaccum_exp.core.nesting import mapped, tensors_in

LOADS = frozenset(
    {"copy_", "__setitem__", "set_", "fill_", "zero_", "normal_", "uniform_", "random_", "bernoulli_"}
)
"""Operations that give a tensor new values, whatever it held: a loop may reuse one for its data."""


DRAWS = re.compile(
    r"rand|normal|bernoulli|multinomial|poisson|dropout|uniform|exponential|_sample_dir|_gamma"
)
"""What occurs in the names of operations that draw random numbers."""
DEEPEST = 256
"""Makings one upon the other that are made again; what those make that stand below is data."""
SMALL = 1 << 18
"""Elements at most of an output of the model's that is kept for what the loop makes of it."""
UNSEEN = frozenset(
    {"item", "tolist", "numpy", "__float__", "__int__", "__bool__", "__format__", "__repr__"}
)
"""Operations that make no tensor, and are frequent."""
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
    beside: bool = False
    """Whether a module beside the model took part in it."""
    depth: int = 1
    """How many makings stand one upon the other."""
    of_model: bool = False
    """Whether it is made of the model's outputs themselves; else of copies alone."""
    outputs: list[tuple[tuple[int, ...], torch.dtype]] = field(default_factory=list)
    """Shape and type of each tensor that it puts out."""
    source: tuple[str, int] = ("", 0)
    """File and line in which the loop does it."""


class MadeRef:
    """Tensor that something made: its place among what that puts out."""

    __slots__ = ("made", "place")

    def __init__(self, made: Made, place: int) -> None:
        self.made, self.place = made, place


def made_from(value: Any) -> Iterator[Any]:
    """Yield the leaves of a nesting, and of all that these are made of, each making's once."""
    waiting, seen = [value], set[int]()
    while waiting:
        found: list[Any] = []
        mapped(found.append, waiting.pop())
        for leaf in found:
            yield leaf
            if isinstance(leaf, MadeRef) and id(leaf.made) not in seen:
                seen.add(id(leaf.made))
                waiting.append([leaf.made.args, leaf.made.kwargs])


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
    drawn: bool = False
    """Whether an operation of the loop's drew it at random."""


class MovingState:
    """What a loop's window met, and what of it has moved.

    Args:
        modules: of model and loss; the parameters that are stepped do not count.
        also: modules, tensors and objects with tensors that the loop uses and nothing shows.
        loss: a function, which may hold tensors and numbers.
    """

    def __init__(self, modules: NamedModules, also: Sequence[Any] = (), loss: Any = None) -> None:
        self.modules, self._also, self._loss = modules, also, loss
        self.loading = 0
        """How many data loaders are at work: what they do is data, and no arithmetic of the loop's."""
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
        self._of_weights: Any = WeakIdKeyDictionary()
        """What the loop takes of parameters: of no sample, and not kept."""
        self._drawn: Any = WeakIdKeyDictionary()
        self._filled: Any = WeakIdKeyDictionary()
        """Tensors that are filled part by part before they are used: data."""
        self._numbers: dict[float, MadeRef] = {}
        """What numbers were read from, by value."""
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
            enclosed = [self._slot(*place) for place in enclosed_by(self._loss)]
            self.slots += enclosed
            self.loose += [*self.given, *enclosed]
        for slot in self.slots:
            slot.outside |= self._look(slot)
        return [(slot, copied(slot.now)) for slot in self.slots if slot.outside]

    def include(self, module: nn.Module) -> None:
        """Look at a module, too, that the loss turns out to be."""
        self.modules.include(module)
        self.slots += [self._slot(*s) for m in module.modules() for s in places_of(m, set())]

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
        made = self._made_by(module, args, kwargs, number, number)
        made.training, made.start, made.beside = training, start, True
        made.outputs = [(tuple(t.shape), t.dtype) for t in outputs]
        if refs:
            self.own_moves.append((made, [t.detach().clone() for t in outputs], refs))
            return
        for place, tensor in enumerate(outputs):
            self._made[tensor] = MadeRef(made, place)

    def run(
        self, function: Any, args: Any, kwargs: Any, from_model: Callable[[Tensor], Any], number: float
    ) -> Any:
        """Run an operation of the loop's, and note what it made of what, and what it wrote to."""
        name = getattr(function, "__name__", "")
        # A gradient is none of the samples' values, and cannot be taken again without its graph.
        if self._running or self.loading or function is torch.autograd.grad:
            return function(*args, **kwargs)
        tensors = tensors_in([args, kwargs])
        origins = any(map(from_model, tensors))
        if name in UNSEEN:
            output = function(*args, **kwargs)
            if name in ("item", "__float__") and not origins:
                self._note_number(output, args, number)
            return output
        beside = any(self._made[t].made.beside for t in tensors if t in self._made)
        of_weights = any(isinstance(t, nn.Parameter) or t in self._of_weights for t in tensors)
        small = not origins or all(t.numel() <= SMALL for t in tensors)
        recorded = beside or (bool(tensors) and small and not of_weights)
        refs = [ref for t in tensors if (ref := from_model(t)) is not None]
        since = self._made_since(tensors, min((ref.call.since for ref in refs), default=math.inf))
        base = number if beside else since
        if writes(name):
            kept = recorded and (beside or not origins)
            return self._run_writing(function, args, kwargs, number, (since, base, kept))
        output = function(*args, **kwargs)
        every = tensors_in(output)
        new = [t for t in every if not (any(t is x for x in tensors) or from_model(t))]
        if DRAWS.search(name):
            self._drawn.update((tensor, True) for tensor in new)
            recorded = beside
        if origins and any(t.requires_grad for t in new):
            recorded = beside  # it is on the tape
        made = None
        if recorded and new:
            with calls_unreported():  # they would take longer
                own = None if beside else from_model
                made = self._made_by(function, args, kwargs, number, base, own)
                made.outputs = [(tuple(t.shape), t.dtype) for t in every]
        for place, tensor in enumerate(every):
            if not any(tensor is t for t in new):
                continue
            if made is not None:
                self._made[tensor] = MadeRef(made, place)
            elif since < math.inf:
                self._carried_from[tensor] = since
            if of_weights:
                self._of_weights[tensor] = True
        return output

    def _run_writing(
        self, function: Any, args: Any, kwargs: Any, number: float, how: tuple[float, float, bool]
    ) -> Any:
        """Run an operation that writes to its first argument."""
        since, base, recorded = how
        targets = tensors_in(args[:1])
        before = [(version_of(t), t in self._uses) for t in targets]
        others = tensors_in([args[1:], kwargs])
        # What is seen for the first time is data as it comes, or an average of weights, and large.
        recorded &= any(t in self._uses or t in self._made for t in targets) or any(
            t in self._made for t in others
        )
        made = self._made_by(function, args, kwargs, number, base) if recorded else None
        output = function(*args, **kwargs)
        for target, (version, used) in zip(targets, before, strict=True):
            if target in self._made or version_of(target) != version:
                self._wrote(function, args, target, made, used, since, number)
        return output

    def _wrote(
        self,
        function: Any,
        args: Any,
        target: Tensor,
        made: Made | None,
        used: bool,
        since: float,
        number: float,
    ) -> None:
        """Note that an operation of the loop's wrote to a tensor, and whether that is new data."""
        name, whole = function.__name__, target
        if target._base is not None and target._base in self._uses:
            whole, made = target._base, None
            used = len(self._uses[whole]) > 1  # once where the view was taken
        uses = self._uses.get(whole, ())
        of_itself = made is not None and self._holds([made.args[1:], made.kwargs], uses)
        mixed = since < math.inf or of_itself or (made is not None and made.beside)
        part = whole.numel() > target.numel()
        part |= name == "__setitem__" and target.ndim > 0 and _is_part(args[1])
        loads = name in LOADS and not mixed
        if loads and part and not used:  # the loop fills it before it uses it
            self._filled[whole] = True
        if loads and (not part or whole in self._filled):
            self._made.pop(whole, None)
            self._written[whole] = "load"
            return
        # Of this micro-batch alone it is no state, but data that the loop works on in place.
        data = all(_begun(use.number) == _begun(number) for use in uses)
        data &= whole not in self._written and not since < math.inf
        if made is not None and (target in self._made or (data and name not in LOADS)):
            made.outputs = [(tuple(target.shape), target.dtype)]
            self._made[target] = MadeRef(made, 0)
            return
        self._made.pop(whole, None)
        if self._written.get(whole) != "load":
            self._carried_from.pop(whole, None)
            self._written[whole] = "update"
            if since < math.inf:  # what is made of it is made of this micro-batch, too
                self._carried_from[whole] = min(since, number)

    def _note_number(self, value: float, args: Any, number: float) -> None:
        """Note the tensor that a number was read from: it may be computed with."""
        if type(value) is float and not value.is_integer() and args[0] not in self._of_weights:
            made = self._made_by(_as_tensor, args[:1], {}, number, math.inf)
            made.outputs = [((), torch.float64)]
            self._numbers[value] = MadeRef(made, 0)

    def _holds(self, value: Any, uses: Any) -> bool:
        """Whether a nesting of what something is made of holds the tensor of these uses."""
        for leaf in made_from(value):
            use = self.all_uses.get(id(leaf)) if isinstance(leaf, Tensor) else None
            if use is not None and use.uses is uses:
                return True
        return False

    def _made_by(
        self,
        function: Any,
        args: Any,
        kwargs: Any,
        number: float,
        base: float,
        from_model: Callable[[Tensor], Any] | None = None,
    ) -> Made:
        """Note a making; `base` is the number of the micro-batch that it is of, where its arguments are
        of none."""
        of_model, depth = False, 0

        def leaf(x: Any) -> Any:
            nonlocal of_model, depth
            if not isinstance(x, Tensor):
                return self._numbers.get(x, x) if type(x) is float else x
            ref, origin = self._made.get(x), from_model(x) if from_model else None
            deep = ref is not None and ref.made.depth >= DEEPEST and not ref.made.of_model
            if ref is not None and (from_model or not ref.made.of_model) and not deep:
                depth = max(depth, ref.made.depth)
                of_model |= ref.made.of_model
                return ref
            if origin is not None and origin.graphless:
                of_model = True
                return origin
            last = self._uses[x][-1] if x in self._uses else None
            known = last is not None and (last.number, last.version) == (number, version_of(x))
            if last is not None and known and last.ref is None and x not in self._written:
                return last.kept
            kept = x.detach().clone()
            self.note(x, kept, number)
            return kept

        tensors = tensors_in([args, kwargs])
        since = self._made_since(tensors, base)
        beside = any(self._made[t].made.beside for t in tensors if t in self._made)
        frame = calling_frame()
        source = ("", 0) if frame is None else (frame.f_code.co_filename, frame.f_lineno)
        device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        kind = "cpu" if device is None else device.type
        autocast = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
        given = mapped(leaf, list(args)), mapped(leaf, kwargs)
        return Made(
            function,
            *given,
            autocast,
            since,
            beside=beside,
            source=source,
            depth=depth + 1,
            of_model=of_model,
        )

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
        use.drawn = tensor in self._drawn
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


def _as_tensor(tensor: Tensor) -> Tensor:
    """Return the only number of a tensor, as wide as Python's."""
    return tensor.detach().double().reshape(())


def _begun(number: float) -> float:
    """Return the number of a micro-batch; before the window's first call that is the first one's."""
    return 0 if math.isinf(number) else number


def _is_part(index: Any) -> bool:
    """Whether an index may leave some of a tensor out."""
    every = index if isinstance(index, tuple) else (index,)
    return any(each is not Ellipsis and each is not None and each != slice(None) for each in every)


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
