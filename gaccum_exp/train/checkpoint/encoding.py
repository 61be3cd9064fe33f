"""Trees of tensors and plain values, as tensors by name and a document of JSON; nothing else is one.

What JSON has not stands as a mapping with one key that begins with `$`: {"$tuple": [1, 2]}, {"$float":
"nan"}, {"$tensor": name}. Decoding makes tensors, containers and numbers, and calls nothing that a
document names.
"""

import math
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

MANY = 32
"""So many integers become a tensor, as in the states of random generators."""


FACTORIES: dict[Any, str | None] = {
    None: None, int: "int", float: "float", bool: "bool", str: "str",
    list: "list", dict: "dict", set: "set", tuple: "tuple",
}  # fmt: skip
"""What a defaultdict may make its missing values with."""


class NotKeptError(TypeError):
    """A value that is neither tensor nor plain, by its place in the tree."""


@dataclass(frozen=True, slots=True)
class Held:
    """Stands for what is not written itself: something with a name, or with a state of its own."""

    kind: str
    of: Any = None
    """Its name, or its state."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """A tree that can be written."""

    values: Any
    """As JSON has it."""
    tensors: dict[str, Tensor]
    """By the place where each stands in the tree: `optimizer.state.model.0.weight.exp_avg`."""


def on_host(tensor: Tensor) -> Tensor:
    """Return a copy in the host's memory, with the strides that it has: kernels go by them."""
    tensor = tensor.detach().resolve_conj().resolve_neg()
    return tensor.to("cpu", copy=True)


def encode(tree: Any, stage: Callable[[Tensor], Tensor] = on_host) -> Encoded:
    """Encode a tree.

    Args:
        tree: dictionaries, lists, tuples, sets, deques, counters, `Held`; numbers, strings, bytes, None,
            dtypes, devices, sizes; arrays and tensors, sparse ones (COO) too. A tensor that stands at
            several places is written once.
        stage: copies a tensor, so that the training can go on while it is written.

    Raises:
        NotKeptError: there is something else in it.
    """
    encoder = _Encoder(stage)
    values = encoder.encoded(tree, ())
    return Encoded(values, encoder.tensors)


class _Encoder:
    def __init__(self, stage: Callable[[Tensor], Tensor]) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._stage = stage
        self._names: dict[int, str] = {}
        self._alive: list[Tensor] = []  # or another one might get the identity of one that is gone

    def encoded(self, value: Any, where: tuple[str, ...]) -> Any:
        kind = type(value)
        if value is None or kind in (bool, int, str):
            return value
        if kind is float:
            return value if math.isfinite(value) else {"$float": repr(value)}
        if kind in (Tensor, nn.Parameter):
            return self._tensor(value, where)
        if kind in (list, tuple) and len(value) > MANY and all(map(_is_int64, value)):
            numbers = self._tensor(torch.tensor(value, dtype=torch.int64), where)
            return {"$ints": numbers, "tuple": kind is tuple}
        if kind is list and len(value) > MANY and set(map(type, value)) == {float}:
            return {"$floats": self._tensor(torch.tensor(value, dtype=torch.float64), where)}
        if kind is list:
            return self._several(value, where)
        if kind in _SEVERAL:
            return {_SEVERAL[kind]: self._several(list(value), where)}
        if kind is deque:
            return {"$deque": self._several(list(value), where), "maxlen": value.maxlen}
        if kind is dict and all(type(key) is str and not key.startswith("$") for key in value):
            return {key: self.encoded(item, (*where, key)) for key, item in value.items()}
        if kind in _MAPPINGS:
            return {
                _MAPPINGS[kind]: [
                    [self.encoded(key, (*where, "key")), self.encoded(item, (*where, str(key)))]
                    for key, item in value.items()
                ]
            }
        if kind is defaultdict and value.default_factory in FACTORIES:
            items = self.encoded(dict(value), where)
            return {"$defaultdict": items, "factory": FACTORIES[value.default_factory]}
        if kind is Held:
            return {"$held": value.kind, "of": self.encoded(value.of, where)}
        return self._other(value, where)

    def _several(self, values: list[Any], where: tuple[str, ...]) -> list[Any]:
        return [self.encoded(item, (*where, str(number))) for number, item in enumerate(values)]

    def _other(self, value: Any, where: tuple[str, ...]) -> Any:
        if type(value) is complex:
            return {"$complex": [self.encoded(part, where) for part in (value.real, value.imag)]}
        if type(value) is bytes:
            return {"$bytes": value.hex()}
        if isinstance(value, torch.dtype):
            return {"$dtype": str(value).removeprefix("torch.")}
        if isinstance(value, torch.device):
            return {"$device": str(value)}
        array = np.asarray(value) if isinstance(value, (np.ndarray, np.generic)) else None
        if array is None or array.dtype.hasobject or array.dtype.fields is not None:
            raise NotKeptError(
                f"{'.'.join(where)} is a {type(value).__qualname__}, neither tensor nor plain value"
            )
        content = torch.tensor(bytearray(array.tobytes()), dtype=torch.uint8)
        about = {"dtype": array.dtype.str, "shape": list(array.shape)}
        kind = "$array" if isinstance(value, np.ndarray) else "$scalar"
        return {kind: self._tensor(content, where), **about}

    def _tensor(self, tensor: Tensor, where: tuple[str, ...]) -> Any:
        if tensor.layout == torch.sparse_coo:
            parts = tensor.detach()._indices(), tensor.detach()._values()
            return {
                "$sparse": self._several(list(parts), where),
                "shape": list(tensor.shape),
                "coalesced": tensor.is_coalesced(),
            }
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
            raise NotKeptError(f"{'.'.join(where)} is a tensor of the layout {tensor.layout}")
        if id(tensor) not in self._names:
            name = ".".join(where)
            while name in self.tensors:
                name += "'"
            self._names[id(tensor)] = name
            self._alive.append(tensor)
            self.tensors[name] = self._stage(tensor)
        written: dict[str, Any] = {"$tensor": self._names[id(tensor)]}
        if tensor.device.type != "cpu":
            written["device"] = tensor.device.type
        return written


