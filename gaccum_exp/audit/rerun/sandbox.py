"""Modules put on a bench: run on copies of their tensors, and put back as if nothing had happened.

The modules themselves are used and not copied, since a loss function, a wrapper or a framework may hold
them; what is exchanged for the length of a `with` block is every tensor in them. So nothing that a pass
does (gradients, running statistics, counters, caches in plain attributes) is left behind.
"""

import copy
import functools
import random
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import torch
import torch.utils.checkpoint
from torch import Tensor, nn

_REGISTRIES = frozenset(vars(nn.Module()))


class Parts:
    """The model, and other modules beside it, under the names that the user knows.

    Args:
        model: its modules and parameters keep their dotted names.
        others: what its loss holds; their names are preceded by `criterion`.
    """

    def __init__(self, model: nn.Module, *others: nn.Module) -> None:
        inside = {id(module) for module in model.modules()}
        apart = [module for module in others if id(module) not in inside]
        numbered = {f"criterion.{i}": module for i, module in enumerate(apart)}
        roots = {"": model, **({"criterion": apart[0]} if len(apart) == 1 else numbered)}
        every = [pair for prefix, root in roots.items() for pair in root.named_modules(prefix=prefix)]
        # By identity, for a module may hash by a state that moves (torchmetrics' do).
        self.modules = list({id(module): module for _, module in every}.values())
        """Each once."""
        self._names = {id(module): name for name, module in reversed(every)}
        self.judged: set[str] | None = None
        """Names of the parameters whose gradients are compared; None: all."""

    def name(self, module: nn.Module) -> str:
        """Return a module's dotted name; the model's own is empty."""
        name: str = self._names[id(module)]
        return name

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return all parameters by name, each once."""
        found: dict[int, tuple[str, nn.Parameter]] = {}
        for module in self.modules:
            prefix = self.name(module)
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    found.setdefault(id(parameter), (f"{prefix}.{name}".lstrip("."), parameter))
        return dict(found.values())


def modules_in(function: Any) -> list[nn.Module]:
    """Return the modules that a loss function holds: bound, partial, enclosed, or as attributes."""
    if isinstance(function, nn.Module):
        return [function]
    held = [getattr(function, "__self__", None), *getattr(function, "__dict__", {}).values()]
    if isinstance(function, functools.partial):
        held += [*function.args, *function.keywords.values(), *modules_in(function.func)]
    for cell in getattr(function, "__closure__", None) or ():
        with suppress(ValueError):  # not filled yet
            held.append(cell.cell_contents)
    return [module for module in held if isinstance(module, nn.Module)]


@contextmanager
def on_bench(
    parts: Parts,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
    moved: Callable[[], None] = lambda: None,
) -> Iterator[dict[str, nn.Parameter]]:
    """Exchange all tensors of the modules for copies.

    Args:
        parts: what the pass will use.
        dtype: of floating-point copies; None: as they are.
        device: of the copies; None: where they are.
        moved: called where a generator that a module holds has been drawn from.

    Yields:
        The copies of the parameters by name, without gradients.
    """
    copies = _Copies(dtype, device)
    # Parameters that some code holds without registering them must keep their gradients as well.
    gradients = [(p, p.grad) for p in parts.parameters().values()]
    before = [(m, dict(m._parameters), dict(m._buffers), _attributes(m)) for m in parts.modules]
    for parameter, _ in gradients:
        parameter.grad = None
    try:
        for module, parameters, buffers, _ in before:
            module._parameters.update({k: copies.of_parameter(p) for k, p in parameters.items()})
            module._buffers.update({k: copies.of_tensor(b) for k, b in buffers.items()})
        for module, _, _, attributes in before:
            vars(module).update({k: copies.of_attribute(v) for k, v in attributes.items()})
            vars(module).update(_silenced(module))
        with _no_recomputation():
            yield parts.parameters()
    finally:
        if copies.drawn_from():
            moved()
        copies.restore_objects()
        for module, parameters, buffers, attributes in before:
            _put_back(module._parameters, parameters)
            _put_back(module._buffers, buffers)
            for added in _attributes(module).keys() - attributes.keys():
                del vars(module)[added]
            vars(module).update(attributes)
        for parameter, grad in gradients:
            parameter.grad = grad


class _Copies:
    """One copy of each tensor, however many modules share it."""

    def __init__(self, dtype: torch.dtype | None, device: torch.device | None) -> None:
        self._dtype, self._device = dtype, device
        self._made: dict[int, Any] = {}
        self._generators: list[tuple[Any, Any]] = []
        self._objects: list[tuple[dict[str, Any], dict[str, Any]]] = []

    def of_parameter(self, parameter: nn.Parameter | None) -> Any:
        if parameter is None or id(parameter) in self._made:
            return None if parameter is None else self._made[id(parameter)]
        made = nn.Parameter(self._copied(parameter), requires_grad=parameter.requires_grad)
        for hook in (parameter._backward_hooks or {}).values():  # part of what the gradient is
            made.register_hook(hook)  # type: ignore[no-untyped-call]  # torch's own
        self._made[id(parameter)] = made
        return made

    def of_tensor(self, tensor: Any) -> Any:
        if not isinstance(tensor, Tensor) or (tensor.requires_grad and not tensor.is_leaf):
            return tensor
        if id(tensor) not in self._made:
            self._made[id(tensor)] = self._copied(tensor).requires_grad_(tensor.requires_grad)
        return self._made[id(tensor)]

    def of_attribute(self, value: Any) -> Any:
        """What code may change in place: tensors, containers, arrays, generators, plain objects."""
        if isinstance(value, Tensor):
            return self.of_tensor(value)
        if type(value) in (list, tuple, set):
            return type(value)(self.of_attribute(v) for v in value)
        if type(value) is dict:
            return {k: self.of_attribute(v) for k, v in value.items()}
        if isinstance(value, (deque, dict, np.ndarray)):
            return copy.copy(value)
        if isinstance(value, GENERATORS):
            self._generators.append((value, copied := _copied_generator(value)))
            return copied
        if _is_plain_object(value) and all(vars(value) is not of for of, _ in self._objects):
            # The object stays itself, since others may hold it; what is in it is put back.
            kept = dict(vars(value))
            self._objects.append((vars(value), kept))
            vars(value).update({k: self.of_attribute(v) for k, v in kept.items()})
        return value

    def drawn_from(self) -> bool:
        """Whether a generator held by a module has moved; torch's are followed operator by operator."""
        pairs = (p for p in self._generators if not isinstance(p[0], torch.Generator))
        return any(_state_of(before) != _state_of(after) for before, after in pairs)

    def restore_objects(self) -> None:
        """Put back what plain objects held."""
        for of, kept in reversed(self._objects):
            of.clear()
            of.update(kept)

    def _copied(self, tensor: Tensor) -> Tensor:
        dtype = self._dtype if tensor.is_floating_point() else None
        return tensor.detach().to(
            device=self._device or tensor.device, dtype=dtype or tensor.dtype, copy=True
        )


