"""The optimizer of a training: what its target is called with, and its parameter groups by name."""

from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from gaccum_exp.config.schema import Settings
from gaccum_exp.config.targets import checked, parameter_names
from gaccum_exp.errors import BadInputError, nearest
from gaccum_exp.train.batch_rules import follow_batch
from gaccum_exp.train.checkpoint.parts import plain_name

NAMED = "named_parameters"
"""The argument by which a target asks for pairs (name, parameter)."""
GROUPS = "param_groups"
SHOWN = 3


def optimizer_of(
    settings: Settings, modules: nn.ModuleList, tensors: Sequence[Tensor] | None = None
) -> torch.optim.Optimizer:
    """Build the optimizer of what modules have to train.

    A target is called with the parameters, as those of `torch.optim` are; one that has an argument
    `named_parameters` is given pairs (name, parameter) there. `optimizer.param_groups` gives some of
    them options of their own: a list of `{names: …, weight_decay: 0, …}`, whose names are patterns of
    a parameter's name, or of its module's class and what it is there, `LayerNorm.weight`.

    Args:
        settings: of the run.
        modules: the model, and the criterion where that is a module.
        tensors: in place of their parameters that require a gradient, in the same order.

    Raises:
        BadInputError: the target cannot be called so, or gives no optimizer.
    """
    node, kinds = dict(settings.optimizer), _kinds(modules)
    names = list(kinds)
    own = [p for p in modules.parameters() if p.requires_grad]
    named = dict(zip(names, own if tensors is None else tensors, strict=True))
    taken = parameter_names(node)
    groups = None if GROUPS in taken else node.pop(GROUPS, None)
    parameters: list[Any] = list(named.values())
    given = f"a list of {len(parameters)} parameters"
    if groups:
        if NAMED in taken:
            raise BadInputError(
                f"optimizer.{GROUPS}: {node['_target_']} takes {NAMED}, and makes groups of them "
                "itself: leave it out"
            )
        parameters = _groups(groups, named, kinds)
        given = f"a list of {len(parameters)} parameter groups, each a dict with params"
    arguments = () if taken[:1] == [NAMED] else (parameters,)
    pairs = {NAMED: list(named.items())} if NAMED in taken else {}
    kind: type[torch.optim.Optimizer] = torch.optim.Optimizer
    try:
        optimizer: torch.optim.Optimizer = checked("optimizer", node, kind, *arguments, **pairs)
    except BadInputError as error:
        if not str(error).startswith("optimizer: _target_="):  # it names the key that is at fault
            raise
        options = ", ".join(f"{key}={value}" for key, value in node.items() if not key.startswith("_"))
        given = f"{NAMED}, a list of {len(named)} pairs (name, parameter)," if pairs else given
        way_out = "" if pairs else f"; an argument {NAMED} is given pairs (name, parameter)"
        raise BadInputError(f"{error}; it was called with {given} and {options}{way_out}") from error
    _require_known_options(groups or (), optimizer)
    follow_batch(optimizer, settings)
    return optimizer


def _kinds(modules: nn.ModuleList) -> dict[str, str]:
    """Return by name each parameter that is trained: the class of its module, and its entry there.

    Names are those of the plain model; those of a criterion have `criterion.` before their name.
    """
    found: dict[str, str] = {}
    seen: set[Tensor] = set()
    for root, owner, key, parameter in _parameters(modules):
        if parameter in seen:
            continue
        seen.add(parameter)
        if parameter.requires_grad:
            found[plain_name(f"{root}{key}")] = f"{type(owner).__name__}.{key.rpartition('.')[2]}"
    return found


def _parameters(modules: nn.ModuleList) -> Iterator[tuple[str, nn.Module, str, nn.Parameter]]:
    """Yield each in the order of `modules.parameters()`: root, its module, its name below the root."""
    for number, root in enumerate(modules):
        for name, owner in root.named_modules():
            for key, parameter in owner._parameters.items():
                if parameter is not None:
                    yield "criterion." * (number > 0), owner, f"{name}.{key}".lstrip("."), parameter


def _groups(given: Any, named: Mapping[str, Tensor], kinds: Mapping[str, str]) -> list[dict[str, Any]]:
    """Return parameter groups as torch has them; what no pattern names comes first, without options."""
    if not isinstance(given, list) or not all(isinstance(group, Mapping) for group in given):
        raise BadInputError(
            f"optimizer.{GROUPS}={given}: is a list of {{names: …, weight_decay: 0, …}}, as "
            "[{names:[*bias,*Norm*],weight_decay:0}]"
        )
    left, groups = dict(named), list[dict[str, Any]]()
    for number, group in enumerate(given):
        key = f"optimizer.{GROUPS}[{number}].names"
        patterns = group.get("names")
        patterns = [patterns] if isinstance(patterns, str) else patterns
        if not isinstance(patterns, list) or not patterns:
            raise BadInputError(
                f"{key}={patterns}: is a pattern of parameters' names, or a list of them"
            )
        found = dict[str, Tensor]()
        for pattern in map(str, patterns):
            of_it = [name for name in named if _fits(pattern, name, kinds[name])]
            if not of_it:
                raise BadInputError(
                    f"{key}={pattern}: no parameter is called so{_such_as(pattern, kinds)}"
                )
            found |= {name: left.pop(name) for name in of_it if name in left}
        if not found:
            raise BadInputError(
                f"{key}={','.join(map(str, patterns))}: all of these are in groups before it"
            )
        groups.append({**group, "params": list(found.values())})
        del groups[-1]["names"]
    return [{"params": list(left.values())}, *groups] if left else groups


def _fits(pattern: str, name: str, kind: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(kind, pattern)


def _such_as(pattern: str, kinds: Mapping[str, str]) -> str:
    """Say what parameters are called."""
    words = {*kinds, *kinds.values(), *(name.rpartition(".")[2] for name in kinds)}
    shown = [f"{name} ({kind})" for name, kind in list(kinds.items())[:SHOWN]]
    more = ", …" if len(kinds) > SHOWN else ""
    return f"{nearest(pattern.strip('*'), words)}; they are {', '.join(shown)}{more}"


def _require_known_options(
    groups: Sequence[Mapping[str, Any]], optimizer: torch.optim.Optimizer
) -> None:
    """Refuse what an optimizer would keep in a group and never read."""
    for number, group in enumerate(groups):
        for key in group.keys() - {"names"} - optimizer.defaults.keys():
            known = sorted(optimizer.defaults)
            raise BadInputError(
                f"optimizer.{GROUPS}[{number}].{key}: {type(optimizer).__name__} has no such option "
                f"(it has {', '.join(known)}){nearest(key, known)}"
            )
