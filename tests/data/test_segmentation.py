"""A user's own images with a mask for each."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from gaccum_exp.data.segmentation import Segmentation
from gaccum_exp.errors import BadInputError

SIDE = 8


def paint(folder: Path, name: str, mask: np.ndarray, ending: str = "png") -> None:
    """Write an image of noise, and its mask."""
    for kind in ("images", "masks"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(len(name)).integers(0, 256, (*mask.shape, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "images" / f"{name}.{ending}")
    Image.fromarray(mask).save(folder / "masks" / f"{name}.png")


@pytest.fixture
def scenes(tmp_path: Path) -> Path:
    """Four images in train/, each with another number of pixels that do not count, and one in val/."""
    for number in range(4):
        mask = np.full((SIDE, SIDE), 255, dtype=np.uint8)
        mask[: 2 * number + 1] = np.arange(SIDE) % 3
        paint(tmp_path / "train", f"scene {number}", mask, ending="bmp")
    paint(tmp_path / "val", "other", np.zeros((SIDE, SIDE), dtype=np.uint8))
    return tmp_path


def read(folder: Path, **options: Any) -> Segmentation:
    chosen = {"num_classes": 3, "image_size": SIDE} | options
    return Segmentation(str(folder / "images"), str(folder / "masks"), **chosen)


def test_images_come_with_the_mask_of_their_name(scenes: Path) -> None:
    """Whatever the endings are; a pixel that does not count has torch's own label for that."""
    dataset = read(scenes / "train")
    assert len(dataset) == 4
    image, mask = dataset[1]
    assert (image.shape, image.dtype, mask.shape, mask.dtype) == (
        (3, SIDE, SIDE), torch.float32, (SIDE, SIDE), torch.int64,
    )  # fmt: skip
    assert mask[:3].tolist() == [[n % 3 for n in range(SIDE)]] * 3
    assert (mask[3:] == -100).all()
    assert dataset.classes == ["0", "1", "2"]


def test_image_and_mask_are_resized_and_flipped_alike(tmp_path: Path) -> None:
    """A square of another class stays where the image's black square is."""
    mask = np.zeros((20, 30), dtype=np.uint8)
    mask[4:12, 6:14] = 1
    paint(tmp_path, "a", mask)
    Image.fromarray(np.repeat(mask[..., None] * 255, 3, axis=2)).save(tmp_path / "images" / "a.png")
    dataset = read(tmp_path, image_size=10, augment=True)
    seen = set()
    for seed in range(8):
        torch.manual_seed(seed)
        image, labels = dataset[0]
        white = image[0] > image[0].mean()
        assert (white == labels.bool()).float().mean() > 0.95
        seen.add(labels.numpy().tobytes())
    assert len(seen) == 2


def test_palettes_are_read_by_their_index(tmp_path: Path) -> None:
    """As Pascal VOC's masks are stored."""
    mask = np.full((SIDE, SIDE), 2, dtype=np.uint8)
    paint(tmp_path, "a", mask)
    stored = Image.fromarray(mask).convert("P")
    stored.putpalette([9] * 768)
    stored.save(tmp_path / "masks" / "a.png")
    assert read(tmp_path)[0][1].unique().tolist() == [2]


def test_a_mask_that_is_not_there_is_named_both_ways(scenes: Path) -> None:
    """An image without a mask, and a mask without an image."""
    (scenes / "train" / "masks" / "scene 2.png").rename(scenes / "train" / "masks" / "scene 9.png")
    with pytest.raises(
        BadInputError, match=r"scene 2\.bmp: there is no mask in .* of the name 'scene 2'"
    ):
        read(scenes / "train")
    (scenes / "train" / "images" / "scene 2.bmp").unlink()
    with pytest.raises(
        BadInputError, match=r"scene 9\.png: there is no image in .* of the name 'scene 9'"
    ):
        read(scenes / "train")


@pytest.mark.parametrize(
    ("mask", "options", "said"),
    [
        (
            np.full((SIDE, SIDE), 7, np.uint8),
            {},
            r"a\.png: the value 7 at row 0, column 0 is none of .* 0 to 2",
        ),
        (np.full((SIDE, SIDE), 255, np.uint8), {"ignore_index": None}, "the value 255 at row 0"),
        (np.zeros((SIDE, SIDE, 3), np.uint8), {}, r"of 3 channels \(RGB\), and a mask has one value"),
        (np.zeros((SIDE, 4), np.uint8), {}, "is 4×8 pixels, and .* 8×8"),
    ],
)
def test_a_mask_that_cannot_be_one_is_named(
    tmp_path: Path, mask: np.ndarray, options: dict[str, Any], said: str
) -> None:
    """When it is read: colours, another size, values that are no class."""
    paint(tmp_path, "a", np.zeros((SIDE, SIDE), np.uint8))
    Image.fromarray(mask).save(tmp_path / "masks" / "a.png")
    with pytest.raises(BadInputError, match=said):
        read(tmp_path, **options)[0]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"num_classes": 1}, r"data\.num_classes=1 2"),
        ({"ignore_index": 2}, r"data\.ignore_index=2 is one of the classes 0 to 2 as well"),
        ({"image_size": 0}, r"data\.image_size=0"),
    ],
)
def test_values_that_mean_nothing_are_refused(scenes: Path, options: dict[str, int], said: str) -> None:
    """By their key."""
    with pytest.raises(BadInputError, match=said):
        read(scenes / "train", **options)


def test_a_folder_that_is_missing_or_empty_is_named(tmp_path: Path) -> None:
    """With the keys that set it."""
    with pytest.raises(BadInputError, match=r"does not exist .*data\.root.*data\.train\.images"):
        read(tmp_path)
    (tmp_path / "images").mkdir()
    with pytest.raises(BadInputError, match="holds no images"):
        read(tmp_path)
    paint(tmp_path, "a", np.zeros((SIDE, SIDE), np.uint8))
    Image.new("RGB", (SIDE, SIDE)).save(tmp_path / "images" / "a.jpg")
    with pytest.raises(BadInputError, match=r"a\.jpg and a\.png have the same name"):
        read(tmp_path)
    (tmp_path / "images" / "a.jpg").unlink()
    (tmp_path / "images" / "a.png").write_bytes(b"no picture")
    with pytest.raises(BadInputError, match=r"a\.png cannot be read"):
        read(tmp_path)[0]
