"""Micro gradients seen one by one, without a copy: what a hook on a leaf gets before autograd adds it.

Of each only its square and its inner product with the sum of those before it are taken. That sum is what
`.grad`, or the strategy's buffer, holds while the hook runs.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gaccum_exp.core.dtypes import out_of_half, reals
from gaccum_exp.core.gradient import gradient_norm
from gaccum_exp.core.joined_samples import NotJoinableError, SampleLayout
from gaccum_exp.core.losses.protocol import Denominator, LossFn, criterion_of, pair_of
from gaccum_exp.core.module_state import held_by, state_put_back, states_of
from gaccum_exp.core.sample_mixing import mixing_module, swaps
from gaccum_exp.core.sample_reading import sample_layouts
from gaccum_exp.core.seeding import random_state_kept, random_states, same_states, set_random_states
from gaccum_exp.core.strategies import AccumulatorState
from gaccum_exp.errors import BadInputError

CHUNK = 2**20
"""Elements of a gradient that are looked at in one operation: what that needs besides is no larger."""
KEPT = 2**18
"""Elements of D that are kept for a window, of small parameters: of a small model it takes the time."""
TRIED = 8
"""Samples that are tried for whether they are independent."""
OF_DRAWS = (
    "passes draw random numbers (dropout and its like), and of a training set's noise scale no more can "
    "be told: that noise does not vanish in a window of all its samples, as the samples' does"
)
OF_TERMS = "a loss of several terms has a noise scale for each term: give it as one sum and denominator"


class Seen(NamedTuple):
    """What was seen of one micro-batch."""

    samples: int
    denominator: Denominator
    """nᵢ."""
    divisor: Denominator
    """What its loss sum was divided by."""
    dots: Tensor
    """s·s and s·A of its gradient s and the sum A of those before it, (2,); in an optimizer's metric D
    sᵀDs and sᵀDA besides, (4,), NaN where not all parameters have one."""


class AdamMetric(NamedTuple):
    """D = 1/(√v̂ + ε) of one parameter, v̂ = v/(1 − β₂ᵏ) after k steps.

    An element that has never had a gradient has no metric yet, and counts as 0: 1/ε would drown all.
    """

    second_moment: Tensor
    """v, or its maximum under amsgrad."""
    root: float | Tensor
    """√(1 − β₂ᵏ)."""
    eps: float

    def weights(self, moment: Tensor) -> Tensor:
        """Return D for a part of v."""
        root = torch.threshold_(moment.sqrt(), 0.0, math.inf)
        return root.add_(self.eps * self.root).reciprocal_().mul_(self.root)


class MicroGradients:
    """Sees the micro gradients of one window.

    Args:
        parameters: whose gradients.
        optimizer: its metric is measured by, too, where it is Adam-like and has taken a step.
        rows: of the micro-batches that are done, where the window goes on.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        optimizer: torch.optim.Optimizer | None = None,
        rows: Sequence[Seen] = (),
    ) -> None:
        self.rows = list(rows)
        self.unfit: str | None = None
        """Why this window tells nothing."""
        self._parameters = parameters
        self._metrics = {} if optimizer is None else adam_metrics(optimizer)
        self._weights: dict[nn.Parameter, Tensor] = {}
        left = KEPT
        for parameter, metric in self._metrics.items():
            if parameter.numel() <= left:
                left -= parameter.numel()
                self._weights[parameter] = metric.weights(out_of_half(reals(metric.second_moment)))
        self._held: dict[nn.Parameter, Tensor] = {}
        self._dots: list[Tensor] = []
        self._seen: set[nn.Parameter] = set()
        self._device = parameters[0].device
        self._apart = any(p.device != self._device for p in parameters)
        self._zero, self._nan = torch.tensor([0.0, math.nan], device=self._device).unbind()

    @contextmanager
    def watching(self, begun: AccumulatorState | None = None) -> Iterator[None]:
        """See the gradients of a block's passes; `begun` is the state of a window that goes on."""
        self._held = {} if begun is None else begun.buffers
        handles = [
            p.register_hook(partial(self._see, p))  # type: ignore[no-untyped-call]  # torch's
            for p in self._parameters
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def end_micro_batch(self, state: AccumulatorState, samples: int) -> None:
        """Take what was seen since the last one as that of a micro-batch of so many samples."""
        self._held = state.buffers
        if state.last_share is None:
            self.unfit = OF_TERMS
            return
        columns, device = 4 if self._metrics else 2, self._device
        seen = [dot.to(device) for dot in self._dots] if self._apart else self._dots
        double = torch.float32 if device.type == "mps" else torch.float64
        if seen:
            dots = torch.stack(seen).view(-1, columns).sum(0, dtype=double)
        else:  # nothing in it counts
            dots = torch.zeros(columns, dtype=double, device=device)
        self.rows.append(Seen(samples, *state.last_share, dots))
        self._dots, self._seen = [], set()

    def _see(self, parameter: nn.Parameter, gradient: Tensor) -> None:
        if gradient.layout != torch.strided:
            self.unfit = (
                f"the gradient of a parameter of shape {tuple(parameter.shape)} is sparse: use "
                "sparse=False in its layer"
            )
            return
        if parameter in self._seen:
            self.unfit = (
                f"a parameter of shape {tuple(parameter.shape)} gets its gradient in several parts "
                "within one micro-batch, as one that is shared by checkpointed segments does: use "
                "use_reentrant=False there, and one backward pass a micro-batch"
            )
            return
        self._seen.add(parameter)
        held, metric = self._held.get(parameter, parameter.grad), self._metrics.get(parameter)
        weights = self._weights.get(parameter)
        tensors = [reals(gradient.detach())]
        if held is not None:
            tensors.append(reals(held.detach()))
        if metric is not None:
            tensors.append(reals(metric.second_moment) if weights is None else weights)
        for parts in _pieces(tensors):
            self._look(parts, held is not None, metric if weights is None else None)
            parts.clear()  # or the next ones are made beside them

    def _look(self, parts: Sequence[Tensor], has_sum: bool, metric: AdamMetric | None) -> None:
        """Take the dots of a part of a gradient; after it that of the sum so far, and D or v for it."""
        own, total = parts[0], parts[1] if has_sum else None
        self._dots += [torch.dot(own, own), self._zero if total is None else _dot(own, total)]
        if len(parts) > 1 + has_sum:
            by = own * (parts[-1] if metric is None else metric.weights(parts[-1]))
            self._dots += [_dot(own, by), self._zero if total is None else _dot(by, total)]
        elif self._metrics:
            self._dots += [self._nan, self._nan]


def adam_metrics(optimizer: torch.optim.Optimizer) -> dict[nn.Parameter, AdamMetric]:
    """Return the metric of every parameter that has one by now; none, if others have another state."""
    metrics: dict[nn.Parameter, AdamMetric] = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state.get(parameter)
            if not state:
                continue
            moment = state.get("max_exp_avg_sq", state.get("exp_avg_sq"))
            step = state.get("step")
            if moment is None or step is None or not {"betas", "eps"} <= group.keys():
                return {}
            left = 1 - float(group["betas"][1]) ** (step if _on_device(step) else float(step))
            root = left.sqrt() if isinstance(left, Tensor) else math.sqrt(left)
            metrics[parameter] = AdamMetric(moment, root, group["eps"])
    return metrics


def samples_in(
    window: Sequence[Any], *, dim: int | None = None, sizes: Sequence[int] | None = None
) -> SampleLayout:
    """Return where the samples of a window's micro-batches are.

    Args:
        window: the micro-batches.
        dim: the dimension that counts them, if that is known.
        sizes: how many each holds, if they are known.

    Raises:
        BadInputError: they cannot be told apart.
    """
    try:
        return sample_layouts(window, dim=dim, sizes=sizes, guess=True)[0]
    except NotJoinableError as error:
        raise BadInputError(
            f"noise scale: the samples of a micro-batch cannot be told apart ({error}), so that nothing "
            "shows whether they are independent: give tensors with the samples along one dimension"
        ) from None


def require_independent(
    model: nn.Module,
    loss_fn: LossFn,
    micro_batch: Any,
    layout: SampleLayout,
    parameters: Sequence[nn.Parameter],
    coarsest: torch.dtype,
) -> bool:
    """Return whether passes draw random numbers, of a gradient that is a sum over samples.

    The first samples of a micro-batch pass four times, always with the same draws: as they are, every
    second one replaced by its neighbour, the others replaced, and all. Of a sum over samples the
    gradients of the first and the last pass are together those of the other two. What passes move is put
    back.

    Args:
        model: in the mode to be trained in.
        loss_fn: of the window.
        micro_batch: of two samples or more, or else only draws are seen.
        layout: where its samples are, it being the first of the window.
        parameters: that get a gradient.
        coarsest: the least precise type that passes compute in.

    Raises:
        BadInputError: a sample has no share of its own in the gradient, and why.
    """
    size, drawn = min(layout.sizes[0], TRIED), False
    held = [model, *held_by(loss_fn)]
    refusal: BadInputError | None
    with random_state_kept(), state_put_back(held):  # which an error would leave as it is
        kept, start = states_of(held), random_states()

        def run(rows: Tensor) -> tuple[Tensor, Denominator]:
            nonlocal drawn
            for state in kept:
                state.put_back()
            set_random_states(start)
            result = loss_fn(model, layout.picked(micro_batch, rows))
            drawn = drawn or not same_states(random_states(), start)
            if isinstance(result, Mapping):
                raise BadInputError(f"noise scale: {OF_TERMS}")
            return pair_of(result)

        try:
            refusal = _refusal(model, loss_fn, run, size, parameters, coarsest)
        except BadInputError as error:
            refusal = error
    if refusal is not None:
        raise refusal
    return drawn


def _refusal(
    model: nn.Module,
    loss_fn: LossFn,
    run: Callable[[Tensor], tuple[Tensor, Denominator]],
    size: int,
    parameters: Sequence[nn.Parameter],
    coarsest: torch.dtype,
) -> BadInputError | None:
    """Run samples and their replacements; return what speaks against them."""
    samples = torch.arange(size)
    if size < 2:
        if size:
            run(samples)
        return None
    one, other = (swap.rows for swap in swaps(size))
    # Without a loss scale float16 would lose the digits of small gradients.
    scale = 1024.0 if coarsest == torch.float16 else 1.0
    before, watched = [p.grad for p in parameters], MicroGradients(parameters)
    norms: list[float] = []
    try:
        for parameter in parameters:
            parameter.grad = None
        for sign, rows in ((1, samples), (-1, one), (-1, other), (1, one + other - samples)):
            loss, _ = run(rows)
            if loss.requires_grad:
                with nullcontext() if norms else watched.watching():
                    torch.autograd.backward(loss * (sign * scale))
            norms.append(float(gradient_norm(parameters)))
    finally:
        for parameter, grad in zip(parameters, before, strict=True):
            parameter.grad = grad
    if watched.unfit is not None:
        return BadInputError(f"noise scale: {watched.unfit}")
    if not norms[-1] > math.sqrt(torch.finfo(coarsest).eps) * max(norms):
        return None
    with torch.no_grad():
        named = [mixing_module(model, run, swap) for swap in swaps(size)]
    culprit = next((name for name in named if name != type(model).__name__), None)
    if culprit is not None:
        return BadInputError(
            f"noise scale: {culprit} makes a sample's output depend on the other samples of its "
            "micro-batch, so that a sample has no gradient of its own: replace it (by GroupNorm, for "
            "one), or freeze the statistics that it takes"
        )
    criterion = criterion_of(loss_fn)
    name = "the loss function" if criterion is None else f"the criterion {type(criterion).__name__}"
    return BadInputError(
        f"noise scale: {name} couples the samples of a micro-batch, so that a sample has no gradient of "
        "its own: there is none, unless the loss is a sum over samples"
    )


def coarsest_type(
    parameters: Sequence[nn.Parameter], autocast: torch.dtype | None = None
) -> torch.dtype:
    """Return the least precise type of parameters, and of autocast where that is on or given."""
    kind = parameters[0].device.type
    if autocast is None and torch.is_autocast_enabled(kind):
        autocast = torch.get_autocast_dtype(kind)
    own = [p.real.dtype if p.is_complex() else p.dtype for p in parameters]
    return max([*own, *([autocast] if autocast else [])], key=lambda dtype: torch.finfo(dtype).eps)


def _pieces(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Yield flat parts of tensors of one shape, views where they are contiguous; halves in float32."""
    first = tensors[0]
    if first.numel() <= CHUNK:
        yield [out_of_half(t).reshape(-1) for t in tensors]
        return
    dim = max(range(first.ndim), key=first.shape.__getitem__)
    rows = max(1, first.shape[dim] * CHUNK // first.numel())
    for parts in zip(*(torch.split(t, rows, dim) for t in tensors), strict=True):
        yield from _pieces(parts)


def _dot(one: Tensor, other: Tensor) -> Tensor:
    if one.dtype != other.dtype:
        wider = torch.promote_types(one.dtype, other.dtype)
        one, other = one.to(wider), other.to(wider)
    return torch.dot(one, other)


def _on_device(step: Any) -> bool:
    return isinstance(step, Tensor) and step.device.type != "cpu"
