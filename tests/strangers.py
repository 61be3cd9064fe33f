"""A stranger's package: a model and data sets that know nothing of gaccum_exp."""

import random
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset


class Net(nn.Module):
    """A float64 classifier of points in the plane."""

    def __init__(self, hidden: int = 6, dropout: float = 0.0) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(2, hidden), nn.Tanh(), nn.Dropout(dropout), nn.Linear(hidden, 3)
        ).double()

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 2) -> logits (batch, 3)."""
        return self.layers(x)


class Points(Dataset[tuple[Tensor, int]]):
    """Points in the plane with a label; `noise` is drawn anew at every fetch, as augmentation is."""

    def __init__(self, samples: int = 24, seed: int = 0, noise: float = 0.0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.x = torch.randn(samples, 2, generator=generator, dtype=torch.float64)
        self.y = torch.randint(3, (samples,), generator=generator).tolist()
        self.noise = noise

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.x[index] + self.noise * torch.randn(2, dtype=torch.float64), self.y[index]


class Ignored(Points):
    """Labels of which every second one is -100: they do not count."""

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        x, y = super().__getitem__(index)
        return x, -100 if index % 2 else y


class OnceIgnored(Points):
    """Labels of which a single one, the last sample's, does not count."""

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        x, y = super().__getitem__(index)
        return x, -100 if index == len(self) - 1 else y


class Diverging(Net):
    """Its output becomes NaN at the fourth training pass."""

    def __init__(self) -> None:
        super().__init__()
        self.passes = 0

    def forward(self, x: Tensor) -> Tensor:
        self.passes += self.training
        return super().forward(x) * (float("nan") if self.passes >= 4 else 1.0)


class Fragile(Net):
    """Its output becomes NaN at the fourth training pass under some seeds and not under others."""

    def __init__(self) -> None:
        super().__init__()
        self.passes = 0

    def forward(self, x: Tensor) -> Tensor:
        self.passes += self.training
        first_bias = self.layers[0].bias[0]
        broken = (first_bias < 0) & torch.tensor(self.passes >= 4)
        return super().forward(x) * torch.where(broken, float("nan"), 1.0)


class Padded(Points):
    """Points as sequences of one, but for the sample 0, of two; micro-batches are padded with zeros."""

    def gather(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Indices (samples,) -> sequences (samples, 1 or 2, 2) and labels (samples,)."""
        rows = [self.x[index] for index in indices.tolist()]
        length = 2 if 0 in indices.tolist() else 1
        padded = torch.zeros(len(rows), length, 2, dtype=torch.float64)
        padded[:, 0] = torch.stack(rows)
        return padded, torch.tensor([self.y[index] for index in indices.tolist()])


class OfSequences(Net):
    """Classifies the sum of a sequence."""

    def forward(self, x: Tensor) -> Tensor:
        """(batch, length, 2) -> logits (batch, 3)."""
        return super().forward(x.sum(1))


def count_labels(model: nn.Module, micro_batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """A stranger's loss function, whose denominator is known only after the forward pass."""
    x, y = micro_batch
    loss = nn.functional.cross_entropy(model(x), y, reduction="sum")
    return loss, (y != -100).sum()


class Frozen(Net):
    """A pretrained part that is not trained."""

    def __init__(self) -> None:
        super().__init__()
        self.layers[0].requires_grad_(False)


@lru_cache
def ones(count: int) -> Tensor:
    """Return a tensor that is made once for all models of a process."""
    return torch.ones(count, dtype=torch.float64)


class Sharing(Net):
    """Uses a tensor that is made once, when it is built and when it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("ones", ones(3))

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 2) -> logits (batch, 3)."""
        return super().forward(x) * ones(3)


class Lazy(nn.Module):
    """Parameters that are made at the first forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.LazyLinear(5), nn.Tanh(), nn.LazyLinear(3))

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 2) -> logits (batch, 3)."""
        return self.layers(x.float())


class Embedded(nn.Module):
    """A sparse embedding, which torch's own memory tracker cannot follow."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(16, 3, sparse=True)
        self.norm = nn.BatchNorm1d(3)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 2) -> logits (batch, 3)."""
        return self.norm(self.table((x.abs() * 5).long().clamp(max=15)).sum(1))


class NumpyNoise(Net):
    """Noise from NumPy and Python, which no torch seed reaches."""

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 2) -> logits (batch, 3)."""
        return super().forward(x) + float(np.random.rand()) * random.random()


class DrawnAtOnce(Points):
    """Data drawn from the global generator when the set is made."""

    def __init__(self, samples: int = 24) -> None:
        super().__init__(samples)
        self.x = torch.randn(samples, 2, dtype=torch.float64)


class Collating(Points):
    """A data set that brings its own way of making a batch."""

    @staticmethod
    def collate_fn(samples: list[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
        """Samples -> (inputs, labels), the labels all 1."""
        return torch.stack([x for x, _ in samples]), torch.ones(len(samples), dtype=torch.long)


class Dicts(Points):
    """Samples as dictionaries."""

    def __getitem__(self, index: int) -> dict[str, object]:  # type: ignore[override]
        x, y = super().__getitem__(index)
        return {"x": x, "y": y}


def two_views(model: nn.Module, micro_batch: tuple[Tensor, Tensor]) -> tuple[Tensor, int]:
    """A loss that calls the model twice for one backward pass."""
    x, _ = micro_batch
    return (model(x) - model(x + 1)).square().sum(), len(x)


class OwnCrossEntropy(nn.Module):
    """A stranger's criterion, of which nothing is known but its `reduction`."""

    def __init__(self, reduction: str = "mean") -> None:
        super().__init__()
        self.reduction = reduction

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """A scalar, reduced as asked."""
        return nn.functional.cross_entropy(logits, target, reduction=self.reduction)


