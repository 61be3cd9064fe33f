"""What a loop makes beside its model, made again for the large batch: from all samples at once.

A teacher's outputs, normalised advantages, a weight that is counted: the large batch has them from the
joined samples. Where that gives other rows than the micro-batches' own, samples are mixed there. A
random draw is data, and so is what a random choice picks, or what a data loader has put together.
"""

import linecache
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from fractions import Fraction
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from gaccum_exp.audit import result
from gaccum_exp.audit.causes.batch_mixing import Comparison
from gaccum_exp.audit.rerun.random_replay import Draws, DrawsAre
from gaccum_exp.audit.rerun.random_replay import Replay as DrawsReplay
from gaccum_exp.audit.rerun.sandbox import NamedModules
from gaccum_exp.audit.result import Culprit, Mixing
from gaccum_exp.audit.watch.moving_state import Made, MadeRef, MovingState, made_from
from gaccum_exp.core.dtypes import in_precision, is_inexact
from gaccum_exp.core.joined_samples import picked_rows
from gaccum_exp.core.module_calls import ModuleCall, ModuleTracer
from gaccum_exp.core.nesting import mapped

ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-5}
"""By how much two rows may differ, relative to the largest number, where only rounding differs."""
MOST = 1 << 22
"""Pairs of numbers at most that are compared."""
Node = Any
"""Tensor that something made (a `MadeRef`), or the copy of one that nothing made."""


class NotMadeAgainError(Exception):
    """Something cannot be made from all samples at once, and may mix them."""


class UnlikeError(Exception):
    """What was made for the micro-batches does not correspond."""


class Runs(Protocol):
    """Runs again what was made in the loop."""

    def value(self, node: Node) -> Tensor:
        """Return a tensor as the loop made it, at the first values of its state."""

    def called(self, made: Made, args: Any, kwargs: Any, around: Any = None) -> list[Tensor]:
        """Return what is made of these arguments instead; of a module, as `around` asks for."""


