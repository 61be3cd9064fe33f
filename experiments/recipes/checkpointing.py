"""Gradient checkpointing inside accumulation: blocks run again in the backward pass, to the same end.

It halves what a micro-batch holds, and N divides it: together they reach batches that neither does.
"""

import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from experiments.recipes.recipe import Recipe, drawn, drawn_tokens
from gaccum_exp import accumulate_gradients
from gaccum_exp.audit.result import UNEQUAL_DENOMINATORS

SAMPLES, WIDTH, CLASSES = 12, 6, 3


class Blocks(nn.Module):
    """A classifier whose blocks keep their inputs only."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.GELU()) for _ in range(3)
        )
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x):
        """Map points (batch, width) to logits."""
        for block in self.blocks:
            x = x + checkpoint(block, x, use_reentrant=False)
        return self.head(x)


def train_step(model, optimizer, window):
    """Nothing about it is special: the passes are the model's affair."""
    optimizer.zero_grad()
    accumulate_gradients(model, nn.CrossEntropyLoss(), window)
    optimizer.step()


def first_written(model, optimizer, window):
    """The memory saved went into larger micro-batches; what is left of the window makes a short one."""
    optimizer.zero_grad()
    for x, labels in window:
        (F.cross_entropy(model(x), labels) / len(window)).backward()
    optimizer.step()


RECIPES = {
    "gradient checkpointing": Recipe(
        build=Blocks,
        batch=lambda: (drawn(SAMPLES, WIDTH), drawn_tokens(SAMPLES, most=CLASSES)),
        train_step=train_step,
        large_batch=lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]),
        first_written=first_written,
        cause=UNEQUAL_DENOMINATORS,
    )
}
