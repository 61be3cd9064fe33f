"""A sandbox for modules: they run on copies of their tensors, and are put back as they were.

The modules themselves are not copied, since a loss function, a wrapper or a framework may hold them.
Every tensor in them is exchanged for the length of a `with` block, so that nothing which a pass changes
(gradients, running statistics, counters, caches in plain attributes) stays changed.
"""

import copy
import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from gaccum_exp.core.dtypes import in_precision

_GENERATORS = (random.Random, np.random.Generator, np.random.RandomState, torch.Generator)
_FRAMEWORKS = ("builtins", "torch", "lightning", "pytorch_lightning", "accelerate", "transformers")
_REGISTRIES = frozenset(vars(nn.Module()))


class NamedModules:
    """The modules of the model and of its loss, each once, under dotted names.

    Args:
        model: its modules and parameters keep their names.
        others: what the loss holds; their names are preceded by `criterion`.
        compared: the parameters whose gradients are compared; None: all.
    """

    def __init__(
        self, model: nn.Module, *others: nn.Module, compared: Iterable[Tensor] | None = None
    ) -> None:
        inside = {id(module) for module in model.modules()}
        outside = [module for module in others if id(module) not in inside]
        numbered = {f"criterion.{i}": module for i, module in enumerate(outside)}
        roots = {"": model, **({"criterion": outside[0]} if len(outside) == 1 else numbered)}
        named = [pair for prefix, root in roots.items() for pair in root.named_modules(prefix=prefix)]
        # By identity, for a module may hash by a state that changes (torchmetrics' do).
        self._each = list({id(module): module for _, module in named}.values())
        self._names = {id(module): name for name, module in reversed(named)}
        chosen = None if compared is None else {id(parameter) for parameter in compared}
        self.compared = {n for n, p in self.parameters().items() if chosen is None or id(p) in chosen}
        """Names of the parameters whose gradients are compared."""

    def __iter__(self) -> Iterator[nn.Module]:
        return iter(self._each)

    def name(self, module: nn.Module) -> str:
        """Return a module's dotted name; the model's own is empty."""
        name: str = self._names[id(module)]
        return name

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return all parameters by name, each once."""
        found: dict[int, tuple[str, nn.Parameter]] = {}
        for module in self:
            prefix = self.name(module)
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    found.setdefault(id(parameter), (f"{prefix}.{name}".lstrip("."), parameter))
        return dict(found.values())


@contextmanager
def sandbox(
    modules: NamedModules,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
    drawn: Callable[[], None] = lambda: None,
) -> Iterator[dict[str, nn.Parameter]]:
    """Exchange all tensors of the modules for copies; yield those of the parameters by name.

    They have no gradients. Real and complex ones are as precise as `dtype`, all of them on `device`, if
    given. `drawn` is called where a generator that a module holds has been drawn from.
    """
    copies = _Copies(dtype, device)
    # Parameters may be held elsewhere too (by an optimizer), and must keep their gradients there.
    gradients = [(p, p.grad) for p in modules.parameters().values()]
    before = [(m, dict(m._parameters), dict(m._buffers), _attributes(m)) for m in modules]
    for parameter, _ in gradients:
        parameter.grad = None
    try:
        for module, parameters, buffers, _ in before:
            module._parameters.update({k: copies.of_parameter(p) for k, p in parameters.items()})
            module._buffers.update({k: copies.of_tensor(b) for k, b in buffers.items()})
        for module, _, _, attributes in before:
            vars(module).update({k: copies.of_attribute(v) for k, v in attributes.items()})
            if any(kind.__name__ == "LightningModule" for kind in type(module).__mro__):
                # These log from within their steps, which a pass in the sandbox must not.
                vars(module).update(log=nothing, log_dict=nothing)
        with _no_recomputation():
            yield modules.parameters()
    finally:
        if copies.drawn_from():
            drawn()
        copies.restore_objects()
        for module, parameters, buffers, attributes in before:
            pairs: Any = (module._parameters, parameters), (module._buffers, buffers)
            for registry, then in pairs:
                registry.clear()
                registry.update(then)
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
        if parameter is not None and id(parameter) not in self._made:
            made = nn.Parameter(self._copied(parameter), requires_grad=parameter.requires_grad)
            for hook in (parameter._backward_hooks or {}).values():  # they make the gradient, too
                made.register_hook(hook)  # type: ignore[no-untyped-call]  # torch's own
            self._made[id(parameter)] = made
        return None if parameter is None else self._made[id(parameter)]

    def of_tensor(self, tensor: Any) -> Any:
        if not isinstance(tensor, Tensor) or (tensor.requires_grad and not tensor.is_leaf):
            return tensor
        if id(tensor) not in self._made:
            self._made[id(tensor)] = self._copied(tensor).requires_grad_(tensor.requires_grad)
        return self._made[id(tensor)]

    def of_attribute(self, value: Any) -> Any:
        """Copy what code may change in place: tensors, containers, arrays, generators, plain objects."""
        if isinstance(value, Tensor):
            return self.of_tensor(value)
        if type(value) in (list, tuple, set):
            return type(value)(self.of_attribute(v) for v in value)
        if type(value) is dict:
            return {k: self.of_attribute(v) for k, v in value.items()}
        if isinstance(value, (deque, dict, np.ndarray)):
            return copy.copy(value)
        if isinstance(value, _GENERATORS):
            if isinstance(value, torch.Generator):
                return value.clone_state()  # draws from it are recorded operator by operator
            # The system's has no state to be copied.
            copied = value if isinstance(value, random.SystemRandom) else copy.deepcopy(value)
            self._generators.append((value, copied))
            return copied
        if _is_plain_object(value) and all(vars(value) is not of for of, _ in self._objects):
            # The object itself stays, since others may hold it; what is in it is put back.
            kept = dict(vars(value))
            self._objects.append((vars(value), kept))
            vars(value).update({k: self.of_attribute(v) for k, v in kept.items()})
        return value

    def drawn_from(self) -> bool:
        """Whether a generator of Python's or NumPy's that a module holds was drawn from."""
        return any(_state_of(before) != _state_of(after) for before, after in self._generators)

    def restore_objects(self) -> None:
        for of, kept in reversed(self._objects):
            of.clear()
            of.update(kept)

    def _copied(self, tensor: Tensor) -> Tensor:
        dtype = in_precision(tensor.dtype, self._dtype)
        return tensor.detach().to(self._device or tensor.device, dtype, copy=True)


def _state_of(generator: Any) -> str:
    if isinstance(generator, random.SystemRandom):
        return str(id(object()))  # the system's has no state, and never repeats
    if isinstance(generator, random.Random):
        return str(generator.getstate())
    if isinstance(generator, np.random.Generator):
        return str(generator.bit_generator.state)
    return str(generator.get_state(legacy=False))


def _is_plain_object(value: Any) -> bool:
    """Whether it is an object of the user's, e.g. a meter: no module and no part of a framework."""
    if not hasattr(value, "__dict__") or isinstance(value, (nn.Module, type)) or callable(value):
        return False
    return type(value).__module__.partition(".")[0] not in _FRAMEWORKS


def nothing(*args: Any, **kwargs: Any) -> None:
    """Do nothing, in place of a function that must not run."""


def _attributes(module: nn.Module) -> dict[str, Any]:
    return {k: v for k, v in vars(module).items() if k not in _REGISTRIES or k == "training"}


@contextmanager
def _no_recomputation() -> Iterator[None]:
    """Switch checkpointing off: its backward pass draws the random numbers of a pass a second time."""

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
