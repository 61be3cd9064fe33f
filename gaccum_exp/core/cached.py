"""A window's gradient by way of its outputs, exact for any loss of the whole window's outputs.

A contrastive or a ranking loss, dice over the batch, a criterion whose mean is no ratio: each couples
the samples of a window, and is no sum over micro-batches. With outputs yᵢ = f(xᵢ, θ) of micro-batch i,
the chain rule still splits it:

    1. yᵢ for every micro-batch, without graph;
    2. the loss L(y₁ … y_N, θ) of all outputs at once, and its gradients: gᵢ at yᵢ, and ∂L/∂θ at what the
       loss reads itself (a temperature, class centres);
    3. every micro-batch again with the same draws, back-propagated: ∇L = ∂L/∂θ + Σ gᵢ · ∂yᵢ/∂θ.

GradCache (Gao et al. 2021, arXiv 2101.06983). It costs one forward pass more, and the memory of the
window's outputs and of the loss over them. A sample's output must not depend on other samples.
"""

import itertools
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Protocol, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from gaccum_exp.core.joined_samples import NotJoinableError
from gaccum_exp.core.losses.model_loss import ModelLoss
from gaccum_exp.core.losses.protocol import (
    Denominator,
    LossFn,
    LossWrapper,
    criterion_of,
    without_inputs,
)
from gaccum_exp.core.model_outputs import (
    Call,
    Dims,
    WholeOutputs,
    back_propagate,
    dims_of,
    record,
    refused,
    signature,
)
from gaccum_exp.core.module_state import held_by, state_put_back, states_of
from gaccum_exp.core.reductions import Reduction
from gaccum_exp.core.sample_mixing import agree, mixing_module, swaps
from gaccum_exp.core.sample_reading import joined, picked, size_of
from gaccum_exp.core.seeding import random_state_kept, random_states, set_random_states
from gaccum_exp.core.stand_in import stand_in
from gaccum_exp.core.strategies import IN_PLACE, AccumulatorState, InPlace
from gaccum_exp.errors import BadInputError


class Totals(Protocol):
    """The sums of a window."""

    @property
    def loss_sum(self) -> Tensor:
        """Σ Sᵢ."""

    @property
    def denominator(self) -> Denominator:
        """Σ nᵢ."""


L = TypeVar("L", bound=Totals)


