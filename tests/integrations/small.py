"""Small models and data for loops that other projects run."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

EQUAL, SHORT, PARTIAL = (8, 8, 8, 8, 8, 8, 8, 8), (8, 8, 8, 3), (8, 8, 8, 8, 8, 8)
"""Sizes of micro-batches; N is 4."""


def net() -> nn.Sequential:
    """Return a classifier of 6 numbers into 3 classes, always with the same weights."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.LayerNorm(16), nn.GELU(), nn.Linear(16, 3))


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    """Return an optimizer whose steps show a change in any bit of a gradient."""
    return torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.1)


def points(count: int) -> tuple[Tensor, Tensor]:
    """Return inputs (count, 6) and classes (count,)."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(64, 6, generator=generator)
    return x[:count], torch.randint(3, (64,), generator=generator)[:count]


def loader(sizes: Sequence[int]) -> "DataLoader[Any]":
    """Return micro-batches of these sizes."""
    rows = [part.tolist() for part in torch.arange(sum(sizes)).split(list(sizes))]
    return DataLoader(TensorDataset(*points(sum(sizes))), batch_sampler=rows)


class WithLoss(nn.Module):
    """Returns its loss, as models for the transformers Trainer do."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.net = net()
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.net(self.drop(x))
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def weights(model: nn.Module) -> list[Tensor]:
    """Return copies of a model's parameters."""
    return [p.detach().clone() for p in model.parameters()]


def same(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    """Whether all tensors agree bit for bit."""
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
