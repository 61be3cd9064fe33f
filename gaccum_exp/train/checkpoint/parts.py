"""The parts of a training by name: modules, what the loss holds, and what of them is no parameter.

Names are those of the plain model: `model.net.0.weight`, whatever wraps or compiles it.
"""

import random
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gaccum_exp.core.module_state import held_by, own_attributes
from gaccum_exp.core.seeding import random_states, set_random_states
from gaccum_exp.train.state import TrainState

WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
"""What modules call the module that they wrap."""
PLAIN = (bool, int, float, complex, str, type(None))
LONGEST = 1000
"""Entries of a list or dictionary that is an attribute: a longer one is data, and not state."""
_CONTAINERS = (list, dict, set, deque)


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


def moving(parts: Mapping[str, Any]) -> dict[str, Any]:
    """Return what passes may move beside gradients, as a tree of values that are not copied.

    Buffers, what a module keeps by `get_extra_state`, attributes that are plain values, tensors or
    random generators, and the process's own generators.
    """
    return {
        "buffers": {f"{n}.{key}": b for n, part in _modules(parts) for key, b in part._buffers.items()},
        "extra": {name: part.get_extra_state() for name, part in _modules(parts) if _has_extra(part)},
        "attributes": {name: plain_attributes(part) for name, part in parts.items()},
        "random": random_states(),
    }


@torch.no_grad()
def put_back(parts: Mapping[str, Any], kept: Mapping[str, Any]) -> None:
    """Put back what `moving` has returned."""
    for name, part in _modules(parts):
        for key, now in list(part._buffers.items()):
            before = kept["buffers"].get(f"{name}.{key}")
            if not _written(now, before):
                part._buffers[key] = before
        if name in kept["extra"]:
            part.set_extra_state(kept["extra"][name])
    for name, part in parts.items():
        put_back_attributes(part, kept["attributes"].get(name, {}))
    set_random_states(fitting(kept["random"]))


def fitting(states: Sequence[Any]) -> list[Any]:
    """Return generators' states with the present ones of accelerators, where there are not as many."""
    here, there = random_states()[3], states[3]
    return [*states[:3], there if list(map(len, here)) == list(map(len, there)) else here]


def plain_attributes(of: Any) -> dict[str, Any]:
    """Return an object's attributes that are values, or random generators, which are their state."""
    kept = {key: _value(value) for key, value in own_attributes(of).items()}
    return {key: value for key, value in kept.items() if value is not _NONE_KEPT}


def put_back_attributes(of: Any, kept: Mapping[str, Any]) -> None:
    """Put back what `plain_attributes` has returned."""
    own = vars(of)
    for key, before in kept.items():
        now = own.get(key)
        if isinstance(before, tuple):
            _set_generator(now, before[1])
        elif isinstance(now, _CONTAINERS) and type(now) is type(before):
            if now != before:
                now.clear()
                (now.extend if isinstance(now, (list, deque)) else now.update)(before)
        elif not _written(now, before):
            own[key] = before


_NONE_KEPT: Any = object()


def _value(value: Any) -> Any:
    """Return what is kept of an attribute."""
    if type(value) in PLAIN or isinstance(value, np.ndarray):
        return value if not isinstance(value, np.ndarray) or not value.dtype.hasobject else _NONE_KEPT
    if type(value) is Tensor:
        return value if value.is_leaf and value.layout == torch.strided else _NONE_KEPT
    if type(value) in _CONTAINERS and len(value) <= LONGEST:
        entries = (*value, *value.values()) if isinstance(value, dict) else tuple(value)
        return value if all(type(entry) in PLAIN for entry in entries) else _NONE_KEPT
    # A tuple, as no attribute is that is kept as it is.
    if isinstance(value, torch.Generator):
        return ("generator", value.get_state())
    if isinstance(value, random.Random) and not isinstance(value, random.SystemRandom):
        return ("generator", value.getstate())
    if isinstance(value, np.random.RandomState):
        return ("generator", value.get_state())
    if isinstance(value, np.random.Generator):
        return ("generator", value.bit_generator.state)
    return _NONE_KEPT


def _set_generator(generator: Any, state: Any) -> None:
    if isinstance(generator, torch.Generator):
        generator.set_state(state)
    elif isinstance(generator, random.Random):
        generator.setstate(state)
    elif isinstance(generator, np.random.RandomState):
        generator.set_state(state)
    elif isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state


def _written(now: Any, before: Any) -> bool:
    """Write a tensor's or an array's value into the one that is there, if it has its shape and type."""
    if isinstance(now, np.ndarray) and isinstance(before, np.ndarray):
        alike = now.shape == before.shape and now.dtype == before.dtype and now.flags.writeable
        if alike:
            np.copyto(now, before)
        return alike
    if not isinstance(now, Tensor) or not isinstance(before, Tensor):
        return now is before
    if now.shape != before.shape or now.dtype != before.dtype or now.layout != torch.strided:
        return False
    if any(by == 0 and n > 1 for n, by in zip(now.shape, now.stride(), strict=True)):
        return False  # it shows one number at several places
    now.data.copy_(before)
    return True


def _modules(parts: Mapping[str, Any]) -> Iterator[tuple[str, nn.Module]]:
    return ((name, part) for name, part in parts.items() if isinstance(part, nn.Module))


def _has_extra(part: nn.Module) -> bool:
    return type(part).get_extra_state is not nn.Module.get_extra_state
