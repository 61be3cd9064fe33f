"""A sample's part in the gradient depends on which others are in its micro-batch."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.negative_controls.control import SOUND, Control, Ground
from experiments.negative_controls.models import batch_norm, group_norm, points, views
from gaccum_exp.audit.result import BATCH_STATISTICS, NOT_ADDITIVE


def nt_xent(z1: Tensor, z2: Tensor, temperature: float = 0.5) -> Tensor:
    """Return SimCLR's loss of two views' embeddings (batch, features): all others are negatives."""
    z = F.normalize(torch.cat([z1, z2]), dim=1)
    itself = torch.eye(len(z), dtype=torch.bool)
    similarity = (z @ z.T / temperature).masked_fill(itself, float("-inf"))
    partner = torch.arange(len(z)).roll(len(z1))
    return F.cross_entropy(similarity, partner)


def contrastive_faulty(model, criterion, optimizer, loader, n=4):
    """Each sample sees the negatives of its micro-batch only."""
    for i, (a, b) in enumerate(loader):
        loss = criterion(model(a), model(b)) / n
        loss.backward()
        if (i + 1) % n == 0:
            optimizer.step()
            optimizer.zero_grad()


def contrastive_sound(model, criterion, optimizer, loader, n=4):
    """GradCache: the loss of all embeddings, then each micro-batch against its part of the gradient."""
    for start in range(0, len(loader), n):
        window = loader[start : start + n]
        with torch.no_grad():
            z1 = torch.cat([model(a) for a, _ in window])
            z2 = torch.cat([model(b) for _, b in window])
        loss = criterion(z1.requires_grad_(), z2.requires_grad_())
        loss.backward()
        sizes = [len(a) for a, _ in window]
        cached = zip(z1.grad.split(sizes), z2.grad.split(sizes), strict=True)
        for (a, b), gradients in zip(window, cached, strict=True):
            torch.autograd.backward([model(a), model(b)], gradients)
        optimizer.step()
        optimizer.zero_grad()


def one_pass_sound(model, criterion, optimizer, loader):
    """N = 1: every sample sees every other."""
    for a, b in loader:
        loss = criterion(model(a), model(b))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def batch_norm_faulty(model, criterion, optimizer, loader, n=4):
    """The loop is right, and the model normalises by the micro-batch's statistics."""
    for i, (x, y) in enumerate(loader):
        loss = criterion(model(x), y) / n
        loss.backward()
        if (i + 1) % n == 0:
            optimizer.step()
            optimizer.zero_grad()


def batch_norm_sound(model, criterion, optimizer, loader, n=4):
    """The same loop; the model normalises within each sample."""
    for i, (x, y) in enumerate(loader):
        loss = criterion(model(x), y) / n
        loss.backward()
        if (i + 1) % n == 0:
            optimizer.step()
            optimizer.zero_grad()


def contrastive_large_batch(model: nn.Module, window: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Return the loss with all samples of the window as negatives."""
    a, b = (torch.cat(part) for part in zip(*window, strict=True))
    return nt_xent(model(a), model(b))


CONTROLS = (
    Control(
        slug="contrastive",
        title="in-batch-negative loss accumulated as if it were a sum",
        seen="sentence-transformers#1822, mdiephuis/SimCLR#13",
        ground=Ground(loader=views(*[8] * 8), criterion=nt_xent, large_batch=contrastive_large_batch),
        faulty=contrastive_faulty,
        sound=contrastive_sound,
        expected=NOT_ADDITIVE,
        remedy="strategy=cached",
        # the loss is not called on what the model returned with a graph: that may be beyond `watch`
        allowed=SOUND | {"inconclusive"},
    ),
    Control(
        slug="contrastive_one_pass",
        title="in-batch-negative loss, N = 1",
        seen="SimCLR",
        ground=Ground(loader=views(32, 32), n=1, criterion=nt_xent, large_batch=contrastive_large_batch),
        sound=one_pass_sound,
    ),
    Control(
        slug="batch_norm",
        title="BatchNorm in the model",
        seen="open-mmlab/mmcv#1869",
        ground=Ground(loader=points(*[8] * 8), model=batch_norm),
        mended=Ground(loader=points(*[8] * 8), model=group_norm),
        faulty=batch_norm_faulty,
        sound=batch_norm_sound,
        expected=BATCH_STATISTICS,
        remedy="GroupNorm",
    ),
)
