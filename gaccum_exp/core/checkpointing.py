"""Activation checkpointing: keep a block's input alone, and run it again in the backward pass.

Chen et al. 2016 (arXiv 1604.06174), by way of `torch.utils.checkpoint`, which restores torch's random
numbers and autocast. What it leaves open is restored here: a block runs again on copies of its buffers,
in the mode and with the random numbers of Python and NumPy of its first run, and then all is put back.
So BatchNorm's running statistics move once, and no result changes by a bit.
"""

import functools
import pickle
import random
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten
from torch.utils.checkpoint import checkpoint

from gaccum_exp.core.blocks import PLAIN_CLASS, find_blocks, is_segment, pieces, plain_class
from gaccum_exp.errors import BadInputError

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def checkpoint_blocks(model: nn.Module) -> list[str]:
    """Make every repeated block keep only its input; return their dotted names.

    `core/blocks.py` says what a block is. The modules stay the same objects with the same parameters,
    buffers, hooks, state dict and class name; their class becomes a subclass of what it was. Copies and
    pickles are checkpointed too, and a second call changes nothing. Whether a block is in training mode
    does not matter, only whether gradients are enabled.

    Args:
        model: on any device, `meta` included; changed in place.

    Returns:
        The names, in the order of the modules; none where the model has no block. Segments of a
        Sequential are slices (`features[0:3]`), which keep as much as ever where a model calls its
        layers one by one.

    Beside its input a block keeps a copy of its buffers. Not held are a generator of its own that it
    draws from, and what it leaves in plain attributes. Forward hooks on modules inside a block run again
    with it, those on a block do not. An empty key-value cache is withheld from a block, as transformers
    does itself; given a filled one it is not checkpointed. A block that writes to its input raises
    `BadInputError` in its forward pass. Under torch.compile the compiler decides what runs again, except
    in a block that it gives up: that is checkpointed as it is without it.
    """
    blocks = find_blocks(model)
    for block in blocks:
        kind: Any = plain_class(block.module)
        block.module.__class__ = _checkpointed_class(kind, block.is_segment)
    return [block.name for block in blocks]


