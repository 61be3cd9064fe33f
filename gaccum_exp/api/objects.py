"""Objects of Python code as overrides: under their address, or handed over.

What each may be is checked here, where the caller is told; what it does, in the arms.
"""

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from gaccum_exp.arms.handed_over import (
    CALLED,
    CALLED_WITH_NAMES,
    ITSELF,
    Packed,
    address_of,
    is_dataset,
    name_of,
    pack,
)
from gaccum_exp.config.arguments import quoted, written
from gaccum_exp.core.losses.criteria import HAND_OVER, as_criterion
from gaccum_exp.errors import BadInputError

A_FUNCTION = "hand over a function that makes it, without arguments"
"""The way out for what no other process can have."""


@dataclass(slots=True)
class HandedOver:
    """What is handed over, as overrides and as the bytes of files."""

    overrides: dict[str, str] = field(default_factory=dict)
    """By what stands before the `=`, `+optimizer.momentum`."""
    objects: dict[str, bytes] = field(default_factory=dict, repr=False)
    """By digest."""
    _trained: dict[str, Mapping[int, Any]] = field(default_factory=dict)
    """The trained tensors of each, by id."""

    def add_model(self, model: object) -> None:
        """Add a module, of whose copies each arm trains one, or a callable that makes one."""
        if not isinstance(model, nn.Module) and not callable(model):
            raise BadInputError(
                f"model={_spoken(model)}: must be a torch.nn.Module, or a function that makes one"
            )
        self.overrides["model"] = "custom"
        self._add("model", model, is_called=not isinstance(model, nn.Module))

    def add_criterion(self, criterion: object) -> None:
        """Add a module, a function of output and target with `reduction`, or a loss function."""
        if not callable(criterion):
            raise BadInputError(f"criterion={_spoken(criterion)}: must be {HAND_OVER}")
        self.overrides["criterion"] = "custom"
        criterion = as_criterion(criterion) or criterion
        made = criterion.func if isinstance(criterion, functools.partial) else criterion
        is_class = isinstance(made, type)
        self._add("criterion", criterion, is_called=is_class)
        if "+criterion.digest" not in self.overrides and not is_class:
            self.overrides["+criterion._partial_"] = "true"  # the function itself
        if self._trained.get("model", {}).keys() & self._trained.get("criterion", {}).keys():
            raise BadInputError(
                f"criterion={_spoken(criterion)}: holds weights of the model, of which every arm trains "
                "a copy; take them from the model that it is called with: loss_fn(model, micro_batch)"
            )

    def add_optimizer(self, optimizer: object) -> None:
        """Add a callable that takes parameters: a class, a partial, a function."""
        if isinstance(optimizer, torch.optim.Optimizer):
            raise BadInputError(
                f"optimizer={_spoken(optimizer)}: holds the parameters of one model, and every arm "
                f"trains a copy of its own; hand over how it is made: optimizer={_how_made(optimizer)}"
            )
        if not callable(optimizer):
            raise BadInputError(
                f"optimizer={_spoken(optimizer)}: must be called with parameters and give an optimizer, "
                "as torch.optim.AdamW or functools.partial(torch.optim.SGD, lr=0.1) are"
            )
        self.overrides["optimizer"] = "custom"
        self._add("optimizer", optimizer, is_called=True)
        if self.overrides["optimizer._target_"] == CALLED and "named_parameters" in _arguments(
            optimizer
        ):
            self.overrides["optimizer._target_"] = CALLED_WITH_NAMES
        rate = self.overrides.pop("+optimizer.lr", None) or _default_rate(optimizer)
        key = "~optimizer.lr" if rate is None else "optimizer.lr"
        self.overrides[key] = rate or ""
        if self._trained.get("optimizer"):
            raise BadInputError(
                f"optimizer={_spoken(optimizer)}: holds parameters of a model, and every arm trains a "
                "copy of its own; take them as the argument: lambda parameters: SGD(parameters, lr=0.1)"
            )

    def add_data(self, data: object) -> None:
        """Add a data set, tensors (inputs, targets), a callable that makes one, or (train, eval)."""
        parts = data if isinstance(data, tuple) and not _are_tensors(data) else (data,)
        if not 1 <= len(parts) <= 2:
            raise BadInputError(
                f"data: a tuple of {len(parts)} is neither (train, eval) nor tensors (inputs, targets)"
            )
        self.overrides["data"] = "custom"
        for name, part in zip(("train", "eval"), parts, strict=False):
            if part is not None or name == "train":
                dataset = _dataset(f"data.{name}", part)
                self._add(f"data.{name}", dataset, is_called=not is_dataset(dataset))

    def _add(self, key: str, value: object, *, is_called: bool) -> None:
        """Add an object under its address, with its arguments; hand it over where it has none."""
        function, given = value, {}
        if isinstance(value, functools.partial) and not value.args:
            function, given = value.func, dict(value.keywords)
        address = address_of(function)
        try:
            arguments = {f"+{key}.{name}": written(of) for name, of in given.items()}
        except TypeError:
            address = None
        if address is not None:
            self.overrides[f"{key}._target_"] = address
            self.overrides |= arguments
            return
        packed = self._packed(key, value)
        self.overrides[f"{key}._target_"] = CALLED if is_called else ITSELF
        self.overrides[f"+{key}.name"] = quoted(packed.name)
        self.overrides[f"+{key}.digest"] = quoted(packed.digest)

    def _packed(self, key: str, value: object) -> Packed:
        packed = pack(key, value, A_FUNCTION)
        self.objects[packed.digest] = packed.content
        self._trained[key] = packed.trained
        return packed


