"""A mixture of experts: tokens are averaged, the balance of the experts is a function of the window's.

Fedus et al. 2021, arXiv 2101.03961, equation 4: experts · Σ fₑ·Pₑ, with the share fₑ of tokens that go
to an expert and its mean probability Pₑ, both over the batch.
"""

import torch
import torch.nn.functional as F
from torch import nn

from experiments.recipes.recipe import Recipe, drawn_tokens
from gaccum_exp import accumulate_gradients
from gaccum_exp.audit.result import NOT_ADDITIVE

VOCABULARY, LENGTH, SAMPLES, EXPERTS, WIDTH, OF_BALANCE = 7, 4, 12, 3, 5, 0.5


class Mixture(nn.Module):
    """A language model whose tokens each go to one expert."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.router = nn.Linear(WIDTH, EXPERTS)
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(EXPERTS))
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens):
        """Map tokens (batch, length) to logits (…, vocabulary) and the router's probabilities."""
        x = self.embedding(tokens)
        gates = self.router(x).softmax(-1)
        every = torch.stack([expert(x) for expert in self.experts], -2)
        gate, chosen = gates.max(-1, keepdim=True)
        taken = every.gather(-2, chosen[..., None].expand(*chosen.shape, WIDTH))[..., 0, :]
        return self.head(torch.tanh(x + gate * taken)), gates


def shares(gates):
    """Return the tokens that go to each expert, and the sums of their probabilities (2, experts)."""
    chosen = F.one_hot(gates.argmax(-1), EXPERTS).to(gates)
    return torch.stack([chosen.flatten(0, -2).sum(0), gates.flatten(0, -2).sum(0)])


def balance(means):
    """Return the balance term of the shares' means over tokens (2, experts)."""
    return EXPERTS * (means[0] * means[1]).sum()


def loss_fn(model, micro_batch):
    """Return the tokens' term, and the balance as a function of sums over the window."""
    tokens, labels = micro_batch
    logits, gates = model(tokens)
    of_tokens = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    return {
        "tokens": (of_tokens, (labels != -100).sum().item()),
        "balance": (shares(gates), tokens.numel(), OF_BALANCE, balance),
    }


def train_step(model, optimizer, window):
    """The balance that counts is the window's: a micro-batch may use one expert alone."""
    optimizer.zero_grad()
    accumulate_gradients(model, loss_fn, window)
    optimizer.step()


def compute_loss(model, micro_batch):
    """Return the loss as it stands in a loop without accumulation."""
    tokens, labels = micro_batch
    logits, gates = model(tokens)
    of_tokens = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    return of_tokens + OF_BALANCE * balance(shares(gates) / tokens.numel())


def first_written(model, optimizer, window):
    """Every micro-batch is balanced by itself, which forbids what specialised experts do."""
    optimizer.zero_grad()
    for micro_batch in window:
        (compute_loss(model, micro_batch) / len(window)).backward()
    optimizer.step()


RECIPES = {
    "mixture of experts": Recipe(
        build=Mixture,
        batch=lambda: tuple(drawn_tokens(SAMPLES, LENGTH, most=VOCABULARY, seed=s) for s in (0, 1)),
        train_step=train_step,
        large_batch=compute_loss,
        first_written=first_written,
        watched=compute_loss,
        cause=NOT_ADDITIVE,
        equal=True,
    )
}
