"""Find a loop's model and optimizers by what is called and what steps, from its first window on.

Every optimizer that is made, or there already, is known. Once there is one, the first call of a module
begins the trace: of that module, if it holds all that is stepped, else of the largest that does. Nothing
of the loop is changed but that the making of optimizers is noted.
"""

import functools
import gc
import inspect
import os
import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim import Optimizer

from gaccum_exp.audit.watch.tracer import LOADING
from gaccum_exp.core.gradient import dense

WRAPPERS = {
    "DistributedDataParallel": "module",
    "DataParallel": "module",
    "OptimizedModule": "_orig_mod",
    "_FabricModule": "_original_module",
    "AcceleratedOptimizer": "optimizer",
    "_FabricOptimizer": "optimizer",
    "LightningOptimizer": "_optimizer",
}
"""Wrappers of a module or an optimizer, by class name, and the attribute that holds it."""


def unwrapped(wrapped: Any) -> Any:
    """Return what wrappers that are known hold in the end."""
    while type(wrapped).__name__ in WRAPPERS:
        wrapped = getattr(wrapped, WRAPPERS[type(wrapped).__name__])
    return wrapped


class LoopFinder:
    """Knows the optimizers, and waits for a module to be called.

    Args:
        begin: gets the module that is called first, the optimizers, and the frame of the call.
        made: gets every optimizer that is made while modules are not waited for.
        before: whether optimizers that there were before may be the loop's.
    """

    def __init__(
        self,
        begin: Callable[[nn.Module, list[Optimizer], FrameType], None],
        made: Callable[[Optimizer], None],
        *,
        before: bool = True,
    ) -> None:
        self._begin, self._made, self._before = begin, made, before
        self._known: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        self._bare: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        """Those whose parameters had no gradients when they were first known."""
        self._here = os.getpid(), threading.get_ident()
        self._waiting: Any = None
        self._calls = 0
        """Of modules, while there was no optimizer."""

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Wait, for the length of the block."""
        if self._before:
            gc.collect()  # else what nobody holds any more would be found, too
            self._known.update(o for o in _alive(Optimizer) if hasattr(o, "param_groups"))
            self._bare.update(o for o in self._known if not _has_gradients([o]))
        self.wait()
        try:
            with making_noted(Optimizer, self._note):
                yield
        finally:
            self.wait_no_longer()

    def wait(self) -> None:
        """Wait for the next call of a module."""
        if self._waiting is None:
            self._waiting = register_module_forward_pre_hook(self._on_call)

    def learn(self, optimizer: Optimizer) -> bool:
        """Take an optimizer that steps for a known one; return whether it was."""
        known = optimizer in self._known
        self._known.add(optimizer)
        return known

    @property
    def optimizers(self) -> list[Optimizer]:
        """All that are there, each once, without wrappers."""
        found = {id(o): o for o in map(unwrapped, list(self._known))}
        return [o for o in found.values() if stepped_by([o])]

    @property
    def passes_unseen(self) -> bool:
        """Whether there were backward passes, without a module's call, since an optimizer was known."""
        return _has_gradients(self._bare)

    @property
    def elsewhere(self) -> bool:
        """Whether this is another process, forked from the loop's, or another thread."""
        return self._here != (os.getpid(), threading.get_ident())

    def wait_no_longer(self) -> None:
        """Let modules be called."""
        if self._waiting is not None:
            self._waiting.remove()
            self._waiting = None

    def _note(self, optimizer: Optimizer) -> None:
        if not self.elsewhere:
            self._known.add(optimizer)
            if not _has_gradients([optimizer]):
                self._bare.add(optimizer)
            if self._waiting is None:
                self._made(optimizer)

    def _on_call(self, module: nn.Module, args: Any) -> None:
        # What is computed under inference mode can be no part of a window, nor what makes a batch.
        if torch.compiler.is_compiling() or self.elsewhere or torch.is_inference_mode_enabled():
            return
        optimizers = self.optimizers or self._others()
        frame = _outermost_call() if optimizers else None
        if frame is not None:
            self.wait_no_longer()
            self._begin(frame.f_locals["self"], optimizers, frame)

    def _others(self) -> list[Any]:
        """Search for optimizers of no class of torch's, which takes long: at call 1, 2, 4, 8 …"""
        self._calls += 1
        if self._calls & (self._calls - 1) or not torch.is_grad_enabled():
            return []
        every = gc.get_objects()
        kinds = {kind for kind in set(map(type, every)) if _has_optimizers_methods(kind)}
        if kinds:
            self._known.update(o for o in every if type(o) in kinds and is_other_optimizer(o))
        return self.optimizers


