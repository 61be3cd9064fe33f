"""Hold images in memory: to be fetched by index, or augmented one at a time."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset


@dataclass(frozen=True, slots=True)
class Normalisation:
    """Mean and standard deviation of each channel, of pixels scaled to 0..1."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, pixels: Tensor) -> Tensor:
        """Return float32 pixels, normalised, of uint8 pixels (..., channels, height, width)."""
        shape = (len(self.mean), 1, 1)
        scaled = pixels.to(torch.float32).div_(255)
        return scaled.sub_(torch.tensor(self.mean).view(shape)).div_(torch.tensor(self.std).view(shape))


def tensor_dataset(inputs: Tensor, targets: Tensor, classes: Sequence[str]) -> TensorDataset:
    """Return a `TensorDataset` of inputs (samples, ...) and targets (samples,) with class names."""
    dataset = TensorDataset(inputs, targets)
    # TensorDataset has no room for names, and a subclass would not be fetched by index.
    dataset.classes = list(classes)  # type: ignore[attr-defined]
    return dataset


@dataclass(eq=False, repr=False)
class AugmentedImages(Dataset[tuple[Tensor, int]]):
    """Images that go through random transforms each time that they are read."""

    images: Tensor
    """(samples, channels, height, width), uint8."""
    targets: Tensor
    """(samples,), class indices."""
    classes: list[str]
    augment: Callable[[Tensor], Tensor]
    """The random transforms, of one uint8 image (channels, height, width)."""
    normalise: Normalisation

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.normalise(self.augment(self.images[index])), int(self.targets[index])