class MadeAgain:
    """Makes again, for all micro-batches at once, what the loop made for each.

    Args:
        moving: what the window met.
        runs: runs a making again.
        sizes: samples of each micro-batch.
        dim: the dimension that counts them.
        drew_on_host: whether Python's or NumPy's generator was drawn from between micro-batches.
    """

    def __init__(
        self, moving: MovingState, runs: Runs, sizes: Sequence[int], dim: int, *, drew_on_host: bool
    ) -> None:
        self._moving, self._runs, self._sizes, self._dim = moving, runs, list(sizes), dim
        self._drew_on_host = drew_on_host
        self._done: dict[tuple[int, ...], list[Tensor]] = {}
        self._wholes: dict[tuple[int, ...], Tensor | Exception] = {}
        """By the identities of the nodes."""
        self._drawn: dict[int, bool] = {}
        self._mixing: dict[int, Mixing] = {}
        """Modules that mix samples, by the identity of the module."""
        self.drew: list[Culprit] = []
        """Modules that draw random numbers."""

    def rows(self, nodes: Sequence[Node], own: Sequence[Tensor]) -> tuple[list[Tensor], Any] | None:
        """Return each micro-batch's rows of what the large batch has, and why they are others.

        None: they are no others than its `own`. The reason is a `Mixing`, or None where a value is
        carried from one micro-batch to the next.

        Raises:
            NotMadeAgainError: they cannot be made, and may be others.
        """
        whole = self._whole(nodes)
        found = self._split(whole, [tuple(t.shape) for t in own])
        if found is None or all(map(_close, found, own)):
            return None
        found = [rows.to(t.dtype) for rows, t in zip(found, own, strict=True)]
        if any(self._carried(each) for each in self._below(nodes)):
            return found, None
        why = self._blamed(nodes)
        if isinstance(why, Mixing) and why.culprit.cause != result.BATCH_STATISTICS:
            mixed = any(self._mixes(node, i, nodes) for i, node in enumerate(nodes))
            return (found, why) if mixed else None
        return None if why is None else (found, why)

    # What all samples at once give.

    def _whole(self, nodes: Sequence[Node]) -> Tensor:
        key = tuple(map(id, nodes))
        if key not in self._wholes:
            try:
                self._wholes[key] = self._computed(nodes)
            except (UnlikeError, NotMadeAgainError) as error:
                self._wholes[key] = error
        found = self._wholes[key]
        if isinstance(found, Exception):
            raise found
        return found

    def _computed(self, nodes: Sequence[Node]) -> Tensor:
        first = nodes[0]
        if all(self._same(first, node) for node in nodes) or self._carried(nodes):
            return self._runs.value(first)
        if any(isinstance(node, MadeRef) and node.made.of_model for node in nodes):
            raise UnlikeError  # it stands on no copies alone
        if all(isinstance(node, MadeRef) for node in nodes):
            with suppress(UnlikeError):
                return self._made_of_all([node.made for node in nodes], [node.place for node in nodes])
            return self._as_data(nodes)
        if any(isinstance(node, MadeRef) for node in nodes):
            return self._as_data(nodes)
        return self._joined(nodes)

    def _made_of_all(self, mades: list[Made], places: list[int]) -> Tensor:
        """Return what is made at one place from all samples; UnlikeError where that cannot be done."""
        place, key = places[0], tuple(map(id, mades))
        if any(made.function != mades[0].function for made in mades) or len(set(places)) > 1:
            raise UnlikeError
        if key not in self._done:
            if isinstance(mades[0].function, nn.Module):
                self._done[key] = self._of_module(mades)
            else:
                self._done[key] = self._of_operation(mades)
        return self._done[key][place]

    def _of_operation(self, mades: list[Made]) -> list[Tensor]:
        columns = _columns(mades)
        shapes = [[shape for shape, _ in made.outputs] for made in mades]
        tensors = [c for c in columns if _is_node(c[0])]
        others = [c for c in columns if not _is_node(c[0])]
        differing = [c for c in others if any(leaf != c[0] for leaf in c)]
        if differing and all(self._same(c[0], node) for c in tensors for node in c):
            raise UnlikeError  # each micro-batch's part of what is there for all
        sizes, total = self._sizes, sum(self._sizes)
        as_one = [total if list(c) == sizes else c[0] for c in others]
        if any(list(c) != sizes for c in differing):
            raise UnlikeError
        whole = [self._whole(c) for c in tensors]
        first: list[Tensor] | None = None
        ways = [(whole, numbers) for numbers in self._numbers(as_one)]
        ways += [(places, as_one) for places in self._places(tensors, whole)]
        for given in ways:
            which, numbers = map(iter, given)
            leaves = [next(which) if _is_node(c[0]) else next(numbers) for c in columns]
            try:
                outputs = self._runs.called(mades[0], *_filled(mades[0], leaves))
            except Exception:  # an operation may not take so many
                continue
            rows = [self._split(out, [of[i] for of in shapes]) for i, out in enumerate(outputs)]
            if any(row is None for row in rows):
                continue
            own = [[self._runs.value(MadeRef(made, i)) for made in mades] for i in range(len(rows))]
            if all(all(map(_close, row or [], of)) for row, of in zip(rows, own, strict=True)):
                return outputs
            first = first or outputs
        if first is None:
            raise UnlikeError
        return first

    def _numbers(self, as_one: list[Any]) -> Iterator[list[Any]]:
        """Yield the numbers that an operation may take for all samples: as they are, or one grown."""
        yield as_one
        for i, number in enumerate(as_one):
            by, rest = divmod(number, self._sizes[0]) if type(number) is int else (0, 1)
            if by > 0 and not rest:
                yield [*as_one[:i], by * sum(self._sizes), *as_one[i + 1 :]]

    def _places(self, columns: list[tuple[Any, ...]], whole: list[Tensor]) -> Iterator[list[Tensor]]:
        """Yield the tensors with one that may hold places of samples, counted over all of them."""
        for i, (column, joined) in enumerate(zip(columns, whole, strict=True)):
            parts = [x for x in column if isinstance(x, Tensor) and _has_places(x)]
            if len(parts) < len(column) or self._sample_dim([tuple(t.shape) for t in parts]) is None:
                continue
            if all(int(t.max()) < size for t, size in zip(parts, self._sizes, strict=True)):
                before = [sum(self._sizes[:k]) for k in range(len(parts))]
                counted = self._joined([t + n for t, n in zip(parts, before, strict=True)])
                yield [*whole[:i], counted.to(joined), *whole[i + 1 :]]

    def _of_module(self, mades: list[Made]) -> list[Tensor]:
        """Return a module's outputs for all samples, in float64 where it mixes them."""
        module: Any = mades[0].function
        named, draws = NamedModules(module), Draws()
        comparison = Comparison(self._sizes)
        columns = _columns(mades)
        if any(leaf != c[0] for c in columns if not _is_node(c[0]) for leaf in c):
            raise UnlikeError
        given = [[self._runs.value(x) for x in c] if _is_node(c[0]) else c for c in columns]
        whole = [self._whole(c) if _is_node(c[0]) else c[0] for c in columns]

        def run(
            made: Made,
            leaves: list[Any],
            draws_are: DrawsAre,
            index: int | None,
            see: Callable[[ModuleCall], None] | None,
        ) -> list[Tensor]:
            tracer = ModuleTracer(named.by_name, see)
            drawn = DrawsReplay(draws, self._sizes, tracer, draws_are, float64=True)
            context = drawn.whole(None) if index is None else drawn.micro_batch(index)
            args, kwargs = mapped(_wide, list(_filled(made, leaves)))
            return self._runs.called(made, args, kwargs, (torch.float64, tracer(), drawn, context))

        try:
            parts = []
            for i, made in enumerate(mades):
                see = comparison.see_shapes if i == 0 else None
                parts.append(run(made, [c[i] for c in given], "recorded", i, see))
            outputs = run(mades[0], whole, "replayed", None, comparison.see_whole)
            if draws.any and any(True for _ in module.parameters()):  # an augmentation has none
                self.drew += [_culprit(module, named, name, result.RANDOMNESS) for name in draws.modules]
            rows = [self._split(out, [of[k].shape for of in parts]) for k, out in enumerate(outputs)]
            apart = [
                row is None or not all(map(_close, row, [of[k] for of in parts]))
                for k, row in enumerate(rows)
            ]
            if not any(apart):
                return [
                    self._joined([self._runs.value(MadeRef(m, k)) for m in mades])
                    for k in range(len(outputs))
                ]
            for i, made in enumerate(mades):
                part = partial(comparison.see_part, i)
                run(made, [c[i] for c in given], "replayed", i, part)
        except Exception as error:  # a module of the loop's may not take so many
            kind = type(module).__name__
            raise NotMadeAgainError(
                f"{kind} cannot be run over all samples: {type(error).__name__}"
            ) from error
        if draws.foreign:
            raise NotMadeAgainError(f"{type(module).__name__} draws numbers that cannot be replayed")
        names = comparison.mixing() or [named.name(module)]
        mixing = _culprit(module, named, names[0], result.BATCH_STATISTICS)
        what = f"{mixing.said} takes in the other samples of its micro-batch"
        said = f"{what}: call eval() on it"
        self._mixing[id(module)] = Mixing(mixing, said)
        return outputs

    def _as_data(self, nodes: Sequence[Node]) -> Tensor:
        """Return what the micro-batches have, joined: nothing in it mixes samples."""
        for i, node in enumerate(nodes):
            why = self._mixes(node, i, nodes)
            if why is not None:
                said = (
                    f"samples are mixed in what the loop computes at {why}, and what it is over all of"
                )
                raise NotMadeAgainError(f"{said} the window's cannot be computed")
        number = self._number_that_changes(nodes)
        if number is not None and not self._drew_on_host:
            raise NotMadeAgainError(number)
        return self._joined([self._runs.value(node) for node in nodes])

    def _joined(self, tensors: Sequence[Tensor]) -> Tensor:
        dim = self._sample_dim([tuple(t.shape) for t in tensors])
        if dim is not None:
            return torch.cat([t.to(tensors[0].device) for t in tensors], dim)
        if all(t.shape == tensors[0].shape and torch.equal(t, tensors[0]) for t in tensors):
            return tensors[0]
        dim = self._sample_dim([tuple(t.shape) for t in tensors], parts=True)
        if dim is not None:
            return torch.cat([t.to(tensors[0].device) for t in tensors], dim)
        raise UnlikeError

    def _sample_dim(self, shapes: Sequence[tuple[int, ...]], *, parts: bool = False) -> int | None:
        """Return the dimension that counts samples in micro-batches' tensors of these shapes.

        A sample has one row, or several; as one of `parts`, of which the loop makes a micro-batch of the
        model's (chosen and rejected ones, two views), it has a whole part of these.
        """
        for d in sorted(range(len(shapes[0])), key=lambda d: (d != self._dim, d)):
            if len({len(s) for s in shapes}) > 1 or len({(*s[:d], *s[d + 1 :]) for s in shapes}) > 1:
                continue
            pairs = [(s[d], n) for s, n in zip(shapes, self._sizes, strict=True) if n]
            ratios = {Fraction(n, rows) if parts and rows else Fraction(rows, n) for rows, n in pairs}
            if len(ratios) == 1 and min(ratios) >= 1 and min(ratios).denominator == 1:
                return d
        return None

    def _split(self, whole: Tensor, shapes: Sequence[tuple[int, ...]]) -> list[Tensor] | None:
        """Return each micro-batch's rows of what all samples have: all of it where it does not grow."""
        shapes = [tuple(s) for s in shapes]
        for d in sorted(range(whole.ndim), key=lambda d: (d != self._dim, d)):
            lengths = [s[d] if len(s) == whole.ndim else 0 for s in shapes]
            rest = (*whole.shape[:d], *whole.shape[d + 1 :])
            if sum(lengths) == whole.shape[d] and all((*s[:d], *s[d + 1 :]) == rest for s in shapes):
                return list(torch.split(whole, lengths, d))
        return [whole] * len(shapes) if all(s == tuple(whole.shape) for s in shapes) else None

    # What stays the same, and what is carried.

    def _same(self, one: Node, other: Node) -> bool:
        if isinstance(one, MadeRef) or isinstance(other, MadeRef):
            both = isinstance(one, MadeRef) and isinstance(other, MadeRef)
            return both and one.made is other.made and one.place == other.place
        return one is other or self._of_one_tensor(one, other)

    def _of_one_tensor(self, one: Tensor, other: Tensor) -> bool:
        mine, its = (self._moving.all_uses.get(id(x)) for x in (one, other))
        return mine is not None and its is not None and mine.uses is its.uses

    def _carried(self, nodes: Sequence[Node]) -> bool:
        """Whether each later one is made of the first: a state that the loop moves on."""
        first = nodes[0]
        if all(self._same(first, node) for node in nodes):
            return False
        return all(any(self._same(first, x) for x in self._tree(node)) for node in nodes[1:])

    def _tree(self, node: Node) -> Iterator[Node]:
        """Return a tensor, and all that it is made of."""
        return filter(_is_node, made_from(node))

    def _below(self, nodes: Sequence[Node]) -> Iterator[Sequence[Node]]:
        """Yield corresponding tensors, and those that they are made of, as far as they correspond."""
        waiting, seen = [nodes], set[tuple[int, ...]]()
        while waiting:
            column = waiting.pop()
            yield column
            if self._carried(column) or not all(isinstance(node, MadeRef) for node in column):
                continue
            mades = [node.made for node in column]
            key = tuple(map(id, mades))
            with suppress(UnlikeError):
                if key not in seen:
                    seen.add(key)
                    waiting += [c for c in _columns(mades) if _is_node(c[0])]

    # Who mixes samples.

    def _blamed(self, nodes: Sequence[Node]) -> Mixing | None:
        """Return the innermost making whose arguments agree row by row, and whose rows do not."""
        if not all(isinstance(node, MadeRef) for node in nodes):
            return None
        mades = [node.made for node in nodes]
        with suppress(UnlikeError):
            for column in _columns(mades):
                if not _is_node(column[0]) or self._agree(column):
                    continue
                return self._blamed(column)
        if id(mades[0].function) in self._mixing:
            return self._mixing[id(mades[0].function)]
        line = _line(mades[0])
        said = (
            f"samples are mixed in what the loop computes at {line}: compute it over the whole window's "
            "samples, before its passes"
        )
        return Mixing(Culprit(result.BESIDE_MODEL, line, result.NOT_ADDITIVE), said)

    def _agree(self, nodes: Sequence[Node]) -> bool:
        own = [self._runs.value(node) for node in nodes]
        whole = self._split(self._whole(nodes), [tuple(t.shape) for t in own])
        return whole is not None and all(map(_close, whole, own))

    def _mixes(self, node: Node, index: int, nodes: Sequence[Node]) -> str | None:
        """Return the source of what is made of several samples of a micro-batch; None: nothing is.

        Samples are exchanged, or one left out, and what changes is compared, wherever that stands.
        """
        size = self._sizes[index]
        chosen = self._chosen(nodes)
        if not isinstance(node, MadeRef) or size < 2 or id(node.made) in chosen:
            return None
        others = [x for other in nodes if other is not node for x in self._tree(other)]
        shared = [leaf for leaf in others if isinstance(leaf, Tensor)]
        each = torch.arange(size)

        def of(rows: Tensor) -> Tensor:
            """Return what is made of these samples."""

            def moved(x: Tensor) -> Tensor:
                d = self._own_dim(x, size)
                if d is None or any(self._same(x, leaf) for leaf in shared):
                    return x
                return picked_rows(x, d, rows.to(x.device), size)

            return self._value(node, moved, chosen, {})

        def changed(bit: int, value: int) -> Tensor:
            """Return which numbers change if these samples do."""
            after = of(torch.where((each >> bit) & 1 == value, each.roll(1), each))
            if after.shape != before.shape:  # some are picked by their values
                return torch.zeros_like(before, dtype=torch.bool)
            return (after != before) & ~(after.isnan() & before.isnan())

        try:
            before = of(each)
            if self._own_dim(before, size) is None:  # a statistic
                moves = bool((changed(0, 1) | changed(0, 0)).any())
                return _line(node.made) if moves else None
            bits = range((size - 1).bit_length())  # any two samples differ in a bit of their numbers
            mixed = any(bool((changed(bit, 1) & changed(bit, 0)).any()) for bit in bits)
        except Exception:  # an operation of the loop's may not run again
            return None
        with suppress(Exception):  # of fewer samples, a count may change
            mixed = mixed or not _among(of(each[:-1]), before)
        return _line(node.made) if mixed else None

    def _own_dim(self, tensor: Tensor, size: int) -> int | None:
        """Return the dimension that may count the samples of one micro-batch."""
        fitting = [d for d, n in enumerate(tensor.shape) if n and n % size == 0]
        return self._dim if self._dim in fitting else next(iter(fitting), None)

    def _value(
        self, node: Node, moved: Callable[[Tensor], Tensor], data: set[int], done: dict[int, Any]
    ) -> Tensor:
        """Return a tensor as it would be made of other samples; of modules, and of data, other rows."""
        if not isinstance(node, MadeRef):
            return moved(node)
        if isinstance(node.made.function, nn.Module) or id(node.made) in data:
            return moved(self._runs.value(node))
        if id(node.made) not in done:
            leaves = [
                self._value(x, moved, data, done) if _is_node(x) else x for x in _leaves_of(node.made)
            ]
            done[id(node.made)] = self._runs.called(node.made, *_filled(node.made, leaves))
        made: Tensor = done[id(node.made)][node.place]
        return made

    def _chosen(self, nodes: Sequence[Node]) -> set[int]:
        """Return the makings that give data: random choices, and parts of what all of them share."""
        found = {id(x.made) for node in nodes for x in self._tree(node) if self._chooses(x)}
        for column in self._below(nodes):
            if not all(isinstance(node, MadeRef) for node in column):
                continue
            mades = [node.made for node in column]
            with suppress(UnlikeError):
                columns = _columns(mades)
                of_nodes = [c for c in columns if _is_node(c[0])]
                differing = any(x != c[0] for c in columns if not _is_node(c[0]) for x in c)
                parts = all(self._same(c[0], node) for c in of_nodes for node in c)
                if differing and (parts or self._drew_on_host):
                    found |= set(map(id, mades))
        return found

    def _chooses(self, node: Node) -> bool:
        """Whether places of samples, or one number for all of them, were drawn for this."""

        def drawn(leaf: Any) -> bool:
            if isinstance(leaf, MadeRef):
                shape, dtype = leaf.made.outputs[leaf.place]
                return (shape == () or not is_inexact(torch.empty(0, dtype=dtype))) and self._chooses(
                    leaf
                )
            use = self._moving.all_uses.get(id(leaf)) if isinstance(leaf, Tensor) else None
            return use is not None and use.drawn and (leaf.ndim == 0 or not is_inexact(leaf))

        if not isinstance(node, MadeRef):
            return False
        if id(node.made) not in self._drawn:
            self._drawn[id(node.made)] = any(map(drawn, _leaves_of(node.made)))
        return self._drawn[id(node.made)]

    def _number_that_changes(self, nodes: Sequence[Node]) -> str | None:
        """Return what is to be said of a number that is another one in each micro-batch."""
        for found in self._below(nodes):
            if not all(isinstance(node, MadeRef) for node in found):
                continue
            mades = [node.made for node in found]
            with suppress(UnlikeError):
                for column in _columns(mades):
                    said = None
                    if _is_node(column[0]):
                        said = self._scalar_that_changes(column, mades[0])
                    elif all(type(x) is float for x in column) and len(set(column)) > 1:
                        said = _said_of(column, mades[0])
                    if said is not None:
                        return said
        return None

    def _scalar_that_changes(self, column: Sequence[Node], made: Made) -> str | None:
        if any(isinstance(x, MadeRef) or x.ndim or not is_inexact(x) for x in column):
            return None
        uses = [self._moving.all_uses.get(id(x)) for x in column]
        values = [float(x) for x in column]
        if len(set(values)) == 1 or any(use is not None and use.drawn for use in uses):
            return None
        return _said_of(values, made)


