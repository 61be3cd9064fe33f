"""More than one pass of the model in a micro-batch, and gradients that other passes left or took."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.negative_controls.control import Control, Ground
from experiments.negative_controls.models import FEATURES, points, views
from gaccum_exp.audit.result import LOSS_SCALE, STALE_OR_MISSING


def with_unlabelled(*sizes: int) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Return micro-batches of labelled points, and twice as many points with labels made up for them."""
    more = points(*[2 * size for size in sizes])
    return [(x, y, -u, v) for (x, y), (u, v) in zip(points(*sizes), more, strict=True)]


def two_calls_faulty(model, criterion, optimizer, loader, n=4):
    """Labelled and unlabelled samples in two calls, and neither loss divided by N."""
    for i, (x, y, u, v) in enumerate(loader):
        loss = criterion(model(x), y) + 0.5 * criterion(model(u), v)
        loss.backward()
        if (i + 1) % n == 0:
            optimizer.step()
            optimizer.zero_grad()


def two_calls_sound(model, criterion, optimizer, loader, n=4):
    """The sum of both is divided."""
    for i, (x, y, u, v) in enumerate(loader):
        loss = criterion(model(x), y) + 0.5 * criterion(model(u), v)
        loss = loss / n
        loss.backward()
        if (i + 1) % n == 0:
            optimizer.step()
            optimizer.zero_grad()


def two_backwards_faulty(model, criterion, optimizer, loader, n=4):
    """`zero_grad` before each micro-batch's second loss: the last one alone is kept."""
    for i, (x, y, u, v) in enumerate(loader):
        loss = criterion(model(x), y) / n
        loss.backward()
        optimizer.zero_grad()
        loss = 0.5 * criterion(model(u), v) / n
        loss.backward()
        if (i + 1) % n == 0:
            optimizer.step()
            optimizer.zero_grad()


def two_backwards_sound(model, criterion, optimizer, loader, n=4):
    """Each loss has its own backward pass, and `zero_grad` follows the step."""
    for i, (x, y, u, v) in enumerate(loader):
        loss = criterion(model(x), y) / n
        loss.backward()
        loss = 0.5 * criterion(model(u), v) / n
        loss.backward()
        if (i + 1) % n == 0:
            optimizer.step()
            optimizer.zero_grad()


def two_calls_large_batch(model: nn.Module, window: list[tuple[Tensor, ...]]) -> Tensor:
    """Return the mean over the labelled, and half the mean over the others."""
    x, y, u, v = (torch.cat(part) for part in zip(*window, strict=True))
    return F.cross_entropy(model(x), y) + 0.5 * F.cross_entropy(model(u), v)


def generator() -> nn.Module:
    """Return a generator of points, the same every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        return nn.Linear(FEATURES, FEATURES)


def critic() -> nn.Module:
    """Return a critic of points."""
    return nn.Sequential(nn.Linear(FEATURES, 6), nn.Tanh(), nn.Linear(6, 1))


def gan_faulty(model, criterion, optimizer, loader, n=4):
    """The generator's passes leave gradients in the critic, whose step takes them along."""
    making = generator()
    of_generator = torch.optim.SGD(making.parameters(), lr=0.1)
    for z, _ in loader:
        logits = model(making(z))
        loss = criterion(logits, torch.ones_like(logits)) / n
        loss.backward()
    for z, real in loader:
        fake, logits = model(making(z).detach()), model(real)
        loss = criterion(logits, torch.ones_like(logits)) + criterion(fake, torch.zeros_like(fake))
        loss = loss / n
        loss.backward()
    of_generator.step()
    optimizer.step()


def gan_sound(model, criterion, optimizer, loader, n=4):
    """In the generator's passes the critic is constant."""
    making = generator()
    of_generator = torch.optim.SGD(making.parameters(), lr=0.1)
    model.requires_grad_(False)
    for z, _ in loader:
        logits = model(making(z))
        loss = criterion(logits, torch.ones_like(logits)) / n
        loss.backward()
    model.requires_grad_(True)
    for z, real in loader:
        fake, logits = model(making(z).detach()), model(real)
        loss = criterion(logits, torch.ones_like(logits)) + criterion(fake, torch.zeros_like(fake))
        loss = loss / n
        loss.backward()
    of_generator.step()
    optimizer.step()


