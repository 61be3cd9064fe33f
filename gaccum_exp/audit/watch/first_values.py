"""First values: what the large batch would have met in place of the state that a window moved.

They are computed when the window is judged, from what `MovingState` has noted in the loop.
"""

import functools
import math
import sys
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from gaccum_exp.audit.rerun.sandbox import NamedModules, sandbox
from gaccum_exp.audit.result import Culprit, Mixing
from gaccum_exp.audit.watch.made_again import MadeAgain, NotMadeAgainError, UnlikeError
from gaccum_exp.audit.watch.moving_state import (
    DEEPEST,
    Made,
    MadeRef,
    MovingState,
    Use,
    made_from,
    writes,
)
from gaccum_exp.audit.watch.slots import same_state
from gaccum_exp.audit.watch.tape import OutputRef, TapedCall, TapedMicroBatch, made_of
from gaccum_exp.core.modes import eagerly
from gaccum_exp.core.nesting import mapped, tensors_in
from gaccum_exp.core.seeding import random_state_kept, same_host_state, set_random_states

P = ParamSpec("P")
T = TypeVar("T")
CARRIED = "a value of an earlier micro-batch enters a later one's loss"
HIDDEN_STATE = (
    "values of earlier micro-batches that the model was given (a hidden state?) are taken as they were"
)


def deeply(function: Callable[P, T]) -> Callable[P, T]:
    """Let a function call itself for every making, of which many may stand one upon the other."""

    @functools.wraps(function)
    def called(*args: P.args, **kwargs: P.kwargs) -> T:
        limit = sys.getrecursionlimit()
        sys.setrecursionlimit(limit + 20 * DEEPEST)
        try:
            return function(*args, **kwargs)
        finally:
            sys.setrecursionlimit(limit)

    return called


@dataclass(slots=True)
class FirstValues:
    """What the large batch would have met in place of what has moved."""

    values: dict[int, Tensor] = field(default_factory=dict)
    """By the identity of the copy on the tape."""
    owners: list[str] = field(default_factory=list)
    """Types of the modules or objects that moved."""
    given: list[str] = field(default_factory=list)
    """What is taken as it was, a clause each."""
    refused: list[str] = field(default_factory=list)
    """Why some could not be computed again, a clause each."""
    inside: list[Any] = field(default_factory=list)
    """Modules and objects, none of model's or loss's, that moved, and that a loss may run again."""
    modules: list[nn.Module] = field(default_factory=list)
    """All modules that a rerun of the window runs, and whose state moved."""
    mixing: list[Mixing] = field(default_factory=list)
    """Where samples are mixed beside the model."""
    drew: list[Culprit] = field(default_factory=list)
    """Modules beside the model that draw random numbers."""
    not_again: list[str] = field(default_factory=list)
    """Why something cannot be made for all samples at once, a clause each."""
    moves: dict[str, int] = field(default_factory=dict)
    """How often the state of a module or object of this type was seen to move in the window."""


