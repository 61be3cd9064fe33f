"""Two towers: the negatives of a pair are all others of the window, so its loss is taken of all outputs.

Radford et al. 2021, arXiv 2103.00020; the strategy: Gao et al. 2021, arXiv 2101.06983 (GradCache).
"""

import torch
import torch.nn.functional as F
from torch import nn

from experiments.recipes.recipe import Recipe, drawn
from gaccum_exp import accumulate_gradients
from gaccum_exp.audit.result import NOT_ADDITIVE

PAIRS, WIDTH, FEATURES = 12, 5, 4


class Towers(nn.Module):
    """An encoder of images and one of texts, and the temperature of their loss, which is learned too."""

    def __init__(self):
        super().__init__()
        self.image = nn.Sequential(nn.Linear(WIDTH, 6), nn.Tanh(), nn.Linear(6, FEATURES))
        self.text = nn.Sequential(nn.Linear(WIDTH, 6), nn.Tanh(), nn.Linear(6, FEATURES))
        self.log_scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, image, text):
        """Map images and texts (batch, width) to features (batch, features) of length 1."""
        return F.normalize(self.image(image), dim=-1), F.normalize(self.text(text), dim=-1)


def compute_loss(model, micro_batch):
    """Return the mean cross entropy of each image among all texts, and of each text among all images."""
    images, texts = model(*micro_batch)
    logits = model.log_scale.exp() * images @ texts.T
    itself = torch.arange(len(logits))
    return (F.cross_entropy(logits, itself) + F.cross_entropy(logits.T, itself)) / 2


def loss_fn(model, micro_batch):
    """Return the loss sum and the number of pairs; it is called on the window's outputs, all at once."""
    n = len(micro_batch[0])
    return compute_loss(model, micro_batch) * n, n


def train_step(model, optimizer, window):
    """Outputs without graph, the loss of all, each micro-batch again with its part of the gradient."""
    optimizer.zero_grad()
    accumulate_gradients(model, loss_fn, window, strategy="cached")
    optimizer.step()


def first_written(model, optimizer, window):
    """Each pair sees the negatives of its micro-batch: at N = 3 a third of them, an easier task."""
    optimizer.zero_grad()
    for micro_batch in window:
        (compute_loss(model, micro_batch) / len(window)).backward()
    optimizer.step()


RECIPES = {
    "two-tower contrastive": Recipe(
        build=Towers,
        batch=lambda: (drawn(PAIRS, WIDTH), drawn(PAIRS, WIDTH, seed=1)),
        train_step=train_step,
        large_batch=compute_loss,
        first_written=first_written,
        watched=compute_loss,
        cause=NOT_ADDITIVE,
        equal=True,
    )
}
