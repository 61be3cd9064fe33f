"""Join micro-batches to the large batch that they were cut from, and pick samples out of it.

A micro-batch is any nesting of mappings, lists, tuples and data classes. Its samples lie along a
dimension of its tensors, or are the entries of its lists (images of several sizes, the boxes of each).
`sample_reading` finds out which.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from gaccum_exp.core.nesting import children_of, names_of, rebuilt

PADDING = {"label": -100, "padding_mask": 1, "mask": 0, "_ids": 0, "embeds": 0}
"""The value that pads a tensor whose name holds one of these words; the first that fits."""
ASKED = "say which dimension of the model's inputs counts samples, by batch_dim="


class NotJoinableError(ValueError):
    """Micro-batches that do not make one batch; the message says why."""


@dataclass(frozen=True, slots=True)
class Along:
    """A tensor whose samples lie along a dimension."""

    dim: int


@dataclass(frozen=True, slots=True)
class Beside:
    """A tensor with samples of its own along a dimension, of other numbers than the window's."""

    dim: int
    shapes: str
    """In the micro-batches, and its name."""


Role = Along | Beside | Literal["samples", "size", "total", "shared", "differs"] | list[Any]
"""What a part of a micro-batch is: a tensor of samples; one of samples of its own; a list with an entry
per sample; the number of samples, or of rows in a list of them; the same in all micro-batches; a value
that differs between them and belongs to no sample; or, of a container, the roles of its children."""


@dataclass(frozen=True, slots=True)
class SampleLayout:
    """Where the samples are in corresponding micro-batches."""

    sizes: list[int]
    """Samples of each micro-batch."""
    roles: Role
    differing: tuple[str, ...] = ()
    """Names of values that belong to no sample and yet differ; the one pass has the first of each."""
    padded: bool = False
    """Whether joining the micro-batches pads their sequences."""

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

    def joined(self, parts: Sequence[Any]) -> Any:
        """Return one batch of all micro-batches' samples, in order.

        Tensors that differ in another dimension (sequences padded to each micro-batch's longest) are
        padded at the end, with the value that belongs to their name: labels with -100, masks with what
        stands for padding, token ids and embeddings with 0.
        """
        return _joined(parts, self.roles, "")

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


def sample_dim(whole: tuple[int, ...], part: tuple[int, ...], total: int, size: int) -> int | None:
    """Return the one dimension that grows from a micro-batch to the whole as the samples do."""
    grown = [d for d, (n, of_part) in enumerate(zip(whole, part, strict=False)) if n != of_part]
    if len(whole) != len(part) or len(grown) != 1:
        return None
    n, of_part = whole[grown[0]], part[grown[0]]
    return grown[0] if n * size == of_part * total and n % total == 0 else None


def leaves_of(role: Role) -> list[Role]:
    """Return the roles of all that is no container."""
    return [leaf for child in role for leaf in leaves_of(child)] if isinstance(role, list) else [role]


def _joined(parts: Sequence[Any], role: Role, name: str) -> Any:
    first = parts[0]
    if isinstance(role, list):
        every = zip(zip(*map(children_of, parts), strict=True), role, names_of(first, name), strict=True)
        return rebuilt(first, [_joined(column, of_column, n) for column, of_column, n in every])
    if isinstance(role, Beside):
        return torch.cat(list(parts), role.dim)
    if isinstance(role, Along):
        return torch.cat(_padded(parts, role.dim, name), role.dim)
    if role == "samples":
        return rebuilt(first, [child for part in parts for child in part])
    return sum(parts) if role in ("size", "total") else first


def _picked(value: Any, role: Role, rows: Tensor) -> Any:
    if isinstance(role, list):
        pairs = zip(children_of(value), role, strict=True)
        return rebuilt(value, [_picked(child, of_child, rows) for child, of_child in pairs])
    if isinstance(role, Along):
        return value.index_select(role.dim, rows.to(value.device))
    if role == "samples":
        return rebuilt(value, [value[row] for row in rows.tolist()])
    return len(rows) if role == "size" else value


def _with_values_of(first: Any, value: Any, role: Role) -> Any:
    if not isinstance(role, list):
        return first if role == "differs" else value
    every = zip(children_of(first), children_of(value), role, strict=True)
    return rebuilt(value, [_with_values_of(*each) for each in every])


def _padded(parts: Sequence[Tensor], dim: int, name: str) -> list[Tensor]:
    longest = [max(t.shape[d] for t in parts) for d in range(parts[0].ndim)]
    if all(t.shape[d] == longest[d] for t in parts for d in range(t.ndim) if d != dim):
        return list(parts)

    padded, value = [], padding_of(name)
    for tensor in parts:
        lacking = [0 if d == dim else longest[d] - n for d, n in enumerate(tensor.shape)]
        # torch pads the last dimension first, and each of them in front and behind.
        padded.append(F.pad(tensor, [n for lack in reversed(lacking) for n in (0, lack)], value=value))
    return padded


def padding_of(name: str) -> int | None:
    """Return the value that pads a tensor of this name; None: it is not known."""
    return next((value for word, value in PADDING.items() if word in name.lower()), None)
