"""The gradient is a multiple of the large batch's."""

from torch import nn

from experiments.negative_controls.control import Control, Ground
from experiments.negative_controls.models import Tied, points, sentences
from gaccum_exp.audit.result import LOSS_SCALE


def not_divided_faulty(model, criterion, optimizer, loader, n=4):
    """Each mean loss counts in full."""
    for i, (x, y) in enumerate(loader):
        loss = criterion(model(x), y)
        loss.backward()
        if (i + 1) % n == 0:
            optimizer.step()
            optimizer.zero_grad()


def not_divided_sound(model, criterion, optimizer, loader, n=4):
    """Each mean loss counts one N-th."""
    for i, (x, y) in enumerate(loader):
        loss = criterion(model(x), y) / n
        loss.backward()
        if (i + 1) % n == 0:
            optimizer.step()
            optimizer.zero_grad()


def partial_window_faulty(model, criterion, optimizer, loader, n=4):
    """The last window holds two micro-batches and is divided by four."""
    for i, (x, y) in enumerate(loader):
        loss = criterion(model(x), y) / n
        loss.backward()
        if (i + 1) % n == 0 or i + 1 == len(loader):
            optimizer.step()
            optimizer.zero_grad()


def partial_window_sound(model, criterion, optimizer, loader, n=4):
    """Each window is divided by what it holds."""
    for i, (x, y) in enumerate(loader):
        held = min(n, len(loader) - i // n * n)
        loss = criterion(model(x), y) / held
        loss.backward()
        if (i + 1) % n == 0 or i + 1 == len(loader):
            optimizer.step()
            optimizer.zero_grad()


def short_epoch_scaled_faulty(model, criterion, optimizer, loader, n=4, epochs=2):
    """An epoch of three micro-batches steps at its end, as if it were four."""
    for _ in range(epochs):
        for i, (x, y) in enumerate(loader):
            loss = criterion(model(x), y) / n
            loss.backward()
            if (i + 1) % n == 0 or i + 1 == len(loader):
                optimizer.step()
                optimizer.zero_grad()


def short_epoch_scaled_sound(model, criterion, optimizer, loader, n=4, epochs=2):
    """N is no larger than the epoch."""
    n = min(n, len(loader))
    for _ in range(epochs):
        for i, (x, y) in enumerate(loader):
            loss = criterion(model(x), y) / n
            loss.backward()
            if (i + 1) % n == 0:
                optimizer.step()
                optimizer.zero_grad()


def divided_twice_faulty(model, criterion, optimizer, loader, n=4):
    """The loss is divided, and the gradients once more."""
    for i, (x, y) in enumerate(loader):
        loss = criterion(model(x), y) / n
        loss.backward()
        if (i + 1) % n == 0:
            for p in model.parameters():
                p.grad /= n
            optimizer.step()
            optimizer.zero_grad()


def divided_twice_sound(model, criterion, optimizer, loader, n=4):
    """Only the gradients are divided."""
    for i, (x, y) in enumerate(loader):
        loss = criterion(model(x), y)
        loss.backward()
        if (i + 1) % n == 0:
            for p in model.parameters():
                p.grad /= n
            optimizer.step()
            optimizer.zero_grad()


def tokens_and_n_faulty(model, criterion, optimizer, loader, n=4):
    """The model divides by the window's tokens, and the trainer by N again."""
    for start in range(0, len(loader), n):
        window = loader[start : start + n]
        num_items = sum((y != -100).sum() for _, y in window)
        for x, y in window:
            loss = criterion(model(x).flatten(0, 1), y.flatten()) / num_items
            loss = loss / n
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def tokens_and_n_sound(model, criterion, optimizer, loader, n=4):
    """The window's tokens are all that is divided by."""
    for start in range(0, len(loader), n):
        window = loader[start : start + n]
        num_items = sum((y != -100).sum() for _, y in window)
        for x, y in window:
            loss = criterion(model(x).flatten(0, 1), y.flatten()) / num_items
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()


CONTROLS = (
    Control(
        slug="not_divided",
        title="loss not divided by N",
        seen="axolotl-ai-cloud/axolotl#2262",
        ground=Ground(loader=points(*[8] * 8)),
        faulty=not_divided_faulty,
        sound=not_divided_sound,
        expected=LOSS_SCALE,
        remedy="not divided by N",
    ),
    Control(
        slug="partial_window",
        title="last partial window divided by the full N",
        seen="Lightning-AI/pytorch-lightning#19987, accelerate",
        ground=Ground(loader=points(*[8] * 6)),
        faulty=partial_window_faulty,
        sound=partial_window_sound,
        expected=LOSS_SCALE,
        remedy="0.5 ×",
    ),
    Control(
        slug="short_epoch_scaled",
        title="epoch shorter than N: stepped on at its end, divided by the full N",
        seen="Lightning-AI/pytorch-lightning#21808",
        ground=Ground(loader=points(8, 8, 8), epochs=2),
        faulty=short_epoch_scaled_faulty,
        sound=short_epoch_scaled_sound,
        expected=LOSS_SCALE,
        remedy="0.75",
    ),
    Control(
        slug="divided_twice",
        title="double normalisation: the loss divided by N, then the gradients",
        seen="huggingface/transformers#37766",
        ground=Ground(loader=points(*[8] * 8)),
        faulty=divided_twice_faulty,
        sound=divided_twice_sound,
        expected=LOSS_SCALE,
        remedy="0.25",
    ),
    Control(
        slug="tokens_and_n",
        title="double normalisation: the sum divided by the token count, then by N",
        seen="huggingface/transformers#35438",
        ground=Ground(
            loader=sentences(*[8] * 8), model=Tied, criterion=nn.CrossEntropyLoss(reduction="sum")
        ),
        faulty=tokens_and_n_faulty,
        sound=tokens_and_n_sound,
        expected=LOSS_SCALE,
        remedy="0.25",
    ),
)
