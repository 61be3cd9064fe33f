"""The blocks of a model: the modules that it repeats, or the segments of one long Sequential."""

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

from torch import nn

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
PLAIN_CLASS = "_class_without_checkpointing"
"""Where the class of a checkpointed module holds the class that the module had before."""


class Block(NamedTuple):
    """A block, or a segment of one long Sequential."""

    name: str
    """Dotted; a segment's ends in the slice that it is, e.g. `features[0:3]`."""
    module: nn.Module
    """Itself, or the Sequential."""
    is_segment: bool = False


def find_blocks(model: nn.Module) -> list[Block]:
    """Return a model's blocks, in the order of its modules, each once however many names it has.

    A block is a module with submodules and parameters that stands in an `nn.Sequential`, `nn.ModuleList`
    or `nn.ModuleDict`, as others of its class do: the outermost such, e.g. `layer1.0` of a ResNet. One
    that is alone of its class is a block if there is none inside it, and a container of such modules
    never is. An `nn.Sequential` of layers outside any block is cut before every layer with a matrix or
    kernel of weights, and each piece of two layers or more is a block, e.g. `features[0:3]`.
    """
    return list(_Search(model).inside(model))


def plain_class(module: nn.Module) -> type[nn.Module]:
    """Return a module's class, the one that it had before it was checkpointed."""
    kind: type[nn.Module] = getattr(type(module), PLAIN_CLASS, type(module))
    return kind


def pieces(layers: Sequence[nn.Module]) -> list[slice]:
    """Cut a Sequential before every layer with a matrix or kernel of weights."""
    heavy = [i for i, layer in enumerate(layers) if _is_heavy(layer)]
    return [slice(start, stop) for start, stop in pairwise([0, *heavy, len(layers)])]


def is_segment(piece: Sequence[nn.Module]) -> bool:
    """Whether a piece of a Sequential is to be checkpointed."""
    # One layer by itself would save nothing, and what precedes the first heavy layer may write to its
    # input, as the dropout of many a classifier does.
    return len(piece) > 1 and _is_heavy(piece[0])


class _Search:
    def __init__(self, model: nn.Module) -> None:
        containers = [m for m in model.modules() if isinstance(m, CONTAINERS)]
        members = {id(m): m for c in containers for m in c.children() if _can_be_block(m)}
        times = Counter(plain_class(m) for m in members.values())
        self._repeated = {kind for kind, n in times.items() if n > 1}
        self._seen: set[int] = set()

    def inside(self, module: nn.Module, prefix: str = "") -> Iterator[Block]:
        """Yield the blocks inside a module that has not been searched before."""
        if id(module) in self._seen:
            return
        self._seen.add(id(module))
        if isinstance(module, nn.Sequential) and _is_cut(module):
            layers = list(module)
            for piece in pieces(layers):
                if is_segment(layers[piece]):
                    yield Block(f"{prefix}[{piece.start}:{piece.stop}]", module, is_segment=True)
            return
        for name, child in _submodules(module).items():
            yield from self._of(child, f"{prefix}.{name}".lstrip("."), isinstance(module, CONTAINERS))

    def _of(self, child: nn.Module, name: str, member: bool) -> Iterator[Block]:
        candidate = member and id(child) not in self._seen and _can_be_block(child)
        if candidate and plain_class(child) in self._repeated:
            self._seen.add(id(child))
            yield Block(name, child)
            return
        found = list(self.inside(child, name))
        yield from found
        if candidate and not found:
            yield Block(name, child)


def _can_be_block(module: nn.Module) -> bool:
    """Whether it has submodules and parameters, and is more than a place for blocks."""
    if not _submodules(module) or next(module.parameters(), None) is None:
        return False
    plain = plain_class(module) in CONTAINERS
    return not isinstance(module, CONTAINERS) or (_is_flat(module) and not plain)


def _is_cut(module: nn.Sequential) -> bool:
    """Whether it holds nothing but layers, and runs them one after the other as every Sequential."""
    return _is_flat(module) and plain_class(module).forward is nn.Sequential.forward


def _is_flat(module: nn.Module) -> bool:
    """Whether no submodule has submodules."""
    return not any(map(_submodules, module.children()))


def _submodules(module: nn.Module) -> dict[str, nn.Module]:
    """Return the children by name, without what computes a parametrized weight."""
    return {name: m for name, m in module.named_children() if name != "parametrizations"}


def _is_heavy(layer: nn.Module) -> bool:
    return any(p.ndim > 1 for p in layer.parameters())
