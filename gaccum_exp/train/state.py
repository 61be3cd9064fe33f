"""What one training run works with."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import Dataset

from gaccum_exp.config.schema import Settings
from gaccum_exp.core.losses.criterion import CriterionLoss, LossFn
from gaccum_exp.core.losses.placement import Placement
from gaccum_exp.core.window import WindowPlan


@dataclass(slots=True)
class Splitting:
    """How much finer windows are split than was asked for."""

    factor: int = 1
    """Times as many micro-batches: it grows where memory runs out."""


@dataclass(frozen=True)
class Experiment:
    """The built objects of one arm, and the settings that they were built from."""

    model: nn.Module
    loss_fn: LossFn
    """Takes micro-batches from the host."""
    criterion_loss: CriterionLoss | None
    """The criterion as a loss function, for evaluation; None where the user gave a loss function."""
    parameters: list[nn.Parameter]
    optimizer: torch.optim.Optimizer
    scheduler: LRScheduler | None
    train_data: Dataset[Any]
    eval_data: Dataset[Any] | None
    plan: WindowPlan
    total_steps: int
    sum_divisor: float
    """What the reduction `sum` divides by at the largest global batch."""
    device: torch.device
    placement: Placement
    """What is done to micro-batches from the host; `loss_fn` does it by itself."""
    scaler: torch.amp.GradScaler | None
    """Of the loss, where passes compute in float16."""
    buffer_dtype: torch.dtype | None
    """In what micro gradients are added up; None: as the weights."""
    counts_tokens: bool
    """Whether a target is a sequence of labels, (batch, length)."""
    ignore_index: int
    """Of labels that do not count."""
    settings: Settings
    splitting: Splitting = field(default_factory=Splitting)

    def accum_steps(self, global_step: int) -> int:
        """Return N, the micro-batches of a window."""
        stage = self.settings.stages[self.plan.stage_of(global_step)]
        if self.splitting.factor == 1:
            return stage.accum_steps
        size = stage.global_batch_size
        finer = min(stage.accum_steps * self.splitting.factor, size)
        if self.settings.accum.reduction == "mean":  # of means: on unequal micro-batches it is biased
            return next(n for n in range(finer, size + 1) if size % n == 0)
        return finer

    def divisor(self, global_step: int) -> float:
        """Return what the reduction `sum` divides by: a constant of the stage, as its batch is."""
        return self.sum_divisor * self._share(global_step) if self.sum_divisor != 1.0 else 1.0

    def is_full(self, global_step: int) -> bool:
        """Whether a window is as large as those of its stage get."""
        plan = self.plan
        asked = plan.stages[plan.stage_of(global_step)].global_batch_size
        carried = plan.partial_window == "carry"
        return plan.size(global_step) == (asked if carried else min(asked, plan.samples))

    @property
    def stage_windows(self) -> list[range]:
        """The global steps of every stage that this training reaches."""
        starts = [*self.plan.stage_starts, self.total_steps]
        ends = [min(end, self.total_steps) for end in starts[1:]]
        return [range(*stage) for stage in zip(starts, ends, strict=False) if stage[0] < stage[1]]

    def backward(self, loss: Tensor) -> None:
        """Back-propagate a micro-batch's share of the loss."""
        torch.autograd.backward(loss if self.scaler is None else self.scaler.scale(loss))

    def rate_factor(self, global_step: int) -> float:
        """Return what the learning rate is multiplied by while the schedule keeps the batch small."""
        share = self._share(global_step)
        power = {"none": 0.0, "linear": 1.0, "sqrt": 0.5}[self.settings.accum.schedule_lr]
        return float(share**power)

    @property
    def modules(self) -> nn.ModuleList:
        """The model, and the criterion where that is a module: it may have parameters as well."""
        criterion = self.criterion_loss.criterion if self.criterion_loss else None
        return nn.ModuleList([self.model] if criterion is None else [self.model, criterion])

    def _share(self, global_step: int) -> float:
        """Return the global batch now over the largest of the schedule."""
        now = self.plan.stages[self.plan.stage_of(global_step)].global_batch_size
        return now / self.plan.largest_batch
