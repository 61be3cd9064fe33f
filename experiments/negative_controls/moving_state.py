"""A state beside the weights moves in every micro-batch, and the loss or the model reads it."""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.negative_controls.control import Control, Ground
from experiments.negative_controls.models import CLASSES, mlp, points, views
from gaccum_exp.audit.result import MOVING_STATE


def taught(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the cross entropy of the student's distribution to the teacher's."""
    return -(teacher.softmax(-1) * student.log_softmax(-1)).sum(-1).mean()


def teacher_of(model: nn.Module) -> nn.Module:
    """Return a teacher as it may be after some training: not quite the student."""
    teacher = copy.deepcopy(model).requires_grad_(False)
    for p in teacher.parameters():
        p.mul_(2)
    return teacher


def teacher_faulty(model, criterion, optimizer, loader, n=4):
    """The teacher follows in every micro-batch: later ones are taught by another."""
    teacher = teacher_of(model)
    for i, (a, b) in enumerate(loader):
        loss = criterion(model(a), teacher(b)) / n
        loss.backward()
        with torch.no_grad():
            for old, new in zip(teacher.parameters(), model.parameters(), strict=True):
                old.lerp_(new, 0.5)
        if (i + 1) % n == 0:
            optimizer.step()
            optimizer.zero_grad()


def teacher_sound(model, criterion, optimizer, loader, n=4):
    """The teacher follows after the step."""
    teacher = teacher_of(model)
    for i, (a, b) in enumerate(loader):
        loss = criterion(model(a), teacher(b)) / n
        loss.backward()
        if (i + 1) % n == 0:
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():
                for old, new in zip(teacher.parameters(), model.parameters(), strict=True):
                    old.lerp_(new, 0.5)


def teacher_large_batch(model: nn.Module, window: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Return the loss of all samples under the teacher of the window's start."""
    a, b = (torch.cat(part) for part in zip(*window, strict=True))
    return taught(model(a), teacher_of(model)(b))


class Centred(nn.Module):
    """A loss of targets less their running centre, as in DINO."""

    def __init__(self, every_pass: bool) -> None:
        super().__init__()
        self.every_pass = every_pass
        self.register_buffer("center", torch.zeros(CLASSES))

    def forward(self, out: Tensor, target: Tensor) -> Tensor:
        """Map logits and targets (batch, classes) to the loss, 0-dim."""
        loss = -(((target - self.center) / 0.5).softmax(-1) * out.log_softmax(-1)).sum(-1).mean()
        if self.every_pass:
            self.center.lerp_(target.mean(0), 0.5)
        return loss


def distributions(*sizes: int) -> list[tuple[Tensor, Tensor]]:
    """Return micro-batches of points and targets (batch, classes)."""
    return [(x, 2 * x[:, :CLASSES] + 1) for x, _ in points(*sizes)]


def centre_loop(model, criterion, optimizer, loader, n=4):
    """The loop is right; whether the centre waits for the step is the criterion's affair."""
    for i, (x, t) in enumerate(loader):
        loss = criterion(model(x), t) / n
        loss.backward()
        if (i + 1) % n == 0:
            optimizer.step()
            optimizer.zero_grad()


def centre_large_batch(model: nn.Module, window: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Return the loss of all samples at the centre of the window's start."""
    x, t = (torch.cat(part) for part in zip(*window, strict=True))
    return -((t / 0.5).softmax(-1) * model(x).log_softmax(-1)).sum(-1).mean()


QUEUE = torch.randn(5, CLASSES, generator=torch.Generator().manual_seed(4))
"""Keys of earlier windows."""


def queue_faulty(model, criterion, optimizer, loader, n=4):
    """Negatives are queued in every micro-batch, and the later ones already see them."""
    queue = QUEUE
    for i, (a, b) in enumerate(loader):
        with torch.no_grad():
            keys = model(b)
        loss = criterion(model(a), keys, queue) / n
        loss.backward()
        queue = torch.cat([queue, keys])[-len(QUEUE) :]
        if (i + 1) % n == 0:
            optimizer.step()
            optimizer.zero_grad()


def queue_sound(model, criterion, optimizer, loader, n=4):
    """They are queued when the window has been through."""
    queue, new = QUEUE, []
    for i, (a, b) in enumerate(loader):
        with torch.no_grad():
            keys = model(b)
        loss = criterion(model(a), keys, queue) / n
        loss.backward()
        new.append(keys)
        if (i + 1) % n == 0:
            optimizer.step()
            optimizer.zero_grad()
            queue, new = torch.cat([queue, *new])[-len(QUEUE) :], []


def against_queue(z: Tensor, keys: Tensor, queue: Tensor) -> Tensor:
    """Return the loss of each query (batch, features) with its key against the queue."""
    own = (z * keys).sum(-1, keepdim=True)
    return F.cross_entropy(torch.cat([own, z @ queue.T], 1), torch.zeros(len(z), dtype=torch.int64))


def queue_large_batch(model: nn.Module, window: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Return the loss of all samples against the queue of the window's start."""
    a, b = (torch.cat(part) for part in zip(*window, strict=True))
    return against_queue(model(a), model(b).detach(), QUEUE.to(a.dtype))


ONE_WINDOW = views(*[8] * 4)
CONTROLS = (
    Control(
        slug="teacher_moves",
        title="a teacher's moving average moves in every micro-batch",
        seen="lightly-ai/lightly-train#968",
        ground=Ground(loader=ONE_WINDOW, model=mlp, criterion=taught, large_batch=teacher_large_batch),
        faulty=teacher_faulty,
        sound=teacher_sound,
        expected=MOVING_STATE,
    ),
    Control(
        slug="centre_moves",
        title="a centre of the criterion moves in every micro-batch",
        seen="lightly-ai/lightly-train#968",
        ground=Ground(
            loader=distributions(*[8] * 4), criterion=Centred(True), large_batch=centre_large_batch
        ),
        mended=Ground(
            loader=distributions(*[8] * 4), criterion=Centred(False), large_batch=centre_large_batch
        ),
        faulty=centre_loop,
        sound=centre_loop,
        expected=MOVING_STATE,
    ),
    Control(
        slug="queue_moves",
        title="a queue of negatives takes in every micro-batch",
        seen="MoCo and its kind",
        ground=Ground(
            loader=ONE_WINDOW, model=mlp, criterion=against_queue, large_batch=queue_large_batch
        ),
        faulty=queue_faulty,
        sound=queue_sound,
        expected=MOVING_STATE,
    ),
)
