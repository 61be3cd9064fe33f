"""Plan the memory of any model and optimizer, without a configuration."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from gaccum_exp.core.accumulate import StrategyName, accumulate_gradients, strategy_named
from gaccum_exp.core.checkpointing import checkpoint_blocks
from gaccum_exp.core.losses.criterion import as_loss_fn
from gaccum_exp.core.losses.placement import Placed, Placement
from gaccum_exp.core.losses.protocol import LossFn
from gaccum_exp.core.modes import eagerly
from gaccum_exp.core.reductions import ReductionName, reduction_named
from gaccum_exp.core.seeding import random_state_kept
from gaccum_exp.core.strategies import InPlace
from gaccum_exp.memory.fake import (
    SizesOnly,
    copies,
    fake_copies,
    fake_mode,
    nothing_left_behind,
    resized,
    samples_in,
    sizes_only,
)
from gaccum_exp.memory.meter import FORWARD_BACKWARD, OPTIMIZER_STEP, Meter
from gaccum_exp.memory.plan import BF16, CHECKPOINTING, FUSED, Change, MemoryPlan
from gaccum_exp.memory.planner import Planner, peak_source, with_advice
from gaccum_exp.memory.predict import MeteredStep, Predicted, decisive_sizes
from gaccum_exp.memory.timing import with_times

OptimizerOf = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


@nothing_left_behind()
def plan_memory(
    model: nn.Module,
    loss_fn: LossFn | nn.Module,
    batch: Any,
    optimizer: torch.optim.Optimizer | OptimizerOf,
    *,
    batch_size: int | None = None,
    budget_bytes: int | None = None,
    reduction: ReductionName = "global_mean",
    buffer_dtype: torch.dtype | None = None,
    strategy: StrategyName | InPlace = "in_place",
    timed: bool = False,
) -> MemoryPlan:
    """Predict the peak memory of accumulation for every N, without running anything.

        plan = plan_memory(model, nn.CrossEntropyLoss(), (images, labels), optimizer, budget_bytes=2**33)
        print(plan)

    With `timed=True` the windows of N = 1, 2, 4, 8 and of the chosen N are run, too, as far as they fit
    the machine, on copies: the plan has their seconds beside their peaks.

    Args:
        model: on the device where it will be trained; on `meta`, it is planned for the CPU.
        loss_fn: as for `accumulate_gradients`.
        batch: a micro-batch as the loss function takes it, on any device, even `meta`, of any size.
        optimizer: over the model's parameters, or what makes it of them, e.g. `torch.optim.AdamW`.
        batch_size: samples of a window, the global batch; None: as many as `batch` holds.
        budget_bytes: what the peak may be at most; None: no N is chosen.
        reduction: as for `accumulate_gradients`; under `mean` only an N that divides the batch
            is chosen.
        buffer_dtype: as for `accumulate_gradients`; `strategy` as well.
        timed: whether to time windows, on micro-batches like `batch`, in up to a minute or so.

    Returns a row for every power of two up to one sample a micro-batch, the smallest N that fits, the N
    past which nothing shrinks, and what else would save memory, as one would write it in a script.

    A model whose forward pass depends on values is run instead, on a copy, on micro-batches of four and
    eight samples; the plan says so. On `meta`, without values, its error is raised with a note. Errors
    of the model, the loss function or the optimizer are raised as they are.
    """
    samples = samples_in(batch) if batch_size is None else batch_size
    if samples < 1 or samples_in(batch) < 1:
        raise ValueError(
            f"a window of {samples} samples cannot be planned on a batch of {samples_in(batch)}: "
            "both have to hold one at least"
        )
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    device = torch.device("cpu") if device.type == "meta" else device
    chosen = strategy_named(strategy, buffer_dtype)
    chosen.require(reduction_named(reduction))
    step = _Step(model, loss_fn, batch, optimizer, reduction, chosen, device)
    tensors = [*model.parameters(), *(t for t in tree_leaves(batch) if isinstance(t, Tensor))]
    real = None if any(t.is_meta for t in tensors) else step.real
    if timed and real is None:
        raise ValueError("timed=True runs windows: model and batch need memory, and are on `meta`")
    source, notes = peak_source(step.fake, real, samples)
    equal_parts = reduction_named(reduction).needs_equal_parts
    planner = Planner(source, samples, equal_parts=equal_parts, notes=notes)
    plan = replace(planner.plan(str(device), budget_bytes), in_code=True)
    if isinstance(source, Predicted):
        plan = with_advice(plan, step.fake)
    return with_times(plan, step.real(whole=True)) if timed else plan


@dataclass(frozen=True, slots=True)
class _Step:
    model: nn.Module
    loss_fn: LossFn | nn.Module
    batch: Any
    optimizer: torch.optim.Optimizer | OptimizerOf
    reduction: ReductionName
    strategy: InPlace
    device: torch.device

    def real(self, *, whole: bool = False) -> MeteredStep:
        """Return the step on copies; its windows are `whole`, or have what decides their peak."""
        copied = copies((self.model, self.loss_fn, self.optimizer), {})
        return self._on(copied, None, None, whole=whole)

    def fake(self, change: Change | None = None) -> MeteredStep:
        """Return the step on copies without memory, with a change; raise if that does not apply."""
        mode = fake_mode()
        copied = fake_copies(mode, (self.model, self.loss_fn, self.optimizer), self.device)
        return self._on(copied, mode, change)

    def _on(
        self,
        copied: tuple[Any, ...],
        mode: FakeTensorMode | None,
        change: Change | None,
        *,
        whole: bool = False,
    ) -> MeteredStep:
        @contextmanager
        def context() -> Iterator[None]:
            with random_state_kept(), eagerly(), mode or nullcontext():
                yield

        model, loss_fn, optimizer = copied
        modules = nn.ModuleList([model, *([loss_fn] if isinstance(loss_fn, nn.Module) else [])])
        with context():
            if not isinstance(optimizer, torch.optim.Optimizer):
                optimizer = optimizer([p for p in modules.parameters() if p.requires_grad])
            if (change == FUSED and not fuse(optimizer)) or (
                change == CHECKPOINTING and not checkpoint_blocks(model)
            ):
                raise ValueError(f"{change.name} does not apply")
            at_once = self.strategy.takes_window_at_once
            half = torch.bfloat16 if change == BF16 else None
            placement = Placement(self.device, autocast=half, device_type=self.device.type)
            wrapped = as_loss_fn(loss_fn, self.reduction, whole_window=at_once)
            run = Placed(wrapped if whole else SizesOnly(wrapped, self.batch), placement)
        strategy = self.strategy if mode is None else sizes_only(self.strategy)
        strategy = strategy.for_optimizer(optimizer)

        def take(window: list[Any], meter: Meter) -> None:
            optimizer.zero_grad()
            with meter.phase(FORWARD_BACKWARD):
                accumulate_gradients(
                    model,
                    meter.loss_fn(run),
                    window,
                    reduction=self.reduction,
                    strategy=strategy,
                )
            with meter.phase(OPTIMIZER_STEP):
                strategy.step_of(optimizer)()

        def window(sizes: Sequence[int]) -> list[Any]:
            with context():  # what is on meta becomes fake, or memory
                chosen = sizes if whole else decisive_sizes(sizes, strategy)
                return [resized(self.batch, size, self.device) for size in chosen]

        return MeteredStep(modules, optimizer, self.device, window, take, context, strategy)


def fuse(optimizer: torch.optim.Optimizer) -> bool:
    """Make an optimizer fused; False where it has no such form, or is in it already."""
    if "fused" not in optimizer.defaults or all(group["fused"] for group in optimizer.param_groups):
        return False
    for group in optimizer.param_groups:
        group.update(fused=True, foreach=False)
    return True
