"""Losses that people write themselves: clamped counts, several terms, empty micro-batches, N inside."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.negative_controls.control import Control, Ground
from experiments.negative_controls.models import FEATURES, points
from gaccum_exp.audit.result import LOSS_SCALE, UNEQUAL_DENOMINATORS


class Focal(nn.Module):
    """A focal loss over positives and negatives, divided by the positives, if there are any."""

    def __init__(self, reduction: str = "mean") -> None:
        super().__init__()
        self.reduction = reduction

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Map logits and targets (batch, 1) to the loss, 0-dim."""
        p = logits.sigmoid()
        each = (target - p).square() * F.binary_cross_entropy_with_logits(
            logits, target, reduction="none"
        )
        return each.sum() if self.reduction == "sum" else each.sum() / target.sum().clamp(min=1)


def scorer() -> nn.Module:
    """Return a model of one logit."""
    return nn.Sequential(nn.Linear(FEATURES, 6), nn.Tanh(), nn.Linear(6, 1))


def positives(*counts: int) -> list[tuple[Tensor, Tensor]]:
    """Return micro-batches of 8 points with these many positives."""
    draw = torch.Generator().manual_seed(5)
    return [
        (torch.randn(8, FEATURES, generator=draw), (torch.arange(8) < n).float()[:, None])
        for n in counts
    ]


def clamped_faulty(model, criterion, optimizer, loader, n=4):
    """Micro-batches without a positive divide by one, the others by what they have."""
    for i, (x, y) in enumerate(loader):
        loss = criterion(model(x), y) / n
        loss.backward()
        if (i + 1) % n == 0:
            optimizer.step()
            optimizer.zero_grad()


