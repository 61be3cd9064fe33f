"""A stranger's contrastive set-up: two towers, and a loss over all pairs with a temperature."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Towers(nn.Module):
    """Embeds a point in the plane, and its mirror image."""

    def __init__(self, dropout: float = 0.0, hidden: int = 8) -> None:
        super().__init__()
        self.one = nn.Sequential(
            nn.Linear(2, hidden), nn.Tanh(), nn.Dropout(dropout), nn.Linear(hidden, 4)
        )
        self.other = nn.Sequential(nn.Linear(2, hidden), nn.Tanh(), nn.Linear(hidden, 4))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(batch, 2) -> embeddings (batch, 4) and (batch, 4)."""
        weight: Tensor = self.one[0].weight  # type: ignore[assignment]  # of a linear layer
        x = x.to(weight.dtype)
        return self.one(x), self.other(x.flip(-1))


class Normalised(Towers):
    """The same with statistics of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.one[1] = nn.BatchNorm1d(8)


class InfoNCE(nn.Module):
    """Each embedding is to find its own partner among those of the whole window; no `reduction`."""

    def __init__(self) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.tensor(1.0))

    def forward(self, one: Tensor, other: Tensor, target: Tensor) -> Tensor:
        """(batch, 4), (batch, 4), anything -> the mean over the batch."""
        logits = F.normalize(one, dim=-1) @ F.normalize(other, dim=-1).T * self.temperature.exp()
        return F.cross_entropy(logits, torch.arange(len(one), device=one.device))


CONTRASTIVE = (
    "model=custom",
    "model._target_=tests.contrastive.Towers",
    "criterion=custom",
    "criterion._target_=tests.contrastive.InfoNCE",
    "data=custom",
    "data.train._target_=tests.strangers.Points",
    "+data.train.samples=23",
    "data.global_batch_size=10",
    "train.epochs=2",
    "runtime.device=cpu",
    "strategy=cached",
)
"""Windows of 10, 10 and 3 samples."""