def is_other_optimizer(found: Any) -> bool:
    """Whether an object is used as an optimizer, and is none of torch's: by what it has."""
    kind = type(found)
    if not _has_optimizers_methods(kind):
        return False
    groups = getattr(found, "param_groups", None)
    return isinstance(groups, list) and bool(groups) and all("params" in group for group in groups)


def _has_optimizers_methods(kind: type) -> bool:
    own = (inspect.getattr_static(kind, name, None) for name in ("step", "zero_grad"))
    return all(map(inspect.isfunction, own)) and not issubclass(kind, (Optimizer, nn.Module))


def stepped_by(optimizers: Iterable[Any]) -> list[Any]:
    """Return the parameters that these optimizers step, each once."""
    every = (p for each in optimizers for group in each.param_groups for p in group["params"])
    return list({id(p): p for p in every}.values())


def _has_gradients(optimizers: Iterable[Any]) -> bool:
    return any(p.grad is not None and bool(dense(p.grad).any()) for p in stepped_by(optimizers))


def owner_of(parameters: Iterable[Any], called: Any) -> nn.Module | None:
    """Return the module that holds these parameters; None: no module holds any of them.

    It is the one that was `called`, where that holds all; else the largest that does; where none does
    (an encoder and a decoder), the largest that hold some, in a container under their class names.
    """
    wanted = {id(p) for p in parameters}

    def held(module: nn.Module) -> set[int]:
        return {id(p) for p in module.parameters()} & wanted

    first: nn.Module | None = unwrapped(called)
    if first is not None and held(first) == wanted:
        return first
    every = [m for m in _alive(nn.Module) if hasattr(m, "_modules") and type(m).__name__ not in WRAPPERS]
    inside = {id(child) for m in every for child in m._modules.values() if child is not None}
    roots = [(held(m), list(m.modules()), m) for m in every if id(m) not in inside]
    # Of several that hold the same (an average of the weights holds the model, too) the smallest.
    roots.sort(key=lambda root: (-len(root[0]), all(m is not first for m in root[1]), len(root[1])))
    chosen: list[nn.Module] = []
    for own, _, root in roots:
        if own & wanted:
            wanted -= own
            chosen.append(root)
    if len(chosen) < 2:
        return next(iter(chosen), None)
    return _Together(chosen)


class _Together(nn.Module):
    """Container of the modules whose parameters are stepped together."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        super().__init__()
        for module in modules:
            name, number = type(module).__name__, 2
            while name in self._modules or hasattr(self, name):
                name, number = f"{type(module).__name__}{number}", number + 1
            self.add_module(name, module)


def _outermost_call() -> FrameType | None:
    """Return the frame of the outermost call of a module that runs; None: a data loader's."""
    frame: FrameType | None = sys._getframe(1)
    found = None
    while frame is not None:
        if frame.f_code in LOADING:
            return None
        if frame.f_code is nn.Module._call_impl.__code__:
            found = frame
        frame = frame.f_back
    return found


def _alive(kind: type) -> list[Any]:
    """Return all objects of a type that the garbage collector knows."""
    # By their own types, for a proxy's `__class__` may say anything, and import much.
    return [found for found in gc.get_objects() if issubclass(type(found), kind)]


@contextmanager
def making_noted(kind: Any, note: Callable[[Any], None]) -> Iterator[None]:
    """Note every object of a class that is made in the block."""
    plain, open_ = kind.__init__, True

    @functools.wraps(plain)
    def noted(self: Any, *args: Any, **kwargs: Any) -> None:
        plain(self, *args, **kwargs)
        if open_:
            note(self)

    kind.__init__ = noted
    try:
        yield
    finally:
        open_ = False
        if kind.__init__ is noted:  # else others that end later came after it
            kind.__init__ = plain
