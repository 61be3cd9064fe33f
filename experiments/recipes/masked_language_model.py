"""Masked language model: the mean over the masked tokens of the window, however they fall."""

import torch.nn.functional as F
from torch import nn

from experiments.recipes.recipe import Recipe, drawn, drawn_tokens
from gaccum_exp import accumulate_gradients
from gaccum_exp.audit.result import UNEQUAL_DENOMINATORS
from gaccum_exp.core.losses.criteria import TokenCrossEntropy

VOCABULARY, LENGTH, SAMPLES = 11, 6, 12
criterion = TokenCrossEntropy()  # its mean divides by the labels that are not -100


def train_step(model, optimizer, window):
    """The window's masked tokens are counted, and each sum is divided by their number."""
    optimizer.zero_grad()
    accumulate_gradients(model, criterion, window)
    optimizer.step()


def first_written(model, optimizer, window):
    """A micro-batch with two masked tokens weighs as much as one with twenty."""
    optimizer.zero_grad()
    for tokens, labels in window:
        loss = F.cross_entropy(model(tokens).flatten(0, 1), labels.flatten()) / len(window)
        loss.backward()
    optimizer.step()


def build():
    """Return a model from tokens (batch, length) to logits (batch, length, vocabulary)."""
    return nn.Sequential(
        nn.Embedding(VOCABULARY, 4), nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, VOCABULARY)
    )


def batch():
    """Return tokens with some masked (by token 0), and their labels, -100 where nothing is masked."""
    tokens = drawn_tokens(SAMPLES, LENGTH, most=VOCABULARY)
    masked = drawn(SAMPLES, LENGTH) > 0.5
    masked[0, 0] = True
    return tokens.masked_fill(masked, 0), tokens.masked_fill(~masked, -100)


def large_batch(model, samples):
    """Return the mean over all masked tokens."""
    tokens, labels = samples
    return F.cross_entropy(model(tokens).flatten(0, 1), labels.flatten())


RECIPES = {
    "masked language model": Recipe(
        build=build,
        batch=batch,
        train_step=train_step,
        large_batch=large_batch,
        first_written=first_written,
        cause=UNEQUAL_DENOMINATORS,
        equal=True,
    )
}