def _said_of(values: Sequence[float], made: Made) -> str:
    numbers = ", ".join(f"{value:.4g}" for value in values)
    said = f"a number changes from micro-batch to micro-batch ({numbers}) at {_line(made)}, and one pass"
    return f"{said} has one value"


def _culprit(module: nn.Module, named: NamedModules, name: str, cause: str) -> Culprit:
    kind = type(named.by_name[name]).__name__
    return Culprit(f"{type(module).__name__}.{name}" if name else result.BESIDE_MODEL, kind, cause)


def _line(made: Made) -> str:
    """Return the line of the loop's source that makes it."""
    line = linecache.getline(*made.source).strip()
    return f"`{line if len(line) <= 60 else line[:57] + '...'}`"


def _is_node(leaf: Any) -> bool:
    return isinstance(leaf, (Tensor, MadeRef))


def _leaves_of(made: Made) -> list[Any]:
    found: list[Any] = []
    mapped(found.append, [made.args, made.kwargs])
    return found


def _filled(made: Made, leaves: Sequence[Any]) -> tuple[Any, Any]:
    """Return the arguments of a making with other leaves."""
    given = iter(leaves)
    args, kwargs = mapped(lambda _: next(given), [made.args, made.kwargs])
    return args, kwargs


def _columns(mades: Sequence[Made]) -> list[tuple[Any, ...]]:
    """Return the corresponding leaves of several makings' arguments."""
    every = [_leaves_of(made) for made in mades]
    if len({len(leaves) for leaves in every}) > 1:
        raise UnlikeError
    columns = list(zip(*every, strict=True))
    if any(len({_is_node(leaf) for leaf in column}) > 1 for column in columns):
        raise UnlikeError
    return columns


