"""Join micro-batches to the large batch that they were cut from, and pick samples out of it.

A micro-batch is any nesting of mappings, lists, tuples and data classes around tensors whose dimension
`dim` counts samples. What does not grow with the samples (a mask that all share, a number) has to be the
same in every micro-batch.
"""

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

PADDING = {"label": -100, "padding_mask": 1, "mask": 0, "_ids": 0, "embeds": 0}
"""The value that pads a tensor whose name holds one of these words; the first that fits."""


class NotJoinableError(ValueError):
    """Micro-batches that do not make one batch; the message says why."""


def size_of(value: Any, dim: int = 0) -> int:
    """Return the number of samples in a micro-batch: the length of its first tensor's `dim`."""
    for tensor in tensors_in(value):
        if tensor.ndim > dim:
            return int(tensor.shape[dim])
    raise NotJoinableError("a micro-batch holds no tensor with a dimension of samples")


def tensors_in(value: Any) -> list[Tensor]:
    """Return all tensors of a nesting, in order."""
    if isinstance(value, Tensor):
        return [value]
    return [tensor for child in _children(value) for tensor in tensors_in(child)]


def mapped(function: Callable[[Any], Any], value: Any) -> Any:
    """Return the nesting with `function` applied to every leaf."""
    children = _children(value)
    if children:
        return _rebuilt(value, [mapped(function, child) for child in children])
    return value if _is_container(value) else function(value)


def joined(parts: Sequence[Any], sizes: Sequence[int], dim: int = 0) -> Any:
    """Return one batch of all micro-batches' samples, in order.

    Tensors that differ in another dimension (sequences padded to each micro-batch's longest) are padded
    at the end, with the value that belongs to their name: labels with -100, masks with what stands for
    padding, token ids and embeddings with 0.

    Raises:
        NotJoinableError: they do not make one batch.
    """
    if isinstance(parts[0], (list, tuple)):  # a pair of two samples is no list of samples
        return _column_by_column(parts, sizes, dim, "")
    return _joined(parts, sizes, dim, "")


def ragged(parts: Sequence[Any], dim: int = 0) -> bool:
    """Whether micro-batches differ in other lengths than their number of samples."""
    columns = zip(*map(tensors_in, parts), strict=False)
    return any(len({(t.shape[:dim], t.shape[dim + 1 :]) for t in column}) > 1 for column in columns)


def picked(value: Any, rows: Tensor, size: int, dim: int = 0) -> Any:
    """Return the samples at `rows` of a batch of `size`."""
    if isinstance(value, (list, tuple)):
        return _rebuilt(value, [_picked(child, rows, size, dim) for child in _children(value)])
    return _picked(value, rows, size, dim)


def _picked(value: Any, rows: Tensor, size: int, dim: int) -> Any:
    if isinstance(value, Tensor):
        counts = value.ndim > dim and value.shape[dim] == size
        return value.index_select(dim, rows.to(value.device)) if counts else value
    if _is_sample_list(value, size):
        return _rebuilt(value, [_children(value)[row] for row in rows.tolist()])
    children = _children(value)
    return _rebuilt(value, [_picked(c, rows, size, dim) for c in children]) if children else value


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


def _joined(parts: Sequence[Any], sizes: Sequence[int], dim: int, name: str) -> Any:
    first = parts[0]
    if all(isinstance(part, Tensor) for part in parts):
        return _joined_tensors(parts, sizes, dim, name)
    if all(_is_sample_list(part, size) for part, size in zip(parts, sizes, strict=True)):
        return _rebuilt(first, [child for part in parts for child in _children(part)])
    if _is_container(first):
        return _column_by_column(parts, sizes, dim, name)
    if isinstance(first, int) and not isinstance(first, bool) and list(parts) == list(sizes):
        return sum(sizes)  # the micro-batch's own number of samples
    counts_up = all(type(part) is int for part in parts) and sorted(set(parts)) == list(parts)
    if (counts_up and len(parts) > 1) or name == "dataloader_idx":  # Lightning numbers its batches
        return first
    if any(part is not first and part != first for part in parts):
        raise NotJoinableError(f"micro-batches were called with different values{_at(name)}: {parts}")
    return first


