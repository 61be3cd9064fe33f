"""Read the user's own images, one sub folder per class.

Both splits must number the classes alike. torchvision numbers the sub folders that it finds, so
that a class without held-out images would shift every later one; here the held-out split is given
the folder that the classes are read from.
"""

from pathlib import Path

from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import default_loader
from torchvision.transforms import (
    CenterCrop,
    Compose,
    Normalize,
    RandomHorizontalFlip,
    RandomResizedCrop,
    Resize,
    ToTensor,
)

from gaccum_exp.errors import BadInputError

# Of ImageNet, as usual for photographs.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)

# The centre crop keeps 7/8 of the shorter side: 224 of 256 pixels.
RESIZE_RATIO = 256 / 224


class _Folder(ImageFolder):  # type: ignore[misc]  # torchvision has no annotations
    def __init__(self, root: Path, transform: Compose, classes_from: Path) -> None:
        self.classes_from = classes_from
        super().__init__(str(root), transform, loader=_read, allow_empty=True)

    def find_classes(self, directory: str) -> tuple[list[str], dict[str, int]]:
        known = _sub_folders(self.classes_from)
        if not known:
            raise BadInputError(f"image folder {self.classes_from} has no sub folders, one per class")
        unknown = [name for name in _sub_folders(Path(directory)) if name not in known]
        if unknown:
            raise BadInputError(
                f"image folder {directory} has a class {unknown[0]!r} that {self.classes_from} has not"
            )
        return known, {name: index for index, name in enumerate(known)}


def imagefolder(
    root: str, image_size: int = 224, augment: bool = False, classes_from: str | None = None
) -> ImageFolder:
    """Return the images below `root`/<class>/, (3, image_size, image_size) float32, normalised.

    Args:
        root: the folder that holds one sub folder per class.
        image_size: side in pixels, after resizing the shorter side and cropping the centre.
        augment: crop a random part at a random scale and flip at random instead.
        classes_from: the folder whose sub folders number the classes; null for `root` itself.

    Raises `BadInputError` where a folder is missing or holds no image, and when an image that
    cannot be read is reached.
    """
    if image_size < 1:
        raise BadInputError(f"data.image_size={image_size} must be at least 1")
    folder = Path(root).expanduser()
    names = folder if classes_from is None else Path(classes_from).expanduser()
    for path in (folder, names):
        if not path.is_dir():
            raise BadInputError(
                f"image folder {path} does not exist (looked for {path.resolve()}): set data.root "
                "to a folder with train/ and val/ in it, or data.train.root and data.eval.root"
            )
    geometry = (
        [RandomResizedCrop(image_size), RandomHorizontalFlip()]
        if augment
        else [Resize(round(image_size * RESIZE_RATIO)), CenterCrop(image_size)]
    )
    dataset = _Folder(folder, Compose([*geometry, ToTensor(), Normalize(MEAN, STD)]), names)
    present = set(dataset.targets)
    absent = [name for index, name in enumerate(dataset.classes) if index not in present]
    # A class to train on needs images; held-out images may well be of some classes only.
    if not present or (classes_from is None and absent):
        raise BadInputError(f"image folder {folder} holds no images in {folder / absent[0]}")
    return dataset


def _sub_folders(directory: Path) -> list[str]:
    return sorted(entry.name for entry in directory.iterdir() if entry.is_dir())


def _read(path: str) -> object:
    try:
        return default_loader(path)
    except OSError as error:
        raise BadInputError(f"image {path} cannot be read: {error}") from error
