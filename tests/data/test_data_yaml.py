"""Every data block composes from its YAML file and loads what it says."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import get_object, instantiate
from omegaconf import DictConfig
from PIL import Image
from torch.utils.data import Dataset

CONF = Path(__file__).parents[2] / "conf"
BLOCKS = sorted(path.stem for path in (CONF / "data").glob("*.yaml"))
TORCHVISION = {
    "mnist": "MNIST",
    "fashion_mnist": "FashionMNIST",
    "cifar10": "CIFAR10",
    "cifar100": "CIFAR100",
}


def composed(block: str, *overrides: str) -> DictConfig:
    """Compose one file of the group `data` with overrides from a command line."""
    with initialize_config_dir(str(CONF), version_base=None):
        node = compose(f"data/{block}", overrides=list(overrides)).data
    assert isinstance(node, DictConfig)
    return node


class Points(Dataset[tuple[torch.Tensor, int]]):
    """A stranger's data set."""

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.full((2,), float(self.seed)), index


Write = Callable[[Path, str], Any]


def overrides_for(block: str, folder: Path, write_files: Write) -> list[str]:
    """Return what a user would have to set, with the files it needs written to `folder`."""
    if block in TORCHVISION:
        write_files(folder, TORCHVISION[block])
        return [f"data.root={folder}", "data.download=false"]
    if block == "imagefolder":
        for path in ("train/ant/1.png", "train/bee/2.png", "val/bee/3.png"):
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (9, 9)).save(folder / path)
        return [f"data.root={folder}", "data.image_size=8"]
    if block == "csv":
        rows = "\n".join(f"{number},{'ab'[number % 2]},{'xyz'[number % 3]}" for number in range(10))
        (folder / "table.csv").write_text(f"size,kind,class\n{rows}\n")
        return [f"data.file={folder}/table.csv", "data.target=class"]
    if block == "segmentation":
        for path in ("train/images/1", "train/masks/1", "val/images/2", "val/masks/2"):
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB" if "images" in path else "L", (9, 9)).save(folder / f"{path}.png")
        return [f"data.root={folder}", "data.image_size=8", "data.num_classes=2"]
    if block == "text":
        (folder / "text").write_text("\n\n".join(letter * 20 for letter in "abcde"))
        return [f"data.root={folder}/text", "data.context=7"]
    if block == "ragged":
        return ["data.length_cv=0"]
    if block == "custom":
        return [f"data.{split}._target_={__name__}.Points" for split in ("train", "eval")] + [
            "+data.eval.seed=1"
        ]
    return []


EXPECTED = {
    "digits": ((1, 8, 8), 1442, 355, 10),
    "fake": ((3, 32, 32), 1024, 256, 10),
    "mnist": ((1, 28, 28), 20, 12, 10),
    "fashion_mnist": ((1, 28, 28), 20, 12, 10),
    "cifar10": ((3, 32, 32), 20, 12, 10),
    "cifar100": ((3, 32, 32), 20, 12, 100),
    "imagefolder": ((3, 8, 8), 2, 1, 2),
    "text": ((7,), 12, 2, 6),
    "ragged": ((64,), 4096, 512, 64),
    "custom": ((2,), 3, 3, None),
    "csv": ((3,), 8, 2, 3),
    "segmentation": ((3, 8, 8), 1, 1, 2),
}


def shape_of_first(dataset: Any) -> tuple[int, ...]:
    """Return the shape of the first sample's input, of a pair or of tokens."""
    sample = dataset[0]
    return tuple((sample["input_ids"] if isinstance(sample, dict) else sample[0]).shape)


@pytest.mark.parametrize("block", BLOCKS)
def test_every_block_composes_and_loads(block: str, tmp_path: Path, write_files: Write) -> None:
    """Each file gives a training and a held-out set of the shape, sizes and classes it promises."""
    node = composed(block, *overrides_for(block, tmp_path, write_files))
    train, held_out = instantiate(node.train), instantiate(node.eval)
    shape, train_size, held_out_size, classes = EXPECTED[block]
    assert shape_of_first(train) == shape_of_first(held_out) == shape
    assert (len(train), len(held_out)) == (train_size, held_out_size)
    if classes is not None:
        assert len(train.classes) == len(held_out.classes) == classes


