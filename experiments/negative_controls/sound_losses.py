"""Sound loops that differ in the model, in the loss and in how the window is made."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.negative_controls.control import Control, Ground, mean_cross_entropy
from experiments.negative_controls.models import Tied, WithLoss, points, sentences, views

EQUAL = points(*[8] * 8)


def plain(model, criterion, optimizer, loader, n=4):
    """The seed's second loop: each mean loss divided by N."""
    for i, (x, y) in enumerate(loader):
        loss = criterion(model(x), y) / n
        loss.backward()
        if (i + 1) % n == 0:
            optimizer.step()
            optimizer.zero_grad()


def undivided_sum(model, criterion, optimizer, loader, n=4):
    """The seed's third loop: sum losses, divided by nothing."""
    for i, (x, y) in enumerate(loader):
        loss = criterion(model(x), y)
        loss.backward()
        if (i + 1) % n == 0:
            optimizer.step()
            optimizer.zero_grad()


def autocast_bf16(model, criterion, optimizer, loader, n=4):
    """Forward in bfloat16, weights and gradients in float32."""
    for i, (x, y) in enumerate(loader):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = criterion(model(x), y) / n
        loss.backward()
        if (i + 1) % n == 0:
            optimizer.step()
            optimizer.zero_grad()


def functional_loss(model, criterion, optimizer, loader, n=4):
    """The loss is a function, called by its name."""
    for i, (x, y) in enumerate(loader):
        loss = F.cross_entropy(model(x), y)
        (loss / n).backward()
        if (i + 1) % n == 0:
            optimizer.step()
            optimizer.zero_grad()


def loss_in_model(model, criterion, optimizer, loader, n=4):
    """The model returns its loss, as in transformers; its inputs are named."""
    for i, (x, y) in enumerate(loader):
        outputs = model(inputs=x, labels=y)
        loss = outputs.loss / n
        loss.backward()
        if (i + 1) % n == 0:
            optimizer.step()
            optimizer.zero_grad()


def masked_mean(model, criterion, optimizer, loader, n=4):
    """Losses of single tokens, a mask, and the window's count of what it lets through."""
    for start in range(0, len(loader), n):
        window = loader[start : start + n]
        count = sum((y != -100).sum() for _, y in window)
        for x, y in window:
            per_token = criterion(model(x).flatten(0, 1), y.flatten())
            mask = (y.flatten() != -100).float()
            loss = (per_token * mask).sum() / count
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def two_views(model, criterion, optimizer, loader, n=4):
    """The model is called twice per micro-batch, and each sample has its own loss."""
    for i, (a, b) in enumerate(loader):
        loss = criterion(model(a), model(b)) / n
        loss.backward()
        if (i + 1) % n == 0:
            optimizer.step()
            optimizer.zero_grad()


def tied_tokens(model, criterion, optimizer, loader, n=4):
    """Embedding and output layer are one parameter; tokens are counted over the window."""
    for start in range(0, len(loader), n):
        window = loader[start : start + n]
        tokens = sum((y != -100).sum().item() for _, y in window)
        for x, y in window:
            loss = criterion(model(x).transpose(1, 2), y) / tokens
            loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def evaluated_inside(model, criterion, optimizer, loader, n=4):
    """An evaluation falls into the middle of a window."""
    for i, (x, y) in enumerate(loader):
        loss = criterion(model(x), y) / n
        loss.backward()
        if i % 3 == 1:
            model.eval()
            with torch.no_grad():
                print(f"evaluation: {criterion(model(loader[0][0]), loader[0][1]).item():.4f}")
            model.train()
        if (i + 1) % n == 0:
            optimizer.step()
            optimizer.zero_grad()


def counted(model, criterion, optimizer, loader, n=3):
    """N divides neither the epoch nor the samples: sums over what the window holds."""
    for start in range(0, len(loader), n):
        window = loader[start : start + n]
        total = sum(y.numel() for _, y in window)
        for x, y in window:
            (criterion(model(x), y) / total).backward()
        optimizer.step()
        optimizer.zero_grad()


def chunked(model, criterion, optimizer, loader):
    """The loader gives the large batch, and the loop cuts it."""
    for x, y in loader:
        optimizer.zero_grad()
        for x_part, y_part in zip(x.chunk(4), y.chunk(4), strict=True):
            loss = criterion(model(x_part), y_part) * (len(y_part) / len(y))
            loss.backward()
        optimizer.step()


def consistency(z1: Tensor, z2: Tensor) -> Tensor:
    """Return the mean over samples of one minus the cosine between two views (batch, features)."""
    return (1 - F.cosine_similarity(z1, z2)).mean()


def large_batch_sum(model: nn.Module, window: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Return the sum over the window's samples."""
    return mean_cross_entropy(model, window) * sum(len(y) for _, y in window)


def large_batch_in_model(model: nn.Module, window: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Return the loss that the model computes itself."""
    x, y = (torch.cat(part) for part in zip(*window, strict=True))
    return model(x, y).loss


def large_batch_of_views(model: nn.Module, window: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Return the consistency of all pairs of views."""
    a, b = (torch.cat(part) for part in zip(*window, strict=True))
    return consistency(model(a), model(b))


SEEN = "a sound style"
CONTROLS = (
    Control(slug="plain", title="the seed's second loop", seen="the seed",
            ground=Ground(loader=EQUAL), sound=plain),
    Control(slug="undivided_sum", title="the seed's third loop: sums", seen="the seed",
            ground=Ground(loader=EQUAL, criterion=nn.CrossEntropyLoss(reduction="sum"),
                          large_batch=large_batch_sum), sound=undivided_sum),
    Control(slug="autocast_bf16", title="autocast to bfloat16", seen=SEEN,
            ground=Ground(loader=EQUAL, rounding=5e-2), sound=autocast_bf16),
    Control(slug="functional_loss", title="F.cross_entropy called as a function", seen=SEEN,
            ground=Ground(loader=EQUAL, criterion=F.cross_entropy), sound=functional_loss),
    Control(slug="loss_in_model", title="the model returns its loss", seen="transformers",
            ground=Ground(loader=EQUAL, model=WithLoss, criterion=None,
                          large_batch=large_batch_in_model), sound=loss_in_model),
    Control(slug="masked_mean", title="reduction='none' and a mask", seen=SEEN,
            ground=Ground(loader=sentences(*[8] * 8), model=Tied,
                          criterion=nn.CrossEntropyLoss(reduction="none")), sound=masked_mean),
    Control(slug="two_views", title="two views, a loss per sample", seen=SEEN,
            ground=Ground(loader=views(*[8] * 8), criterion=consistency,
                          large_batch=large_batch_of_views), sound=two_views),
    Control(slug="tied_tokens", title="tied weights, tokens counted", seen=SEEN,
            ground=Ground(loader=sentences(*[8] * 8), model=Tied,
                          criterion=nn.CrossEntropyLoss(reduction="sum")), sound=tied_tokens),
    Control(slug="evaluated_inside", title="an evaluation inside the window", seen=SEEN,
            ground=Ground(loader=EQUAL), sound=evaluated_inside),
    Control(slug="counted", title="N divides nothing, samples counted", seen=SEEN,
            ground=Ground(loader=points(8, 7, 8, 5, 8, 8, 1), n=3,
                          criterion=nn.CrossEntropyLoss(reduction="sum")), sound=counted),
    Control(slug="chunked", title="the large batch cut by chunk", seen=SEEN,
            ground=Ground(loader=points(30, 32), n=1), sound=chunked),
)  # fmt: skip
