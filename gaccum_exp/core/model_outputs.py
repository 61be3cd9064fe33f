"""The outputs of a model for the micro-batches of a window: recorded call by call, joined, replayed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from gaccum_exp.core.joined_samples import sample_dim
from gaccum_exp.core.losses.protocol import LossFn, outputs
from gaccum_exp.core.nesting import mapped, tensors_in
from gaccum_exp.core.seeding import random_states, same_states
from gaccum_exp.core.stand_in import stand_in
from gaccum_exp.errors import BadInputError

Dims = list[list[int | None]]
"""Of every tensor that each call puts out, the dimension that counts samples; None: it has none."""
_PLAIN = (type(None), bool, int, float, complex, str, torch.dtype, torch.device)


def refused(why: str) -> BadInputError:
    """Return the error that says why a loss cannot be taken over a window's outputs."""
    return BadInputError(f"strategy=cached is refused: {why}")


@dataclass(slots=True)
class Call:
    """A call of the model, or of something inside it, and what it has put out."""

    path: str
    """Dotted name of what was called; the model's own is empty."""
    structure: Any
    """The outputs, with tensors of no elements."""
    tensors: list[Tensor]
    """Those of the outputs, in order, without graph."""
    differentiated: bool
    """Whether gradients were enabled there."""
    written: list[bool] = field(default_factory=list)
    """Of each tensor, whether the loss function writes to it."""

    @property
    def name(self) -> str:
        """What was called, in words."""
        return self.path or "the model"