class Replay:
    """The first values of one window, by running again what made the tensors that its calls met.

    Args:
        moving: what the window met.
        ends: number of the last backward pass of each of its micro-batches, in order.
        since: that of the first one that is judged.
    """

    def __init__(self, moving: MovingState, ends: Sequence[int], since: int) -> None:
        self._moving, self._ends, self._since = moving, ends, since
        moving.judged_since = since
        self._done: dict[int, list[Tensor]] = {}
        """What was computed again, by the identity of what makes it."""

    @deeply
    def first_values(self, calls: Sequence[Any]) -> FirstValues:
        """Compute what these calls, of which the judged losses are made, would have met."""
        calls, found = list(calls), FirstValues()
        entered = _tensors_of(calls)
        to_model = _tensors_of(call for call in calls if call.kind == "model")
        moved = {
            id(module)
            for module, slots in self._moving.beside.values()
            if any(s.moves or not same_state(s.now, s.first) for s in slots)
        }
        uses = {key: use for key, use in self._moving.all_uses.items() if key in entered}
        for key, use in uses.items():
            first = self._moved_since(use)
            if first is not None and use.owner is None and not use.written:
                found.refused.append("a tensor that is used again was written to, unseen")
                continue
            if first is None and self._micro_batch(use.since) < self._micro_batch(use.number):
                by_sample = key in to_model and use.kept.ndim > 1
                (found.given if by_sample else found.refused).append(
                    HIDDEN_STATE if by_sample else CARRIED
                )
            who = [use.owner or "Tensor"] if first is not None else list(self._movers(use.ref, moved))
            if not who:
                continue
            try:
                value = first.kept if first is not None else self._computed(use.ref)
            except Exception as error:  # a module of the loop's may refuse to run again
                found.refused.append(f"{who[0]} cannot be run again: {type(error).__name__}")
                continue
            if value.shape == use.kept.shape and torch.equal(value, use.kept):
                continue
            if first is None and self._micro_batch(use.number) <= self._micro_batch(self._since):
                found.refused.append(f"{who[0]}, run again, puts out something else")
                continue
            found.values[id(use.kept)] = value
            found.owners += who
        found.owners = list(dict.fromkeys(found.owners))
        found.inside = list({id(s.owner): s.owner for s in self._moving.loose if s.moves}.values())
        own = {id(module) for module in self._moving.modules}
        for owner in {id(s.owner): s.owner for s in self._moving.slots if s.moves}.values():
            if isinstance(owner, nn.Module):
                found.modules += [owner] if id(owner) in own else owner.modules()
        for slot in self._moving.all_slots():
            kind = type(slot.owner).__name__
            found.moves[kind] = max(found.moves.get(kind, 0), slot.moves)
        found.refused += self._of_own_moves(set(calls))
        found.refused = list(dict.fromkeys([*found.refused, *self._unseen()]))
        return found

    @deeply
    def made_again(
        self,
        columns: Iterable[Sequence[Any]],
        sizes: Sequence[int],
        dim: int,
        found: FirstValues,
    ) -> None:
        """Add what the large batch would have met of all that the loop made of its samples.

        Args:
            columns: corresponding calls of the micro-batches; None where one has none.
            sizes, dim: the samples of each micro-batch, and the dimension that counts them.
            found: gets it.
        """
        every: dict[tuple[int, ...], MadeAgain] = {}
        for column in columns:
            there = tuple(i for i, call in enumerate(column) if call is not None)
            calls = [column[i] for i in there]
            if there not in every:
                starts = [c.start for c in calls if c.start]
                drew = not all(same_host_state(starts[0], start) for start in starts[1:])
                own = [sizes[i] for i in there]
                every[there] = MadeAgain(self._moving, self, own, dim, drew_on_host=drew)
            for tensors in _corresponding_tensors(calls):
                self._make_again(tensors, every[there], found)
        for again in every.values():
            found.drew += again.drew

    def _make_again(self, tensors: Sequence[Tensor], again: MadeAgain, found: FirstValues) -> None:
        uses = [self._moving.all_uses.get(id(tensor)) for tensor in tensors]
        known = any(id(tensor) in found.values for tensor in tensors)
        if known or any(use is None for use in uses) or all(use.ref is None for use in uses if use):
            return
        nodes = [
            tensor if use is None or use.ref is None else use.ref
            for use, tensor in zip(uses, tensors, strict=True)
        ]
        try:
            others = again.rows(nodes, tensors)
        except UnlikeError:  # they have no dimension of samples in common: data
            return
        except NotMadeAgainError as error:
            found.not_again += [str(error)] if str(error) not in found.not_again else []
            return
        if others is None:
            return
        rows, why = others
        found.values |= {id(tensor): row for tensor, row in zip(tensors, rows, strict=True)}
        if why is None:
            found.owners += ["Tensor"] if "Tensor" not in found.owners else []
            found.moves.setdefault("Tensor", len(tensors))
            found.refused = [each for each in found.refused if each != CARRIED]
        elif why not in found.mixing:
            found.mixing.append(why)

    def value(self, node: Any) -> Tensor:
        """Return a tensor as the loop made it, at the first values of its state."""
        if isinstance(node, MadeRef):
            return self._computed(node)
        use = self._moving.all_uses.get(id(node))
        first = None if use is None else self._moved_since(use)
        tensor: Tensor = node if first is None else first.kept
        return tensor

    def called(self, made: Made, args: Any, kwargs: Any, around: Any = None) -> list[Tensor]:
        """Return what is made of these arguments instead.

        Of a module: in a precision, and within contexts (`around`).
        """
        if writes(getattr(made.function, "__name__", "")):
            args, kwargs = mapped(lambda x: x.clone() if isinstance(x, Tensor) else x, [args, kwargs])
        device = next((t.device.type for t in tensors_in([args, kwargs])), "cpu")
        autocast = torch.autocast(device, made.autocast[1], enabled=made.autocast[0])
        with torch.no_grad(), random_state_kept(), autocast:
            return [t.detach() for t in tensors_in(self._called(made, args, kwargs, around))]

    def _of_own_moves(self, calls: set[Any]) -> list[str]:
        """Return the modules, run on the model's outputs, whose own moves change what they put out."""
        found = []
        for made, outputs, refs in self._moving.own_moves:
            if not any(ref.call in calls for ref in refs):
                continue
            try:
                again = [self._computed(MadeRef(made, i)) for i in range(len(outputs))]
                same = all(map(same_state, again, outputs))
            except Exception:  # a module of the loop's may refuse to run again
                same = False
            if not same:
                found.append(f"{type(made.function).__name__} has a state that every pass of it moves")
        return found

    def _unseen(self) -> list[str]:
        """Return what was given besides, moves in the window, and enters nothing that is seen."""
        seen = {id(s.value) for _, slots in self._moving.beside.values() for s in slots}
        used = {
            use.owner for use in self._moving.all_uses.values() if self._moved_since(use) is not None
        }
        moved = (s for s in self._moving.given if s.outside and id(s.value) not in seen)
        kinds = dict.fromkeys(type(slot.owner).__name__ for slot in moved)
        said = "moves in the window, and what it enters is not seen"
        return [f"{kind} {said}" for kind in kinds if kind not in used]

    def _movers(self, ref: MadeRef | None, moved: set[int]) -> Iterator[str]:
        """Yield the types of the states that moved, and that a tensor was made by."""
        if ref is None:
            return
        for leaf in made_from(ref):
            use = self._moving.all_uses.get(id(leaf))
            if isinstance(leaf, MadeRef):
                if id(leaf.made.function) in moved:
                    yield type(leaf.made.function).__name__
            elif use is not None and self._moved_since(use) is not None:
                yield use.owner or "Tensor"

    def _micro_batch(self, number: float) -> float:
        """Return which micro-batch is in progress after so many backward passes."""
        return number if math.isinf(number) else bisect_left(self._ends, number)

    def _moved_since(self, use: Use) -> Use | None:
        """Return the first use of a state in the judged passes, if it moved between micro-batches."""
        if use.ref is not None:
            return None
        begun = self._micro_batch(self._since)
        first = next(u for u in use.uses if self._micro_batch(u.number) >= begun or u is use)
        before = begun if math.isinf(first.number) else self._micro_batch(first.number)
        moved = use.version != first.version and self._micro_batch(use.number) > before
        return first if moved and not math.isinf(use.number) else None

    def _computed(self, ref: MadeRef | None) -> Tensor:
        assert ref is not None
        made = ref.made
        if id(made) not in self._done:

            def leaf(x: Any) -> Any:
                return self.value(x) if isinstance(x, (Tensor, MadeRef)) else x

            args, kwargs = mapped(leaf, made.args), mapped(leaf, made.kwargs)
            self._done[id(made)] = self.called(made, args, kwargs)
        return self._done[id(made)][ref.place]

    def _called(self, made: Made, args: Any, kwargs: Any, around: Any = None) -> Any:
        if not isinstance(made.function, nn.Module):
            return made.function(*args, **kwargs)
        dtype, *contexts = around or (None,)
        with ExitStack() as stack:
            stack.enter_context(sandbox(NamedModules(made.function), dtype=dtype))
            for slot in self._moving.beside[id(made.function)][1]:
                slot.put(slot.start(self._since))
            for module, training in made.training:
                module.training = training
            set_random_states(made.start)
            for context in ([eagerly()] if contexts else []) + contexts:
                stack.enter_context(context)
            return made.function(*args, **kwargs)


