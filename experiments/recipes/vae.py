"""Variational autoencoder: reconstruction and divergence, each a sum within a sample, a mean over them.

The noise is drawn with the sample and not in the model, so that a sample sees the same noise however its
window is split. Drawn in the model it is noise of the same law, and a comparison over N needs averages.
"""

import torch
from torch import nn

from experiments.recipes.recipe import Recipe, drawn
from gaccum_exp import accumulate_gradients
from gaccum_exp.audit.result import UNEQUAL_DENOMINATORS

SAMPLES, WIDTH, LATENT, BETA = 12, 6, 2, 0.5


class Vae(nn.Module):
    """An encoder to mean and log variance, and a decoder."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(WIDTH, 5), nn.Tanh(), nn.Linear(5, 2 * LATENT))
        self.decoder = nn.Linear(LATENT, WIDTH)

    def forward(self, x, noise):
        """Map points (batch, width) and noise (batch, latent) to reconstruction, mean, log variance."""
        mean, log_variance = self.encoder(x).chunk(2, dim=-1)
        return self.decoder(mean + noise * (0.5 * log_variance).exp()), mean, log_variance


def per_sample(model, micro_batch):
    """Return the negative evidence bound of each sample (batch,)."""
    x, noise = micro_batch
    decoded, mean, log_variance = model(x, noise)
    divergence = -0.5 * (1 + log_variance - mean.square() - log_variance.exp()).sum(-1)
    return (decoded - x).square().sum(-1) + BETA * divergence


def loss_fn(model, micro_batch):
    """Return the loss sum and the number of samples."""
    each = per_sample(model, micro_batch)
    return each.sum(), len(each)


def train_step(model, optimizer, window):
    """One mean over all samples of the window."""
    optimizer.zero_grad()
    accumulate_gradients(model, loss_fn, window)
    optimizer.step()


def compute_loss(model, micro_batch):
    """Return the mean over a micro-batch."""
    return per_sample(model, micro_batch).mean()


def first_written(model, optimizer, window):
    """A mean of means: the samples of a short micro-batch weigh more."""
    optimizer.zero_grad()
    for micro_batch in window:
        (compute_loss(model, micro_batch) / len(window)).backward()
    optimizer.step()


RECIPES = {
    "variational autoencoder": Recipe(
        build=Vae,
        batch=lambda: (torch.tanh(drawn(SAMPLES, WIDTH)), drawn(SAMPLES, LATENT, seed=1)),
        train_step=train_step,
        large_batch=compute_loss,
        first_written=first_written,
        watched=compute_loss,
        cause=UNEQUAL_DENOMINATORS,
    )
}
