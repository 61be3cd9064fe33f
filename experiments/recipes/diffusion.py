"""Diffusion with a weight per sample (min-SNR): a weighted mean divides by the weights, not by samples.

Hang et al. 2023, arXiv 2303.09556. Noise and time are drawn with the sample, as in `vae`.
"""

import torch
from torch import nn

from experiments.recipes.recipe import Recipe, drawn
from gaccum_exp import accumulate_gradients
from gaccum_exp.audit.result import UNEQUAL_DENOMINATORS

SAMPLES, WIDTH, GAMMA = 12, 4, 5.0


class Denoiser(nn.Module):
    """Predicts the noise in a noisy sample at a time."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(WIDTH + 1, 6), nn.SiLU(), nn.Linear(6, WIDTH))

    def forward(self, noisy, time):
        """Map samples (batch, width) and times (batch,) to noise (batch, width)."""
        return self.net(torch.cat([noisy, time[:, None]], -1))


def weighted(model, micro_batch):
    """Return each sample's weighted loss, and its weight (batch,): min(SNR, γ) / SNR."""
    x, noise, time = micro_batch
    signal = torch.cos(time * torch.pi / 2)[:, None]
    noisy = signal * x + (1 - signal.square()).sqrt() * noise
    ratio = (signal.square() / (1 - signal.square()))[:, 0]
    weight = ratio.clamp(max=GAMMA) / ratio
    return weight * (model(noisy, time) - noise).square().mean(-1), weight


def loss_fn(model, micro_batch):
    """Return the weighted sum, and the sum of the weights."""
    losses, weight = weighted(model, micro_batch)
    return losses.sum(), weight.sum().item()


def train_step(model, optimizer, window):
    """One weighted mean over the window."""
    optimizer.zero_grad()
    accumulate_gradients(model, loss_fn, window)
    optimizer.step()


def compute_loss(model, micro_batch):
    """Return the weighted mean of a micro-batch."""
    losses, weight = weighted(model, micro_batch)
    return losses.sum() / weight.sum()


def first_written(model, optimizer, window):
    """Equal micro-batches, but their weights are not: a mean of weighted means."""
    optimizer.zero_grad()
    for micro_batch in window:
        (compute_loss(model, micro_batch) / len(window)).backward()
    optimizer.step()


def batch():
    """Return samples and noise (batch, width), and times in (0, 1)."""
    times = (torch.arange(SAMPLES, dtype=torch.float64) + 0.5) / SAMPLES
    return drawn(SAMPLES, WIDTH), drawn(SAMPLES, WIDTH, seed=1), times


RECIPES = {
    "diffusion with weights": Recipe(
        build=Denoiser,
        batch=batch,
        train_step=train_step,
        large_batch=compute_loss,
        first_written=first_written,
        watched=compute_loss,
        cause=UNEQUAL_DENOMINATORS,
        equal=True,
    )
}
