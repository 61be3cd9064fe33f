"""Models of one architecture trained as one: every parameter has a leading seed dimension, (seeds, ...).

A pass is vmapped over the seeds. They share nothing, so the gradient of the sum of their losses holds
each seed's own gradient, and the arithmetic is that of `core/accumulate.py` and `core/reductions.py`
seed by seed. Whether a model may be trained so is measured in `train/stackable_seeds.py`.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.data import Dataset, TensorDataset

from gaccum_exp.core.feed import windows
from gaccum_exp.core.losses.protocol import LossFn, count, loss_sum, window_denominator
from gaccum_exp.core.reductions import Reduction
from gaccum_exp.core.window import WindowPlan, split_sizes


class MicroBatches(NamedTuple):
    """The i-th micro-batches of all seeds."""

    each: Sequence[Any]
    """One for each seed."""
    together: Any | None
    """The same pytree with tensors (seeds, micro-batch, ...); None where the seeds' shapes differ."""


StackedWindow = list[MicroBatches]
"""The windows of all seeds for one optimizer step, one entry for each of the N micro-batches."""


class StackedLoss(NamedTuple):
    """What the seeds' windows added up to, both (seeds,)."""

    loss_sums: Tensor
    """On the models' device, detached."""
    denominators: Tensor
    """On the host; 0 where nothing in a seed's window counts, and then that seed got no gradient."""

    @property
    def mean(self) -> Tensor:
        """Each seed's loss over all that counts in its window, (seeds,)."""
        return self.loss_sums / self.denominators.to(self.loss_sums)


