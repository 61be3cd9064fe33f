"""A user's own folder of images."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from gaccum_exp.data.imagefolder import imagefolder
from gaccum_exp.errors import BadInputError


def paint(path: Path, colour: tuple[int, int, int], size: tuple[int, int] = (40, 30)) -> None:
    """Write a PNG of one colour, with its left half black."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("RGB", size, colour)
    image.paste((0, 0, 0), (0, 0, size[0] // 2, size[1]))
    image.save(path)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """train/ has classes ant, bee and cat, val/ has no image of the middle one."""
    for index, name in enumerate(("ant", "bee", "cat")):
        for shot in range(index + 1):
            paint(tmp_path / "train" / name / f"{shot}.png", (255, 80 * index, 0))
    paint(tmp_path / "val" / "ant" / "a.png", (255, 0, 0))
    paint(tmp_path / "val" / "cat" / "c.png", (0, 0, 255))
    return tmp_path


def test_images_come_resized_and_with_their_folders_class(photos: Path) -> None:
    """Each image is (3, size, size) float32, its target the index of its folder's name."""
    dataset = imagefolder(str(photos / "train"), image_size=16)
    assert dataset.classes == ["ant", "bee", "cat"]
    assert [target for _, target in dataset] == [0, 1, 1, 2, 2, 2]
    assert {(image.shape, image.dtype) for image, _ in dataset} == {((3, 16, 16), torch.float32)}


def test_held_out_images_are_numbered_like_the_training_classes(photos: Path) -> None:
    """A class without held-out images does not shift the classes after it."""
    train = str(photos / "train")
    dataset = imagefolder(str(photos / "val"), image_size=16, classes_from=train)
    assert [target for _, target in dataset] == [0, 2]
    assert dataset.classes == ["ant", "bee", "cat"]


def test_plain_images_are_the_same_each_time_and_augmented_ones_follow_the_seed(
    photos: Path,
) -> None:
    """Without augmentation no random number is drawn; with it the seed decides the image."""
    folder = str(photos / "train")
    plain, augmented = imagefolder(folder, 16), imagefolder(folder, 16, augment=True)
    state = torch.get_rng_state()
    assert torch.equal(plain[0][0], plain[0][0])
    assert torch.equal(state, torch.get_rng_state())

    def under(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return augmented[0][0]

    assert torch.equal(under(1), under(1))
    assert len({under(seed).numpy().tobytes() for seed in range(8)}) > 1


def test_missing_folder_is_named_with_the_keys_that_set_it(tmp_path: Path) -> None:
    """The message has the path that was looked for and the keys to change."""
    with pytest.raises(BadInputError) as caught:
        imagefolder(str(tmp_path / "none" / "train"))
    message = str(caught.value)
    for word in (str(tmp_path / "none" / "train"), "data.root", "data.train.root"):
        assert word in message
    assert "\n" not in message


def test_missing_folder_of_classes_is_named(photos: Path) -> None:
    """The training folder that the held-out split refers to is checked too."""
    with pytest.raises(BadInputError, match="nowhere does not exist"):
        imagefolder(str(photos / "val"), classes_from=str(photos / "nowhere"))


def test_folder_without_class_folders_is_bad_input(tmp_path: Path) -> None:
    """Images that lie in no class's sub folder are not found, and the message says so."""
    paint(tmp_path / "loose.png", (1, 2, 3))
    with pytest.raises(BadInputError, match="has no sub folders, one per class"):
        imagefolder(str(tmp_path))


def test_class_without_images_is_bad_input(photos: Path) -> None:
    """A training class with nothing in it is named, for no sample would ever have it."""
    (photos / "train" / "bug").mkdir()
    with pytest.raises(BadInputError, match=r"holds no images in .*bug"):
        imagefolder(str(photos / "train"))


def test_held_out_folder_without_images_is_bad_input(photos: Path, tmp_path: Path) -> None:
    """Class folders with no image in any of them are an empty data set."""
    (tmp_path / "bare" / "ant").mkdir(parents=True)
    with pytest.raises(BadInputError, match="holds no images"):
        imagefolder(str(tmp_path / "bare"), classes_from=str(photos / "train"))


def test_class_that_was_not_trained_on_is_named(photos: Path) -> None:
    """A held-out class that the training folder has not cannot be numbered."""
    paint(photos / "val" / "dog" / "d.png", (9, 9, 9))
    with pytest.raises(BadInputError, match="'dog'"):
        imagefolder(str(photos / "val"), classes_from=str(photos / "train"))


def test_unreadable_image_is_named(photos: Path) -> None:
    """A file that is no image is named when it is read."""
    (photos / "train" / "ant" / "0.png").write_bytes(b"not a picture")
    dataset = imagefolder(str(photos / "train"), 16)
    with pytest.raises(BadInputError, match=r"ant/0\.png cannot be read"):
        dataset[0]


def test_image_size_below_one_is_bad_input(photos: Path) -> None:
    """A side of 0 pixels is refused with its key."""
    with pytest.raises(BadInputError, match=r"data\.image_size=0"):
        imagefolder(str(photos / "train"), image_size=0)
