"""Objects that Python code hands over in place of a `_target_`, on their way to the arms of its sweep.

A configuration is text, to be recorded, compared, and read by another process. A class or a function
that can be imported stands there under its address, as anybody would write it. Any other object, a
module with weights, a data set, a lambda, a class of a notebook, stands there under its name and a
digest of what it is, and lies in a file below the sweep's folder for as long as the sweep's command
runs. Each arm reads a copy of its own from there: none meets what another has changed, and the object
itself is never touched.

To be imported without torch: what needs it imports it.
"""

import functools
import hashlib
import inspect
import io
import pickle
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sized
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any, TypeGuard

import cloudpickle

from gaccum_exp.config.targets import object_at
from gaccum_exp.errors import BadInputError, in_a_line, text_of

FOLDER = "handed_over"
ITSELF, CALLED, CALLED_WITH_NAMES = (
    f"{__name__}.{name}" for name in ("itself", "called", "called_with_names")
)
"""The `_target_`s of an object that is handed over: it is what is meant, or it makes that."""
_folder: ContextVar[Path | None] = ContextVar("handed_over", default=None)
"""Where the arm in hand finds what its sweep was handed over."""


def itself(*, name: str, digest: str) -> Any:
    """Return a copy of an object that was handed over.

    Args:
        name: what it is called.
        digest: of it.

    Raises:
        BadInputError: it is not there: its sweep is over.
    """
    import torch

    folder = _folder.get()
    path = None if folder is None else folder / FOLDER / digest
    if path is None or not path.exists():
        raise BadInputError(
            f"{name} (digest {digest}) was handed over by Python code, and is gone with its sweep; "
            "go on from there, with the same objects (sweep(..., 'sweep.resume=last'))"
        )
    return torch.load(path, weights_only=False)  # of this very command


def called(*args: Any, name: str, digest: str, **options: Any) -> Any:
    """Call a copy of a function or a class that was handed over; arguments as of `itself`."""
    return itself(name=name, digest=digest)(*args, **options)


def called_with_names(named_parameters: Any, *, name: str, digest: str, **options: Any) -> Any:
    """Call a copy of what makes an optimizer of pairs (name, parameter); arguments as of `itself`."""
    return itself(name=name, digest=digest)(named_parameters=named_parameters, **options)


@contextmanager
def looked_for_in(folder: Path | None) -> Iterator[None]:
    """Read what was handed over from a sweep's folder meanwhile; None: nothing was."""
    token = _folder.set(folder)
    try:
        yield
    finally:
        _folder.reset(token)


def write(folder: Path, objects: Mapping[str, bytes]) -> None:
    """Write objects, by digest, below a sweep's folder."""
    if objects:
        (folder / FOLDER).mkdir(parents=True, exist_ok=True)
    for digest, content in objects.items():
        (folder / FOLDER / digest).write_bytes(content)


def remove(folder: Path) -> None:
    """Remove what `write` has written."""
    shutil.rmtree(folder / FOLDER, ignore_errors=True)


def address_of(value: object) -> str | None:
    """Return what a class or a function can be imported by, wherever Python runs; None: by nothing.

    Of several addresses the shortest, which is the one that a package shows: `torch.optim.SGD`.
    """
    module, name = getattr(value, "__module__", None), getattr(value, "__qualname__", "<")
    if not (inspect.isclass(value) or inspect.isroutine(value)) or "<" in name or not module:
        return None
    if module == "__main__" or getattr(sys.modules.get(module), "__spec__", None) is None:
        return None
    parts = module.split(".")
    places = (f"{'.'.join(parts[:count])}.{name}" for count in range(1, len(parts) + 1))
    return next((place for place in places if object_at(place) is value), None)


def name_of(value: object) -> str:
    """Return what an object is called: a function by its own name, anything else by its class's."""
    if isinstance(value, functools.partial):
        return name_of(value.func)
    named: Any = value if hasattr(value, "__qualname__") else type(value)
    return address_of(named) or f"{named.__module__}.{named.__qualname__.replace('<locals>.', '')}"


@dataclass(frozen=True, slots=True)
class Packed:
    """An object as it is handed over."""

    name: str
    digest: str
    content: bytes = field(repr=False)
    """Of its file."""
    trained: Mapping[int, Any] = field(repr=False)
    """The tensors in it that require a gradient, by id."""