def _among(some: Tensor, every: Tensor) -> bool:
    """Whether all numbers of a tensor are among another's; of many that is not looked at."""
    if some.numel() * every.numel() > MOST:
        return True
    flat, known = (torch.nan_to_num(t.double()).flatten() for t in (some, every))
    gap = (flat[:, None] - known).abs().amin(1)
    return not gap.numel() or float(gap.max()) <= 1e-6 * max(float(known.abs().max()), 1e-30)


def _has_places(tensor: Tensor) -> bool:
    whole = not is_inexact(tensor) and tensor.dtype != torch.bool
    return whole and tensor.numel() > 0 and int(tensor.min()) >= 0


def _wide(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    dtype = in_precision(value.dtype, torch.float64)
    return value.to(dtype)


def _close(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal but for rounding, in the lower precision of the two."""
    if one.shape != other.shape:
        return False
    if not is_inexact(other):
        return torch.equal(one.to(other.dtype), other)
    tolerance = ROUNDING.get(other.dtype, 2e-2)
    here = torch.nan_to_num(other.detach().double())
    gap = (torch.nan_to_num(one.detach().double()) - here).abs()
    size = float(here.abs().max()) if here.numel() else 0.0
    return not gap.numel() or float(gap.max()) <= tolerance * max(size, 1e-30) or math.isnan(size)
