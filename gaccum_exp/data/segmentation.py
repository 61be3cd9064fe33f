"""Read the user's own images with a mask of classes for each, in two folders of the same names."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F

from gaccum_exp.data.imagefolder import MEAN, STD
from gaccum_exp.errors import BadInputError, nearest

IGNORED = -100
"""The label of a pixel that does not count: torch's own `ignore_index`."""
ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".gif")
ONE_VALUE = ("1", "L", "P", "I", "I;16")
"""Modes of an image that has one integer for a pixel; of a palette it is the index."""


class Segmentation(Dataset[tuple[Tensor, Tensor]]):
    """Images and their masks, resized alike.

    Args:
        images: folder of images, grey or in colour.
        masks: folder of masks, each of the name of its image, whatever their endings are, and of its
            size; a pixel's value is its class. Palettes are fine, colours are not.
        num_classes: the values are 0 to num_classes - 1.
        image_size: side in pixels, after resizing the shorter side and cropping the centre; images
            bilinearly, masks to the nearest pixel.
        ignore_index: the value of pixels that do not count; null: all count.
        augment: flip image and mask together, at random.

    A sample is (3, size, size) float32, normalised, and (size, size) int64, with -100 where a pixel does
    not count. Raises `BadInputError` where the folders do not fit together, and when a file that cannot
    be read, or a mask with another value, is reached.
    """

    def __init__(
        self,
        images: str,
        masks: str,
        num_classes: int,
        image_size: int = 128,
        ignore_index: int | None = 255,
        augment: bool = False,
    ) -> None:
        if image_size < 1 or num_classes < 2:
            raise BadInputError(
                f"data.image_size={image_size} must be at least 1, and data.num_classes={num_classes} 2"
            )
        if ignore_index is not None and 0 <= ignore_index < num_classes:
            raise BadInputError(
                f"data.ignore_index={ignore_index} is one of the classes 0 to {num_classes - 1} as well"
            )
        found, of_image = _by_name(images), _by_name(masks)
        _require_partners(found, of_image, f"mask in {masks}")
        _require_partners(of_image, found, f"image in {images}")
        self.classes = [str(label) for label in range(num_classes)]
        self.files = [(str(found[name]), str(of_image[name])) for name in sorted(found)]
        """Of every sample its image and its mask."""
        self._size = image_size
        self._ignored = ignore_index
        self._augment = augment

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image_file, mask_file = self.files[index]
        image, mask = _opened(image_file).convert("RGB"), _opened(mask_file)
        if mask.mode not in ONE_VALUE:
            raise BadInputError(
                f"{mask_file}: is an image of {len(mask.getbands())} channels ({mask.mode}), and a mask "
                "has one value for a pixel, its class"
            )
        if mask.size != image.size:
            raise BadInputError(
                f"{mask_file}: is {mask.size[0]}×{mask.size[1]} pixels, and {image_file} "
                f"{image.size[0]}×{image.size[1]}"
            )
        image = F.center_crop(F.resize(image, self._size), self._size)
        pixels: Tensor = F.normalize(F.to_tensor(image), MEAN, STD)
        labels = torch.from_numpy(np.asarray(mask).astype(np.int64))
        self._check(mask_file, labels)
        labels = F.resize(labels[None], self._size, InterpolationMode.NEAREST_EXACT)
        labels = F.center_crop(labels, self._size)[0]
        if self._ignored is not None:
            labels = labels.masked_fill(labels == self._ignored, IGNORED)
        if self._augment and torch.rand(()) < 0.5:
            return pixels.flip(-1), labels.flip(-1)
        return pixels, labels

    def _check(self, file: str, labels: Tensor) -> None:
        wrong = (labels < 0) | (labels >= len(self.classes))
        if self._ignored is not None:
            wrong &= labels != self._ignored
        if wrong.any():
            row, column = wrong.nonzero()[0].tolist()
            raise BadInputError(
                f"{file}: the value {labels[row, column]} at row {row}, column {column} is none of the "
                f"classes 0 to {len(self.classes) - 1}, nor data.ignore_index={self._ignored}"
            )


def _require_partners(files: Mapping[str, Path], others: Mapping[str, Path], what: str) -> None:
    missing = next((name for name in files if name not in others), None)
    if missing is not None:
        close = nearest(missing, others)
        raise BadInputError(f"{files[missing]}: there is no {what} of the name {missing!r}{close}")


def _by_name(folder: str) -> dict[str, Path]:
    """Return the images in a folder by their names without endings."""
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise BadInputError(
            f"folder {folder} does not exist (looked for {path.absolute()}): set data.root to a folder "
            "with train/images, train/masks, val/images and val/masks in it, or data.train.images, "
            "data.train.masks, …"
        )
    files: Sequence[Path] = [f for f in sorted(path.iterdir()) if f.suffix.lower() in ENDINGS]
    if not files:
        raise BadInputError(f"folder {folder} holds no images ({', '.join(ENDINGS)})")
    found: dict[str, Path] = {}
    for file in files:
        if file.stem in found:
            raise BadInputError(
                f"{found[file.stem]} and {file.name} have the same name: which is meant?"
            )
        found[file.stem] = file
    return found


def _opened(file: str) -> Image.Image:
    try:
        with Image.open(file) as image:
            image.load()
            return image
    except OSError as error:
        raise BadInputError(f"image {file} cannot be read: {error}") from error
