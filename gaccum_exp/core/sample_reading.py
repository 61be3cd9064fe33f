"""Find out where the samples are in micro-batches, from what agrees between these.

The numbers of samples of all micro-batches are the lengths of some dimension in every tensor that is
not the same in all of them, or of its lists. What does not grow with the samples (a mask that all share,
a number) has to be the same in every micro-batch, or not to matter.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from gaccum_exp.core.dtypes import is_inexact
from gaccum_exp.core.joined_samples import (
    PADDING,
    Along,
    Beside,
    Longest,
    NotJoinableError,
    Role,
    SampleLayout,
    leaves_of,
)
from gaccum_exp.core.nesting import children_of, is_container, names_of, tensors_in

Sizes = tuple[int, ...]
"""The number of samples of each micro-batch."""
Shapes = Sequence[tuple[int, ...]]
"""Of several tensors."""


def sample_layouts(
    parts: Sequence[Any],
    *,
    others: Sequence[Shapes] = (),
    dim: int | None = None,
    sizes: Sequence[int] | None = None,
    apart: bool = False,
    label: int | None = None,
    guess: bool = False,
) -> list[SampleLayout]:
    """Return where the samples may be in corresponding micro-batches, the likeliest first.

    There is more than one entry where all shapes agree with more than one reading, as those of
    (time, batch) sequences do: then only a run can tell, for the order of samples changes nothing.

    Args:
        parts: the micro-batches, or the arguments of corresponding calls.
        others: for each of them the shapes of what belongs to it: outputs, targets.
        dim: the dimension that counts samples, if that is known.
        sizes: the samples of each micro-batch, if they are known: other readings come after.
        apart: whether tensors of other lengths may have samples of their own, e.g. unlabelled ones.
        label: what integers are to be padded with, where they are known to be labels.
        guess: whether a tensor may be padded whose name does not tell with what: by what its own
            sequences end with, or 0. Whether that changes nothing is for the caller to try.

    Raises:
        NotJoinableError: they do not make one batch.
    """
    found: list[tuple[tuple[int, bool, int], SampleLayout]] = []
    refusals = []
    for numbers, along in dict.fromkeys(_numbers(parts)):
        if dim is not None and max(along, 0) != dim:
            continue
        try:
            layout = _read(parts, numbers, along, counting=True, apart=apart, label=label, guess=guess)
        except NotJoinableError as error:
            refusals.append(error)
            continue
        unknown = sizes is not None and list(numbers) != list(sizes)
        lacking = _unplaced(parts[0], layout.roles) + _lacking(numbers, others, layout.padded)
        lacking += sum(isinstance(role, Beside) for role in leaves_of(layout.roles))
        found.append(((lacking, unknown, along), layout))
    if not found and sizes is not None:  # what belongs to no sample is joined, too: a model's own loss
        return [_read(parts, sizes, dim or 0, counting=False, apart=apart, label=label, guess=guess)]
    if not found:
        raise refusals[0] if refusals else NotJoinableError(_nothing_counts(parts, dim))
    fewest: dict[bool, int] = {}  # of readings that pad, and of those that do not
    for (lacking, *_), layout in found:
        fewest[layout.padded] = min(lacking, fewest.get(layout.padded, lacking))
    layouts: list[SampleLayout] = []
    for (lacking, *_), layout in sorted(found, key=lambda pair: pair[0]):
        least = fewest[layout.padded]
        if min(fewest.values()) < least and layout.padded:
            continue  # padding is no better where there are more tensors without samples
        if lacking == least and all(layout.roles != other.roles for other in layouts):
            layouts.append(layout)
    return layouts


def size_of(value: Any, dim: int | None = None) -> int:
    """Return the number of samples in a micro-batch: the length of its first tensor's `dim`, or list."""
    return sample_layouts([value], dim=dim)[0].sizes[0]


def joined(parts: Sequence[Any], sizes: Sequence[int], dim: int | None = None) -> Any:
    """Return one batch of all micro-batches' samples, in order; as `SampleLayout.joined` does."""
    return _read(parts, sizes, dim or 0, counting=False).joined(parts)


def picked(value: Any, rows: Tensor, size: int, dim: int | None = None) -> Any:
    """Return the samples at `rows` of a batch of `size`."""
    return _read([value], [size], dim or 0, counting=False).picked(value, rows)


