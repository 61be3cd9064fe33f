"""What one training run works with."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import Dataset

from gaccum_exp.config import Settings
from gaccum_exp.core.loss import CriterionLoss, LossFn
from gaccum_exp.core.window import WindowPlan


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
    """What the reduction `sum` divides by."""
    device: torch.device
    settings: Settings

    @property
    def modules(self) -> nn.ModuleList:
        """The model, and the criterion where that is a module: it may have parameters as well."""
        criterion = self.criterion_loss.criterion if self.criterion_loss else None
        return nn.ModuleList([self.model] if criterion is None else [self.model, criterion])
