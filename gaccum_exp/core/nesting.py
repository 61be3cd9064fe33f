"""Nestings: mappings, lists, tuples and data classes of tensors and of other values."""

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor


def tensors_in(value: Any) -> list[Tensor]:
    """Return all tensors of a nesting, in order."""
    if isinstance(value, Tensor):
        return [value]
    return [tensor for child in children_of(value) for tensor in tensors_in(child)]


def mapped(function: Callable[[Any], Any], value: Any) -> Any:
    """Return the nesting with `function` applied to every leaf."""
    children = children_of(value)
    if children:
        return rebuilt(value, [mapped(function, child) for child in children])
    return value if is_container(value) else function(value)


def names_of(container: Any, name: str) -> list[str]:
    """Return names for a container's children; a call's arguments are numbered in a mapping."""
    if isinstance(container, Mapping):
        return [f"argument {key}" if isinstance(key, int) else str(key) for key in container]
    if isinstance(container, (list, tuple)):
        return list(getattr(container, "_fields", [name] * len(container)))
    return [f.name for f in dataclasses.fields(container) if f.init]


def is_container(value: Any) -> bool:
    """Whether it is no leaf."""
    plain_dataclass = dataclasses.is_dataclass(value) and not isinstance(value, type)
    return isinstance(value, (Mapping, list, tuple)) or plain_dataclass


def children_of(value: Any) -> list[Any]:
    """Return what a container holds, in order; a leaf holds nothing."""
    if isinstance(value, (Mapping, list, tuple)):
        return list(value.values() if isinstance(value, Mapping) else value)
    if is_container(value):
        return [getattr(value, f.name) for f in dataclasses.fields(value) if f.init]
    return []


def rebuilt(like: Any, children: Sequence[Any]) -> Any:
    """Return a container like this one that holds these children, of a list or tuple any number."""
    if isinstance(like, Mapping):
        if type(like) is dict:
            return dict(zip(like, children, strict=True))
        clone = copy.copy(like)
        for key, child in zip(list(like), children, strict=True):
            clone[key] = child  # type: ignore[index]  # batches come in mutable mappings
        return clone
    if hasattr(like, "_fields"):
        return type(like)._make(children)  # a named tuple's own constructor may be another
    if isinstance(like, (list, tuple)):
        return list(children) if isinstance(like, list) else tuple(children)
    names = [f.name for f in dataclasses.fields(like) if f.init]
    return dataclasses.replace(like, **dict(zip(names, children, strict=True)))