class Loud(nn.Module):
    """A linear classifier of points in the plane times a number, which its gradient has as a factor."""

    def __init__(self, amplitude: float = 1.0) -> None:
        super().__init__()
        self.amplitude = amplitude
        self.linear = nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 2) -> logits (batch, 3)."""
        return self.linear(x.to(self.linear.weight.dtype) * self.amplitude)


class Overflowing(Loud):
    """Its output becomes infinite at the fourth training pass, as one of float16 may."""

    def __init__(self, at: int = 4) -> None:
        super().__init__()
        self.at, self.passes = at, 0

    def forward(self, x: Tensor) -> Tensor:
        self.passes += self.training
        return super().forward(x) * (float("inf") if self.passes == self.at else 1.0)


def tiny_gpt2(vocab_size: int) -> nn.Module:
    """Return one of transformers' language models, which computes its own loss, without dropout."""
    from transformers import GPT2Config, GPT2LMHeadModel

    quiet = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    config = GPT2Config(vocab_size=vocab_size, n_positions=16, n_embd=8, n_layer=1, n_head=2, **quiet)
    return GPT2LMHeadModel(config)


class Spectral(nn.Module):
    """A classifier of points in the plane with complex64 weights, in float32 otherwise."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(2, 8)
        self.filter = nn.Parameter(torch.randn(5, dtype=torch.complex64))
        self.last = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 2) -> logits (batch, 3)."""
        hidden = torch.tanh(self.first(x.to(self.first.weight.dtype)))
        return self.last(torch.fft.irfft(torch.fft.rfft(hidden) * self.filter, n=8))


class Turned(nn.Module):
    """A criterion with a complex buffer: the squared difference of logits and labels, turned by i."""

    def __init__(self, reduction: str = "mean") -> None:
        super().__init__()
        self.reduction = reduction
        self.register_buffer("turn", torch.tensor(1j, dtype=torch.complex64))

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """(batch, classes), (batch,) -> 0-dim."""
        loss = ((logits[:, 0] - target) * self.turn).abs().square()
        return loss.mean() if self.reduction == "mean" else loss.sum()


class TwoHeads(nn.Module):
    """Classes of points and a number beside them, by name; `p` is the dropout between."""

    def __init__(self, p: float = 0.0) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Dropout(p)).double()
        self.classes, self.number = nn.Linear(6, 3).double(), nn.Linear(6, 1).double()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """(batch, 2) -> logits (batch, 3) and numbers (batch,)."""
        hidden = self.trunk(x)
        return {"classes": self.classes(hidden), "number": self.number(hidden).squeeze(1)}


class Labelled(Dataset[tuple[Tensor, dict[str, Tensor]]]):
    """Points with two targets by name, of which every so many labels one is ignored."""

    def __init__(self, samples: int = 24, seed: int = 0, every: int = 3) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.x = torch.randn(samples, 2, generator=generator, dtype=torch.float64)
        self.y = torch.randint(3, (samples,), generator=generator)
        self.y[every - 1 :: every] = -100
        self.numbers = torch.randn(samples, generator=generator, dtype=torch.float64)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        return self.x[index], {"label": self.y[index], "number": self.numbers[index]}


def expert_balance(model: nn.Module, micro_batch: tuple[Tensor, dict[str, Tensor]]) -> dict[str, tuple]:
    """Cross entropy, and a balance of the classes over the window; nothing is counted beforehand."""
    x, target = micro_batch
    logits = model(x)["classes"]
    p = logits.softmax(1)
    loss = nn.functional.cross_entropy(logits, target["label"], reduction="sum")
    return {
        "class": (loss, (target["label"] != -100).sum()),
        "balance/of classes": (p.sum(0), len(x), 0.5, lambda means: means.square().sum()),
    }
