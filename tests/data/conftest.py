"""Small data sets in torchvision's file formats, for torchvision itself to read; no network."""

import gzip
import hashlib
import io
import pickle
import struct
import tarfile
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from torchvision import datasets


@dataclass
class Written:
    """What was written, and where."""

    root: Path
    archives: list[Path]
    images: dict[str, np.ndarray]
    """Per split, uint8 images as torchvision hands them out."""
    targets: dict[str, list[int]]


SPLITS = {"train": 20, "test": 12}
SIDES = {"MNIST": (28, 28), "FashionMNIST": (28, 28), "CIFAR10": (32, 32, 3), "CIFAR100": (32, 32, 3)}


def md5(content: bytes) -> str:
    """Return the checksum as torchvision writes it."""
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def drawn(name: str) -> tuple[dict[str, np.ndarray], dict[str, list[int]]]:
    """Return random images and targets of each split."""
    rng = np.random.default_rng(0)
    classes = 100 if name == "CIFAR100" else 10
    images = {
        split: rng.integers(0, 256, (size, *SIDES[name]), dtype=np.uint8)
        for split, size in SPLITS.items()
    }
    targets = {split: rng.integers(0, classes, size).tolist() for split, size in SPLITS.items()}
    return images, targets


def write_mnist(root: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> Written:
    """Write the four gzipped idx files: a big-endian header of magic number and sizes, then bytes."""
    images, targets = drawn(name)
    contents = {}
    for split, prefix in (("train", "train"), ("test", "t10k")):
        header = struct.pack(">IIII", 0x803, *images[split].shape)
        contents[f"{prefix}-images-idx3-ubyte.gz"] = header + images[split].tobytes()
        header = struct.pack(">II", 0x801, len(targets[split]))
        contents[f"{prefix}-labels-idx1-ubyte.gz"] = header + bytes(targets[split])
    raw = root / name / "raw"
    raw.mkdir(parents=True)
    for file, content in contents.items():
        (raw / file).write_bytes(gzip.compress(content))
    source = getattr(datasets, name)
    resources = [(file, md5((raw / file).read_bytes())) for file, _ in source.resources]
    monkeypatch.setattr(source, "resources", resources)
    return Written(root, [raw / file for file, _ in resources], images, targets)


def write_cifar(root: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> Written:
    """Write the tar archive of pickled dicts: rows of 3,072 bytes, all red, then green, then blue."""
    images, targets = drawn(name)
    source = getattr(datasets, name)
    label_key = "labels" if name == "CIFAR10" else "fine_labels"
    files: dict[str, bytes] = {}
    for split, listed in (("train", source.train_list), ("test", source.test_list)):
        parts = np.array_split(np.arange(len(targets[split])), len(listed))
        for (file, _), part in zip(listed, parts, strict=True):
            rows = images[split][part].transpose(0, 3, 1, 2).reshape(len(part), -1)
            labels = [targets[split][index] for index in part]
            files[file] = pickle.dumps({"data": rows, label_key: labels}, protocol=2)
    names = [f"class {index}" for index in range(10 if name == "CIFAR10" else 100)]
    files[source.meta["filename"]] = pickle.dumps({source.meta["key"]: names}, protocol=2)
    root.mkdir(parents=True, exist_ok=True)
    with tarfile.open(root / source.filename, "w:gz") as archive:
        for file, content in files.items():
            member = tarfile.TarInfo(f"{source.base_folder}/{file}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    for listing in ("train_list", "test_list"):
        sums = [[file, md5(files[file])] for file, _ in getattr(source, listing)]
        monkeypatch.setattr(source, listing, sums)
    meta = dict(source.meta, md5=md5(files[source.meta["filename"]]))
    monkeypatch.setattr(source, "meta", meta)
    monkeypatch.setattr(source, "tgz_md5", md5((root / source.filename).read_bytes()))
    return Written(root, [root / source.filename], images, targets)


def write(root: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> Written:
    """Write the data set of torchvision's class `name`, and its checksums into the class."""
    writer = write_mnist if name.endswith("MNIST") else write_cifar
    return writer(root, name, monkeypatch)


@pytest.fixture
def write_files(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path, str], Written]:
    """Return a function that writes the data set of torchvision's class `name` to a folder."""
    return lambda root, name: write(root, name, monkeypatch)


@pytest.fixture(params=sorted(SIDES))
def written(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[str, Written]:
    """Each of torchvision's four data sets in turn: its class's name and its files."""
    return request.param, write(tmp_path / "files", request.param, monkeypatch)


@pytest.fixture
def own_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reach servers on this machine directly, whatever proxy the environment names."""
    for variable in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(variable, raising=False)
        monkeypatch.delenv(variable.upper(), raising=False)
    # urllib reads the proxies once and keeps them.
    monkeypatch.setattr(urllib.request, "_opener", None)


@pytest.fixture
def no_network(own_network: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Send every request to a port of this machine where nothing listens."""
    for variable in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(variable, "http://127.0.0.1:9")
