"""scikit-learn's bundled handwritten digits: 1,797 real 8×8 grey scans, no download.

They are the test half of the UCI "Optical Recognition of Handwritten Digits" set, written by 13
people (Alpaydin & Kaynak 1998).
"""

from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from gaccum_exp.data.tensors import tensor_dataset
from gaccum_exp.errors import BadInputError, nearest

# Of the pixels of all 1,797 scans, which run from 0 to 16.
PIXEL_MEAN = 4.884
PIXEL_STD = 6.017

# Of each class's scans every fifth is held out, so that both splits have the same mix of classes.
HELD_OUT_EVERY = 5


def digits(split: str) -> TensorDataset:
    """Return the `train` (1,442) or `test` (355) scans, (1, 8, 8) float32, normalised.

    The split is fixed: no seed enters it. Raises `BadInputError` on another split's name.
    """
    if split not in ("train", "test"):
        raise BadInputError(
            f"digits has no split {split!r}, only train and test{nearest(split, ('train', 'test'))}"
        )
    pixels, targets = _scans()
    rank_in_class = torch.zeros_like(targets)
    for label in range(10):
        of_label = targets == label
        rank_in_class[of_label] = torch.arange(int(of_label.sum()))
    held_out = rank_in_class % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
    chosen = held_out if split == "test" else ~held_out
    inputs = (pixels - PIXEL_MEAN) / PIXEL_STD
    return tensor_dataset(inputs[chosen], targets[chosen], [str(label) for label in range(10)])


def _scans() -> tuple[Tensor, Tensor]:
    """Return all scans, (1797, 1, 8, 8) float32, 0 to 16, and their labels, (1797,) int64."""
    rows = torch.from_numpy(_table())
    return rows[:, :-1].reshape(-1, 1, 8, 8), rows[:, -1].long()


@cache
def _table() -> np.ndarray[Any, np.dtype[np.float32]]:
    """Read a row for each scan: its pixels and its label; twenty milliseconds, of every split."""
    # From scikit-learn's file: importing the package takes longer than importing torch.
    package = find_spec("sklearn")
    path = Path(package.origin).parent / "datasets/data/digits.csv.gz" if package else None  # type: ignore[arg-type]
    if path is not None and path.is_file():
        return np.loadtxt(path, delimiter=",", dtype=np.float32)
    from sklearn.datasets import load_digits  # another release keeps it elsewhere

    scans = load_digits()
    return np.column_stack([scans.data, scans.target]).astype(np.float32)
