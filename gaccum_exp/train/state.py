"""The state of a training: what it was built from, and what its steps move."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import Dataset

from gaccum_exp.config.schema import Settings
from gaccum_exp.core.batch_growth import BatchGrowth, rate_factor
from gaccum_exp.core.feed import Window, windows
from gaccum_exp.core.losses.criterion import CriterionLoss
from gaccum_exp.core.losses.placement import Placement
from gaccum_exp.core.losses.protocol import LossFn
from gaccum_exp.core.losses.terms import TermsLoss
from gaccum_exp.core.reductions import Reduction
from gaccum_exp.core.strategies import AccumulatorState, InPlace
from gaccum_exp.core.window import WindowPlan


@dataclass(slots=True)
class TrainState:
    """One training at one global step."""

    settings: Settings
    model: nn.Module
    loss_fn: LossFn
    """Takes micro-batches from the host."""
    criterion_loss: CriterionLoss | TermsLoss | None
    """The criterion, or those of several terms, as a loss function, for evaluation; None where the user
    gave a loss function."""
    parameters: list[nn.Parameter]
    optimizer: torch.optim.Optimizer
    scheduler: LRScheduler | None
    scaler: torch.amp.GradScaler | None
    """Of the loss, where passes compute in float16."""
    train_data: Dataset[Any]
    eval_data: Dataset[Any] | None
    plan: WindowPlan
    total_steps: int
    reduction: Reduction
    """At the largest global batch."""
    strategy: InPlace
    device: torch.device
    placement: Placement
    """What is done to micro-batches from the host; `loss_fn` does it by itself."""
    counts_tokens: bool
    """Whether a target is a sequence of labels, (batch, length)."""
    ignore_index: int
    """Of labels that do not count."""
    growth: BatchGrowth | None = None
    """Of a batch that grows where the schedule would let the rate fall."""
    global_step: int = 0
    """Windows used so far; each was an optimizer step, unless nothing in it counted."""
    split_factor: int = 1
    """Times as many micro-batches as was asked for: it grows where memory runs out."""
    begun: AccumulatorState | None = None
    """Of the window at `global_step`, where it was interrupted after a micro-batch and is to go on."""
    begun_sizes: list[int] | None = None
    """Of that window's micro-batches, where the ones that are left are split for another N."""
    begun_at_start: dict[str, Any] | None = None
    """What passes move, as it was when that window began."""
    rates: list[Any] | None = None
    """The learning rates of the schedule, while a step has multiplied them; None: as in the groups."""

    @property
    def done(self) -> bool:
        """Whether no window is left."""
        return self.global_step >= self.total_steps

    @property
    def modules(self) -> nn.ModuleList:
        """The model, and the criterion where that is a module: it may have parameters as well."""
        criterion = self.criterion_loss.criterion if self.criterion_loss else None
        return nn.ModuleList([self.model] if criterion is None else [self.model, criterion])

    @property
    def stage_windows(self) -> list[range]:
        """The global steps of every stage that this training reaches."""
        starts = [*self.plan.stage_starts, self.total_steps]
        ends = [min(end, self.total_steps) for end in starts[1:]]
        return [range(*stage) for stage in zip(starts, ends, strict=False) if stage[0] < stage[1]]

    def windows_from(self, first: int) -> Iterator[Window]:
        """Yield the windows of the training in order, from a global step on."""
        begun_sizes = None if self.begun is None else self.begun_sizes
        return windows(
            self.train_data,
            replace(self.plan, control_seed=self.settings.audit.control_seed),
            accum_steps=lambda k: begun_sizes if begun_sizes and k == first else self.accum_steps(k),
            global_steps=range(first, self.total_steps),
            workers=self.settings.data.workers,
            pin=self.device.type != "cpu",
        )

    def accum_steps(self, global_step: int) -> int:
        """Return N, the micro-batches of a window."""
        stage = self.settings.stages[self.plan.stage_of(global_step)]
        if self.split_factor == 1:
            return stage.accum_steps
        size = stage.global_batch_size
        finer = min(stage.accum_steps * self.split_factor, size)
        if self.reduction.needs_equal_parts:
            return next(n for n in range(finer, size + 1) if size % n == 0)
        return finer

    def is_full(self, global_step: int) -> bool:
        """Whether a window is as large as those of its stage get."""
        plan = self.plan
        asked = plan.stages[plan.stage_of(global_step)].global_batch_size
        carried = plan.partial_window == "carry"
        return plan.size(global_step) == (asked if carried else min(asked, plan.samples))

    def reduction_at(self, global_step: int) -> Reduction:
        """Return the reduction of a window: its constant is of its stage, as its batch is."""
        return self.reduction.at_batch_share(self._batch_share(global_step))

    def rate_factor(self, global_step: int) -> float:
        """Return what the schedule's learning rate is multiplied by for the batch of a window."""
        if self.growth is not None:
            return self.growth.factors[global_step]
        return rate_factor(self.settings.accum.schedule_lr, self._batch_share(global_step))

    @property
    def schedule_steps(self) -> int:
        """The steps of the learning rate's schedule: one a window, unless the batch grows."""
        return self.total_steps if self.growth is None else self.growth.base_steps[-1]

    def schedule_steps_of(self, global_step: int) -> int:
        """Return the steps of the schedule that a window takes: as many as windows that do not grow."""
        if self.growth is None:
            return 1
        now, following = self.growth.base_steps[global_step : global_step + 2]
        return following - now

    def backward(self, loss: Tensor) -> None:
        """Back-propagate a micro-batch's share of the loss."""
        torch.autograd.backward(loss if self.scaler is None else self.scaler.scale(loss))

    def _batch_share(self, global_step: int) -> float:
        """Return the global batch now over the largest of the schedule."""
        now = self.plan.stages[self.plan.stage_of(global_step)].global_batch_size
        return now / self.plan.largest_batch
