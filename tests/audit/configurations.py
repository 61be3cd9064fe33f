"""Random models, windows and losses: sound ones, and the same with one fault planted."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.audit.support import Fn

WIDTH, CLASSES, TOKENS = 6, 3, 9
ACTIVATIONS = (nn.ReLU, nn.Tanh, nn.GELU, nn.SiLU, nn.Softplus, nn.ELU)
NORMS: tuple[Callable[[], nn.Module], ...] = (
    lambda: nn.LayerNorm(WIDTH),
    lambda: nn.GroupNorm(2, WIDTH),
    lambda: nn.RMSNorm(WIDTH),
    lambda: nn.BatchNorm1d(WIDTH).eval(),
    lambda: nn.Dropout(0.0),
    nn.Identity,
)


@dataclass
class Configuration:
    """What `audit_window` is given."""

    name: str
    model: nn.Module
    loss_fn: Any
    window: list[Any]
    reduction: str = "global_mean"


class Net(nn.Module):
    """Blocks of one width, after a Linear or a sparse or dense embedding of one or two inputs."""

    def __init__(self, rng: random.Random, inputs: str) -> None:
        super().__init__()
        self.inputs = inputs
        sparse = rng.random() < 0.5
        self.embedding = nn.Embedding(TOKENS, WIDTH, sparse=sparse) if inputs == "tokens" else None
        self.first = nn.Linear(WIDTH, WIDTH)
        blocks: list[nn.Module] = []
        shared = nn.Linear(WIDTH, WIDTH)
        for _ in range(rng.randint(0, 3)):
            linear = shared if rng.random() < 0.3 else nn.Linear(WIDTH, WIDTH)
            blocks += [linear, rng.choice(NORMS)(), rng.choice(ACTIVATIONS)()]
        self.blocks = nn.Sequential(*blocks)
        self.last = nn.Linear(WIDTH, CLASSES)
        if rng.random() < 0.3:
            self.unused = nn.Linear(2, 2)
        if rng.random() < 0.3:
            self.first.requires_grad_(False)

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        hidden = self.embedding(x).mean(1) if self.embedding is not None else x
        if other is not None:
            hidden = hidden * torch.sigmoid(other)
        return self.last(self.blocks(self.first(hidden)))


def per_sample_loss(kind: str) -> Callable[[Tensor, Tensor], Tensor]:
    """A loss per sample, by hand."""
    if kind == "cross entropy":
        return lambda out, label: F.cross_entropy(out, label, reduction="none")
    if kind == "squares":
        return lambda out, label: (out - F.one_hot(label, CLASSES)).square().sum(1)
    return lambda out, label: F.softplus(-out.gather(1, label[:, None])[:, 0])


def called(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return model(batch["x"], batch["other"]) if "other" in batch else model(batch["x"])


def sizes_of(rng: random.Random, *, equal: bool = False, least: int = 1) -> list[int]:
    if equal:
        return [rng.randint(least, 5)] * rng.randint(2, 5)
    return [rng.randint(least, 5) for _ in range(rng.randint(2, 5))]


def batches_of(sizes: list[int], inputs: str, dtype: torch.dtype) -> list[dict[str, Tensor]]:
    batches = []
    for n in sizes:
        x = torch.randint(TOKENS, (n, 4)) if inputs == "tokens" else torch.randn(n, WIDTH, dtype=dtype)
        batch = {"x": x, "label": torch.randint(CLASSES, (n,))}
        if inputs == "two":
            batch["other"] = torch.randn(n, WIDTH, dtype=dtype)
        batches.append(batch)
    return batches


def sound(seed: int) -> Configuration:
    """A configuration whose accumulated gradient is the large batch's."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    dtype, inputs = rng.choice([torch.float32, torch.float64]), rng.choice(["one", "two", "tokens"])
    reduction = rng.choice(["global_mean", "global_mean", "sum", "mean"])
    sizes = sizes_of(rng, equal=reduction == "mean")
    model = Net(rng, inputs).to(dtype)
    kind = rng.choice(["cross entropy", "squares", "logistic", "criterion"])
    batches = batches_of(sizes, inputs, dtype)
    name = f"{kind}, {inputs}, {reduction}, {sizes}, {dtype}"
    if kind == "criterion" and inputs != "two":
        pairs = [(b["x"], b["label"]) for b in batches]
        return Configuration(name, model, nn.CrossEntropyLoss(), pairs, reduction)
    loss = per_sample_loss(kind)

    def loss_fn(model: nn.Module, batch: dict[str, Tensor]) -> Any:
        each = loss(called(model, batch), batch["label"])
        return each.sum(), len(each)

    return Configuration(name, model, loss_fn, batches, reduction)


def attend(x: Tensor) -> Tensor:
    return (x @ x.T).softmax(1) @ x


def past_mean(x: Tensor) -> Tensor:
    return x - x.cumsum(0) / torch.arange(1, len(x) + 1, dtype=x.dtype)[:, None]


