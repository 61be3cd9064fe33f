"""MNIST, Fashion-MNIST, CIFAR-10 and CIFAR-100, in torchvision's file formats.

Each function takes

* `split`: `train` or `test`;
* `root`: the folder that holds the files, relative to the working directory;
* `download`: whether to fetch them where they are absent;
* `augment`: whether each image goes through random transforms every time that it is read: a random
  crop after padding (4 pixels for CIFAR, 2 for the others), and a horizontal flip where that keeps
  the class.

and returns pixels normalised by the mean and standard deviation of the training set's channels.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.datasets import CIFAR10, CIFAR100, MNIST, FashionMNIST
from torchvision.transforms import Compose, RandomCrop, RandomHorizontalFlip

from gaccum_exp.data.download import Source, load
from gaccum_exp.data.tensors import AugmentedImages, Normalisation, tensor_dataset
from gaccum_exp.errors import BadInputError, nearest


def mnist(split: str, root: str = "data", download: bool = True, augment: bool = False) -> Dataset[Any]:
    """Return MNIST: 60,000 or 10,000 handwritten digits, (1, 28, 28), 10 classes."""
    normalise = Normalisation((0.1307,), (0.3081,))
    transform = RandomCrop(28, padding=2) if augment else None
    return _images(MNIST, split, root, download, normalise, transform)


def fashion_mnist(
    split: str, root: str = "data", download: bool = True, augment: bool = False
) -> Dataset[Any]:
    """Return Fashion-MNIST: 60,000 or 10,000 pieces of clothing, (1, 28, 28), 10 classes."""
    normalise = Normalisation((0.2860,), (0.3530,))
    transform = Compose([RandomCrop(28, padding=2), RandomHorizontalFlip()]) if augment else None
    return _images(FashionMNIST, split, root, download, normalise, transform)


def cifar10(
    split: str, root: str = "data", download: bool = True, augment: bool = False
) -> Dataset[Any]:
    """Return CIFAR-10: 50,000 or 10,000 photographs, (3, 32, 32), 10 classes."""
    normalise = Normalisation((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
    transform = Compose([RandomCrop(32, padding=4), RandomHorizontalFlip()]) if augment else None
    return _images(CIFAR10, split, root, download, normalise, transform)


def cifar100(
    split: str, root: str = "data", download: bool = True, augment: bool = False
) -> Dataset[Any]:
    """Return CIFAR-100: 50,000 or 10,000 photographs, (3, 32, 32), 100 classes."""
    normalise = Normalisation((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762))
    transform = Compose([RandomCrop(32, padding=4), RandomHorizontalFlip()]) if augment else None
    return _images(CIFAR100, split, root, download, normalise, transform)


def _images(
    source: Source,
    split: str,
    root: str,
    download: bool,
    normalise: Normalisation,
    augment: Callable[[Tensor], Tensor] | None,
) -> Dataset[Any]:
    if split not in ("train", "test"):
        raise BadInputError(
            f"{source.__name__} has no split {split!r}, only train and test"
            + nearest(split, ("train", "test"))
        )
    files = load(source, root, split == "train", download)
    targets = torch.as_tensor(files.targets, dtype=torch.int64)
    pixels = torch.as_tensor(files.data)
    # torchvision keeps grey images without a channel, and coloured ones with it at the end.
    pixels = pixels.unsqueeze(1) if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2).contiguous()
    if augment is None:
        return tensor_dataset(normalise(pixels), targets, files.classes)
    return AugmentedImages(pixels, targets, files.classes, augment, normalise)