@functools.cache
def _checkpointed_class(kind: Any, in_segments: bool) -> Any:
    """Return a subclass whose instances are checkpointed, whole or (a Sequential) by segments."""

    @functools.wraps(kind.forward)
    def whole(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return _checkpointed(functools.partial(kind.forward, self), [self], (args, kwargs))

    @functools.wraps(kind.forward)
    def segmented(self: nn.Sequential, input: Any) -> Any:
        layers = list(self)
        for piece in (layers[cut] for cut in pieces(layers)):
            run = functools.partial(_in_turn, piece)
            input = _checkpointed(run, piece, ((input,), {})) if is_segment(piece) else run(input)
        return input

    def reduced(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
        # As one of the plain class would be: this one has no place that it could be imported from.
        make, arguments, *rest = super(made, self).__reduce_ex__(protocol)
        plain = tuple(kind if argument is made else argument for argument in arguments)
        return (_made_again, (kind, in_segments, make, plain), *rest)

    namespace = {
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
        "__doc__": kind.__doc__,
        "__reduce_ex__": reduced,
        "forward": segmented if in_segments else whole,
        PLAIN_CLASS: kind,
    }
    made: Any = type(kind)(kind.__name__, (kind,), namespace)
    return made


def _made_again(kind: Any, in_segments: bool, make: Any, arguments: tuple[Any, ...]) -> Any:
    """Rebuild a module that was copied or pickled."""
    module = make(*arguments)
    module.__class__ = _checkpointed_class(kind, in_segments)
    return module


def _in_turn(layers: Sequence[nn.Module], input: Any) -> Any:
    for layer in layers:
        input = layer(input)
    return input


def _checkpointed(run: Callable[..., Any], modules: Sequence[nn.Module], arguments: Arguments) -> Any:
    """Call `run` on these modules without keeping their activations."""
    args, kwargs = arguments
    caches = [a for a in (*args, *kwargs.values()) if _is_cache(a)]
    if not torch.is_grad_enabled() or not all(map(_is_empty, caches)):
        return run(*args, **kwargs)
    if caches:
        args = tuple(None if _is_cache(a) else a for a in args)
        kwargs = {name: None if _is_cache(a) else a for name, a in kwargs.items()}
    leaves, structure = tree_flatten((args, kwargs))
    call = _Recomputation(run, modules, (args, kwargs), structure)
    if torch.compiler.is_compiling():
        return checkpoint(call, *leaves, use_reentrant=False)
    versions = list(map(_version, leaves))
    result = checkpoint(call, *leaves, use_reentrant=False)
    if versions != list(map(_version, leaves)):
        raise BadInputError(
            f"{type(modules[0]).__name__} cannot be checkpointed: it is to run on its input again, and "
            "writes to it in place"
        )
    return result


def _version(value: Any) -> int:
    """Return how often a tensor has been written to."""
    return value._version if isinstance(value, Tensor) and not value.is_inference() else 0


def _is_cache(argument: Any) -> bool:
    """Whether it is a key-value cache of transformers, which grows whenever a block runs."""
    # To ask a tensor for what it has not makes the compiler warn.
    return not isinstance(argument, Tensor) and hasattr(argument, "get_seq_length")


def _is_empty(cache: Any) -> bool:
    try:
        return bool(cache.get_seq_length() == 0)
    except ValueError:  # it holds something else than keys and values
        return False


class _Recomputation:
    """A call on some modules that runs a second time as it ran first.

    It takes its arguments one by one, however deep they are in tuples, lists and dicts, so that
    `checkpoint` knows their devices and notices those that have been written to in between.
    """

    def __init__(
        self,
        run: Callable[..., Any],
        modules: Sequence[nn.Module],
        arguments: Arguments,
        structure: TreeSpec,
    ) -> None:
        self._run, self._modules, self._structure = run, modules, structure
        self._first = [arguments]
        self._began: _Snapshot | None = None

    def __call__(self, *leaves: Any) -> Any:
        if self._first and not torch.compiler.is_compiling():
            # The very lists and dicts, for it may be meant to change them; but only once.
            args, kwargs = self._first.pop()
            self._began = _Snapshot(self._modules)
            return self._run(*args, **kwargs)
        args, kwargs = tree_unflatten(leaves, self._structure)
        with self._began or nullcontext():  # compiled, it is a function that changes nothing
            return self._run(*args, **kwargs)


class _ModuleState(NamedTuple):
    module: nn.Module
    training: bool
    parameters: dict[str, Any]
    buffers: dict[str, Any]

    @classmethod
    def of(cls, module: nn.Module) -> "_ModuleState":
        return cls(module, module.training, dict(module._parameters), dict(module._buffers))

    def put_back(self) -> None:
        vars(self.module)["training"] = self.training  # many times as fast as setting it
        for registry, before in (
            (self.module._parameters, self.parameters),
            (self.module._buffers, self.buffers),
        ):
            registry.clear()
            registry.update(before)


class _Snapshot:
    """Modules and the host's generators as they are now; entered, they are so again for a while."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        every = {id(m): m for module in modules for m in module.modules()}
        self._made = [_ModuleState.of(module) for module in every.values()]
        buffers = (b for state in self._made for b in state.buffers.values() if b is not None)
        self._values = {id(b): _clone(b) for b in buffers}
        self._random = _random_state()

    def __enter__(self) -> None:
        self._before = [_ModuleState.of(state.module) for state in self._made]
        # Not in place: autograd may have saved the buffers themselves.
        clones = {of: _clone(value) for of, value in self._values.items()}
        for state in self._made:
            buffers = {k: clones.get(id(b)) for k, b in state.buffers.items()}
            state._replace(buffers=buffers).put_back()
        # To set NumPy's takes as long as a small block, and hardly a block draws from it.
        now = _random_state()
        self._random_before = None if _alike(now, self._random) else now
        if self._random_before:
            _set_random_state(self._random)

    def __exit__(self, *error: object) -> None:
        for state in self._before:
            state.put_back()
        if self._random_before:
            _set_random_state(self._random_before)


def _clone(buffer: Tensor) -> Tensor:
    return buffer.detach().clone().requires_grad_(buffer.requires_grad)


def _random_state() -> tuple[Any, Any]:
    return random.getstate(), np.random.get_state(legacy=False)


def _alike(one: tuple[Any, Any], other: tuple[Any, Any]) -> bool:
    return bool(one[0] == other[0]) and pickle.dumps(one[1]) == pickle.dumps(other[1])


def _set_random_state(state: tuple[Any, Any]) -> None:
    random.setstate(state[0])
    np.random.set_state(state[1])
