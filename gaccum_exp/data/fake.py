"""Noise images of any size and number, the same every time: for memory, speed and tests."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.data import Dataset
from torchvision.datasets import FakeData
from torchvision.transforms import Compose, Normalize, ToTensor

from gaccum_exp.data.tensors import tensor_dataset
from gaccum_exp.errors import BadInputError

MOST_BYTES_IN_MEMORY = 2**30
"""Above this, images are made when they are read."""
MOST_IMAGES, MOST_VALUES, MOST_CLASSES = 2**24, 2**28, 2**20


def fake(
    size: int,
    image_size: int | Sequence[int],
    num_classes: int,
    random_offset: int = 0,
) -> Dataset[Any]:
    """Return torchvision's `FakeData` as float32 tensors, pixels within -1..1.

    Args:
        size: number of images.
        image_size: side in pixels of a square colour image, or [channels, height, width].
        num_classes: classes to draw the targets from.
        random_offset: image i is drawn from the seed `random_offset` + i; two splits that differ
            by at least their size share no image. The run's generator is left as it is.

    Raises `BadInputError` on sizes below 1 and other than 1 to 4 channels.
    """
    side = [3, image_size, image_size] if isinstance(image_size, int) else list(image_size)
    if len(side) != 3 or min(side) < 1 or side[0] > 4:
        raise BadInputError(
            f"data.image_size={image_size} must be a side in pixels or [channels,height,width] "
            "with 1 to 4 channels"
        )
    if size < 1 or num_classes < 1:
        raise BadInputError(f"data.size={size} and data.num_classes={num_classes} must be at least 1")
    values = math.prod(side)
    if values > MOST_VALUES:
        raise BadInputError(
            f"data.image_size={image_size}: {values:,} values an image, more than {MOST_VALUES:,}"
        )
    if size > MOST_IMAGES or num_classes > MOST_CLASSES:
        raise BadInputError(
            f"data.size={size} must be at most {MOST_IMAGES:,}, and data.num_classes={num_classes} "
            f"at most {MOST_CLASSES:,}"
        )
    shape = (side[0], side[1], side[2])
    transform = Compose([ToTensor(), Normalize(0.5, 0.5)])
    classes = [str(label) for label in range(num_classes)]
    images = FakeData(size, shape, num_classes, transform, random_offset=random_offset)
    if size * side[0] * side[1] * side[2] * torch.float32.itemsize > MOST_BYTES_IN_MEMORY:
        images.classes = classes
        return images  # type: ignore[no-any-return]  # torchvision has no annotations
    inputs = torch.empty(size, *shape)
    targets = torch.empty(size, dtype=torch.int64)
    for index in range(size):
        inputs[index], targets[index] = images[index]
    return tensor_dataset(inputs, targets, classes)
