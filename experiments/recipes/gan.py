"""A GAN: two windows, one for each optimizer, and each accumulates its own loss.

The generator's passes run through the critic. They must leave nothing in the critic's gradients, or the
critic's next step takes it along.
"""

import torch
import torch.nn.functional as F
from torch import nn

from experiments.recipes.recipe import Recipe, drawn
from gaccum_exp import accumulate_gradients
from gaccum_exp.audit.result import STALE_OR_MISSING

SAMPLES, WIDTH, LATENT = 12, 5, 3


class Gan(nn.Module):
    """A generator and a critic."""

    def __init__(self):
        super().__init__()
        self.generator = nn.Sequential(nn.Linear(LATENT, 6), nn.Tanh(), nn.Linear(6, WIDTH))
        self.critic = nn.Sequential(nn.Linear(WIDTH, 6), nn.Tanh(), nn.Linear(6, 1))


def against(logits, real):
    """Return the sum of the logistic losses of logits (batch, 1)."""
    return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, real), reduction="sum")


def critic_loss(gan, micro_batch):
    """Return the critic's loss sum and its samples; fakes are made without graph."""
    x, z = micro_batch
    with torch.no_grad():
        fake = gan.generator(z)
    return against(gan.critic(x), 1.0) + against(gan.critic(fake), 0.0), len(x)


def generator_loss(gan, micro_batch):
    """Return the generator's loss sum and its samples."""
    _, z = micro_batch
    return against(gan.critic(gan.generator(z)), 1.0), len(z)


def train_step(gan, optimizers, window):
    """The critic's window, then the generator's, in which the critic needs no gradient."""
    optimizers["critic"].zero_grad()
    accumulate_gradients(gan, critic_loss, window)
    optimizers["critic"].step()
    gan.critic.requires_grad_(False)
    optimizers["generator"].zero_grad()
    accumulate_gradients(gan, generator_loss, window)
    optimizers["generator"].step()
    gan.critic.requires_grad_(True)


def first_written(gan, optimizers, window):
    """No `zero_grad` for the critic: its step takes along what the generator's passes left in it."""
    optimizers["generator"].zero_grad()
    for micro_batch in window:
        loss, n = generator_loss(gan, micro_batch)
        (loss / n / len(window)).backward()
    optimizers["generator"].step()
    for micro_batch in window:
        loss, n = critic_loss(gan, micro_batch)
        (loss / n / len(window)).backward()
    optimizers["critic"].step()


def optimizers(gan):
    """Return one for each of the two."""
    return {name: torch.optim.SGD(module.parameters(), lr=0.1) for name, module in gan.named_children()}


def large_batch(gan, batch):
    """Return both losses: to the critic the fakes are constant, to the generator the critic is."""
    of_critic, n = critic_loss(gan, batch)
    constant = {name: p.detach() for name, p in gan.critic.named_parameters()}
    logits = torch.func.functional_call(gan.critic, constant, (gan.generator(batch[1]),))
    return (of_critic + against(logits, 1.0)) / n


RECIPES = {
    "gan": Recipe(
        build=Gan,
        batch=lambda: (drawn(SAMPLES, WIDTH), drawn(SAMPLES, LATENT, seed=1)),
        train_step=train_step,
        large_batch=large_batch,
        first_written=first_written,
        watched=critic_loss,
        cause=STALE_OR_MISSING,
        optimizer=optimizers,
        equal=True,
    )
}
