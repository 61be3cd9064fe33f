"""Parameters that are complex or few, and samples that are not the first tensor's first dimension."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.negative_controls.control import SOUND, Control, Ground
from experiments.negative_controls.models import FEATURES, points
from gaccum_exp.audit.result import LOSS_SCALE, NOT_ADDITIVE, UNEQUAL_DENOMINATORS


def plain_faulty(model, criterion, optimizer, loader, n=4):
    """The loss is not divided by N."""
    for i, (x, y) in enumerate(loader):
        loss = criterion(model(x), y)
        loss.backward()
        if (i + 1) % n == 0:
            optimizer.step()
            optimizer.zero_grad()


def plain_sound(model, criterion, optimizer, loader, n=4):
    """It is."""
    for i, (x, y) in enumerate(loader):
        loss = criterion(model(x), y) / n
        loss.backward()
        if (i + 1) % n == 0:
            optimizer.step()
            optimizer.zero_grad()


class Spectral(nn.Module):
    """A layer of a Fourier neural operator: complex weights of frequencies."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(FEATURES // 2 + 1, dtype=torch.complex64))
        self.out = nn.Linear(FEATURES, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Map signals (batch, features) to logits (batch, classes)."""
        return self.out(torch.fft.irfft(torch.fft.rfft(x) * self.weight, n=FEATURES))


class TimeFirst(nn.Module):
    """An LSTM in torch's default layout, a class at each time."""

    def __init__(self) -> None:
        super().__init__()
        self.recurrent, self.out = nn.LSTM(FEATURES, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Map (time, batch, features) to logits (time, batch, classes)."""
        return self.out(self.recurrent(x)[0])


def series(times: int, *sizes: int) -> list[tuple[Tensor, Tensor]]:
    """Return micro-batches (times, batch, features) and labels (times, batch)."""
    draw = torch.Generator().manual_seed(8)
    return [
        (
            torch.randn(times, n, FEATURES, generator=draw),
            torch.randint(3, (times, n), generator=draw),
        )
        for n in sizes
    ]


def time_first_faulty(model, criterion, optimizer, loader, n=4):
    """The loss is not divided by N."""
    for i, (x, y) in enumerate(loader):
        loss = criterion(model(x).flatten(0, 1), y.flatten())
        loss.backward()
        if (i + 1) % n == 0:
            optimizer.step()
            optimizer.zero_grad()


def time_first_sound(model, criterion, optimizer, loader, n=4):
    """It is."""
    for i, (x, y) in enumerate(loader):
        loss = criterion(model(x).flatten(0, 1), y.flatten()) / n
        loss.backward()
        if (i + 1) % n == 0:
            optimizer.step()
            optimizer.zero_grad()


def time_first_large_batch(model: nn.Module, window: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Return the mean over all samples and times; samples are in the second dimension."""
    x, y = (torch.cat(part, 1) for part in zip(*window, strict=True))
    return F.cross_entropy(model(x).flatten(0, 1), y.flatten())


class Boxes(nn.Module):
    """A detector on lists: images of any size, and of each as many boxes as it has."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.box = nn.Conv2d(1, 4, 3, padding=1), nn.Linear(4, 4)

    def forward(self, images: list[Tensor], targets: list[dict[str, Tensor]], boxes: int) -> Tensor:
        """Return the distance of images' boxes to the predicted one, over this many boxes."""
        of = [self.box(torch.tanh(self.convolution(x[None])).mean((2, 3)))[0] for x in images]
        far = [(p - t["boxes"]).abs().sum() for p, t in zip(of, targets, strict=True)]
        return torch.stack(far).sum() / boxes


def image_lists(*counts: tuple[int, int]) -> list[tuple[list[Tensor], list[dict[str, Tensor]]]]:
    """Return micro-batches of two images with these many boxes."""
    draw = torch.Generator().manual_seed(9)
    return [
        (
            [torch.randn(1, 5 + k, 6, generator=draw) for k in pair],
            [{"boxes": torch.rand(k, 4, generator=draw)} for k in pair],
        )
        for pair in counts
    ]


def boxes_in(targets: list[dict[str, Tensor]]) -> int:
    """Return the number of boxes of some images."""
    return sum(len(target["boxes"]) for target in targets)


def lists_faulty(model, criterion, optimizer, loader, n=4):
    """A box of an empty image weighs more than one of a crowded image."""
    for i, (images, targets) in enumerate(loader):
        loss = model(images, targets, boxes_in(targets)) / n
        loss.backward()
        if (i + 1) % n == 0:
            optimizer.step()
            optimizer.zero_grad()


def lists_sound(model, criterion, optimizer, loader, n=4):
    """The window's boxes are counted first."""
    for start in range(0, len(loader), n):
        window = loader[start : start + n]
        boxes = sum(boxes_in(targets) for _, targets in window)
        for images, targets in window:
            loss = model(images, targets, boxes)
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def lists_large_batch(model: nn.Module, window: list[tuple[list[Tensor], list[dict]]]) -> Tensor:
    """Return the mean over the window's boxes."""
    images, targets = ([x for part in parts for x in part] for parts in zip(*window, strict=True))
    return model(images, targets, boxes_in(targets))


def pairs_of_numbers(*sizes: int) -> list[tuple[Tensor, Tensor]]:
    """Return micro-batches of two inputs and one target."""
    return [(x[:, :2], x[:, 2:3]) for x, _ in points(*sizes)]


def spread_out(out: Tensor, target: Tensor) -> Tensor:
    """Return squared errors less the spread of the outputs in their batch."""
    return F.mse_loss(out, target) - 0.5 * (out - out.mean(0)).square().mean()


def each_by_itself(out: Tensor, target: Tensor) -> Tensor:
    """Return squared errors less the squared outputs."""
    return F.mse_loss(out, target) - 0.5 * out.square().mean()


def of_all(loss):
    """Return the large batch's value of a loss of outputs and targets."""

    def large_batch(model: nn.Module, window: list[tuple[Tensor, Tensor]]) -> Tensor:
        x, y = (torch.cat(part) for part in zip(*window, strict=True))
        return loss(model(x), y)

    return large_batch


def three_weights() -> nn.Module:
    """Return a model with fewer weights than a window has micro-batches."""
    return nn.Linear(2, 1)


CONTROLS = (
    Control(
        slug="complex_weights",
        title="complex weights, and a loss not divided by N",
        seen="Fourier neural operators",
        ground=Ground(loader=points(*[8] * 8), model=Spectral),
        faulty=plain_faulty,
        sound=plain_sound,
        expected=LOSS_SCALE,
        remedy="not divided by N",
    ),
    Control(
        slug="time_first",
        title="samples in the second dimension, and a loss not divided by N",
        seen="nn.LSTM's default layout",
        ground=Ground(loader=series(7, *[2] * 8), model=TimeFirst, large_batch=time_first_large_batch),
        faulty=time_first_faulty,
        sound=time_first_sound,
        expected=LOSS_SCALE,
        remedy="not divided by N",
        allowed=SOUND | {"inconclusive"},
    ),
    Control(
        slug="image_lists",
        title="mean of means: lists of images with unequal numbers of boxes",
        seen="torchvision's detection models",
        ground=Ground(
            loader=image_lists((1, 2), (3, 1), (2, 5), (1, 3)),
            model=Boxes,
            criterion=None,
            large_batch=lists_large_batch,
        ),
        faulty=lists_faulty,
        sound=lists_sound,
        expected=UNEQUAL_DENOMINATORS,
    ),
    Control(
        slug="few_weights",
        title="a loss that couples samples, in a model of three weights",
        seen="regressions, calibration, learned temperatures",
        ground=Ground(
            loader=pairs_of_numbers(8, 5, 8, 3),
            model=three_weights,
            criterion=spread_out,
            large_batch=of_all(spread_out),
        ),
        mended=Ground(
            loader=pairs_of_numbers(*[8] * 4),
            model=three_weights,
            criterion=each_by_itself,
            large_batch=of_all(each_by_itself),
        ),
        faulty=plain_sound,
        sound=plain_sound,
        expected=NOT_ADDITIVE,
    ),
)
