"""Models of a few dozen weights, and the samples that they are trained on."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FEATURES, CLASSES, VOCABULARY = 8, 3, 11


def mlp() -> nn.Module:
    """Return a classifier of points."""
    return nn.Sequential(nn.Linear(FEATURES, 6), nn.Tanh(), nn.Linear(6, CLASSES))


def batch_norm() -> nn.Module:
    """Return the classifier with statistics over the batch."""
    return nn.Sequential(nn.Linear(FEATURES, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, CLASSES))


def group_norm() -> nn.Module:
    """Return the classifier with statistics within each sample."""
    return nn.Sequential(nn.Linear(FEATURES, 6), nn.GroupNorm(2, 6), nn.Tanh(), nn.Linear(6, CLASSES))


def frozen() -> nn.Module:
    """Return the classifier with a first layer that is not trained."""
    model = mlp()
    model[0].requires_grad_(False)
    return model


class Tied(nn.Module):
    """A language model of one token of context, whose output layer is its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 4)
        self.hidden = nn.Linear(4, 4)
        self.head = nn.Linear(4, VOCABULARY, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens (batch, length) to logits (batch, length, vocabulary)."""
        return self.head(torch.tanh(self.hidden(self.embedding(tokens))))


class Output(NamedTuple):
    """What a model returns that computes its loss itself."""

    loss: Tensor
    logits: Tensor


class WithLoss(nn.Module):
    """The classifier with its loss inside, as in transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()

    def forward(self, inputs: Tensor, labels: Tensor) -> Output:
        """Map points (batch, features) and classes (batch,) to loss and logits."""
        logits = self.net(inputs)
        return Output(F.cross_entropy(logits, labels), logits)


def points(*sizes: int) -> list[tuple[Tensor, Tensor]]:
    """Return micro-batches of these many points and their classes."""
    draw = torch.Generator().manual_seed(1)
    inputs = torch.randn(sum(sizes), FEATURES, generator=draw)
    target = torch.randint(CLASSES, (sum(sizes),), generator=draw)
    return list(zip(inputs.split(sizes), target.split(sizes), strict=True))


def sentences(*sizes: int, length: int = 7) -> list[tuple[Tensor, Tensor]]:
    """Return micro-batches of these many sentences and their next tokens, -100 after each one's end."""
    draw = torch.Generator().manual_seed(2)
    tokens = torch.randint(VOCABULARY, (sum(sizes), length + 1), generator=draw)
    # two kinds of text that come in runs, as in a corpus sorted by source
    short = torch.randint(1, 3, (sum(sizes),), generator=draw)
    long = torch.randint(length - 2, length + 1, (sum(sizes),), generator=draw)
    lengths = torch.where(torch.arange(sum(sizes)) // 8 % 2 == 0, short, long)
    target = tokens[:, 1:].masked_fill(torch.arange(length) >= lengths[:, None], -100)
    return list(zip(tokens[:, :-1].split(sizes), target.split(sizes), strict=True))


def views(*sizes: int) -> list[tuple[Tensor, Tensor]]:
    """Return micro-batches of these many points in two noisy views."""
    draw = torch.Generator().manual_seed(3)
    inputs = torch.randn(sum(sizes), FEATURES, generator=draw)
    noise = torch.randn(2, sum(sizes), FEATURES, generator=draw) / 5
    first, second = inputs + noise
    return list(zip(first.split(sizes), second.split(sizes), strict=True))
