"""A run's data are told by a few digits, which change with the data."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset

from gaccum_exp.arms.provenance import _fingerprint
from gaccum_exp.data.sequences import TokenSequences


class Listed(Dataset[Any]):
    """A data set of the user's own."""

    def __init__(self, samples: list[Any]) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Any:
        return self.samples[index]


class Handle:
    """An object whose text says where it lies in memory."""


def tokens(row: Tensor) -> TokenSequences:
    starts = torch.arange(0, 960, 32)
    return TokenSequences(row, starts, torch.full_like(starts, 32), ["a", "b"])


def images(samples: Tensor) -> Dataset[Any]:
    from torchvision.datasets import FakeData

    found = FakeData(size=len(samples))
    found.data = samples.numpy()  # as CIFAR-10 has them
    return found


@pytest.mark.parametrize(
    "made_of",
    [
        tokens, images, lambda x: TensorDataset(x), lambda x: Subset(TensorDataset(x), range(50, 900)),
        lambda x: Subset(tokens(x), range(20)), lambda x: ConcatDataset([tokens(x), tokens(x)]),
        lambda x: Listed([(x, 0), (x, 1)]), lambda x: Listed([{"x": [x.numpy()], "of": Handle()}]),
    ],
)  # fmt: skip
def test_a_value_in_the_middle_changes_the_digits(made_of: Callable[[Tensor], Dataset[Any]]) -> None:
    """Of what lies in memory, and in a sample however it is nested; the same data have the same."""
    row = torch.arange(1000) % 7
    other = row.clone()
    other[400] += 1
    first = _fingerprint(made_of(row), {})
    assert _fingerprint(made_of(row.clone()), {}) == first
    assert _fingerprint(made_of(other), {}) != first


def test_of_other_data_samples_are_read_from_the_first_to_the_last() -> None:
    """Eight of them, and their number and configuration count."""
    read: list[int] = []

    class Reads(Listed):
        def __getitem__(self, index: int) -> Any:
            read.append(index)
            return np.float32(index)

    first = _fingerprint(Reads([0] * 71), {})
    assert read == [0, 10, 20, 30, 40, 50, 60, 70]
    assert _fingerprint(Reads([0] * 72), {}) != first
    assert _fingerprint(Reads([0] * 71), {"root": "x"}) != first
    assert len(_fingerprint(Reads([0]), {})) == 8
