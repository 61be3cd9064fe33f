"""Instantiate the `_target_` of a configuration block, and explain where that fails.

Configurations are code: a `_target_` names a function that is called.
"""

import importlib
import inspect
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from types import NoneType, UnionType
from typing import Any, NoReturn, Union, get_args, get_origin, get_type_hints

import hydra
from hydra.errors import InstantiationException

from gaccum_exp.errors import BadInputError, nearest, text_of

# What it cannot import it logs, and raises as well.
logging.getLogger("hydra.utils").addFilter(lambda record: False)


def checked(key: str, node: Mapping[str, Any], kind: type, *args: Any, **kwargs: Any) -> Any:
    """Instantiate a node and require an instance of a class.

    Raises:
        BadInputError: it gives something else, or cannot be built.
    """
    result = instantiate(key, node, *args, **kwargs)
    if not isinstance(result, kind):
        raise BadInputError(
            f"{spoken(key, node)}: gives {type(result).__name__}, not a "
            f"{kind.__module__}.{kind.__name__}"
        )
    return result


def spoken(key: str, node: Mapping[str, Any]) -> str:
    """Return how a line names what a node builds: by its `_target_`, or as Python code calls it."""
    return f"{key}={name}" if (name := handed_over(node)) else f"{key}._target_={node['_target_']}"


def handed_over(node: Mapping[str, Any]) -> str | None:
    """Return the name of an object that Python code has handed over; None: a node names a target."""
    return str(node["name"]) if {"name", "digest"} <= node.keys() else None


def instantiate(key: str, node: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
    """Call the `_target_` of a node with its other keys and these arguments, and return the result.

    Raises:
        BadInputError: it cannot be built; the message names the key and the reason.
    """
    if not node.get("_target_"):
        raise BadInputError(f"{key}._target_ must be set")
    try:
        with _no_exit(key, node["_target_"]):
            return hydra.utils.instantiate(dict(node), *args, _convert_="all", **kwargs)
    except Exception as error:  # of the target, or of Hydra about what stands beside it
        cause = error.__cause__ if isinstance(error, InstantiationException) else error
        if isinstance(cause, BadInputError):
            raise cause from None
        raise BadInputError(f"{key}{_why(node, error, cause)}") from error


@contextmanager
def _no_exit(key: str, target: object) -> Iterator[None]:
    """Let no target end the process on the spot, whatever status it gives it; forked ones may."""
    end, process = os._exit, os.getpid()

    def refuse(status: int = 0) -> NoReturn:
        if os.getpid() == process:
            raise BadInputError(f"{key}: _target_={target}: ends the process (status {status})")
        end(status)

    os._exit = refuse
    try:
        yield
    finally:
        os._exit = end


def _why(node: Mapping[str, Any], error: Exception, cause: BaseException | None) -> str:
    target, handed = node["_target_"], handed_over(node)
    unexpected = re.search(r"unexpected keyword argument '(\w+)'", str(cause))
    if unexpected and handed is None:
        name = unexpected[1]
        known = parameter_names(node)
        return f": {target} takes no {name!r} (it takes {', '.join(known)}){nearest(name, known)}"
    if isinstance(cause, (TypeError, ValueError, AttributeError)):
        for name, value in node.items():
            wanted = _annotation(target, str(name))
            if wanted is not None and not _fits(value, wanted):
                said = getattr(wanted, "__name__", str(wanted)) if isinstance(wanted, type) else wanted
                return f".{name}={value}: {target} takes {said} there, not {type(value).__name__}"
    reason = text_of(error if cause is None else cause)
    lines = [line.strip() for line in reason.splitlines() if line.strip()] or [type(cause).__name__]
    what = f": _target_={target}" if handed is None else f"={handed}"
    return f"{what}: {' '.join(lines[:2])}"


def _annotation(target: str, name: str) -> Any:
    """Return what type a target says that one of its parameters has; None where it says nothing."""
    try:
        made: Any = hydra.utils.get_object(target)
        called = made.__init__ if inspect.isclass(made) else made
        return get_type_hints(called).get(name)
    except Exception:  # as many as there are ways to write annotations
        return None


def _fits(value: Any, wanted: Any) -> bool:
    """Whether a value of a configuration may be of a type; yes, where that is not simple."""
    kind, inner = get_origin(wanted), get_args(wanted)
    if kind in (Union, UnionType):
        numbers = [one for one in inner if one in (int, float)]  # float | Tensor: no text can be meant
        return any(_fits(value, one) for one in (numbers and [*numbers, NoneType]) or inner)
    if kind in (Sequence, list) and isinstance(value, (list, tuple)):
        return not inner or all(_fits(one, inner[0]) for one in value)
    if wanted is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if wanted is int and isinstance(value, bool):
        return False
    if kind in (Sequence, list):
        return False
    return isinstance(value, wanted) if wanted in (int, str, bool, NoneType) else True


def import_target(node: Mapping[str, Any]) -> None:
    """Import a target's module, before random numbers are seeded: the first import may draw some."""
    with suppress(Exception):  # instantiating it will raise the same
        importlib.import_module(str(node["_target_"]).rpartition(".")[0])


def target_object(node: Mapping[str, Any]) -> Any:
    """Return what a `_target_` names; None where there is no such thing, as instantiating it says."""
    with suppress(TypeError):
        return object_at(node["_target_"])
    return None


def object_at(address: str) -> Any:
    """Return what can be imported by an address; None where there is no such thing."""
    with suppress(ImportError, ValueError):
        return hydra.utils.get_object(address)
    return None


def parameter_names(node: Mapping[str, Any]) -> list[str]:
    """Return the names of a `_target_`'s parameters; none where they are unknown."""
    try:
        return list(inspect.signature(target_object(node)).parameters)
    except (ValueError, TypeError):
        return []
