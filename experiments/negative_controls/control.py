"""What a control is: a loop with a fault, the same loop without it, and the ground that both run on."""

import copy
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.negative_controls import models

MicroBatch = Any
Loop = Callable[..., list[float] | None]
"""`loop(model, criterion, optimizer, loader)`; returns the loss it reports for each window, if any."""

Measure = Literal["gradient", "schedule", "memory", "reported loss"]
SOUND = frozenset({"identical", "equivalent"})


class Built(NamedTuple):
    """What a loop is called with, in its order."""

    model: nn.Module
    criterion: Any
    optimizer: torch.optim.Optimizer
    loader: list[MicroBatch]


def mean_cross_entropy(model: nn.Module, window: list[MicroBatch]) -> Tensor:
    """Return the large batch's loss: one pass over all samples, one mean over all that count."""
    inputs, target = (torch.cat(part) for part in zip(*window, strict=True))
    return F.cross_entropy(model(inputs).flatten(0, -2), target.flatten())


def sgd(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """Return plain gradient descent."""
    return torch.optim.SGD(parameters, lr=0.1)


def unchanged(parameters: list[nn.Parameter]) -> None:
    """Leave the gradients as they are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ground:
    """What a loop runs on, and what the true large batch would give there."""

    loader: list[MicroBatch]
    model: Callable[[], nn.Module] = models.mlp
    criterion: Any = field(default_factory=nn.CrossEntropyLoss)
    optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer] = sgd
    n: int = 4
    """Micro-batches of a full window."""
    epochs: int = 1
    drop_partial: bool = False
    """Whether the partial window of an epoch is given up, rather than stepped on."""
    large_batch: Callable[[nn.Module, list[MicroBatch]], Tensor] = mean_cross_entropy
    """The loss of a window in one pass."""
    before_step: Callable[[list[nn.Parameter]], None] = unchanged
    """What rightly happens to the large batch's gradient before the step, as clipping does."""
    rates: Callable[[int, int], float] = lambda step, steps: 1.0
    """The learning rate's factor at a global step, of so many in all."""
    rounding: float = 1e-5
    """How far from float64 a sound gradient may lie in the loop's precision."""

    def build(self) -> Built:
        """Return a new model, criterion and optimizer, the same every time."""
        torch.manual_seed(0)
        model, criterion = self.model(), copy.deepcopy(self.criterion)  # which may hold a state
        return Built(model, criterion, self.optimizer(model.parameters()), self.loader)

    def windows(self) -> list[list[MicroBatch]]:
        """Return the micro-batches that belong to each optimizer step."""
        starts = range(0, len(self.loader), self.n)
        epoch = [self.loader[start : start + self.n] for start in starts]
        if self.drop_partial:
            epoch = [window for window in epoch if len(window) == self.n]
        return epoch * self.epochs


@dataclass(frozen=True, slots=True, kw_only=True)
class Control:
    """A fault planted in a loop beside the loop without it; or a sound loop alone."""

    slug: str
    title: str
    seen: str
    """Where: an issue, a forum, a recipe."""
    ground: Ground
    sound: Loop
    faulty: Loop | None = None
    mended: Ground | None = None
    """The sound loop's ground, where the fault is in the model or in the criterion."""
    wrong: Measure = "gradient"
    """What the fault spoils."""
    expected: str | None = None
    """The cause, or the name of the check, that `watch` should give for the faulty loop."""
    remedy: str = ""
    """A part of the remedy or of the check's finding."""
    allowed: frozenset[str] = SOUND
    """The verdicts on the sound loop that are no accusation."""

    @property
    def sound_ground(self) -> Ground:
        """What the sound loop runs on."""
        return self.mended or self.ground


def run(loop: Loop, built: Built) -> list[float] | None:
    """Run the loop; return what it reports."""
    with warnings.catch_warnings():
        # torch's own hint at a schedule stepped per micro-batch: here it is planted
        warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step", UserWarning)
        return loop(*built)