GENERATORS = (random.Random, np.random.Generator, np.random.RandomState, torch.Generator)


def _copied_generator(generator: Any) -> Any:
    if isinstance(generator, torch.Generator):
        return generator.clone_state()
    return copy.deepcopy(generator) if not isinstance(generator, random.SystemRandom) else generator


def _state_of(generator: Any) -> str:
    if isinstance(generator, random.SystemRandom):
        return str(id(object()))  # it has none, and never repeats
    if isinstance(generator, random.Random):
        return str(generator.getstate())
    if isinstance(generator, np.random.Generator):
        return str(generator.bit_generator.state)
    return str(generator.get_state(legacy=False))


def _is_plain_object(value: Any) -> bool:
    """An object of somebody's class, e.g. a meter; neither a module nor part of a framework."""
    kind = type(value)
    if not hasattr(value, "__dict__") or isinstance(value, (nn.Module, type)) or callable(value):
        return False
    return kind.__module__.partition(".")[0] not in FRAMEWORKS


FRAMEWORKS = frozenset(
    {"builtins", "torch", "lightning", "pytorch_lightning", "accelerate", "transformers"}
)


def _silenced(module: nn.Module) -> dict[str, Any]:
    """Lightning's modules log from within their steps, which a pass on the bench must not."""
    if not any(kind.__name__ == "LightningModule" for kind in type(module).__mro__):
        return {}
    return {"log": _nothing, "log_dict": _nothing}


def _nothing(*args: Any, **kwargs: Any) -> None:
    pass


def _attributes(module: nn.Module) -> dict[str, Any]:
    return {k: v for k, v in vars(module).items() if k not in _REGISTRIES or k == "training"}


def _put_back(registry: dict[str, Any], before: dict[str, Any]) -> None:
    registry.clear()
    registry.update(before)


@contextmanager
def _no_recomputation() -> Iterator[None]:
    """Checkpointing off: it would draw the random numbers of a pass a second time, in its backward."""

    class Direct:
        @staticmethod
        def apply(function: Any, preserve: bool, *args: Any) -> Any:
            return function(*args)

    def once(*args: Any, **kwargs: Any) -> Iterator[None]:
        yield

    stand_ins = {
        "CheckpointFunction": Direct,
        "_checkpoint_without_reentrant_generator": once,
        "_checkpoint_without_reentrant_generator_impl": once,
    }
    names = vars(torch.utils.checkpoint)
    before = {name: names[name] for name in stand_ins if name in names}
    names.update({name: stand_ins[name] for name in before})
    try:
        yield
    finally:
        names.update(before)
