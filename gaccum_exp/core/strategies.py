"""Strategies: where a window's micro gradients are held until the optimizer steps, and how it steps.

A strategy acts at four points: when a window begins, on each micro gradient, when the window ends, and
at the optimizer step. All that it holds in between stands in the window's `AccumulatorState`, so that a
window can be interrupted after any micro-batch and go on from there.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from gaccum_exp.core.dtypes import in_precision, is_narrower
from gaccum_exp.core.losses.protocol import Counts, Denominator, LossFn
from gaccum_exp.core.reductions import Reduction
from gaccum_exp.core.seeding import random_states
from gaccum_exp.core.window_loss import WindowTerms
from gaccum_exp.errors import BadInputError

_HELD = ("buffers", "compensations", "earlier")
"""Of an accumulator state the tensors by parameter."""


@dataclass(slots=True)
class AccumulatorState:
    """What a window that has begun holds beside the parameters' `.grad`."""

    counts: list[Counts | None]
    """Each micro-batch's denominator, or those of its terms; None where it is known after its forward
    pass only. Those that are missing at the end are counted when the window begins or goes on."""
    passes_done: int = 0
    """Micro-batches whose gradient has been taken."""
    loss_sum: Tensor | None = None
    """Σ Sᵢ over these, 0-dim, detached; None before the first."""
    denominator: Denominator = 0
    """Σ nᵢ over these."""
    last_share: tuple[Denominator, Denominator] | None = None
    """The last micro-batch's nᵢ, and what its loss sum was divided by; None: it has several terms."""
    provisional_divisor: float | None = None
    """What stands in for a window's denominator that is not known before its end."""
    terms: WindowTerms | None = None
    """In place of loss sum and denominator, where the loss has several terms."""
    buffers: dict[nn.Parameter, Tensor] = field(default_factory=dict)
    """Gradients that are added up outside `.grad`."""
    compensations: dict[nn.Parameter, Tensor] = field(default_factory=dict)
    """What the rounding of a buffer has put too much into it."""
    earlier: dict[nn.Parameter, Tensor] = field(default_factory=dict)
    """Gradients that were in `.grad` before the window, and are kept out of its arithmetic."""
    folded: dict[nn.Parameter, int] = field(default_factory=dict)
    """Parameters with a gradient of this window in the optimizer's moments, and the passes that were
    done before the last one."""
    generators: list[Any] | None = None
    """The random generators' states with which an interrupted window goes on; None: as they are."""

    def state_dict(self, names: Mapping[nn.Parameter, str]) -> dict[str, Any]:
        """Return a copy by parameter name, with the gradients in `.grad` and the generators' states."""
        held = {key: getattr(self, key) for key in _HELD}
        held["grad"] = {p: p.grad for p in names if p.grad is not None}
        return {
            "counts": list(self.counts),
            "passes_done": self.passes_done,
            "loss_sum": None if self.loss_sum is None else self.loss_sum.clone(),
            "denominator": self.denominator,
            "provisional_divisor": self.provisional_divisor,
            "terms": None if self.terms is None else self.terms.state_dict(),
            "generators": random_states(),
            "folded": {names[p]: at for p, at in self.folded.items()},
            **{key: {names[p]: t.clone() for p, t in of.items()} for key, of in held.items()},
        }

    @classmethod
    def from_state_dict(
        cls, state: Mapping[str, Any], parameters: Mapping[str, nn.Parameter]
    ) -> "AccumulatorState":
        """Return the state of a window that goes on, and put the gradients back into `.grad`."""
        for name, parameter in parameters.items():
            grad = state["grad"].get(name)
            parameter.grad = None if grad is None else grad.clone()
        tensors: dict[str, Any] = {
            key: {parameters[name]: tensor.clone() for name, tensor in state.get(key, {}).items()}
            for key in _HELD
        }
        plain = ("passes_done", "loss_sum", "denominator", "provisional_divisor", "generators")
        values: dict[str, Any] = {key: state[key] for key in plain}
        if state["terms"] is not None:
            values["terms"] = WindowTerms(**copy.deepcopy(state["terms"]))
        values["folded"] = {parameters[name]: at for name, at in state.get("folded", {}).items()}
        return cls(list(state["counts"]), **values, **tensors)