def pack(key: str, value: object, way_out: str) -> Packed:
    """Pack an object for another process.

    Args:
        key: what it is handed over as.
        value: the object.
        way_out: what to do where it cannot be packed.

    Raises:
        BadInputError: it holds what no other process can have: an open file, a lock, a generator.
    """
    import torch

    tensors: dict[int, Any] = {}

    class Pickler(cloudpickle.Pickler):  # type: ignore[misc]  # it has no annotations
        def reducer_override(self, obj: Any) -> Any:
            if isinstance(obj, torch.Tensor) and obj.requires_grad:
                tensors[id(obj)] = obj
            return super().reducer_override(obj)

    by = ModuleType("gaccum_exp.pickling")  # classes and functions of a notebook go by value
    by.Pickler = Pickler  # type: ignore[attr-defined]
    file, name = io.BytesIO(), name_of(value)
    try:
        # By torch, so that tensors which share memory still do.
        torch.save(value, file, pickle_module=by, pickle_protocol=pickle.HIGHEST_PROTOCOL)
        content = file.getvalue()
        digest = digest_of(value, lambda: torch.load(io.BytesIO(content), weights_only=False))
    except Exception as error:  # as many as there are classes
        why = in_a_line(f"{type(error).__name__}: {text_of(error)}")
        raise BadInputError(
            f"{key}: {name} cannot be given to the process that trains ({why}); {way_out}"
        ) from error
    return Packed(name, digest, content, tensors)


def digest_of(value: object, copy_of: Callable[[], Any]) -> str:
    """Return sixteen hexadecimal digits that change with an object: its tensors, numbers and code.

    They are the same in another process, where the same is made again. A data set is read through
    `copy_of`, which makes one, so that nothing of its own moves.
    """
    from gaccum_exp.arms.provenance import add_samples, add_value

    digest = hashlib.blake2b(digest_size=8)
    if is_dataset(value):
        add_value(digest, len(value))
        add_samples(digest, copy_of())
        _add(digest, type(value), set())
    else:
        _add(digest, value, set())
    return digest.hexdigest()


def is_dataset(value: object) -> TypeGuard[Sized]:
    """Whether it is a map-style data set, as a list of samples is; a module of modules is none."""
    from torch import nn

    has_samples = hasattr(value, "__getitem__") and hasattr(value, "__len__")
    return has_samples and not isinstance(value, (type, nn.Module))


def _add(digest: "hashlib.blake2b", value: Any, seen: set[int]) -> None:
    """Add what an object is, as far as that is values and code; `seen`: what is added already, by id."""
    from torch import nn

    from gaccum_exp.arms.provenance import add_value

    if isinstance(value, (FunctionType, type)) or (callable(value) and hasattr(value, "__dict__")):
        if id(value) in seen:  # a function that calls itself
            return
        seen.add(id(value))
    if isinstance(value, nn.Module):
        add_value(digest, [repr(value), *value.named_parameters(), *value.named_buffers()])
        for name, part in value.named_modules():
            _add(digest, type(part), seen)
            for key, own in sorted(vars(part).items()):
                if not key.startswith("_") and key != "training":
                    add_value(digest, [name, key])
                    _add(digest, own, seen)
    elif isinstance(value, functools.partial):
        for part in (value.func, *value.args, *value.keywords.items()):
            _add(digest, part, seen)
    elif isinstance(value, FunctionType):
        _add_function(digest, value, seen)
    elif isinstance(value, MethodType):
        for part in (value.__func__, value.__self__):
            _add(digest, part, seen)
    elif isinstance(value, type):
        add_value(digest, name_of(value))
        if address_of(value) is None:  # else it is code of a file, as a `_target_` is
            for key, own in sorted(vars(value).items()):
                if isinstance(own, (FunctionType, type, staticmethod, classmethod, property)):
                    add_value(digest, key)
                    for made_of in _functions(own):
                        _add(digest, made_of, seen)
    elif isinstance(value, (list, tuple)) and any(map(callable, value)):
        for part in value:
            _add(digest, part, seen)
    elif callable(value) and hasattr(value, "__dict__"):
        _add(digest, type(value), seen)
        for key, own in sorted(vars(value).items()):
            add_value(digest, key)
            _add(digest, own, seen)
    else:
        add_value(digest, value)


def _functions(value: Any) -> list[Any]:
    """Return what a member of a class is made of."""
    if isinstance(value, property):
        return [f for f in (value.fget, value.fset, value.fdel) if f is not None]
    return [getattr(value, "__func__", value)]


def _add_function(digest: "hashlib.blake2b", function: FunctionType, seen: set[int]) -> None:
    """Add a function's code, its defaults, and what it takes from around it."""
    from gaccum_exp.arms.provenance import add_value

    add_value(digest, name_of(function))
    if address_of(function) is not None:
        return
    names = _add_code(digest, function.__code__)
    around: list[Any] = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).items()]
    for cell in function.__closure__ or ():
        with suppress(ValueError):  # it is empty
            around.append(cell.cell_contents)
    around += [function.__globals__[name] for name in names if name in function.__globals__]
    for value in around:
        if not isinstance(value, ModuleType):
            _add(digest, value, seen)


def _add_code(digest: "hashlib.blake2b", code: CodeType) -> list[str]:
    """Add instructions and constants; return the names that they use."""
    names = list(code.co_names)
    digest.update(code.co_code + repr((code.co_names, code.co_varnames)).encode())
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            names += _add_code(digest, constant)
        else:
            digest.update(repr(constant).encode())
    return names
