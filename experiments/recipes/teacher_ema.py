"""Student and teacher, a moving average of the student: it moves once per optimizer step.

Tarvainen & Valpola 2017, arXiv 1703.01780.
"""

import copy

import torch
from torch import nn

from experiments.recipes.recipe import Recipe, drawn
from gaccum_exp import accumulate_gradients
from gaccum_exp.audit.result import MOVING_STATE

SAMPLES, WIDTH, CLASSES, DECAY = 12, 5, 3, 0.5


class MeanTeacher(nn.Module):
    """A student and its teacher."""

    def __init__(self):
        super().__init__()
        self.student = nn.Sequential(nn.Linear(WIDTH, 6), nn.Tanh(), nn.Linear(6, CLASSES))
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        for parameter in self.teacher.parameters():  # as after some training: they are no longer equal
            parameter.mul_(1.5)

    def forward(self, weak, strong):
        """Map two views (batch, width) to the student's logits of one, the teacher's of the other."""
        with torch.no_grad():
            taught = self.teacher(weak)
        return self.student(strong), taught


def update(model):
    """Move the teacher towards the student."""
    with torch.no_grad():
        for old, new in zip(model.teacher.parameters(), model.student.parameters(), strict=True):
            old.lerp_(new, 1 - DECAY)


def compute_loss(model, micro_batch):
    """Return the mean distance of the student's distribution to the teacher's."""
    student, taught = model(*micro_batch)
    return -(taught.softmax(-1) * student.log_softmax(-1)).sum(-1).mean()


def loss_fn(model, micro_batch):
    """Return the loss sum and the samples."""
    n = len(micro_batch[0])
    return compute_loss(model, micro_batch) * n, n


def train_step(model, optimizer, window):
    """All micro-batches see one teacher; it moves when the student has."""
    optimizer.zero_grad()
    accumulate_gradients(model, loss_fn, window)
    optimizer.step()
    update(model)


def first_written(model, optimizer, window):
    """The teacher moves N times in a window: later micro-batches are taught by another one."""
    optimizer.zero_grad()
    for micro_batch in window:
        (compute_loss(model, micro_batch) / len(window)).backward()
        update(model)
    optimizer.step()


RECIPES = {
    "student and teacher": Recipe(
        build=MeanTeacher,
        batch=lambda: (drawn(SAMPLES, WIDTH), drawn(SAMPLES, WIDTH, seed=1)),
        train_step=train_step,
        large_batch=compute_loss,
        first_written=first_written,
        watched=compute_loss,
        cause=MOVING_STATE,
        equal=True,
    )
}