class InPlace:
    """Adds micro gradients up in `.grad`, as autograd does."""

    name: ClassVar[str] = "in_place"
    takes_window_at_once: ClassVar[bool] = False
    """Whether the loss is taken once, over the outputs of the whole window."""
    leaves_gradient: ClassVar[bool] = True
    """Whether the window's gradient stands in `.grad` at its end. Where it does not, nothing can be done
    to it, and a window that failed cannot be had again."""
    buffers_gradients: ClassVar[bool] = False
    """Whether micro gradients are added up outside `.grad`."""

    def buffered(self, dtype: torch.dtype) -> "InPlace":
        """Return the same with micro gradients added up in this type, where parameters' is narrower."""
        return Buffered(dtype)

    @property
    def adding_up(self) -> "InPlace":
        """The strategy that leaves the window's gradient in `.grad`: this one, if it does."""
        return self if self.leaves_gradient else IN_PLACE

    def for_optimizer(self, optimizer: torch.optim.Optimizer) -> "InPlace":
        """Return the same for the steps of this optimizer.

        Raises:
            BadInputError: it has no meaning for such an optimizer.
        """
        return self

    def scales_at(self, accum_steps: int) -> bool:
        """Return whether it scales rate and moments by N for windows of so many micro-batches."""
        return False

    def require(self, reduction: Reduction) -> None:
        """Raise a `BadInputError` where this strategy has no meaning under a reduction."""

    def inspect(self, model: nn.Module, loss_fn: LossFn, window: Sequence[Any]) -> None:
        """Raise a `BadInputError` where this strategy does not suit a model, before its first window."""

    def collecting(
        self, state: AccumulatorState, parameters: Sequence[nn.Parameter], *, rescaled: bool
    ) -> AbstractContextManager[None]:
        """Enter around a window's passes.

        Args:
            state: of the window; one with passes done goes on.
            parameters: all that may get a gradient.
            rescaled: the window's gradient is to be rescaled at its end, so that no earlier one may be
                among what it adds up.
        """
        return collecting(state, parameters, None) if rescaled else nullcontext()

    def rescale(
        self, state: AccumulatorState, parameters: Iterable[nn.Parameter], factor: float
    ) -> None:
        """Multiply what the window has added up, before its end; by zero: drop it."""
        for parameter in parameters:
            grad = state.buffers.get(parameter, parameter.grad)
            if factor and grad is not None:
                grad *= factor
            elif not factor:
                state.buffers.pop(parameter, None)
                parameter.grad = None

    def step_of(self, optimizer: torch.optim.Optimizer) -> Callable[[], Any]:
        """Return what takes the optimizer step on the window's gradient."""
        return optimizer.step


IN_PLACE = InPlace()


@dataclass(frozen=True, slots=True)
class Buffered(InPlace):
    """Adds micro gradients up in a wider type than the parameters', and rounds them once.

    In bfloat16, 256 + 1 is 256: a parameter's own type loses what small micro gradients add to a large
    sum. Each micro gradient moves into a buffer as soon as its backward pass has finished it. At the
    window's end the buffer is added to what `.grad` held before, in place as autograd does, and rounded
    to the parameter's type.
    """

    dtype: torch.dtype
    """Of the buffers, for parameters of a narrower type."""
    buffers_gradients: ClassVar[bool] = True

    def collecting(
        self, state: AccumulatorState, parameters: Sequence[nn.Parameter], *, rescaled: bool
    ) -> AbstractContextManager[None]:
        """Enter around a window's passes, as `InPlace.collecting`."""
        narrower = [p for p in parameters if is_narrower(p.dtype, self.dtype)]
        return collecting(state, parameters if rescaled else narrower, self.dtype, self._add)

    def _add(self, state: AccumulatorState, parameter: Tensor) -> None:
        """Move a micro gradient into its buffer."""
        assert isinstance(parameter, nn.Parameter)
        assert parameter.grad is not None
        if parameter in state.buffers:
            state.buffers[parameter] += parameter.grad
        else:
            state.buffers[parameter] = parameter.grad.to(in_precision(parameter.dtype, self.dtype))
        parameter.grad = None


@contextmanager
def collecting(
    state: AccumulatorState,
    parameters: Sequence[nn.Parameter],
    dtype: torch.dtype | None,
    add: Callable[[AccumulatorState, Tensor], None] | None = None,
) -> Iterator[None]:
    """Keep earlier gradients apart; what stands in `.grad` or in a buffer at the end is added to them.

    Args:
        state: of the window.
        parameters: all that may get a gradient.
        dtype: micro gradients of parameters of a narrower type are added up elsewhere; None: of none.
        add: takes such a one out of `.grad` and adds it up.
    """
    if state.passes_done == 0:
        for parameter in parameters:
            if parameter.grad is not None:
                state.earlier[parameter] = parameter.grad
                parameter.grad = None
    hooks = [
        parameter.register_post_accumulate_grad_hook(partial(add, state))  # type: ignore[no-untyped-call]  # torch's
        for parameter in parameters
        if add and parameter.requires_grad and dtype and is_narrower(parameter.dtype, dtype)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        with torch.no_grad():
            for parameter in parameters:
                added = state.buffers.pop(parameter, parameter.grad)
                earlier = state.earlier.pop(parameter, None)
                parameter.grad = earlier if added is None else _total(earlier, added, parameter.dtype)


def require_dense(gradient: Tensor, strategy: str, or_else: str = "") -> None:
    """Raise a `BadInputError` where a gradient is sparse, which the strategy cannot add up."""
    if gradient.layout != torch.strided:
        raise BadInputError(
            f"strategy={strategy}: the gradient of a parameter of shape {tuple(gradient.shape)} is "
            f"sparse: use sparse=False in its layer{or_else}"
        )


def _total(earlier: Tensor | None, added: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the sum, computed in the wider type of the two and then rounded."""
    if added.is_sparse:  # a row may be listed more than once, and is to be rounded once
        total = added if earlier is None else earlier + added
        return (total.coalesce() if total.is_sparse else total).to(dtype)
    return added.to(dtype) if earlier is None else earlier.add_(added)