_SEVERAL: dict[Any, str] = {tuple: "$tuple", torch.Size: "$size", set: "$set", frozenset: "$frozenset"}
_MAPPINGS: dict[Any, str] = {dict: "$dict", OrderedDict: "$ordered", Counter: "$counter"}


def _is_int64(value: Any) -> bool:
    return type(value) is int and -(1 << 63) <= value < 1 << 63


def decode(encoded: Encoded, device: torch.device | None = None) -> Any:
    """Return the tree that was encoded.

    Args:
        encoded: as it was read.
        device: of the tensors that were not on the host; None: they stay on the host.
    """
    return _Decoder(encoded.tensors, device).decoded(encoded.values)


class _Decoder:
    def __init__(self, tensors: Mapping[str, Tensor], device: torch.device | None) -> None:
        self._tensors, self._device = tensors, device
        self._made: dict[str, Tensor] = {}

    def decoded(self, value: Any) -> Any:
        if isinstance(value, list):
            return [self.decoded(item) for item in value]
        if not isinstance(value, dict):
            return value
        kind = next((key for key in value if key.startswith("$")), None)
        if kind is None:
            return {key: self.decoded(item) for key, item in value.items()}
        return self._special(kind, value[kind], value)

    def _special(self, kind: str, of: Any, about: Mapping[str, Any]) -> Any:
        if kind == "$tensor":
            return self._tensor(of, about)
        if kind == "$float":
            return float(of)
        if kind == "$ints":
            numbers = self.decoded(of).tolist()
            return tuple(numbers) if about["tuple"] else numbers
        if kind == "$floats":
            return self.decoded(of).tolist()
        if kind == "$held":
            return Held(of, self.decoded(about["of"]))
        if kind == "$defaultdict":
            factory = next(made for made, name in FACTORIES.items() if name == about["factory"])
            return defaultdict(factory, self.decoded(of))
        for made, name in (*_SEVERAL.items(), *_MAPPINGS.items()):
            if kind == name:
                items = self.decoded(of)
                if made is Counter:
                    items = dict(map(tuple, items))
                return made(items)
        if kind == "$deque":
            return deque(self.decoded(of), maxlen=about["maxlen"])
        if kind == "$complex":
            return complex(*self.decoded(of))
        if kind == "$bytes":
            return bytes.fromhex(of)
        if kind == "$dtype":
            dtype = getattr(torch, of)
            if not isinstance(dtype, torch.dtype):
                raise ValueError(f"{of!r} is no dtype")
            return dtype
        if kind == "$device":
            return torch.device(of)
        if kind in ("$array", "$scalar"):
            content = self.decoded(of).numpy().tobytes()
            array = np.frombuffer(content, dtype=np.dtype(about["dtype"])).reshape(about["shape"])
            return array.copy() if kind == "$array" else array[()]
        if kind == "$sparse":
            indices, values = self.decoded(of)
            return torch.sparse_coo_tensor(
                indices, values, about["shape"], is_coalesced=about["coalesced"], check_invariants=True
            )
        raise ValueError(f"{kind!r} is no kind of value")

    def _tensor(self, name: str, about: Mapping[str, Any]) -> Tensor:
        if name not in self._made:
            tensor = self._tensors[name]
            if "device" in about and self._device is not None:
                tensor = tensor.to(self._device)
            self._made[name] = tensor
        return self._made[name]