@pytest.mark.parametrize("block", BLOCKS)
def test_every_block_has_the_four_keys_of_a_batch(block: str) -> None:
    """The keys that the loop reads are in every file, so that a typo is told from a choice."""
    node = composed(block, "data.global_batch_size=33")
    assert node.global_batch_size == 33
    assert node.micro_batch_size is None
    assert isinstance(node.eval_batch_size, int)
    assert isinstance(node.workers, int)


@pytest.mark.parametrize("block", [*TORCHVISION, "imagefolder"])
def test_augmentation_is_of_the_training_images_only(
    block: str, tmp_path: Path, write_files: Write
) -> None:
    """With data.augment=true reading a training image draws random numbers, a held-out one none."""
    overrides = overrides_for(block, tmp_path, write_files)
    node = composed(block, *overrides, "data.augment=true")

    def draws(dataset: Any) -> bool:
        state = torch.get_rng_state()
        dataset[0]
        return not torch.equal(state, torch.get_rng_state())

    assert draws(instantiate(node.train))
    assert not draws(instantiate(node.eval))


def test_fake_takes_its_sizes_from_the_keys_of_the_block() -> None:
    """data.image_size, data.size and data.num_classes reach both splits, which share no image."""
    node = composed("fake", "data.image_size=[1,8,8]", "data.size=5", "data.num_classes=3")
    train, held_out = instantiate(node.train), instantiate(node.eval)
    assert train[0][0].shape == held_out[0][0].shape == (1, 8, 8)
    assert (len(train), len(train.classes), len(held_out.classes)) == (5, 3, 3)
    assert not any(torch.equal(a, b) for a in train.tensors[0] for b in held_out.tensors[0])


@pytest.mark.parametrize("block", ["text", "ragged"])
def test_keys_of_a_block_are_the_arguments_of_both_splits(block: str) -> None:
    """What is a key beside the batch's is handed to training and evaluation alike, but for the size."""
    node = composed(block)
    batch = {"global_batch_size", "micro_batch_size", "eval_batch_size", "workers", "sort_by_length"}
    keys = set(node) - batch - {"train", "eval", "size", "eval_size"}
    for split in (node.train, node.eval):
        assert keys <= set(split)
        assert {key: split[key] for key in keys} == {key: node[key] for key in keys}
        arguments = inspect.signature(get_object(split._target_)).parameters
        assert keys <= set(arguments)
        assert {key: arguments[key].default for key in keys} == {key: node[key] for key in keys}


def test_ragged_takes_its_sizes_and_lengths_from_the_keys_of_the_block() -> None:
    """data.size, data.eval_size and data.mean_length reach the sets, which share no sequence."""
    node = composed(
        "ragged", "data.size=5", "data.eval_size=4", "data.length_cv=0", "data.mean_length=9"
    )
    train, held_out = instantiate(node.train), instantiate(node.eval)
    assert (train.lengths.tolist(), held_out.lengths.tolist()) == ([9] * 5, [9] * 4)
    assert not any(torch.equal(a["labels"], b["labels"]) for a in train for b in held_out)


def test_imagefolder_takes_a_path_for_each_split(tmp_path: Path, write_files: Write) -> None:
    """data.train.root and data.eval.root do without data.root."""
    overrides_for("imagefolder", tmp_path, write_files)
    node = composed("imagefolder", f"data.train.root={tmp_path}/train", f"data.eval.root={tmp_path}/val")
    assert len(instantiate(node.train)) == 2
    assert [target for _, target in instantiate(node.eval)] == [1]


def test_custom_without_a_held_out_set_has_none() -> None:
    """Left alone, the target of the held-out set is null."""
    node = composed("custom", f"data.train._target_={__name__}.Points", "+data.train.seed=4")
    assert instantiate(node.train)[0][0].tolist() == [4.0, 4.0]
    assert node.eval._target_ is None
