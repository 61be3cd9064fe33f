"""The parts of a training by name: modules, what the loss holds, and what of them is no parameter.

Names are those of the plain model: `model.net.0.weight`, whatever wraps or compiles it.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from gaccum_exp.core.module_state import held_by
from gaccum_exp.core.seeding import random_states, set_random_states
from gaccum_exp.train.checkpoint.attributes import (
    PARAMETER,
    PART,
    Names,
    Objects,
    PuttingBack,
    attributes_of,
    copied,
)
from gaccum_exp.train.state import TrainState

WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
"""What modules call the module that they wrap."""


def plain_name(name: str) -> str:
    """Return the name that a parameter or a module has in the plain model."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def parts_of(state: TrainState) -> dict[str, Any]:
    """Return every module of a training by name, and the other objects that its loss function holds."""
    roots: dict[str, Any] = {"model": state.model}
    if state.criterion_loss is not None:
        roots["criterion"] = state.criterion_loss.criterion
    held = enumerate(held_by(state.loss_fn))
    roots |= {f"loss.{number}": of for number, of in held if hasattr(of, "__dict__")}
    found: dict[str, Any] = {}
    seen: set[int] = set()
    for root, of in roots.items():
        modules = of.named_modules() if isinstance(of, nn.Module) else [("", of)]
        for name, part in modules:
            wraps = isinstance(part, nn.Module) and any(name in part._modules for name in WRAPPERS)
            if id(part) not in seen and not wraps:
                seen.add(id(part))
                found[plain_name(f"{root}.{name}".rstrip("."))] = part
    return found


def parameters_of(parts: Mapping[str, Any]) -> dict[str, nn.Parameter]:
    """Return the parameters of these parts by name; one that is shared has its first name."""
    found: dict[str, nn.Parameter] = {}
    seen: set[int] = set()
    for name, part in _modules(parts):
        for key, parameter in part._parameters.items():
            if parameter is not None and id(parameter) not in seen:
                seen.add(id(parameter))
                found[f"{name}.{key}"] = parameter
    return found


def names_of(parts: Mapping[str, Any]) -> Names:
    """Return what attributes may refer to by name: the parameters of these parts, and the parts."""
    parameters = parameters_of(parts)
    named = {id(of): (PARAMETER, name) for name, of in parameters.items()}
    return named | {id(part): (PART, name) for name, part in parts.items()}


def objects_of(parts: Mapping[str, Any]) -> Objects:
    """Return what these names stand for."""
    named: dict[tuple[str, str], Any] = {(PARAMETER, n): of for n, of in parameters_of(parts).items()}
    return named | {(PART, name): part for name, part in parts.items()}


def moving(parts: Mapping[str, Any]) -> dict[str, Any]:
    """Return what passes may move beside gradients, as a tree of values that are not copied.

    Buffers, what a module keeps by `get_extra_state`, attributes as `attributes_of` has them, and the
    process's own generators.
    """
    names = names_of(parts)
    return {
        "buffers": {f"{n}.{key}": b for n, part in _modules(parts) for key, b in part._buffers.items()},
        "extra": {name: part.get_extra_state() for name, part in _modules(parts) if _has_extra(part)},
        "attributes": {name: attributes_of(part, names)[0] for name, part in parts.items()},
        "random": random_states(),
    }


@torch.no_grad()
def put_back(parts: Mapping[str, Any], kept: Mapping[str, Any]) -> None:
    """Put back what `moving` has returned; it stays as it is, and can be put back again."""
    putting_back = PuttingBack(objects_of(parts))
    for name, part in _modules(parts):
        for key, now in list(part._buffers.items()):
            part._buffers[key] = putting_back.restored(now, kept["buffers"].get(f"{name}.{key}"))
        if name in kept["extra"]:
            part.set_extra_state(copied(kept["extra"][name]))
    for name, part in parts.items():
        putting_back.attributes(part, kept["attributes"].get(name, {}))
    set_random_states(fitting(kept["random"]))


def fitting(states: Sequence[Any]) -> list[Any]:
    """Return generators' states with the present ones of accelerators, where there are not as many."""
    here, there = random_states()[3], states[3]
    return [*states[:3], there if list(map(len, here)) == list(map(len, there)) else here]


def _modules(parts: Mapping[str, Any]) -> Iterator[tuple[str, nn.Module]]:
    return ((name, part) for name, part in parts.items() if isinstance(part, nn.Module))


def _has_extra(part: nn.Module) -> bool:
    return type(part).get_extra_state is not nn.Module.get_extra_state