def record(model: nn.Module, loss_fn: LossFn, micro_batch: Any, *, graph: bool = False) -> list[Call]:
    """Run a micro-batch for what the model puts out, call by call, without graph.

    Args:
        model: called by the loss function.
        loss_fn: whose loss is not used.
        micro_batch: as it takes it.
        graph: make one nevertheless, and drop it.
    """
    calls: list[Call] = []
    handed: list[list[Tensor]] = []

    def answer(path: str, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        enabled = torch.is_grad_enabled()
        with torch.set_grad_enabled(graph and enabled):
            found = function(*args, **kwargs)
        tensors = [t.detach() for t in tensors_in(found)]
        if not tensors:
            return found
        structure = mapped(lambda v: v.detach().new_empty(0) if isinstance(v, Tensor) else v, found)
        calls.append(Call(path, structure, tensors, enabled))
        handed.append([t.clone() for t in tensors])  # which the loss function may write to
        return _filled(found, handed[-1])

    outputs(loss_fn, stand_in(model, answer), micro_batch)
    for call, copies in zip(calls, handed, strict=True):
        call.written = [t._version > 0 for t in copies]
    return calls


def back_propagate(
    model: nn.Module,
    loss_fn: LossFn,
    micro_batch: Any,
    gradients: Sequence[Tensor | None],
    written: Sequence[bool],
) -> None:
    """Run a micro-batch again, and back-propagate what it puts out against the loss's gradient there.

    A function, so that nothing of its graph outlives it. What one call puts out and another takes stays
    connected.
    """
    found: list[Tensor] = []

    def answer(path: str, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        output = function(*args, **kwargs)
        tensors = tensors_in(output)
        copied = written[len(found) : len(found) + len(tensors)]
        found.extend(tensors)
        if not any(copied):
            return output
        pairs = zip(tensors, copied, strict=True)
        return _filled(output, [t.clone() if is_written else t for t, is_written in pairs])

    outputs(loss_fn, stand_in(model, answer), micro_batch)
    roots, at = [], []
    for output, gradient in zip(found, gradients, strict=True):
        if gradient is not None and output.requires_grad:
            roots.append(output)
            at.append(gradient)
    if roots:
        torch.autograd.backward(roots, at)


class WholeOutputs:
    """The outputs of a whole window, which answer the calls of a loss function.

    Args:
        parts: the calls of each micro-batch, which are emptied.
        sizes: of the micro-batches.
        dims: of each output.
        reads_values: whether tensors have values to be compared.

    Raises:
        BadInputError: outputs that make no batch.
    """

    def __init__(
        self, parts: list[list[Call]], sizes: list[int], dims: Dims, *, reads_values: bool
    ) -> None:
        self._calls, self._sizes, self._dims = parts[0], sizes, dims
        self._answered, self._reads_values, self._begun = 0, reads_values, random_states()
        self._leaves: list[list[Tensor]] = []
        for number, call in enumerate(self._calls):
            column = [part[number] for part in parts]
            call.structure = _shared([each.structure for each in column], sizes)
            leaves = []
            for at, dim in enumerate(dims[number]):
                whole = self._whole(call.name, [each.tensors[at] for each in column], dim)
                for each in column:  # both at once of one output only
                    each.tensors[at] = whole.new_empty(0)
                differentiable = whole.is_floating_point() or whole.is_complex()
                leaves.append(whole.requires_grad_(call.differentiated and differentiable))
            self._leaves.append(leaves)

    @property
    def written(self) -> list[bool]:
        """Of each tensor of all calls, whether the loss function writes to it."""
        return [is_written for call in self._calls for is_written in call.written]

    def answer(self, path: str, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Answer a call; what gave no tensors for a micro-batch is called."""
        if all(call.path != path for call in self._calls):
            return function(*args, **kwargs)
        number = self._answered
        if number >= len(self._calls) or self._calls[number].path != path:
            raise refused(
                f"over the whole window the loss function calls {path or 'the model'} where it does not "
                "for a micro-batch"
            )
        call, leaves = self._calls[number], self._leaves[number]
        if self._reads_values and not same_states(random_states(), self._begun):
            raise refused(
                f"the loss function draws random numbers before it calls {call.name}, and would draw "
                "others for the window; draw them in the model or in the data set"
            )
        self._answered += 1
        pairs = zip(leaves, call.written, strict=True)
        return _filled(call.structure, [t.clone() if is_written else t for t, is_written in pairs])

    def gradients(self) -> list[list[Tensor | None]]:
        """Return the loss's gradient at all outputs for each micro-batch, and let the outputs go.

        What has no samples is the same for all micro-batches: the first has its gradient.
        """
        if self._answered < len(self._calls):
            raise refused(
                f"the loss function calls the model {len(self._calls)} times for a micro-batch and "
                f"{self._answered} times for the window"
            )
        whole = [(t.grad, dim) for ts, ds in zip(self._leaves, self._dims, strict=True)
                 for t, dim in zip(ts, ds, strict=True)]  # fmt: skip
        self._leaves = []
        total = sum(self._sizes)

        def share(gradient: Tensor | None, dim: int | None, index: int) -> Tensor | None:
            if gradient is None or dim is None:
                return gradient if index == 0 else None
            rows = gradient.shape[dim] // total
            return gradient.narrow(dim, rows * sum(self._sizes[:index]), rows * self._sizes[index])

        return [[share(*of, index) for of in whole] for index in range(len(self._sizes))]

    def _whole(self, name: str, parts: list[Tensor], dim: int | None) -> Tensor:
        """Join an output of all micro-batches, as a new tensor."""
        first = parts[0]
        if dim is None:
            if self._reads_values and not all(torch.equal(part, first) for part in parts[1:]):
                raise refused(
                    f"an output of {name} of shape {tuple(first.shape)} has no samples, and differs "
                    "between micro-batches; take that part of the loss outside the model"
                )
            return first.clone()
        if len({(*t.shape[:dim], *t.shape[dim + 1 :]) for t in parts}) > 1:
            shapes = ", ".join(str(tuple(t.shape)) for t in parts[:4])
            raise refused(
                f"{name} puts out shapes {shapes}, which make no batch; pad the sequences of a window "
                "to one length"
            )
        return torch.cat(parts, dim)


def signature(model: nn.Module, calls: Sequence[Call]) -> Any:
    """Return what places of samples in outputs depend on: modes, and which calls of how many dims."""
    modes = tuple(module.training for module in model.modules())
    return modes, tuple((call.path, *(t.ndim for t in call.tensors)) for call in calls)


def dims_of(calls: Sequence[Call], more: Sequence[Call], size: int) -> Dims:
    """Return where outputs of `size` samples have them, given those of one sample more.

    Raises:
        BadInputError: it cannot be told.
    """
    if [(c.path, len(c.tensors)) for c in calls] != [(c.path, len(c.tensors)) for c in more]:
        raise refused("with one sample more the loss function calls the model otherwise")
    dims: Dims = []
    for call, other in zip(calls, more, strict=True):
        dims.append([])
        for part, whole in zip(call.tensors, other.tensors, strict=True):
            dim = sample_dim(tuple(whole.shape), tuple(part.shape), size + 1, size)
            if dim is None and whole.shape != part.shape:
                raise refused(
                    f"an output of {call.name} has the shape {tuple(part.shape)} for {size} samples and "
                    f"{tuple(whole.shape)} for {size + 1}"
                )
            dims[-1].append(dim)
    return dims


class _Withheld:
    """Stands where the output of the whole window is not known, and says so when it is read."""

    def __init__(self, why: str) -> None:
        self._why = why

    def __getattr__(self, name: str) -> Any:
        raise refused(f"the loss reads {self._why}")


def _shared(structures: Sequence[Any], sizes: Sequence[int]) -> Any:
    """Return the structure of the whole window's outputs."""

    def leaves(value: Any) -> list[Any]:
        found: list[Any] = []
        mapped(found.append, value)
        return found

    def one(column: Sequence[Any]) -> Any:
        first = column[0]
        if isinstance(first, Tensor):
            return first
        if not isinstance(first, _PLAIN):
            return _Withheld(f"a {type(first).__name__} that the model puts out, which is no tensor")
        if all(value == first for value in column):
            return first
        if list(column) == list(sizes):
            return sum(sizes)
        return _Withheld("a number that the model puts out, another one for each micro-batch")

    columns = zip(*map(leaves, structures), strict=True)
    replaced = iter([one(column) for column in columns])
    return mapped(lambda leaf: next(replaced), structures[0])


def _filled(structure: Any, tensors: Sequence[Tensor]) -> Any:
    """Return the structure with these tensors in place of its own."""
    given = iter(tensors)
    return mapped(lambda leaf: next(given) if isinstance(leaf, Tensor) else leaf, structure)
