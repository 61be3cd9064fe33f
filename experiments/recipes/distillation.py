"""Distillation: the distance to a teacher (`batchmean`: per sample), and the loss of the labels."""

import torch
import torch.nn.functional as F
from torch import nn

from experiments.recipes.recipe import Recipe, drawn, drawn_tokens, sgd
from gaccum_exp import accumulate_gradients
from gaccum_exp.audit.result import LOSS_SCALE

SAMPLES, CLASSES, TEMPERATURE, ALPHA = 12, 3, 2.0, 0.7


class Distilled(nn.Module):
    """A student, and the teacher that it learns from, which stays as it is."""

    def __init__(self):
        super().__init__()
        self.student = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, CLASSES))
        self.teacher = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, CLASSES))
        self.teacher.requires_grad_(False)

    def forward(self, x):
        """Map points (batch, 5) to the logits of both."""
        with torch.no_grad():
            taught = self.teacher(x)
        return self.student(x), taught


def losses(model, micro_batch, reduction):
    """Return the weighted loss: both parts are per sample, so they have one denominator."""
    x, labels = micro_batch
    student, taught = model(x)
    soft = F.kl_div(
        (student / TEMPERATURE).log_softmax(-1),
        (taught / TEMPERATURE).softmax(-1),
        reduction="sum" if reduction == "sum" else "batchmean",
    )
    hard = F.cross_entropy(student, labels, reduction=reduction)
    return ALPHA * TEMPERATURE**2 * soft + (1 - ALPHA) * hard


def loss_fn(model, micro_batch):
    """Return the loss sum and its samples. A `mean` of kl_div would divide by classes as well."""
    return losses(model, micro_batch, "sum"), len(micro_batch[1])


def train_step(model, optimizer, window):
    """Sums over the samples of the window."""
    optimizer.zero_grad()
    accumulate_gradients(model, loss_fn, window)
    optimizer.step()


def compute_loss(model, micro_batch):
    """Return the loss as it stands in a loop without accumulation."""
    return losses(model, micro_batch, "mean")


def first_written(model, optimizer, window):
    """The loss of the loop without accumulation, N times: a learning rate N times too large."""
    optimizer.zero_grad()
    for micro_batch in window:
        compute_loss(model, micro_batch).backward()
    optimizer.step()


RECIPES = {
    "distillation": Recipe(
        build=Distilled,
        batch=lambda: (drawn(SAMPLES, 5), drawn_tokens(SAMPLES, most=CLASSES)),
        train_step=train_step,
        large_batch=compute_loss,
        first_written=first_written,
        watched=compute_loss,
        cause=LOSS_SCALE,
        optimizer=sgd,
        equal=True,
    )
}
