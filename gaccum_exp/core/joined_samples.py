"""Join micro-batches to the large batch that they were cut from, and pick samples out of it.

A micro-batch is any nesting of mappings, lists, tuples and data classes. Its samples lie along a
dimension of its tensors, or are the entries of its lists (images of several sizes, the boxes of each).
`sample_reading` finds out which.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_sequence, unpack_sequence

from gaccum_exp.core.nesting import children_of, rebuilt

PADDING = {"label": -100, "padding_mask": 1, "mask": 0, "_ids": 0, "embeds": 0}
"""The value that pads a tensor whose name holds one of these words; the first that fits."""


class NotJoinableError(ValueError):
    """Micro-batches that do not make one batch; the message says why."""


@dataclass(frozen=True, slots=True)
class Along:
    """A tensor whose samples lie along a dimension."""

    dim: int
    lengths: tuple[int, ...] | None = None
    """Of its dimensions, the longest of all micro-batches; None: they differ in samples alone."""
    fill: float = 0
    """What it is padded with up to these."""
    unknown: bool = False
    """Whether it holds integers that may be labels, or something else."""


@dataclass(frozen=True, slots=True)
class Longest:
    """A tensor without samples (a causal mask, positions): shorter micro-batches hold its head."""

    value: Tensor = field(compare=False)


@dataclass(frozen=True, slots=True)
class Beside:
    """A tensor with samples of its own along a dimension, of other numbers than the window's."""

    dim: int
    shapes: str
    """In the micro-batches, and its name."""


Role = (
    Along
    | Longest
    | Beside
    | Literal["samples", "packed", "size", "total", "shared", "differs"]
    | list[Any]
)
"""What a part of a micro-batch is: a tensor of samples; one that all share up to its length; one of
samples of its own; a list with an entry per sample; a packed sequence of samples; the number of samples,
or of rows in a list of them; the same in all micro-batches; a value that differs between them and
belongs to no sample; or, of a container, the roles of its children."""


@dataclass(frozen=True, slots=True)
class SampleLayout:
    """Where the samples are in corresponding micro-batches."""

    sizes: list[int]
    """Samples of each micro-batch."""
    roles: Role
    labels_last: bool = False
    """Whether the last integers that may be labels are padded as such."""
    differing: tuple[str, ...] = ()
    """Names of values that belong to no sample and yet differ; the one pass has the first of each."""

    @property
    def padded(self) -> bool:
        """Whether joining the micro-batches pads their sequences."""
        return any(
            isinstance(role, Longest) or (isinstance(role, Along) and role.lengths is not None)
            for role in leaves_of(self.roles)
        )

    @property
    def guessed(self) -> list[str]:
        """The shapes of tensors of other lengths, taken for samples of their own."""
        return [role.shapes for role in leaves_of(self.roles) if isinstance(role, Beside)]

    @property
    def dim(self) -> int:
        """The dimension of the first tensor with samples; 0 for lists."""
        return next((role.dim for role in leaves_of(self.roles) if isinstance(role, Along)), 0)

    def of(self, which: Sequence[int]) -> "SampleLayout":
        """Return the layout of some of the micro-batches."""
        return dataclasses.replace(self, sizes=[self.sizes[i] for i in which])

    def with_labels_last(self, least: int = 1, fill: float = PADDING["label"]) -> "SampleLayout":
        """Return the layout with the last of so many integers that may be labels taken for them."""
        unknown = [r for r in leaves_of(self.roles) if isinstance(r, Along) and r.unknown]
        roles = self.roles
        if len(unknown) >= least:
            roles = _exchanged(roles, unknown[-1], dataclasses.replace(unknown[-1], fill=fill))
        return dataclasses.replace(self, roles=roles, labels_last=True)

    @property
    def agreeing(self) -> int:
        """How many tensors have the samples along a dimension."""
        return sum(isinstance(role, Along) for role in leaves_of(self.roles))

    def sharing_equals(self, parts: Sequence[Any]) -> "SampleLayout | None":
        """Return the layout in which tensors that are equal in all micro-batches are shared by these.

        So is a mask, or an index of places, that happens to be as long as a batch. None: nothing else
        would be left, or nothing changes.
        """
        roles = _sharing_equals(parts, self.roles)
        if roles == self.roles or not any(isinstance(role, Along) for role in leaves_of(roles)):
            return None
        return dataclasses.replace(self, roles=roles)

    def joined(self, parts: Sequence[Any]) -> Any:
        """Return one batch of all micro-batches' samples, in order.

        Tensors that differ in another dimension (sequences padded to each micro-batch's longest) are
        padded at the end.
        """
        return _joined(parts, self.roles)

    def padded_alone(self, part: Any) -> Any:
        """Return one micro-batch as it stands in the joined ones, without the others."""
        return _padded_alone(part, self.roles)

    def picked(self, whole: Any, rows: Tensor) -> Any:
        """Return the samples at `rows`, of one micro-batch or of the joined ones."""
        return _picked(whole, self.roles, rows)

    def with_first_values(self, parts: Sequence[Any]) -> list[Any]:
        """Return the micro-batches, each with the first one's values where they differ."""
        return [_with_values_of(parts[0], part, self.roles) for part in parts]


