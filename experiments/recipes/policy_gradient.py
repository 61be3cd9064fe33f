"""Policy gradient on answers of unequal lengths, normalised by tokens or by sequences.

By tokens each token weighs the same, and the window's tokens are the denominator; by sequences each
answer does, and the window's answers are. They are different losses: count what yours divides by.
"""

from functools import partial

import torch
from torch import nn

from experiments.recipes.recipe import Recipe, drawn, drawn_tokens
from gaccum_exp import accumulate_gradients
from gaccum_exp.audit.result import UNEQUAL_DENOMINATORS

VOCABULARY, LENGTH, ANSWERS = 7, 6, 12


def build():
    """Return a policy from tokens (batch, length) to logits (batch, length, vocabulary)."""
    return nn.Sequential(nn.Embedding(VOCABULARY, 4), nn.Tanh(), nn.Linear(4, VOCABULARY))


def token_losses(model, micro_batch):
    """Return −advantage · log π of each token (batch, length), and which tokens there are."""
    tokens, lengths, advantages = micro_batch
    logp = model(tokens[:, :-1]).log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]
    mask = torch.arange(LENGTH) < lengths[:, None]
    return -advantages[:, None] * logp * mask, mask


def by_tokens(model, micro_batch):
    """Return the sum over tokens, and their number."""
    losses, mask = token_losses(model, micro_batch)
    return losses.sum(), mask.sum().item()


def by_sequences(model, micro_batch):
    """Return the sum over answers of each one's mean over its tokens, and the number of answers."""
    losses, mask = token_losses(model, micro_batch)
    return (losses.sum(-1) / mask.sum(-1)).sum(), len(losses)


def train_step(loss_fn, model, optimizer, window):
    """Divide once, by what the window counts."""
    optimizer.zero_grad()
    accumulate_gradients(model, loss_fn, window)
    optimizer.step()


def token_mean(model, micro_batch):
    """Return the masked mean of a micro-batch, as loops have it."""
    losses, mask = token_losses(model, micro_batch)
    return losses.sum() / mask.sum()


def sequence_mean(model, micro_batch):
    """Return the mean over a micro-batch's answers."""
    losses, mask = token_losses(model, micro_batch)
    return (losses.sum(-1) / mask.sum(-1)).mean()


def first_written(compute_loss, model, optimizer, window):
    """A masked mean per micro-batch: tokens of short answers weigh more than those of long ones."""
    optimizer.zero_grad()
    for micro_batch in window:
        (compute_loss(model, micro_batch) / len(window)).backward()
    optimizer.step()


def batch():
    """Return answers (batch, length + 1), their lengths and their advantages (batch,)."""
    tokens = drawn_tokens(ANSWERS, LENGTH + 1, most=VOCABULARY)
    return tokens, 1 + drawn_tokens(ANSWERS, most=LENGTH, seed=1), drawn(ANSWERS, seed=2)


RECIPES = {
    f"policy gradient by {name}": Recipe(
        build=build,
        batch=batch,
        train_step=partial(train_step, loss_fn),
        large_batch=mean,
        first_written=partial(first_written, mean),
        watched=mean,
        cause=UNEQUAL_DENOMINATORS,
        equal=name == "tokens",
    )
    for name, loss_fn, mean in (
        ("tokens", by_tokens, token_mean),
        ("sequences", by_sequences, sequence_mean),
    )
}
