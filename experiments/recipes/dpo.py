"""Direct preference optimization: a loss per pair of answers, whatever their lengths.

Rafailov et al. 2023, arXiv 2305.18290, equation 7.
"""

import torch
import torch.nn.functional as F
from torch import nn

from experiments.recipes.recipe import Recipe, drawn_tokens
from gaccum_exp import accumulate_gradients
from gaccum_exp.audit.result import STALE_OR_MISSING

VOCABULARY, LENGTH, PAIRS, BETA = 7, 5, 12, 0.5


class Pairwise(nn.Module):
    """A policy, and the reference that it must not leave, which stays as it is."""

    def __init__(self):
        super().__init__()
        self.policy, self.reference = language_model(), language_model()
        self.reference.requires_grad_(False)

    def forward(self, tokens, lengths):
        """Map answers (batch, length) to their log-probabilities (batch,) under both."""
        with torch.no_grad():
            reference = answer_logp(self.reference, tokens, lengths)
        return answer_logp(self.policy, tokens, lengths), reference


def language_model():
    """Return a model from tokens (batch, length) to logits (batch, length, vocabulary)."""
    return nn.Sequential(nn.Embedding(VOCABULARY, 4), nn.Tanh(), nn.Linear(4, VOCABULARY))


def answer_logp(model, tokens, lengths):
    """Return the log-probability of each answer, its padding left out (batch,)."""
    logp = model(tokens[:, :-1]).log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]
    return (logp * (torch.arange(logp.shape[1]) < lengths[:, None])).sum(-1)


def per_pair(model, micro_batch):
    """Return the loss of each pair (batch,)."""
    chosen, rejected, lengths = micro_batch
    policy, reference = model(torch.cat([chosen, rejected]), lengths.T.flatten())
    margins = (policy - reference).view(2, -1)
    return -F.logsigmoid(BETA * (margins[0] - margins[1]))


def loss_fn(model, micro_batch):
    """Return the loss sum and the number of pairs: the tokens are no denominator here."""
    each = per_pair(model, micro_batch)
    return each.sum(), len(each)


def train_step(model, optimizer, window):
    """One mean over all pairs of the window."""
    optimizer.zero_grad()
    accumulate_gradients(model, loss_fn, window)
    optimizer.step()


def compute_loss(model, micro_batch):
    """Return the mean over a micro-batch."""
    return per_pair(model, micro_batch).mean()


def first_written(model, optimizer, window):
    """`zero_grad` where it stood before there was accumulation: the last micro-batch alone is left."""
    for micro_batch in window:
        optimizer.zero_grad()
        (compute_loss(model, micro_batch) / len(window)).backward()
    optimizer.step()


def batch():
    """Return chosen and rejected answers (pairs, length + 1) and their lengths (pairs, 2)."""
    chosen, rejected = (drawn_tokens(PAIRS, LENGTH + 1, most=VOCABULARY, seed=s) for s in (0, 1))
    return chosen, rejected, 1 + drawn_tokens(PAIRS, 2, most=LENGTH, seed=2)


RECIPES = {
    "direct preference optimization": Recipe(
        build=Pairwise,
        batch=batch,
        train_step=train_step,
        large_batch=compute_loss,
        first_written=first_written,
        watched=compute_loss,
        cause=STALE_OR_MISSING,
        equal=True,
    )
}
