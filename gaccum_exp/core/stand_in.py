"""A stand-in for a model in a loss function: it sees, or answers, every call that leads to outputs."""

import inspect
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

Answer = Callable[[str, Callable[..., Any], Any, Any], Any]
"""From the dotted path of what is called, itself, and its arguments, to what the call gives."""


def stand_in(module: nn.Module, answer: Answer) -> Any:
    """Return a stand-in for a module, of no type since it is none and passes for one."""
    return StandIn(module, answer)


class StandIn:
    """Passes for a module; its calls, its methods' and its submodules' go to `answer`.

    All else is the module's: parameters and buffers are read from it, and attributes are set there. What
    a module calls inside itself is not seen, and the methods that every `nn.Module` has are its own.
    """

    def __init__(self, module: nn.Module, answer: Answer, path: str = "") -> None:
        vars(self).update(_stood_in=module, _answer=answer, _path=path)

    @property  # type: ignore[misc]  # which mypy takes for a variable
    def __class__(self) -> Any:
        """Return the module's class, so that `isinstance` holds."""
        return type(self._stood_in)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Answer a call of the module."""
        return self._answer(self._path, self._stood_in, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        return self._inside(name, getattr(self._stood_in, name))

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._stood_in, name, value)

    def __getitem__(self, key: Any) -> Any:
        return self._inside(str(key), self._stood_in[key])

    def __iter__(self) -> Iterator[Any]:
        for key, value in enumerate(self._stood_in):
            yield self._inside(str(key), value)

    def __len__(self) -> int:
        return len(self._stood_in)

    def __bool__(self) -> bool:
        return bool(self._stood_in)

    def __contains__(self, key: Any) -> bool:
        return key in self._stood_in

    def _inside(self, name: str, value: Any) -> Any:
        path, answer = f"{self._path}.{name}".lstrip("."), self._answer
        if isinstance(value, nn.Module):
            return StandIn(value, answer, path)
        own = inspect.ismethod(value) and value.__self__ is self._stood_in
        if not own or getattr(nn.Module, name, None) is value.__func__:
            return value
        return lambda *args, **kwargs: answer(path, value, args, kwargs)