def clamped_sound(model, criterion, optimizer, loader, n=4):
    """Sums, divided by the window's positives."""
    for start in range(0, len(loader), n):
        window = loader[start : start + n]
        found = max(1, sum(y.sum() for _, y in window))
        for x, y in window:
            loss = criterion(model(x), y) / found
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def clamped_large_batch(model: nn.Module, window: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Return the focal loss over the window's positives."""
    x, y = (torch.cat(part) for part in zip(*window, strict=True))
    return Focal()(model(x), y)


def some_ignored(*counts: int) -> list[tuple[Tensor, Tensor]]:
    """Return micro-batches of 8 points with these many labels, the others -100."""
    return [
        (x, y.masked_fill(torch.arange(8) >= kept, -100))
        for (x, y), kept in zip(points(*[8] * len(counts)), counts, strict=True)
    ]


def empty_faulty(model, criterion, optimizer, loader, n=4):
    """A micro-batch without labels is passed over, and counted among the N."""
    for i, (x, y) in enumerate(loader):
        logits = model(x)
        if (y != -100).any():
            loss = criterion(logits, y) / n
            loss.backward()
        if (i + 1) % n == 0:
            optimizer.step()
            optimizer.zero_grad()


def empty_sound(model, criterion, optimizer, loader, n=4):
    """Sums over the window's labels: one without labels adds nothing."""
    for start in range(0, len(loader), n):
        window = loader[start : start + n]
        labels = sum((y != -100).sum() for _, y in window)
        for x, y in window:
            loss = criterion(model(x), y, reduction="sum") / labels
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()


class TwoHeads(nn.Module):
    """A classifier that also predicts two numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(FEATURES, 6), nn.Tanh())
        self.classes, self.numbers = nn.Linear(6, 3), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map points (batch, features) to logits (batch, 3) and numbers (batch, 2)."""
        hidden = self.trunk(x)
        return self.classes(hidden), self.numbers(hidden)


def two_tasks(labelled: list[int], measured: list[int]) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Return micro-batches of 8 points with these many labels, and these many measurements."""
    draw = torch.Generator().manual_seed(6)
    return [
        (x, y, torch.randn(8, 2, generator=draw), (torch.arange(8) < m).float()[:, None].expand(8, 2))
        for (x, y), m in zip(some_ignored(*labelled), measured, strict=True)
    ]


def measured_loss(numbers: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Return the mean squared error of what was measured."""
    return ((numbers - target).square() * mask).sum() / mask.sum()


def task_losses(model: nn.Module, micro_batch: tuple[Tensor, ...]) -> Tensor:
    """Return the sum of two means, each over what the micro-batch has for it."""
    x, y, target, mask = micro_batch
    logits, numbers = model(x)
    return F.cross_entropy(logits, y) + 0.5 * measured_loss(numbers, target, mask)


def window_task_losses(
    model: nn.Module, micro_batch: tuple[Tensor, ...], labels: Tensor, measurements: Tensor
) -> Tensor:
    """Return the two sums, each over what the window has for it."""
    x, y, target, mask = micro_batch
    logits, numbers = model(x)
    of_numbers = ((numbers - target).square() * mask).sum()
    return F.cross_entropy(logits, y, reduction="sum") / labels + 0.5 * of_numbers / measurements


def two_terms_faulty(model, criterion, optimizer, loader, n=4):
    """Both means are means of means: neither task has the same number in every micro-batch."""
    for i, micro_batch in enumerate(loader):
        loss = criterion(model, micro_batch) / n
        loss.backward()
        if (i + 1) % n == 0:
            optimizer.step()
            optimizer.zero_grad()


def two_terms_sound(model, criterion, optimizer, loader, n=4):
    """Each task has a count of its own over the window."""
    for start in range(0, len(loader), n):
        window = loader[start : start + n]
        labels, measurements = (
            sum((y != -100).sum() for _, y, _, _ in window),
            sum(m.sum() for *_, m in window),
        )
        for micro_batch in window:
            loss = criterion(model, micro_batch, labels, measurements)
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def two_terms_large_batch(model: nn.Module, window: list[tuple[Tensor, ...]]) -> Tensor:
    """Return the sum of the two means over the window."""
    return task_losses(model, tuple(torch.cat(part) for part in zip(*window, strict=True)))


def compute_loss(model: nn.Module, batch: tuple[Tensor, Tensor], num_updates: int) -> Tensor:
    """Return a loss that is divided by N inside, as trainers ask it to be, at any number of updates."""
    x, y = batch
    return F.cross_entropy(model(x), y) / 4


def divided_inside_faulty(model, criterion, optimizer, loader, n=4):
    """The loss function divides by N, and so does the loop."""
    for i, batch in enumerate(loader):
        loss = criterion(model, batch, i) / n
        loss.backward()
        if (i + 1) % n == 0:
            optimizer.step()
            optimizer.zero_grad()


def divided_inside_sound(model, criterion, optimizer, loader, n=4):
    """The loss function divides by N; its other argument counts up, and changes nothing."""
    for i, batch in enumerate(loader):
        loss = criterion(model, batch, i)
        loss.backward()
        if (i + 1) % n == 0:
            optimizer.step()
            optimizer.zero_grad()


CONTROLS = (
    Control(
        slug="clamped_count",
        title="mean of means: a count that is clamped to one",
        seen="roboflow/rf-detr, facebookresearch/detr#299",
        ground=Ground(
            loader=positives(5, 0, 1, 0, 2, 3, 0, 1),
            model=scorer,
            criterion=Focal(),
            large_batch=clamped_large_batch,
        ),
        mended=Ground(
            loader=positives(5, 0, 1, 0, 2, 3, 0, 1),
            model=scorer,
            criterion=Focal("sum"),
            large_batch=clamped_large_batch,
        ),
        faulty=clamped_faulty,
        sound=clamped_sound,
        expected=UNEQUAL_DENOMINATORS,
        remedy="global_mean",
    ),
    Control(
        slug="empty_micro_batch",
        title="mean of means: a micro-batch without labels",
        seen="karpathy/nanochat#618, allenai/OLMo-core#657",
        ground=Ground(loader=some_ignored(8, 3, 0, 5), criterion=F.cross_entropy),
        faulty=empty_faulty,
        sound=empty_sound,
        expected=UNEQUAL_DENOMINATORS,
        remedy="global_mean",
    ),
    Control(
        slug="two_denominators",
        title="mean of means: two tasks, each with labels of its own",
        seen="datamol-io/graphium#413",
        ground=Ground(
            loader=two_tasks([8, 3, 6, 1], [1, 8, 4, 6]),
            model=TwoHeads,
            criterion=task_losses,
            large_batch=two_terms_large_batch,
        ),
        mended=Ground(
            loader=two_tasks([8, 3, 6, 1], [1, 8, 4, 6]),
            model=TwoHeads,
            criterion=window_task_losses,
            large_batch=two_terms_large_batch,
        ),
        faulty=two_terms_faulty,
        sound=two_terms_sound,
        expected=UNEQUAL_DENOMINATORS,
    ),
    Control(
        slug="divided_inside",
        title="double normalisation: divided by N inside the loss function, and outside",
        seen="roboflow/rf-detr#1503; huggingface/trl#3021",
        ground=Ground(loader=points(*[8] * 8), criterion=compute_loss),
        faulty=divided_inside_faulty,
        sound=divided_inside_sound,
        expected=LOSS_SCALE,
        remedy="twice",
    ),
)
