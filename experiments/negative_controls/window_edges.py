"""The gradients of other micro-batches reach the step, or those of the window do not."""

from experiments.negative_controls.control import Control, Ground
from experiments.negative_controls.models import points
from gaccum_exp.audit.result import STALE_OR_MISSING


def zeroed_inside_faulty(model, criterion, optimizer, loader, n=4):
    """Only the last micro-batch's gradient is left at the step."""
    for i, (x, y) in enumerate(loader):
        optimizer.zero_grad()
        loss = criterion(model(x), y) / n
        loss.backward()
        if (i + 1) % n == 0:
            optimizer.step()


def zeroed_inside_sound(model, criterion, optimizer, loader, n=4):
    """Gradients are zeroed where a window begins."""
    for i, (x, y) in enumerate(loader):
        if i % n == 0:
            optimizer.zero_grad()
        loss = criterion(model(x), y) / n
        loss.backward()
        if (i + 1) % n == 0:
            optimizer.step()


def never_zeroed_faulty(model, criterion, optimizer, loader, n=4):
    """Every window adds to all that came before."""
    for i, (x, y) in enumerate(loader):
        loss = criterion(model(x), y) / n
        loss.backward()
        if (i + 1) % n == 0:
            optimizer.step()


def never_zeroed_sound(model, criterion, optimizer, loader, n=4):
    """Gradients are zeroed after each step."""
    for i, (x, y) in enumerate(loader):
        loss = criterion(model(x), y) / n
        loss.backward()
        if (i + 1) % n == 0:
            optimizer.step()
            optimizer.zero_grad()


def leftovers_faulty(model, criterion, optimizer, loader, n=4, epochs=2):
    """The fifth micro-batch of an epoch waits for the next epoch's first window."""
    for _ in range(epochs):
        for i, (x, y) in enumerate(loader):
            loss = criterion(model(x), y) / n
            loss.backward()
            if (i + 1) % n == 0:
                optimizer.step()
                optimizer.zero_grad()


def leftovers_sound(model, criterion, optimizer, loader, n=4, epochs=2):
    """What an epoch leaves over is given up."""
    for _ in range(epochs):
        optimizer.zero_grad()
        for i, (x, y) in enumerate(loader):
            loss = criterion(model(x), y) / n
            loss.backward()
            if (i + 1) % n == 0:
                optimizer.step()
                optimizer.zero_grad()


def short_epoch_faulty(model, criterion, optimizer, loader, n=4, epochs=2):
    """An epoch of three micro-batches never comes to a step."""
    for _ in range(epochs):
        for i, (x, y) in enumerate(loader):
            loss = criterion(model(x), y) / n
            loss.backward()
            if (i + 1) % n == 0:
                optimizer.step()
                optimizer.zero_grad()


def short_epoch_sound(model, criterion, optimizer, loader, n=4, epochs=2):
    """N is no larger than the epoch."""
    n = min(n, len(loader))
    for _ in range(epochs):
        for i, (x, y) in enumerate(loader):
            loss = criterion(model(x), y) / n
            loss.backward()
            if (i + 1) % n == 0:
                optimizer.step()
                optimizer.zero_grad()


CONTROLS = (
    Control(
        slug="zeroed_inside",
        title="zero_grad inside the window",
        seen="beginners' loops",
        ground=Ground(loader=points(*[8] * 8)),
        faulty=zeroed_inside_faulty,
        sound=zeroed_inside_sound,
        expected=STALE_OR_MISSING,
        remedy="zero_grad",
    ),
    Control(
        slug="never_zeroed",
        title="zero_grad forgotten",
        seen="beginners' loops",
        ground=Ground(loader=points(*[8] * 12)),
        faulty=never_zeroed_faulty,
        sound=never_zeroed_sound,
        expected=STALE_OR_MISSING,
        remedy="zero_grad",
    ),
    Control(
        slug="leftovers",
        title="leftover gradients leak into the next epoch",
        seen="the seed's own loop",
        ground=Ground(loader=points(*[8] * 5), epochs=2, drop_partial=True),
        faulty=leftovers_faulty,
        sound=leftovers_sound,
        expected=STALE_OR_MISSING,
        remedy="zero_grad",
    ),
    Control(
        slug="short_epoch",
        title="epoch shorter than N: never a step",
        seen="the seed's own loop",
        ground=Ground(loader=points(8, 8, 8), epochs=2),
        faulty=short_epoch_faulty,
        sound=short_epoch_sound,
        expected=STALE_OR_MISSING,
    ),
)
