"""Attributes as trees that can be written, and put back into the objects that hold them.

Numbers, strings, tensors, arrays, and containers of them are kept as they are. A parameter or a part of
the training that stands among them is kept by its name, a random generator by its state. Of any other
object only the place is: `unkept` finds out whether one of these moves.
"""

import random
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gaccum_exp.core.module_state import own_attributes, refill
from gaccum_exp.train.checkpoint.encoding import FACTORIES, Held

PLAIN = frozenset((bool, int, float, complex, str, bytes, type(None)))
LONGEST = 1_000_000
"""Entries of an attribute, those of lists inside it included: a longer one is data, and not state."""
PARAMETER, PART, GENERATOR = "parameter", "part", "generator"
THERE = Held("there")
"""Stands for an object that stays as it is where the attribute is put back."""
Names = Mapping[int, tuple[str, str]]
"""By identity, the kind and the name of what is kept by its name."""
Objects = Mapping[tuple[str, str], Any]
"""The same, the other way round."""
Left = list[tuple[Any, Any]]
"""Objects of which only the place is kept, each with that place."""

_SEVERAL = (list, tuple, deque)
_UNORDERED = (set, frozenset)
_MAPPINGS = (dict, OrderedDict, defaultdict, Counter)
_CONTAINERS = frozenset((*_SEVERAL, *_UNORDERED, *_MAPPINGS, torch.Size))
_ELSEWHERE = {"state", "param_groups"}
"""Attributes of an optimizer that are kept by themselves."""


def attributes_of(of: Any, names: Names) -> tuple[dict[str, Any], dict[str, Left]]:
    """Return an object's attributes as trees, values not copied, and what is left out of each."""
    kept: dict[str, Any] = {}
    left: dict[str, Left] = {}
    skipped = _ELSEWHERE if isinstance(of, Optimizer) else ()
    for key, value in own_attributes(of).items():
        if key in skipped:
            continue
        walk = _Walk(names)
        try:
            tree = walk.tree(value, key)
        except Exception:  # a list inside itself, or whatever a user's object answers
            tree, walk.left = THERE, [(key, value)]
        if tree is not THERE:
            kept[key] = tree
        if walk.left:
            left[key] = walk.left
    return kept, left


class _WholeError(Exception):
    """An attribute cannot be taken apart."""


class _Walk:
    """Takes one attribute apart."""

    def __init__(self, names: Names) -> None:
        self._names, self._room = names, LONGEST
        self.left: Left = []

    def tree(self, value: Any, where: Any) -> Any:
        """Return what is kept of a value that stands at a place."""
        kind = type(value)
        if kind in PLAIN:
            return value
        if id(value) in self._names:
            return Held(*self._names[id(value)])
        if kind in _CONTAINERS:
            return self._container(value, where)
        if _is_value(value):
            return value
        state = _state_of(value)
        if state is not None:
            return Held(GENERATOR, state)
        self.left.append((where, value))
        return THERE

    def _container(self, value: Any, where: Any) -> Any:
        self._room -= len(value)
        if self._room < 0:
            raise _WholeError
        kind, is_mapping = type(value), isinstance(value, dict)
        if kind is defaultdict and value.default_factory not in FACTORIES:
            raise _WholeError
        if set(map(type, value)) <= PLAIN and (
            not is_mapping or set(map(type, value.values())) <= PLAIN
        ):
            return value
        if is_mapping:
            items = {self._key(key): self.tree(item, (where, key)) for key, item in value.items()}
            return filled(value, items)
        if kind in _UNORDERED:
            return kind(map(self._key, value))
        return filled(value, [self.tree(item, (where, at)) for at, item in enumerate(value)])

    def _key(self, key: Any) -> Any:
        """Return what is kept of a key of a dictionary, or of an element of a set."""
        if type(key) in (*PLAIN, torch.Size) or (not isinstance(key, Tensor) and _is_value(key)):
            return key
        if id(key) in self._names:
            return Held(*self._names[id(key)])
        if type(key) is tuple:
            return tuple(map(self._key, key))
        raise _WholeError


def filled(like: Any, content: Any) -> Any:
    """Return a new container of the type of this one: a mapping, or one of values in order."""
    kind = type(like)
    if kind is deque:
        return deque(content, maxlen=like.maxlen)
    if kind is defaultdict:
        return defaultdict(like.default_factory, content)
    return content if kind in (dict, list) else kind(content)


def copied(tree: Any, made: dict[int, Any] | None = None) -> Any:
    """Return a tree with copies of its tensors, arrays and containers: those of a model move on.

    Args:
        tree: as `attributes_of` makes them.
        made: the copies so far, by what they are of: a tensor that stands at two places is one.
    """
    made = {} if made is None else made
    kind = type(tree)
    if isinstance(tree, Tensor) or kind is np.ndarray:
        if id(tree) not in made:
            made[id(tree)] = tree.detach().clone() if isinstance(tree, Tensor) else tree.copy()
        return made[id(tree)]
    if kind is Held:
        return tree if type(tree.of) in PLAIN else Held(tree.kind, copied(tree.of, made))
    if isinstance(tree, dict) and kind in _CONTAINERS:
        return filled(tree, {key: copied(item, made) for key, item in tree.items()})
    if kind in _SEVERAL:
        flat = set(map(type, tree)) <= PLAIN
        return filled(tree, list(tree) if flat else [copied(item, made) for item in tree])
    return set(tree) if kind is set else tree