def _tensors_of(calls: Iterable[Any]) -> set[int]:
    """Return the identities of the tensors that these calls were given."""
    return {id(leaf) for call in calls for leaf in tensors_in(list(call.arguments.values()))}


def _corresponding_tensors(calls: Sequence[Any]) -> Iterator[list[Tensor]]:
    """Yield the tensors that corresponding calls met, and what their arguments come from."""
    waiting, seen = [list(calls)], set[int]()
    while waiting:
        column = waiting.pop()
        if id(column[0]) in seen:
            continue
        seen.add(id(column[0]))
        every: list[list[Any]] = [[] for _ in column]
        for leaves, call in zip(every, column, strict=True):
            mapped(leaves.append, call.arguments)
        if len({len(leaves) for leaves in every}) > 1:
            continue
        for leaf in zip(*every, strict=True):
            if all(isinstance(x, Tensor) for x in leaf):
                yield list(leaf)
            elif all(isinstance(x, OutputRef) for x in leaf):
                waiting.append([x.call for x in leaf])


@deeply
def connect(micro_batches: Sequence[TapedMicroBatch], moving: MovingState) -> None:
    """Put on the tape what the loop makes, without a graph, of the model's outputs for a loss.

    A model may hold a teacher: what comes from its outputs comes from all samples' in the one pass. What
    is made of another micro-batch's outputs stays a copy.
    """
    for micro_batch in micro_batches:
        models, done = set(micro_batch.models), dict[int, TapedCall]()

        def on_tape(made: Made, order: int, done: dict[int, TapedCall] = done) -> TapedCall:
            def leaf(x: Any) -> Any:
                return OutputRef(on_tape(x.made, order), x.place) if isinstance(x, MadeRef) else x

            if id(made) not in done:
                arguments = {**dict(enumerate(mapped(leaf, made.args))), **mapped(leaf, made.kwargs)}
                function = functools.partial(_without_graph, made.function)
                call = TapedCall("between", function, arguments, order, autocast=made.autocast)
                call.outputs = list(made.outputs)
                call.graphs, call.marks = [False] * len(made.outputs), [None] * len(made.outputs)
                done[id(made)] = call
            return done[id(made)]

        for call in list(made_of(micro_batch.losses)):
            if call.kind == "model":
                continue

            def connected(x: Any, call: TapedCall = call, models: set[TapedCall] = models) -> Any:
                use = moving.all_uses.get(id(x))
                if use is None or use.ref is None or not use.ref.made.of_model:
                    return x
                taped = on_tape(use.ref.made, call.order)
                return OutputRef(taped, use.ref.place) if taped.sources() <= models else x

            call.arguments = mapped(connected, call.arguments)


def _without_graph(function: Any, *args: Any, **kwargs: Any) -> Any:
    with torch.no_grad():
        return function(*args, **kwargs)
