"""First values: what the large batch would have met in place of the state that a window moved.

They are computed when the window is judged, from what `MovingState` has noted in the loop.
"""

import math
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from gaccum_exp.audit.rerun.sandbox import NamedModules, sandbox
from gaccum_exp.audit.watch.moving_state import Made, MadeRef, MovingState, Use, writes
from gaccum_exp.audit.watch.slots import same_state
from gaccum_exp.core.nesting import mapped, tensors_in
from gaccum_exp.core.seeding import random_state_kept, set_random_states

CARRIED = "a value of an earlier micro-batch enters a later one's loss"
HIDDEN_STATE = (
    "values of earlier micro-batches that the model was given (a hidden state?) are taken as they were"
)


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

    def first_values(self, calls: Iterable[Any]) -> FirstValues:
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
        if id(ref.made.function) in moved:
            yield type(ref.made.function).__name__
        found: list[Any] = []
        mapped(found.append, [ref.made.args, ref.made.kwargs])
        for leaf in found:
            use = self._moving.all_uses.get(id(leaf))
            if isinstance(leaf, MadeRef):
                yield from self._movers(leaf, moved)
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
            writing = writes(getattr(made.function, "__name__", ""))

            def leaf(x: Any) -> Any:
                found = self._computed(x) if isinstance(x, MadeRef) else x
                use = self._moving.all_uses.get(id(x))
                first = None if use is None else self._moved_since(use)
                if first is not None:
                    found = first.kept
                return found.clone() if writing and isinstance(found, Tensor) else found

            args, kwargs = mapped(leaf, made.args), mapped(leaf, made.kwargs)
            device = next((t.device.type for t in tensors_in([args, kwargs])), "cpu")
            autocast = torch.autocast(device, made.autocast[1], enabled=made.autocast[0])
            with torch.no_grad(), random_state_kept(), autocast:
                self._done[id(made)] = [t.detach() for t in tensors_in(self._called(made, args, kwargs))]
        return self._done[id(made)][ref.place]

    def _called(self, made: Made, args: Any, kwargs: Any) -> Any:
        if not isinstance(made.function, nn.Module):
            return made.function(*args, **kwargs)
        with sandbox(NamedModules(made.function)):
            for slot in self._moving.beside[id(made.function)][1]:
                slot.put(slot.start(self._since))
            for module, training in made.training:
                module.training = training
            set_random_states(made.start)
            return made.function(*args, **kwargs)


def _tensors_of(calls: Iterable[Any]) -> set[int]:
    """Return the identities of the tensors that these calls were given."""
    return {id(leaf) for call in calls for leaf in tensors_in(list(call.arguments.values()))}
