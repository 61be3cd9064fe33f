"""Means over unequal counts are averaged as if the counts were equal."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.negative_controls.control import Control, Ground
from experiments.negative_controls.models import Tied, points, sentences
from gaccum_exp.audit.result import LOSS_SCALE, UNEQUAL_DENOMINATORS

WEIGHTS = torch.tensor([0.2, 1.0, 5.0])


def short_micro_batch_faulty(model, criterion, optimizer, loader, n=4):
    """The last micro-batch's three samples count as much as eight."""
    for i, (x, y) in enumerate(loader):
        loss = criterion(model(x), y) / n
        loss.backward()
        if (i + 1) % n == 0:
            optimizer.step()
            optimizer.zero_grad()


def short_micro_batch_sound(model, criterion, optimizer, loader, n=4):
    """Each mean counts by its share of the window's samples."""
    for start in range(0, len(loader), n):
        window = loader[start : start + n]
        samples = sum(len(y) for _, y in window)
        for x, y in window:
            loss = criterion(model(x), y) * len(y) / samples
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def variable_tokens_faulty(model, criterion, optimizer, loader, n=4):
    """A micro-batch of short sentences counts as much as one of long ones."""
    for i, (x, y) in enumerate(loader):
        logits = model(x)
        loss = criterion(logits.view(-1, logits.size(-1)), y.view(-1)) / n
        loss.backward()
        if (i + 1) % n == 0:
            optimizer.step()
            optimizer.zero_grad()


def variable_tokens_sound(model, criterion, optimizer, loader, n=4):
    """The window's tokens are counted first, and each sum divided by their number."""
    for start in range(0, len(loader), n):
        window = loader[start : start + n]
        tokens = sum((y != -100).sum() for _, y in window)
        for x, y in window:
            logits = model(x)
            loss = criterion(logits.view(-1, logits.size(-1)), y.view(-1), reduction="sum")
            loss = loss / tokens
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def class_weights_faulty(model, criterion, optimizer, loader, n=4):
    """A weighted mean divides by the summed weights, which differ from micro-batch to micro-batch."""
    for i, (x, y) in enumerate(loader):
        loss = criterion(model(x), y) / n
        loss.backward()
        if (i + 1) % n == 0:
            optimizer.step()
            optimizer.zero_grad()


def class_weights_sound(model, criterion, optimizer, loader, n=4):
    """Each weighted mean counts by its share of the window's summed weights."""
    for start in range(0, len(loader), n):
        window = loader[start : start + n]
        total = sum(criterion.weight[y].sum() for _, y in window)
        for x, y in window:
            loss = criterion(model(x), y) * criterion.weight[y].sum() / total
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def auxiliary_loss_faulty(model, criterion, optimizer, loader, n=4):
    """The auxiliary mean is added once per micro-batch: N times what was asked for."""
    for start in range(0, len(loader), n):
        window = loader[start : start + n]
        samples = sum(len(y) for _, y in window)
        for x, y in window:
            loss = criterion(model(x), y, samples)
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def loss_with_auxiliary_mean(logits, target, samples):
    """Divide the main loss by the window's samples, and the auxiliary one by the micro-batch's."""
    main = F.cross_entropy(logits, target, reduction="sum") / samples
    return main + 0.1 * logits.logsumexp(-1).pow(2).mean()


def auxiliary_loss_sound(model, criterion, optimizer, loader, n=4):
    """The loop is the same: the mended line is in the loss."""
    for start in range(0, len(loader), n):
        window = loader[start : start + n]
        samples = sum(len(y) for _, y in window)
        for x, y in window:
            loss = criterion(model(x), y, samples)
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def loss_with_auxiliary_sum(logits, target, samples):
    """Divide both losses by the window's samples."""
    main = F.cross_entropy(logits, target, reduction="sum") / samples
    return main + 0.1 * logits.logsumexp(-1).pow(2).sum() / samples


def weighted_large_batch(model: nn.Module, window: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Return the weighted mean over all samples of the window."""
    x, y = (torch.cat(part) for part in zip(*window, strict=True))
    return F.cross_entropy(model(x), y, WEIGHTS.to(x.dtype))


def auxiliary_large_batch(model: nn.Module, window: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Return the main mean and a tenth of the auxiliary mean, both over the window."""
    x, y = (torch.cat(part) for part in zip(*window, strict=True))
    logits = model(x)
    return F.cross_entropy(logits, y) + 0.1 * logits.logsumexp(-1).pow(2).mean()


CONTROLS = (
    Control(
        slug="short_micro_batch",
        title="mean of means: short last micro-batch",
        seen="accelerate, Lightning, transformers Trainer",
        ground=Ground(loader=points(8, 8, 8, 8, 8, 8, 8, 3)),
        faulty=short_micro_batch_faulty,
        sound=short_micro_batch_sound,
        expected=UNEQUAL_DENOMINATORS,
        remedy="8, 8, 8, 3",
    ),
    Control(
        slug="variable_tokens",
        title="mean of means: variable number of tokens that count",
        seen="huggingface/transformers#24725, #34191",
        ground=Ground(loader=sentences(*[8] * 8), model=Tied, criterion=F.cross_entropy),
        faulty=variable_tokens_faulty,
        sound=variable_tokens_sound,
        expected=UNEQUAL_DENOMINATORS,
        remedy="global_mean",
    ),
    Control(
        slug="class_weights",
        title="mean of means: class weights",
        seen="as huggingface/transformers#24725, with weights for tokens",
        ground=Ground(
            loader=points(*[8] * 8),
            criterion=nn.CrossEntropyLoss(weight=WEIGHTS),
            large_batch=weighted_large_batch,
        ),
        faulty=class_weights_faulty,
        sound=class_weights_sound,
        expected=UNEQUAL_DENOMINATORS,
        remedy="global_mean",
    ),
    Control(
        slug="auxiliary_loss",
        title="auxiliary loss weighted by the number of micro-batches",
        seen="NVIDIA-NeMo/Automodel#3359",
        ground=Ground(
            loader=points(*[8] * 8),
            criterion=loss_with_auxiliary_mean,
            large_batch=auxiliary_large_batch,
        ),
        mended=Ground(
            loader=points(*[8] * 8),
            criterion=loss_with_auxiliary_sum,
            large_batch=auxiliary_large_batch,
        ),
        faulty=auxiliary_loss_faulty,
        sound=auxiliary_loss_sound,
        expected=LOSS_SCALE,
    ),
)