@dataclass(eq=False)
class Cached(InPlace):
    """Takes the loss once, over the outputs of the whole window, and runs every micro-batch twice.

    A loss function is called twice on each micro-batch, with a stand-in for the model that sees its
    calls, and once on the joined window, with one that answers them. So it may call the model, its
    methods and its submodules as it likes, in the same order for any number of samples. A window that
    was interrupted begins again.
    """

    held: InPlace = IN_PLACE
    """Where micro gradients are held."""
    _known: "WeakKeyDictionary[nn.Module, dict[Any, Dims]]" = field(
        default_factory=WeakKeyDictionary, repr=False
    )

    name: ClassVar[str] = "cached"
    takes_window_at_once: ClassVar[bool] = True
    reads_values: ClassVar[bool] = True
    """Whether tensors have values to be compared."""

    def buffered(self, dtype: torch.dtype) -> "Cached":
        """Return the same with micro gradients added up in this type."""
        return replace(self, held=self.held.buffered(dtype))

    def require(self, reduction: Reduction) -> None:
        """Refuse the mean of the micro-batches' means: there is one loss, the window's.

        Raises:
            BadInputError: that reduction.
        """
        if reduction.needs_equal_parts:
            raise BadInputError(
                f"accum.reduction={reduction.name} has no meaning under strategy=cached, which takes "
                "one loss over the whole window: use accum.reduction=global_mean"
            )

    def inspect(self, model: nn.Module, loss_fn: LossFn, window: Sequence[Any]) -> None:
        """Find out where outputs have their samples, and refuse a module that mixes these.

        The first micro-batch (the first ones joined, where it holds less than two samples) runs with one
        sample more, with every second sample replaced, and with a graph, always with the same draws.

        Raises:
            BadInputError: a sample's output depends on others, or a pass cannot be repeated.
        """
        unwrapped = loss_fn
        while isinstance(unwrapped, LossWrapper):
            unwrapped = unwrapped.wrapped
        if isinstance(unwrapped, ModelLoss):
            raise refused(
                f"{type(model).__name__} takes its loss itself, on each micro-batch: take it outside "
                "the model, over its outputs"
            )
        totals = list(itertools.accumulate(size_of(micro_batch, 0) for micro_batch in window))
        needed = next((n for n, total in enumerate(totals, 1) if total > 1), len(window))
        first, size = window[0] if needed == 1 else _joined(window[:needed]), totals[needed - 1]
        if size < 2:
            return
        kept = states_of([model, *held_by(loss_fn)])

        def run(rows: Tensor, graph: bool = False) -> list[Call]:
            with random_state_kept():
                calls = self.first_pass(model, loss_fn, picked(first, rows, size), graph=graph)
            for state in kept:
                state.put_back()
            return calls

        samples = torch.arange(size)
        base = run(samples)
        dims = dims_of(base, run(torch.cat([samples, samples[:1]])), size)

        if self.reads_values:
            if not _agree(base, run(samples, graph=True), dims, samples, size):
                name = type(model).__name__
                raise refused(f"{name}, run again with the same draws, gives other outputs")
            for swap in swaps(size):
                swapped = run(swap.rows)
                if _agree(base, swapped, dims, swap.kept, size):
                    continue
                if not _agree(base, swapped, dims, swap.kept[:0], size):  # at no sample: of the rest
                    raise refused(
                        "an output of the model that has no samples depends on them; take that part of "
                        "the loss outside the model"
                    )
                raise refused(
                    f"{mixing_module(model, run, swap)} makes a sample's output depend on the other "
                    "samples of its micro-batch; replace it, or freeze the statistics that it takes "
                    "(samples are those of dimension 0: give sequences batch first)"
                )
        self._known.setdefault(model, {})[signature(model, base)] = dims

    def accumulate(
        self,
        model: nn.Module,
        loss_fn: LossFn,
        window: Sequence[Any],
        in_one_pass: Callable[..., L],
        *,
        begun: AccumulatorState | None,
        around: Callable[[AccumulatorState], Any] | None,
        after: Callable[[AccumulatorState], object] | None,
    ) -> L:
        """Add the window's gradient to every parameter's `.grad`.

        Args:
            model: as `core.accumulate` has it; so are `loss_fn`, `window`, `begun`, `around`, `after`.
            in_one_pass: accumulates over a window of one micro-batch, given `model` and `window`.

        Returns:
            What `in_one_pass` returns for the outputs of all.
        """
        state = begun or AccumulatorState([None] * len(window))
        if state.passes_done:
            raise ValueError("a window under strategy=cached cannot go on in its middle: begin it again")
        if state.generators is not None:
            set_random_states(state.generators)
        sizes, starts, parts = [size_of(m, 0) for m in window], [], []
        with state_put_back([model, *held_by(loss_fn)]):
            for micro_batch in window:
                starts.append(random_states())
                parts.append(self.first_pass(model, loss_fn, micro_batch))
        torch.clear_autocast_cache()  # where older torch keeps weights that were cast without a graph
        dims = self._dims(model, loss_fn, window, parts)
        whole = WholeOutputs(parts, sizes, dims, reads_values=self.reads_values)
        targets = _joined([without_inputs(loss_fn, micro_batch) for micro_batch in window], sizes)
        loss = in_one_pass(model=stand_in(model, whole.answer), window=[targets])
        if isinstance(loss.denominator, (int, float)) and loss.denominator == 0:
            return loss
        gradients = whole.gradients()
        state.loss_sum, state.denominator = loss.loss_sum, loss.denominator
        drawn = random_states()
        modules = nn.ModuleList([m for m in (model, criterion_of(loss_fn)) if m is not None])
        parameters = list(modules.parameters()) if self.held.buffers_gradients else []
        collecting = self.held.collecting(state, parameters, rescaled=False)
        # The loss has been taken already, and moves nothing a second time.
        with collecting, state_put_back(of for of in held_by(loss_fn) if of is not model):
            for index, micro_batch in enumerate(window):
                set_random_states(starts[index])
                with around(state) if around else nullcontext():
                    self.second_pass(model, loss_fn, micro_batch, gradients[index], whole.written)
                    state.passes_done += 1
                if after is not None:
                    after(state)
        set_random_states(drawn)
        return loss

    def first_pass(
        self, model: nn.Module, loss_fn: LossFn, micro_batch: Any, *, graph: bool = False
    ) -> list[Call]:
        """Return what the model puts out for a micro-batch, as `record` does."""
        return record(model, loss_fn, micro_batch, graph=graph)

    def second_pass(
        self,
        model: nn.Module,
        loss_fn: LossFn,
        micro_batch: Any,
        gradients: Sequence[Tensor | None],
        written: Sequence[bool],
    ) -> None:
        """Run a micro-batch again and back-propagate it, as `back_propagate` does."""
        back_propagate(model, loss_fn, micro_batch, gradients, written)

    def _dims(
        self, model: nn.Module, loss_fn: LossFn, window: Sequence[Any], parts: Sequence[list[Call]]
    ) -> Dims:
        """Return where the outputs have their samples: found out in the first window with such calls."""
        kind = signature(model, parts[0])
        if kind not in self._known.get(model, {}):
            self.inspect(model, loss_fn, window)
        if any(signature(model, part) != kind for part in parts):
            raise refused("the loss function calls the model otherwise for another micro-batch")
        dims = self._known.get(model, {}).get(kind)
        if dims is None:
            raise refused("how the loss function calls the model depends on the samples")
        return dims


CACHED = Cached()


def _joined(parts: Sequence[Any], sizes: Sequence[int] | None = None) -> Any:
    try:
        return joined(parts, sizes or [size_of(part, 0) for part in parts])
    except NotJoinableError as error:
        raise refused(f"the window's micro-batches do not make one batch: {error}") from None


def _agree(ones: Sequence[Call], others: Sequence[Call], dims: Dims, rows: Tensor, size: int) -> bool:
    """Whether the outputs of these samples agree, and those that have no samples."""
    columns = zip(ones, others, dims, strict=True)
    return all(agree(one.tensors, other.tensors, of, rows, size) for one, other, of in columns)