def gan_large_batch(model: nn.Module, window: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Return the critic's loss of all points and of all fakes."""
    z, real = (torch.cat(part) for part in zip(*window, strict=True))
    fake, logits = model(generator().to(z.dtype)(z).detach()), model(real)
    bce = F.binary_cross_entropy_with_logits
    return bce(logits, torch.ones_like(logits)) + bce(fake, torch.zeros_like(fake))


def first_kept_faulty(model, criterion, optimizer, loader, n=4):
    """A buffer of gradients keeps the first micro-batch's and none that come after."""
    buffer: dict[nn.Parameter, Tensor] = {}
    for i, (x, y) in enumerate(loader):
        loss = criterion(model(x), y) / n
        loss.backward()
        for p in model.parameters():
            if p not in buffer:
                buffer[p] = p.grad.clone()
            p.grad = None
        if (i + 1) % n == 0:
            for p in model.parameters():
                p.grad = buffer[p]
            optimizer.step()
            optimizer.zero_grad()
            buffer = {}


def first_kept_sound(model, criterion, optimizer, loader, n=4):
    """The buffer adds them up."""
    buffer: dict[nn.Parameter, Tensor] = {}
    for i, (x, y) in enumerate(loader):
        loss = criterion(model(x), y) / n
        loss.backward()
        for p in model.parameters():
            buffer[p] = p.grad.clone() if p not in buffer else buffer[p] + p.grad
            p.grad = None
        if (i + 1) % n == 0:
            for p in model.parameters():
                p.grad = buffer[p]
            optimizer.step()
            optimizer.zero_grad()
            buffer = {}


def among_cached(z: Tensor, others: Tensor, start: int) -> Tensor:
    """Return the contrastive loss of the window's features (window, features) as pairs of views.

    Rows from `start` on are `z`, with a graph; all others are the cached ones.
    """
    rows = torch.cat([others[:start], z, others[start + len(z) :]])
    first, second = F.normalize(rows, dim=1).chunk(2, 1)
    logits = first @ second.T / 0.5
    return F.cross_entropy(logits, torch.arange(len(logits)))


def encoder() -> nn.Module:
    """Return a model that encodes two views of a point side by side."""
    return nn.Sequential(nn.Linear(2 * FEATURES, 6), nn.Tanh(), nn.Linear(6, 8))


def cached_faulty(model, criterion, optimizer, loader, n=4):
    """The loss of the whole window, with a graph for one micro-batch, divided by N: it has no means."""
    for start in range(0, len(loader), n):
        window = [torch.cat(pair, 1) for pair in loader[start : start + n]]
        with torch.no_grad():
            features = torch.cat([model(x) for x in window])
        at = 0
        for x in window:
            loss = criterion(model(x), features, at) / n
            loss.backward()
            at += len(x)
        optimizer.step()
        optimizer.zero_grad()


def cached_sound(model, criterion, optimizer, loader, n=4):
    """Each micro-batch's part of the gradient is its own: they are added, and divided by nothing."""
    for start in range(0, len(loader), n):
        window = [torch.cat(pair, 1) for pair in loader[start : start + n]]
        with torch.no_grad():
            features = torch.cat([model(x) for x in window])
        at = 0
        for x in window:
            loss = criterion(model(x), features, at)
            loss.backward()
            at += len(x)
        optimizer.step()
        optimizer.zero_grad()


def cached_large_batch(model: nn.Module, window: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Return the contrastive loss of all features."""
    z = model(torch.cat([torch.cat(pair, 1) for pair in window]))
    return among_cached(z, z, 0)


SEMI_SUPERVISED = Ground(loader=with_unlabelled(*[4] * 8), large_batch=two_calls_large_batch)
CONTROLS = (
    Control(
        slug="two_calls",
        title="labelled and unlabelled in two calls, not divided by N",
        seen="FixMatch and its kind",
        ground=SEMI_SUPERVISED,
        faulty=two_calls_faulty,
        sound=two_calls_sound,
        expected=LOSS_SCALE,
        remedy="not divided by N",
    ),
    Control(
        slug="two_backwards",
        title="zero_grad between the two losses of a micro-batch",
        seen="beginners' loops with two losses",
        ground=SEMI_SUPERVISED,
        faulty=two_backwards_faulty,
        sound=two_backwards_sound,
        expected=STALE_OR_MISSING,
        remedy="zero_grad",
    ),
    Control(
        slug="gan_leak",
        title="the generator's passes leave gradients in the critic",
        seen="FoundationVision/OmniTokenizer#15",
        ground=Ground(
            loader=views(*[4] * 4),
            model=critic,
            criterion=nn.BCEWithLogitsLoss(),
            large_batch=gan_large_batch,
        ),
        faulty=gan_faulty,
        sound=gan_sound,
        expected=STALE_OR_MISSING,
    ),
    Control(
        slug="first_kept",
        title="a buffer keeps the first micro-batch's gradients alone",
        seen="AMD-AGI/Primus#1046",
        ground=Ground(loader=points(*[8] * 8)),
        faulty=first_kept_faulty,
        sound=first_kept_sound,
        expected=STALE_OR_MISSING,
    ),
    Control(
        slug="cached_features",
        title="a loss over the window's cached features, divided by N",
        seen="mdiephuis/SimCLR#13, GradCache by hand",
        ground=Ground(
            loader=views(*[4] * 8),
            model=encoder,
            criterion=among_cached,
            large_batch=cached_large_batch,
        ),
        faulty=cached_faulty,
        sound=cached_sound,
        expected=LOSS_SCALE,
        allowed=frozenset({"identical", "equivalent", "inconclusive"}),
    ),
)