def picked_rows(tensor: Tensor, dim: int, order: Tensor, total: int) -> Tensor:
    """Return samples of `total` in this order, each of which may own several rows of `dim`."""
    rows = tensor.shape[dim] // total
    index = order[:, None] * rows + torch.arange(rows, device=order.device)
    return tensor.index_select(dim, index.flatten().to(tensor.device))


def own_rows(
    whole: Tensor, shape: tuple[int, ...], rows: Tensor, total: int, dim: int, padded: bool
) -> Tensor:
    """Return a micro-batch's samples of an output for `total` samples, without their padding.

    Args:
        whole: the output for all samples.
        shape: of the micro-batch's own output.
        rows: where its samples are among all.
        total: the number of all samples.
        dim: the dimension that counts samples, where shapes leave a choice.
        padded: whether the samples were padded; else shapes differ in the number of samples alone.
    """
    size = len(rows)
    if size != total:
        along = sample_dim(tuple(whole.shape), shape, total, size)
    else:  # nothing grows that would tell which dimension counts samples
        along = next((d for d, n in enumerate(shape) if n == total), None)
    inner = dim == 1 and along in (None, 0) and _fits_inside(whole, shape, total, size)
    if inner:  # samples are the inner ones of the rows of (time, batch)
        by_time = whole.reshape(-1, total, *whole.shape[1:])[: shape[0] // size]
        return by_time.index_select(1, rows.to(whole.device)).flatten(0, 1)
    if not padded or len(shape) != whole.ndim:
        return whole if along is None else picked_rows(whole, along, rows, total)

    def fits(d: int) -> bool:
        of_sample, rest = divmod(whole.shape[d], total)
        others = all(m >= n for k, (m, n) in enumerate(zip(whole.shape, shape, strict=True)) if k != d)
        return rest == 0 and shape[d] % size == 0 and shape[d] // size <= of_sample and others

    choices = [dim, *range(len(shape))] if dim < len(shape) else range(len(shape))
    along = next(filter(fits, choices), None)
    if along is not None:
        by_sample = (*whole.shape[:along], total, -1, *whole.shape[along + 1 :])
        of_sample = whole.reshape(by_sample).index_select(along, rows.to(whole.device))
        whole = of_sample.narrow(along + 1, 0, shape[along] // size).flatten(along, along + 1)
    # A loop that takes a view of its rows finds them in one piece.
    return whole[tuple(map(slice, shape))].contiguous()


def _fits_inside(whole: Tensor, shape: tuple[int, ...], total: int, size: int) -> bool:
    """Whether an output has a row for each step in time of each sample, one after another in time."""
    if not shape or whole.ndim != len(shape) or tuple(whole.shape[1:]) != shape[1:]:
        return False
    (steps, rest), (own, of_own) = divmod(whole.shape[0], total), divmod(shape[0], size)
    return rest == of_own == 0 and 0 < own <= steps and steps > 1


def sample_dim(whole: tuple[int, ...], part: tuple[int, ...], total: int, size: int) -> int | None:
    """Return the one dimension that grows from a micro-batch to the whole as the samples do."""
    grown = [d for d, (n, of_part) in enumerate(zip(whole, part, strict=False)) if n != of_part]
    if len(whole) != len(part) or len(grown) != 1:
        return None
    n, of_part = whole[grown[0]], part[grown[0]]
    return grown[0] if n * size == of_part * total and n % total == 0 else None


def _sharing_equals(parts: Sequence[Any], role: Role) -> Role:
    if isinstance(role, list):
        return list(map(_sharing_equals, zip(*map(children_of, parts), strict=True), role))
    alike = isinstance(role, Along) and len(parts) > 1 and not parts[0].is_meta
    if not alike or not all(torch.equal(part, parts[0]) for part in parts[1:]):
        return role
    return "shared"


def _exchanged(role: Role, old: Along, new: Along) -> Role:
    if isinstance(role, list):
        return [_exchanged(child, old, new) for child in role]
    return new if role is old else role


def leaves_of(role: Role) -> list[Role]:
    """Return the roles of all that is no container."""
    return [leaf for child in role for leaf in leaves_of(child)] if isinstance(role, list) else [role]


def _joined(parts: Sequence[Any], role: Role) -> Any:
    first = parts[0]
    if isinstance(role, list):
        columns = zip(zip(*map(children_of, parts), strict=True), role, strict=True)
        return rebuilt(first, [_joined(column, of_column) for column, of_column in columns])
    if isinstance(role, Beside):
        return torch.cat(list(parts), role.dim)
    if isinstance(role, Along):
        return torch.cat([_padded(part, role) for part in parts], role.dim)
    if isinstance(role, Longest):
        return role.value.to(first)
    if role == "packed":
        every = [sequence for part in parts for sequence in unpack_sequence(part)]
        return pack_sequence(every, enforce_sorted=False)
    if role == "samples":
        return rebuilt(first, [child for part in parts for child in part])
    return sum(parts) if role in ("size", "total") else first


def _padded_alone(value: Any, role: Role) -> Any:
    if isinstance(role, list):
        pairs = zip(children_of(value), role, strict=True)
        return rebuilt(value, [_padded_alone(*pair) for pair in pairs])
    if isinstance(role, Longest):
        return role.value.to(value)
    return _padded(value, role) if isinstance(role, Along) else value


def _picked(value: Any, role: Role, rows: Tensor) -> Any:
    if isinstance(role, list):
        pairs = zip(children_of(value), role, strict=True)
        return rebuilt(value, [_picked(child, of_child, rows) for child, of_child in pairs])
    if isinstance(role, Along):
        return value.index_select(role.dim, rows.to(value.device))
    if role == "packed":
        sequences = unpack_sequence(value)
        return pack_sequence([sequences[row] for row in rows.tolist()], enforce_sorted=False)
    if role == "samples":
        return rebuilt(value, [value[row] for row in rows.tolist()])
    return len(rows) if role == "size" else value


def _with_values_of(first: Any, value: Any, role: Role) -> Any:
    if not isinstance(role, list):
        return first if role == "differs" else value
    every = zip(children_of(first), children_of(value), role, strict=True)
    return rebuilt(value, [_with_values_of(*each) for each in every])


def _padded(tensor: Tensor, role: Along) -> Tensor:
    """Return a tensor as long as the longest micro-batch's, filled up at the end."""
    if role.lengths is None:
        return tensor
    lacking = [max(0, longest - n) for longest, n in zip(role.lengths, tensor.shape, strict=True)]
    if not any(lacking):
        return tensor
    # torch pads the last dimension first, and each of them in front and behind.
    return F.pad(tensor, [n for lack in reversed(lacking) for n in (0, lack)], value=role.fill)