class PuttingBack:
    """Puts values back into what is there, into each once: what is one there may be two by now.

    Args:
        objects: what is known by name. No value is written into one.
    """

    def __init__(self, objects: Objects) -> None:
        self._objects = objects
        self._taken = set(map(id, objects.values()))
        self._after: dict[int, Any] = {}

    @torch.no_grad()
    def attributes(self, of: Any, kept: Mapping[str, Any]) -> None:
        """Put back what `attributes_of` has returned; it stays as it is, and can be put back again."""
        own = vars(of)
        for key, before in kept.items():
            now = own.get(key)
            after = self.restored(now, before)
            if after is not now or key not in own:
                own[key] = after

    def restored(self, now: Any, before: Any) -> Any:
        """Return what belongs where `now` stands: itself with what was kept, where it can take that."""
        kind = type(before)
        if kind is Held:
            if before.kind == GENERATOR:
                _set_generator(now, before.of)
                return now
            return self._objects.get((before.kind, before.of), now)
        if isinstance(before, (Tensor, np.ndarray)):
            if id(before) not in self._after:
                into_it = self._may_take(now) and _written(now, before)
                self._after[id(before)] = now if into_it else copied(before)
            return self._after[id(before)]
        if kind not in _CONTAINERS:
            return before
        alike = type(now) is kind and (kind is not deque or now.maxlen == before.maxlen)
        free = alike and self._may_take(now)
        content = self._content(now if alike else kind(), before)
        if alike and _same(now, content):
            return now
        if not free or kind in (tuple, frozenset, torch.Size):
            return filled(before, content)
        refill(now, list(content), list(content.values()) if isinstance(content, dict) else [])
        return now

    def _content(self, now: Any, before: Any) -> Any:
        """Return what a container holds when it is put back: a dictionary, a set or a list."""
        if isinstance(before, dict):
            return {
                (key := self.restored(None, k)): self.restored(now.get(key), item)
                for k, item in before.items()
            }
        if type(before) in _UNORDERED:
            return {self.restored(None, item) for item in before}
        there = [*now, *[None] * (len(before) - len(now))]
        return [self.restored(old, item) for old, item in zip(there, before, strict=False)]

    def _may_take(self, now: Any) -> bool:
        """Whether nothing was written into it yet, nor is it somebody else's."""
        free = id(now) not in self._taken
        self._taken.add(id(now))
        return free


def _same(container: Any, content: Any) -> bool:
    """Whether a container holds this, tensors and the like as the same objects."""
    if isinstance(content, set):
        return bool(container == content)
    if len(container) != len(content):
        return False
    if isinstance(content, dict):
        there = [*container, *container.values()]
        wanted = [*content, *content.values()]
    else:
        there, wanted = list(container), content
    alike = (
        a is b or (type(a) is type(b) and type(a) in PLAIN and a == b)
        for a, b in zip(there, wanted, strict=True)
    )
    return all(alike)


def _written(now: Any, before: Any) -> bool:
    """Write a tensor's or an array's value into the one that is there, if it has its shape and type."""
    if isinstance(now, np.ndarray) and isinstance(before, np.ndarray):
        alike = now.shape == before.shape and now.dtype == before.dtype and now.flags.writeable
        if alike:
            np.copyto(now, before)
        return alike
    if not isinstance(now, Tensor) or not isinstance(before, Tensor):
        return False
    if now.shape != before.shape or now.dtype != before.dtype or now.layout != torch.strided:
        return False
    if now.is_inference():
        return False  # it can be written to in inference mode alone
    if any(by == 0 and n > 1 for n, by in zip(now.shape, now.stride(), strict=True)):
        return False  # it shows one number at several places
    now.data.copy_(before)
    return True


def _is_value(value: Any) -> bool:
    """Whether it is a tensor, an array or another value that is written as it is."""
    if isinstance(value, Tensor):
        written_so = value.layout in (torch.strided, torch.sparse_coo)
        whole = type(value) in (Tensor, nn.Parameter) and not value.is_quantized and not value.is_meta
        return written_so and whole
    if type(value) is np.ndarray or isinstance(value, np.generic):
        return not value.dtype.hasobject and value.dtype.fields is None
    return isinstance(value, (torch.dtype, torch.device))


def _state_of(generator: Any) -> Any:
    """Return the state of a random generator; None: it is none."""
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, random.Random) and not isinstance(generator, random.SystemRandom):
        return generator.getstate()
    if isinstance(generator, np.random.RandomState):
        return generator.get_state()
    if isinstance(generator, np.random.Generator):
        return generator.bit_generator.state
    return None


def _set_generator(generator: Any, state: Any) -> None:
    if isinstance(generator, torch.Generator):
        generator.set_state(state)
    elif isinstance(generator, random.Random):
        generator.setstate(state)
    elif isinstance(generator, np.random.RandomState):
        generator.set_state(state)
    elif isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