def _spoken(value: object) -> str:
    """Return what an object is called in a message."""
    return name_of(value).removeprefix("__main__.").removeprefix("builtins.")


def _are_tensors(value: object) -> bool:
    """Whether a tuple holds tensors, or arrays of NumPy's, and nothing else."""
    return isinstance(value, tuple) and bool(value) and all(_is_array(part) for part in value)


def _is_array(value: object) -> bool:
    return isinstance(value, Tensor) or hasattr(value, "__array_interface__")


def _dataset(key: str, value: object) -> object:
    """Return a data set, or a callable that makes one.

    Raises:
        BadInputError: neither; or its samples cannot be fetched by index.
    """
    if _are_tensors(value):
        tensors = [torch.as_tensor(part) for part in value]  # type: ignore[attr-defined]  # a tuple
        sizes = [len(part) if part.ndim else 0 for part in tensors]
        if len(set(sizes)) > 1:
            raise BadInputError(f"{key}: tensors of {' and '.join(map(str, sizes))} samples")
        return TensorDataset(*tensors)
    if isinstance(value, DataLoader):
        raise BadInputError(
            f"{key}: a DataLoader cuts its own batches, and here the windows are cut; hand over its "
            "data set (loader.dataset)"
        )
    if isinstance(value, IterableDataset):
        raise BadInputError(
            f"{key}: {_spoken(value)} has no samples by index, which windows of every N are cut from; "
            "hand over a map-style data set (list(dataset), if it fits into memory)"
        )
    if isinstance(value, (Mapping, str)) or not (is_dataset(value) or callable(value)):
        raise BadInputError(
            f"{key}={_spoken(value)}: must be a map-style data set, tensors (inputs, targets), or a "
            "function that makes a data set"
        )
    return value


def _default_rate(optimizer: Callable[..., Any]) -> str | None:
    """Return the learning rate that a callable takes by default, as it is written; None: it has none."""
    if address_of(optimizer.func if isinstance(optimizer, functools.partial) else optimizer) is None:
        return None  # of its own code
    rate = _arguments(optimizer).get("lr", inspect.Parameter.empty)
    try:
        return None if rate is inspect.Parameter.empty else written(rate)
    except TypeError:  # a tensor
        return None


def _arguments(function: Callable[..., Any]) -> dict[str, Any]:
    """Return what a callable takes, by name, with its defaults; nothing where it does not say."""
    try:
        return {name: of.default for name, of in inspect.signature(function).parameters.items()}
    except (TypeError, ValueError):
        return {}


def _how_made(optimizer: torch.optim.Optimizer) -> str:
    """Return the code that makes an optimizer like this one: what its class is not given by default."""
    kind = type(optimizer)
    known = _arguments(kind)
    own = ((name, value) for name, value in optimizer.defaults.items() if name in known)
    given = ", ".join(f"{name}={value!r}" for name, value in own if not _same(value, known[name]))
    name = address_of(kind) or kind.__qualname__
    return f"functools.partial({name}, {given})" if given else name


def _same(one: object, other: object) -> bool:
    return bool(type(one) is type(other) and one == other)