def _column_by_column(parts: Sequence[Any], sizes: Sequence[int], dim: int, name: str) -> Any:
    first = parts[0]
    every = [_children(part) for part in parts]
    if any(type(part) is not type(first) for part in parts) or len({len(c) for c in every}) != 1:
        raise NotJoinableError(f"micro-batches differ in structure{_at(name)}")
    names = list(first) if isinstance(first, Mapping) else [name] * len(every[0])
    columns = zip(zip(*every, strict=True), names, strict=True)
    return _rebuilt(first, [_joined(column, sizes, dim, str(n)) for column, n in columns])


def _joined_tensors(parts: Sequence[Tensor], sizes: Sequence[int], dim: int, name: str) -> Tensor:
    first = parts[0]
    count = all(t.ndim > dim and t.shape[dim] == n for t, n in zip(parts, sizes, strict=True))
    if count and len({t.ndim for t in parts}) == 1:
        return torch.cat(_padded(parts, dim, name), dim)
    if all(t.shape == first.shape and torch.equal(t, first) for t in parts):
        return first
    shapes = ", ".join(str(tuple(t.shape)) for t in parts[:4])
    raise NotJoinableError(f"tensors of shapes {shapes} do not make one batch{_at(name)}")


def _padded(parts: Sequence[Tensor], dim: int, name: str) -> list[Tensor]:
    longest = [max(t.shape[d] for t in parts) for d in range(parts[0].ndim)]
    if all(t.shape[d] == longest[d] for t in parts for d in range(t.ndim) if d != dim):
        return list(parts)
    fill = next((value for word, value in PADDING.items() if word in name.lower()), None)
    if fill is None:
        raise NotJoinableError(
            f"micro-batches hold sequences of different lengths{_at(name)}: how to pad them is not known"
        )

    def padded(tensor: Tensor) -> Tensor:
        lacking = [0 if d == dim else longest[d] - n for d, n in enumerate(tensor.shape)]
        # torch pads the last dimension first, and each of them in front and behind.
        return F.pad(tensor, [n for lack in reversed(lacking) for n in (0, lack)], value=fill)

    return [padded(tensor) for tensor in parts]


def _is_sample_list(value: Any, size: int) -> bool:
    # With an entry per sample, e.g. of names, or of images of several sizes.
    if not isinstance(value, (list, tuple)) or hasattr(value, "_fields") or len(value) != size:
        return False
    return not any(isinstance(v, Tensor) and v.ndim and v.shape[0] == size for v in value)


def _is_container(value: Any) -> bool:
    plain_dataclass = dataclasses.is_dataclass(value) and not isinstance(value, type)
    return isinstance(value, (Mapping, list, tuple)) or plain_dataclass


def _children(value: Any) -> list[Any]:
    if isinstance(value, (Mapping, list, tuple)):
        return list(value.values() if isinstance(value, Mapping) else value)
    if _is_container(value):
        return [getattr(value, f.name) for f in dataclasses.fields(value) if f.init]
    return []


def _rebuilt(like: Any, children: Sequence[Any]) -> Any:
    if isinstance(like, Mapping):
        if type(like) is dict:
            return dict(zip(like, children, strict=True))
        clone = copy.copy(like)
        for key, child in zip(list(like), children, strict=True):
            clone[key] = child  # type: ignore[index]  # batches come in mutable mappings
        return clone
    if hasattr(like, "_fields"):
        return type(like)(*children)
    if isinstance(like, (list, tuple)):
        return list(children) if isinstance(like, list) else tuple(children)
    names = [f.name for f in dataclasses.fields(like) if f.init]
    return dataclasses.replace(like, **dict(zip(names, children, strict=True)))


def _at(name: str) -> str:
    return f" ({name})" if name else ""
