"""LoRA on a frozen base: the adapters get the large batch's gradient, what is frozen gets none.

Hu et al. 2021, arXiv 2106.09685.
"""

import torch
import torch.nn.functional as F
from torch import nn

from experiments.recipes.recipe import Recipe, drawn, drawn_tokens
from gaccum_exp import accumulate_gradients
from gaccum_exp.audit.result import LOSS_SCALE

SAMPLES, WIDTH, CLASSES, RANK, MAX_NORM = 12, 6, 3, 2, 0.05


class Lora(nn.Module):
    """A frozen linear layer and its adapter of low rank."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.base = nn.Linear(inputs, outputs).requires_grad_(False)
        self.down = nn.Parameter(torch.randn(RANK, inputs) / inputs**0.5)
        self.up = nn.Parameter(torch.randn(outputs, RANK) / 10)

    def forward(self, x):
        """Map (batch, inputs) to (batch, outputs)."""
        return self.base(x) + x @ self.down.T @ self.up.T


def build():
    """Return a classifier of which only the adapters are trained."""
    return nn.Sequential(Lora(WIDTH, 8), nn.Tanh(), Lora(8, CLASSES))


def train_step(model, optimizer, window):
    """Clip once, when the gradient is complete."""
    optimizer.zero_grad()
    accumulate_gradients(model, nn.CrossEntropyLoss(), window)
    nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
    optimizer.step()


def first_written(model, optimizer, window):
    """Clipped after each backward pass: what was there before is cut down again and again."""
    optimizer.zero_grad()
    for x, labels in window:
        (F.cross_entropy(model(x), labels) / len(window)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
    optimizer.step()


RECIPES = {
    "lora": Recipe(
        build=build,
        batch=lambda: (drawn(SAMPLES, WIDTH), drawn_tokens(SAMPLES, most=CLASSES)),
        train_step=train_step,
        large_batch=lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]),
        before_step=lambda parameters: nn.utils.clip_grad_norm_(parameters, MAX_NORM),
        first_written=first_written,
        cause=LOSS_SCALE,
        equal=True,
    )
}