def _numbers(parts: Sequence[Any]) -> Iterator[tuple[Sizes, int]]:
    """Yield what may be the numbers of samples: lengths of lists, and of tensors' dimensions."""
    if all(isinstance(part, Tensor) for part in parts):
        if len({part.ndim for part in parts}) == 1:
            yield from ((tuple(part.shape[d] for part in parts), d) for d in range(parts[0].ndim))
        return
    if all(isinstance(part, PackedSequence) for part in parts):
        yield tuple(int(part.batch_sizes[0]) for part in parts), 0
        return
    every = [children_of(part) for part in parts]
    if len({len(children) for children in every}) == 1:
        for column in zip(*every, strict=True):
            yield from _numbers(column)
    if all(_may_list_samples(part) for part in parts):
        # A list of records is hardly anything else, though their tensors may agree by chance.
        records = all(isinstance(entry, Mapping) for part in parts for entry in part)
        yield tuple(map(len, parts)), -1 if records else 0


def _unplaced(value: Any, role: Role) -> int:
    """Count the tensors in what may be a list of samples that this reading takes for no samples."""
    if not isinstance(role, list):
        return 0
    pairs = list(zip(children_of(value), role, strict=True))
    if _may_list_samples(value):
        return sum(_shared_tensors(*pair) for pair in pairs)
    return sum(_unplaced(*pair) for pair in pairs)


def _shared_tensors(value: Any, role: Role) -> int:
    if isinstance(role, list):
        return sum(map(_shared_tensors, children_of(value), role))
    return int(role == "shared" and isinstance(value, Tensor) and value.ndim > 0)


