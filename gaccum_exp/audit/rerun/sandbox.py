"""A sandbox for modules: they run on copies of their tensors, and are put back as they were.

The modules themselves are not copied, since a loss function, a wrapper or a framework may hold them.
Every tensor in them is exchanged for the length of a `with` block, so that nothing which a pass changes
(gradients, running statistics, counters, caches in plain attributes) stays changed.
"""

import copy
import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from gaccum_exp.core.dtypes import in_precision
from gaccum_exp.core.module_state import Entries, own_attributes

_GENERATORS = (random.Random, np.random.Generator, np.random.RandomState, torch.Generator)
_FRAMEWORKS = ("builtins", "torch", "lightning", "pytorch_lightning", "accelerate", "transformers")


class NamedModules:
    """The modules of the model and of its loss, each once, under dotted names.

    Args:
        model: its modules and parameters keep their names.
        others: what the loss holds; their names are preceded by `criterion`, or `criterion_` where that
            is a part of the model's.
        compared: the parameters whose gradients are compared; None: all.
    """

    def __init__(
        self, model: nn.Module, *others: nn.Module, compared: Iterable[Tensor] | None = None
    ) -> None:
        self._chosen = None if compared is None else {id(parameter) for parameter in compared}
        self._name_all(model, others)

    def include(self, module: nn.Module) -> None:
        """Take in a module that the loss turns out to be."""
        self._name_all(self._model, (*self.others, module))

    def _name_all(self, model: nn.Module, others: Sequence[nn.Module]) -> None:
        self._model, self.others = model, tuple(others)
        """The model, and what the loss holds."""
        inside = {id(module) for module in model.modules()}
        outside = [module for module in others if id(module) not in inside]
        loss = "criterion"
        while loss in model._modules:
            loss += "_"
        numbered = {f"{loss}.{i}": module for i, module in enumerate(outside)}
        roots = {"": model, **({loss: outside[0]} if len(outside) == 1 else numbered)}
        named = [pair for prefix, root in roots.items() for pair in root.named_modules(prefix=prefix)]
        # By identity, for a module may hash by a state that changes (torchmetrics' do).
        self._names = {id(module): name for name, module in reversed(named)}
        each = {id(module): module for _, module in named}.values()
        self.by_name = {self.name(module): module for module in each}
        """Every module under its dotted name; the model's own is empty."""
        chosen = self._chosen
        self.compared = {n for n, p in self.parameters().items() if chosen is None or id(p) in chosen}
        """Names of the parameters whose gradients are compared."""

    def __iter__(self) -> Iterator[nn.Module]:
        return iter(self.by_name.values())

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
    hooks: bool = True,
    recomputation: bool = False,
) -> Iterator[dict[str, nn.Parameter]]:
    """Exchange all tensors of the modules for copies; yield those of the parameters by name.

    They have no gradients. Real and complex ones are as precise as `dtype`, all of them on `device`, if
    given. `drawn` is called where a generator that a module holds has been drawn from. `hooks` on
    parameters, which change their gradients, are the copies' too. Without `recomputation` checkpointing
    is off.
    """
    copies = _Copies(dtype, device, hooks=hooks)
    # Parameters may be held elsewhere too (by an optimizer), and must keep their gradients there.
    gradients = [(p, p.grad) for p in modules.parameters().values()]
    before = [Entries(vars(m), m._parameters, m._buffers) for m in modules]
    for parameter, _ in gradients:
        parameter.grad = None
    try:
        for module in modules:
            parameters, buffers = module._parameters.items(), module._buffers.items()
            module._parameters.update({k: copies.of_parameter(p) for k, p in parameters})
            module._buffers.update({k: copies.of_tensor(b) for k, b in buffers})
        for module in modules:
            own = own_attributes(module).items()
            vars(module).update({k: copies.of_attribute(v) for k, v in own})
            if any(kind.__name__ == "LightningModule" for kind in type(module).__mro__):
                # These log from within their steps, which a pass in the sandbox must not.
                vars(module).update(log=nothing, log_dict=nothing)
        with nullcontext() if recomputation else _no_recomputation():
            yield modules.parameters()
    finally:
        if copies.drawn_from():
            drawn()
        for entries in (*reversed(copies.objects.values()), *before):
            entries.put_back()
        for parameter, grad in gradients:
            parameter.grad = grad


class _Copies:
    """One copy of each tensor, however many modules share it."""

    def __init__(
        self, dtype: torch.dtype | None, device: torch.device | None, *, hooks: bool = True
    ) -> None:
        self._dtype, self._device, self._hooks = dtype, device, hooks
        self._made: dict[int, Any] = {}
        self._generators: list[tuple[Any, Any]] = []
        self.objects: dict[int, Entries] = {}
        """What stood in the attributes of plain objects, by the dictionary's identity."""

    def of_parameter(self, parameter: nn.Parameter | None) -> Any:
        if parameter is not None and id(parameter) not in self._made:
            made = nn.Parameter(self._copied(parameter), requires_grad=parameter.requires_grad)
            # They make the gradient, too.
            for hook in (parameter._backward_hooks or {}).values() if self._hooks else ():
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
        if type(value) in (tuple, set):
            return type(value)(self.of_attribute(v) for v in value)
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return type(value)(*map(self.of_attribute, value))
        if isinstance(value, (list, deque)):
            # By way of its type, since some, e.g. those of torch.fx, refuse to be written to.
            kind: Any = list if isinstance(value, list) else deque
            entries = copy.copy(value)
            kind.clear(entries)
            kind.extend(entries, map(self.of_attribute, value))
            return entries
        if isinstance(value, dict):
            copied = copy.copy(value)
            for key, entry in value.items():
                dict.__setitem__(copied, key, self.of_attribute(entry))
            return copied
        if isinstance(value, np.ndarray):
            return value.copy()
        if isinstance(value, _GENERATORS):
            if isinstance(value, torch.Generator):
                return value.clone_state()  # draws from it are recorded operator by operator
            # The system's has no state to be copied.
            drawn = value if isinstance(value, random.SystemRandom) else copy.deepcopy(value)
            self._generators.append((value, drawn))
            return drawn
        if not hasattr(value, "__dict__") or isinstance(value, (nn.Module, type)) or callable(value):
            return value
        # An object of the user's, e.g. a meter, stays, since others may hold it: its inside is put back.
        inside, package = vars(value), type(value).__module__.partition(".")[0]
        if package not in _FRAMEWORKS and id(inside) not in self.objects:
            self.objects[id(inside)] = Entries(inside)
            inside.update({k: self.of_attribute(v) for k, v in list(inside.items())})
        return value

    def drawn_from(self) -> bool:
        """Whether a generator of Python's or NumPy's that a module holds was drawn from."""
        return any(_state_of(before) != _state_of(after) for before, after in self._generators)

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


def nothing(*args: Any, **kwargs: Any) -> None:
    """Do nothing, in place of a function that must not run."""


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
