"""Instantiate the `_target_` of a configuration block, and explain where that fails.

Configurations are code: a `_target_` names a function that is called.
"""

import importlib
import inspect
import re
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import hydra
from hydra.errors import InstantiationException

from gaccum_exp.errors import BadInputError, nearest


def checked(key: str, node: Mapping[str, Any], kind: type, *args: Any, **kwargs: Any) -> Any:
    """Instantiate a node and require an instance of a class.

    Raises:
        BadInputError: it gives something else, or cannot be built.
    """
    result = instantiate(key, node, *args, **kwargs)
    if not isinstance(result, kind):
        raise BadInputError(
            f"{key}._target_={node['_target_']}: gives {type(result).__name__}, not a "
            f"{kind.__module__}.{kind.__name__}"
        )
    return result


def instantiate(key: str, node: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
    """Call the `_target_` of a node with its other keys and these arguments, and return the result.

    Raises:
        BadInputError: it cannot be built; the message names the key and the reason.
    """
    if not node.get("_target_"):
        raise BadInputError(f"{key}._target_ must be set")
    try:
        return hydra.utils.instantiate(dict(node), *args, _convert_="all", **kwargs)
    except InstantiationException as error:
        cause = error.__cause__
        if isinstance(cause, BadInputError):
            raise cause from None
        raise BadInputError(f"{key}: {_why(node, error, cause)}") from error


def _why(node: Mapping[str, Any], error: Exception, cause: BaseException | None) -> str:
    target = node["_target_"]
    unexpected = re.search(r"unexpected keyword argument '(\w+)'", str(cause))
    if unexpected:
        name = unexpected[1]
        known = parameter_names(node)
        return f"{target} takes no {name!r} (it takes {', '.join(known)}){nearest(name, known)}"
    reason = str(cause) if cause is not None else str(error)
    lines = [line.strip() for line in reason.splitlines() if line.strip()] or [type(cause).__name__]
    return f"_target_={target}: {' '.join(lines[:2])}"


def import_target(node: Mapping[str, Any]) -> None:
    """Import a target's module, before random numbers are seeded: the first import may draw some."""
    with suppress(Exception):  # instantiating it will raise the same
        importlib.import_module(str(node["_target_"]).rpartition(".")[0])


def parameter_names(node: Mapping[str, Any]) -> list[str]:
    """Return the names of a `_target_`'s parameters; none where they are unknown."""
    try:
        return list(inspect.signature(hydra.utils.get_object(node["_target_"])).parameters)
    except (ImportError, ValueError, TypeError):
        return []