def _lacking(numbers: Sizes, others: Sequence[Shapes], padded: bool) -> int:
    """Return how many of the tensors that belong to the micro-batches have no dimension of samples."""
    lacking = 0
    for column in zip(*others, strict=False):
        if len({len(shape) for shape in column}) > 1 or not column[0]:
            continue
        lengths = zip(*column, strict=True)
        # Sequences may be laid end to end, in front of a loss: a sample has several rows then, and
        # as many in all micro-batches where these are of one length.
        lacking += not any(
            all(n and of_dim % n == 0 for of_dim, n in zip(each, numbers, strict=True))
            and (padded or len({of_dim // n for of_dim, n in zip(each, numbers, strict=True)}) == 1)
            for each in lengths
        )
    return lacking


def _nothing_counts(parts: Sequence[Any], dim: int | None) -> str:
    shapes = _listed(tuple(t.shape) for t in tensors_in(parts[0]))
    shapes = f" ({shapes})" if shapes else ""
    if dim is None:
        return f"a micro-batch holds no tensor with a dimension of samples, and no list{shapes}"
    return f"no tensor of a micro-batch has a dimension {dim} to count samples{shapes}"


def _read(
    parts: Sequence[Any],
    numbers: Sequence[int],
    along: int,
    *,
    counting: bool,
    apart: bool = False,
    label: int | None = None,
    guess: bool = False,
) -> SampleLayout:
    """Read lists as columns (inputs and targets), and where that fails as lists of samples."""
    refusal = None
    for how in ({}, {"listed": True}, *([{"apart": True}] if apart else [])):
        try:
            reading = _Reading(tuple(numbers), along, label=label, guess=guess, **how)
            return reading.layout(parts, counting=counting)
        except NotJoinableError as error:
            refusal = refusal or error
    assert refusal is not None
    raise refusal


class _Reading:
    """The reading of micro-batches as having these numbers of samples, along a dimension if it can be.

    Lists of as many entries have one per sample: all of them (`listed`), or those without such tensors.
    Tensors of other lengths may have samples of their own (`apart`), e.g. unlabelled ones.
    """

    def __init__(
        self,
        numbers: Sizes,
        along: int,
        *,
        label: int | None,
        guess: bool,
        listed: bool = False,
        apart: bool = False,
    ) -> None:
        self._numbers, self._along, self._listed, self._apart = numbers, along, listed, apart
        self._label, self._guess = label, guess
        self._differing: list[str] = []
        self._edges: str | None = None
        self._dims: set[int] = set()
        self._others: set[Sizes] = set()
        """Numbers of samples that some tensors have of their own."""
        self._totals: set[Sizes] = set()
        """Rows of the tensors in each micro-batch's lists, e.g. the boxes of all its images."""

    def layout(self, parts: Sequence[Any], *, counting: bool = True) -> SampleLayout:
        """Return the layout; raise NotJoinableError where this reading does not fit."""
        first = parts[0]
        # Inputs and targets are no list of two samples, however alike they are.
        pair = isinstance(first, tuple) or all(isinstance(child, Tensor) for child in children_of(first))
        pair = pair and not isinstance(first, PackedSequence)
        apart = is_container(first) and pair and len({len(children_of(part)) for part in parts}) == 1
        rows = [_rows_in_lists(part) for part in parts]
        self._totals = {
            tuple(of[key] for of in rows) for key in rows[0] if all(key in of for of in rows)
        }
        read = self._of_columns if apart else self._role
        roles = read(parts, "")
        if self._others:  # known by now, and found again in tensors that might be read otherwise
            self._differing = []
            roles = read(parts, "")
        if self._edges is not None and 0 in self._dims:
            raise NotJoinableError(
                f"graphs are not joined{_at(self._edges)}: edges would point to the first one's nodes"
            )
        if counting and not _counts(roles):
            raise NotJoinableError(_nothing_counts(parts, None))
        return SampleLayout(list(self._numbers), roles, differing=tuple(self._differing))

    def _role(self, parts: Sequence[Any], name: str) -> Role:
        first = parts[0]
        if all(isinstance(part, Tensor) for part in parts):
            return self._of_tensors(parts, name)
        if all(isinstance(part, PackedSequence) for part in parts):
            if tuple(int(part.batch_sizes[0]) for part in parts) != self._numbers:
                raise NotJoinableError(f"packed sequences of other numbers of samples{_at(name)}")
            return "packed"
        if all(is_container(part) for part in parts):
            if not (all(map(_may_list_samples, parts)) and tuple(map(len, parts)) == self._numbers):
                return self._of_columns(parts, name)
            if not self._listed and len(first):
                before = list(self._differing)
                columns = self._of_columns(parts, name)
                if _counts(columns) or any(isinstance(role, Beside) for role in leaves_of(columns)):
                    return columns
                self._differing = before  # names, one of each sample
            return "samples"
        whole = isinstance(first, int) and not isinstance(first, bool)
        if whole and tuple(parts) == self._numbers:
            return "size"
        if whole and tuple(parts) in self._totals:
            return "total"
        if all(_same(part, first) for part in parts):
            return "shared"
        self._differing.append(name or type(first).__name__)
        return "differs"

    def _of_columns(self, parts: Sequence[Any], name: str) -> list[Role]:
        first = parts[0]
        every = [children_of(part) for part in parts]
        alike = all(type(part) is type(first) for part in parts) and len({len(c) for c in every}) == 1
        if not alike or (
            isinstance(first, Mapping) and any(part.keys() != first.keys() for part in parts)
        ):
            raise NotJoinableError(
                f"micro-batches differ in structure{_at(name)}, and are no lists of their samples"
            )
        columns = zip(zip(*every, strict=True), names_of(first, name), strict=True)
        return [self._role(column, of_column) for column, of_column in columns]

    def _of_tensors(self, parts: Sequence[Tensor], name: str) -> Role:
        first, alike = parts[0], len({t.ndim for t in parts}) == 1
        if any(t.is_nested for t in parts):
            raise NotJoinableError(f"nested tensors are not joined{_at(name)}: pad them")
        own = max(self._along, 0)
        lengths = tuple(t.shape[own] if t.ndim > own else 0 for t in parts)
        shapes, numbers = _listed(tuple(t.shape) for t in parts), _listed(self._numbers)
        if alike and lengths in self._others:
            return Beside(own, f"{shapes}{_at(name)}")
        fitting = [
            d for d in range(first.ndim) if alike and tuple(t.shape[d] for t in parts) == self._numbers
        ]
        if fitting:
            dim = self._along if self._along in fitting else fitting[0]
            self._dims.add(dim)
            if first.ndim == 2 and len(first) == 2 and dim == 1 and not first.is_floating_point():
                self._edges = name
            return self._along_dim(parts, dim, name)
        known = not any(t.is_meta and t.ndim for t in parts)
        if known and all(
            t is first or t.is_meta or (t.shape == first.shape and torch.equal(t, first)) for t in parts
        ):
            return "shared"
        if known and alike and (longest := _longest(parts)) is not None:
            return longest
        if all(t.ndim == 0 for t in parts):
            self._differing.append(name or "a tensor")
            return "differs"
        others = {(*t.shape[:own], *t.shape[own + 1 :]) for t in parts}
        edges = first.ndim == 2 and len(first) == 2 and not is_inexact(first)
        if self._apart and alike and first.ndim > own and len(others) == 1 and not edges:
            self._others.add(lengths)
            return Beside(own, f"{shapes}{_at(name)}")
        raise NotJoinableError(
            f"tensors of shapes {shapes} do not make one batch{_at(name)}: they differ, and no "
            f"dimension counts the micro-batches' {numbers} samples: give one tensor to all"
        )

    def _along_dim(self, parts: Sequence[Tensor], dim: int, name: str) -> Along:
        """Return the role of a tensor of samples: with what it is padded, where lengths differ."""
        if len({(*t.shape[:dim], *t.shape[dim + 1 :]) for t in parts}) == 1:
            return Along(dim)
        longest = [max(t.shape[d] for t in parts) for d in range(parts[0].ndim)]
        lengths = (*longest[:dim], 0, *longest[dim + 1 :])
        integers = not is_inexact(parts[0]) and parts[0].dtype != torch.bool
        word = next((word for word in PADDING if word in name.lower()), None)
        found: float | None = self._label if integers and word in (None, "label") else None
        unknown = integers and found is None and word in (None, "label")
        if found is None and self._guess:
            found = _ending(parts, dim)
        if found is None and word is None and self._guess and parts[0].dtype == torch.bool:
            values = {value for t in parts for value in t.flatten().tolist()}
            found = float(not values.pop()) if len(values) == 1 else 0
        if found is None:
            found = 0 if word is None and self._guess else PADDING.get(word or "")
        if found is None:
            raise NotJoinableError(
                f"micro-batches hold sequences of different lengths{_at(name)}: how to pad them is not "
                "known; pad all of them to one length"
            )
        return Along(dim, lengths, found, unknown)


def _longest(parts: Sequence[Tensor]) -> Longest | None:
    """Return the longest of tensors that differ in how much of it they hold."""
    longest = max(parts, key=Tensor.numel)
    if any(n > m for t in parts for n, m in zip(t.shape, longest.shape, strict=True)):
        return None
    heads = (longest[tuple(slice(n) for n in t.shape)] for t in parts)
    alike = all(t.dtype == h.dtype and torch.equal(t, h) for t, h in zip(parts, heads, strict=True))
    return Longest(longest) if alike and len({t.shape for t in parts}) > 1 else None


def _ending(parts: Sequence[Tensor], dim: int) -> float | None:
    """Return the one value that shorter sequences within the micro-batches are filled up with.

    It ends several more than once (in a mask one, and once), and is not all that they are.
    """
    votes: dict[float, int] = {}
    for d in range(parts[0].ndim):
        if d == dim or len({t.shape[d] for t in parts}) == 1:
            continue
        for t in parts:
            if t.is_meta or t.is_complex() or not t.numel():
                continue
            rows = t.movedim((dim, d), (0, 1)).flatten(2) if t.ndim > 2 else t.movedim(dim, 0)[..., None]
            last = rows[:, -1, 0]
            run = (rows == last[:, None, None]).all(2).flip(1).int().cumprod(1).sum(1)
            enough = 1 if t.dtype == torch.bool else 2
            for value in last[(run >= enough) & (run < rows.shape[1])].tolist():
                votes[value] = votes.get(value, 0) + 1
    found = max(votes, key=lambda value: votes[value]) if votes else None
    # One sentence may end with a word said twice.
    return None if found is None or (votes[found] < 2 and parts[0].dtype != torch.bool) else found


def _counts(role: Role) -> bool:
    """Whether anything in it counts samples."""
    return any(isinstance(leaf, Along) or leaf in ("samples", "packed") for leaf in leaves_of(role))


def _rows_in_lists(value: Any, listed: bool = False, path: str = "") -> dict[str, int]:
    """Count the rows of tensors that stand in lists, by their place."""
    if isinstance(value, Tensor):
        return {path: len(value)} if listed and value.ndim else {}
    total: dict[str, int] = {}
    inside = listed or isinstance(value, list)
    names = names_of(value, "") if is_container(value) else ()
    for name, child in zip(names, children_of(value), strict=True):
        place = path if isinstance(value, list) else f"{path}/{name}"
        for key, n in _rows_in_lists(child, inside, place).items():
            total[key] = total.get(key, 0) + n
    return total


def _may_list_samples(value: Any) -> bool:
    """Whether it may have an entry per sample, e.g. of names, or of images of several sizes."""
    if not isinstance(value, (list, tuple)) or hasattr(value, "_fields"):
        return False
    return len({_kind(entry) for entry in value}) <= 1


def _kind(entry: Any) -> Any:
    if isinstance(entry, Tensor):
        return Tensor, entry.ndim, entry.dtype
    inside = entry if isinstance(entry, Mapping) else map(_kind, children_of(entry))
    return type(entry), tuple(inside)


def _same(one: Any, other: Any) -> bool:
    if one is other:
        return True
    try:
        return type(one) is type(other) and bool(one == other)
    except (ValueError, RuntimeError, TypeError):  # arrays compare element by element
        return False


def _listed(values: Any) -> str:
    said = list(map(str, values))
    return ", ".join(said[:4]) + (", …" if len(said) > 4 else "")


def _at(name: str) -> str:
    return f" ({name})" if name else ""