class Running(nn.Module):
    """Normalises by a running mean that it updates in training."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        result = x - self.mean
        with torch.no_grad():
            self.mean.mul_(0.5).add_(0.5 * x.mean(0))
        return result


MIXERS: dict[str, Callable[[], nn.Module]] = {
    "BatchNorm": lambda: nn.BatchNorm1d(WIDTH),
    "BatchNorm without statistics": lambda: nn.BatchNorm1d(WIDTH, track_running_stats=False).eval(),
    "batch mean": lambda: Fn(lambda x: x - x.mean(0)),
    "batch softmax": lambda: Fn(lambda x: x * x.softmax(0)),
    "in-batch attention": lambda: Fn(attend),
    "batch maximum": lambda: Fn(lambda x: x / x.abs().amax(0)),
    "running mean": Running,
}
ORDERED: dict[str, Callable[[], nn.Module]] = {
    "cumsum": lambda: Fn(lambda x: x + x.cumsum(0)),
    "past mean": lambda: Fn(past_mean),
    "neighbour": lambda: Fn(lambda x: x + 0.5 * x.roll(1, 0)),
    "first of the batch": lambda: Fn(lambda x: x - 0.5 * x[:1]),
    "place in the batch": lambda: Fn(lambda x: x * torch.arange(1, len(x) + 1)[:, None]),
}
"""Whose output depends on the order of the samples as well."""


def mixing(seed: int, mixers: dict[str, Callable[[], nn.Module]] | None = None) -> Configuration:
    """A sound one with a module that mixes samples, somewhere between its blocks."""
    rng = random.Random(seed)
    base = sound(seed)
    name = rng.choice(sorted(mixers or MIXERS))
    assert isinstance(base.model, Net)
    blocks = list(base.model.blocks)
    dtype = base.model.last.weight.dtype
    mixer = (mixers or MIXERS)[name]().to(dtype)
    blocks.insert(rng.randint(0, len(blocks)), mixer)
    base.model.blocks = nn.Sequential(*blocks)
    inputs = base.model.inputs
    batches = batches_of([rng.randint(2, 5) for _ in range(rng.randint(2, 4))], inputs, dtype)
    loss = per_sample_loss("squares")

    def loss_fn(model: nn.Module, batch: dict[str, Tensor]) -> Any:
        each = loss(called(model, batch), batch["label"])
        return each.sum(), len(each)

    return Configuration(f"{name}, {base.name}", base.model, loss_fn, batches)


def infonce(z: Tensor) -> Tensor:
    z = F.normalize(z)
    return F.cross_entropy(z @ z.T / 0.5, torch.arange(len(z)), reduction="sum")


LOSSES: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, float]]] = {
    "mean over 1": lambda out, y: (F.cross_entropy(out, y), 1),
    "mean over its size": lambda out, y: (F.cross_entropy(out, y), len(y)),
    "sum over 1": lambda out, y: (F.cross_entropy(out, y, reduction="sum"), 1),
    "size minus one": lambda out, y: (F.cross_entropy(out, y, reduction="sum"), max(len(y) - 1, 1)),
    "in-batch negatives": lambda out, y: (infonce(out), len(y)),
    "variance": lambda out, y: (out.var(0).sum() * len(y), len(y)),
    "batch maximum": lambda out, y: (F.cross_entropy(out, y, reduction="none").amax() * len(y), len(y)),
}


def faulty_loss(seed: int) -> Configuration:
    """A sound model with a loss that is no sum over samples, or that counts wrongly."""
    rng = random.Random(seed)
    base = sound(seed)
    assert isinstance(base.model, Net)
    name = rng.choice(sorted(LOSSES))
    dtype = base.model.last.weight.dtype
    rest = [rng.randint(2, 5) for _ in range(rng.randint(1, 3))]
    batches = batches_of([max(rest) + 1, *rest], base.model.inputs, dtype)

    def loss_fn(model: nn.Module, batch: dict[str, Tensor]) -> Any:
        return LOSSES[name](called(model, batch), batch["label"])

    return Configuration(f"loss {name}, {base.name}", base.model, loss_fn, batches)


def unequal_mean(seed: int) -> Configuration:
    """Mean of means over micro-batches of unequal sizes."""
    rng = random.Random(seed)
    base = sound(seed)
    assert isinstance(base.model, Net)
    rest = [rng.randint(1, 4) for _ in range(rng.randint(1, 3))]
    dtype = base.model.last.weight.dtype
    batches = batches_of([max(rest) + 2, *rest], base.model.inputs, dtype)
    loss = per_sample_loss("cross entropy")

    def loss_fn(model: nn.Module, batch: dict[str, Tensor]) -> Any:
        each = loss(called(model, batch), batch["label"])
        return each.sum(), len(each)

    return Configuration(f"unequal, {base.name}", base.model, loss_fn, batches, "mean")


def faulty(seed: int) -> Configuration:
    """One of the above."""
    return (mixing, mixing, faulty_loss, unequal_mean)[seed % 4](seed)