class Stack:
    """Modules of one architecture as one.

    Args:
        parts: of each seed, its modules; the first of them is what functions are called with. From here
            on their parameters and buffers are views of the stacked ones: each seed's modules can be run
            and read as if they were trained alone.

    Raises:
        RuntimeError: they differ by more than their values.
    """

    def __init__(self, parts: Sequence[nn.ModuleList]) -> None:
        holders = [_Holder(modules) for modules in parts]
        self._holder = holders[0]
        self.parameters, buffers = stack_module_state(holders)
        # Those that all seeds have alike, e.g. class weights, stay what they are: values to be read.
        apart = {k: b for k, b in buffers.items() if not torch.equal(b, b[:1].expand_as(b))}
        self._state = self.parameters | apart
        for seed, holder in enumerate(holders):
            own = dict(holder.named_parameters()) | dict(holder.named_buffers())
            for name, stacked in self._state.items():
                own[name].data = stacked.detach()[seed]

    @property
    def trained(self) -> list[Tensor]:
        """The parameters that get a gradient, each (seeds, ...)."""
        return [p for p in self.parameters.values() if p.requires_grad]

    def __call__(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Return `function(model, *arguments)` of all seeds, tensors with a leading seed dimension.

        Args:
            function: called once; what it returns that is no tensor is the same for every seed.
            arguments: pytrees of tensors (seeds, ...). What all seeds share belongs into the function.
        """
        structure: list[Any] = []

        def of_a_seed(state: Any, arguments: Any) -> list[Tensor]:
            leaves, spec = tree_flatten(functional_call(self._holder, state, (function, *arguments)))
            structure[:] = spec, [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            return [leaf for leaf in leaves if isinstance(leaf, Tensor)]

        with warnings.catch_warnings():
            # An operator that cannot be batched runs seed by seed: correct, and as fast as alone.
            warnings.filterwarnings("ignore", "There is a performance drop", UserWarning)
            tensors = iter(vmap(of_a_seed)(self._state, arguments))
        spec, plain = structure
        return tree_unflatten([next(tensors) if leaf is None else leaf for leaf in plain], spec)

    def losses(self, loss_fn: LossFn, micro_batches: MicroBatches) -> Tensor:
        """Return each seed's loss sum, (seeds,)."""

        def of_a_seed(model: nn.Module, micro_batch: Any) -> Tensor:
            return loss_sum(loss_fn, model, micro_batch)

        if micro_batches.together is not None:
            losses: Tensor = self(of_a_seed, micro_batches.together)
            return losses
        return torch.stack(
            [
                functional_call(self._holder, self._state_of(seed), (of_a_seed, micro_batch))
                for seed, micro_batch in enumerate(micro_batches.each)
            ]
        )

    def _state_of(self, seed: int) -> dict[str, Tensor]:
        return {name: tensor[seed] for name, tensor in self._state.items()}


class _Holder(nn.Module):
    """Calls a function with the first of its modules, all of whose tensors may be swapped."""

    def __init__(self, parts: nn.ModuleList) -> None:
        super().__init__()
        self.parts = parts
        self.train(parts.training)

    def forward(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return function(self.parts[0], *arguments)


def stacked_windows(
    dataset: Dataset[Any],
    plans: Sequence[WindowPlan],
    *,
    accum_steps: Callable[[int], int],
    global_steps: range,
) -> Iterator[StackedWindow]:
    """Yield what `core.feed.windows` yields for each seed's plan, together.

    Args:
        dataset: the seeds' own, one for all.
        plans: of the seeds; they differ in their seed only.
        accum_steps: N as a function of the global step.
        global_steps: e.g. range(0, 140).
    """
    if type(dataset) is not TensorDataset:
        feeds = (
            windows(dataset, plan, accum_steps=accum_steps, global_steps=global_steps) for plan in plans
        )
        for of_seeds in zip(*feeds, strict=True):
            yield [MicroBatches(each, _together(each)) for each in zip(*of_seeds, strict=True)]
        return
    for global_step in global_steps:
        sizes = split_sizes(plans[0].size(global_step), accum_steps(global_step))
        indices = torch.stack([plan.indices(global_step) for plan in plans])  # (seeds, window)
        flat = (tensor.index_select(0, indices.flatten()) for tensor in dataset.tensors)
        rows = (torch.split(t.view(*indices.shape, *t.shape[1:]), sizes, dim=1) for t in flat)
        yield [
            MicroBatches(list(zip(*(t.unbind() for t in together), strict=True)), together)
            for together in zip(*rows, strict=True)
        ]


def accumulate_stacked(
    stack: Stack, loss_fn: LossFn, window: StackedWindow, reduction: Reduction
) -> StackedLoss:
    """Add the gradient of every seed's window to the stacked parameters' `.grad`.

    Args:
        stack: the models.
        loss_fn: as in `core.accumulate`; it can count a micro-batch without the model.
        window: the seeds' micro-batches.
        reduction: of all seeds, as `core.reductions.stacked` makes it of theirs.

    Raises:
        ValueError: the loss has several terms, or a denominator is known only after the forward pass.
    """
    known: Any = [[count(loss_fn, micro_batch) for micro_batch in part.each] for part in window]
    if any(isinstance(n, dict) for counts in known for n in counts):
        raise ValueError("its loss has several terms")
    if any(n is None for counts in known for n in counts):
        raise ValueError("what its loss divides by is known only after the forward pass")
    counts = torch.tensor(known, dtype=torch.float64)  # (N, seeds)
    totals = torch.as_tensor(window_denominator(loss_fn, counts.sum(0)))
    loss_sums = []
    for part, of_seeds in zip(window, counts, strict=True):
        n = window_denominator(loss_fn, of_seeds)
        by = torch.as_tensor(reduction.divisor(n, totals, len(window)))
        by = torch.where(by == 0, torch.inf, by)  # x / inf is the zero that zero elements give
        losses = stack.losses(loss_fn, part)
        torch.autograd.backward((losses / by.to(losses)).sum())
        loss_sums.append(losses.detach())
    return StackedLoss(torch.stack(loss_sums).sum(0), totals)


def gradient_norms(parameters: Iterable[Tensor]) -> Tensor:
    """Return each seed's Euclidean norm of all its gradients taken together, (seeds,)."""
    gradients = [p.grad.flatten(1) for p in parameters if p.grad is not None]
    norms = [torch.linalg.vector_norm(gradient, dim=1) for gradient in gradients]
    total: Tensor = torch.linalg.vector_norm(torch.stack(norms), dim=0)
    return total


@torch.no_grad()
def clip_gradients(parameters: Iterable[Tensor], max_norm: float, norms: Tensor) -> None:
    """Clip each seed's gradient to a norm, as `torch.nn.utils.clip_grads_with_norm_` clips one.

    Args:
        parameters: stacked, (seeds, ...).
        max_norm: the same for all seeds.
        norms: of the seeds' gradients, (seeds,).
    """
    factors = torch.clamp(max_norm / (norms + 1e-6), max=1.0)
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad.mul_(factors.view(-1, *[1] * (parameter.grad.ndim - 1)))


def _together(each: Sequence[Any]) -> Any | None:
    """Stack pytrees of tensors; None where they differ in more than values."""
    flat = [tree_flatten(micro_batch) for micro_batch in each]
    spec = flat[0][1]
    alike = all(other == spec for _, other in flat)
    if not alike or not all(isinstance(leaf, Tensor) for leaves, _ in flat for leaf in leaves):
        return None
    columns = list(zip(*(leaves for leaves, _ in flat), strict=True))
    if any(len({(leaf.shape, leaf.dtype) for leaf in column}) > 1 for column in columns):
        return None
    return tree_unflatten([torch.stack(column) for column in columns], spec)
