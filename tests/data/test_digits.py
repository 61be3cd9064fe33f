"""The default data set: complete, fixed, and split alike for every class."""

import pytest
import torch
from sklearn.datasets import load_digits
from torch.utils.data import TensorDataset

from gaccum_exp.data.digits import digits
from gaccum_exp.errors import BadInputError


def test_splits_hold_every_scan_once() -> None:
    """The two splits together are scikit-learn's 1,797 scans, up to one scale and shift."""
    together = torch.cat([digits("train").tensors[0], digits("test").tensors[0]])
    given = torch.tensor(load_digits().images, dtype=torch.float32).flatten(1)
    mine = torch.round(together.flatten(1) * 6.017 + 4.884)
    assert sorted(map(tuple, mine.int().tolist())) == sorted(map(tuple, given.int().tolist()))


def test_held_out_fifth_has_the_same_mix_of_classes() -> None:
    """Every class gives a fifth of its scans to the held-out split, to within one scan."""
    train, test = digits("train").tensors[1], digits("test").tensors[1]
    for label in range(10):
        held_out, rest = int((test == label).sum()), int((train == label).sum())
        assert abs(held_out - (held_out + rest) / 5) < 1


def test_split_does_not_depend_on_the_seed() -> None:
    """Reading under two seeds gives the same tensors and leaves the generator where it was."""
    torch.manual_seed(1)
    state = torch.get_rng_state()
    one = digits("train")
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(2)
    other = digits("train")
    assert all(map(torch.equal, one.tensors, other.tensors))


def test_what_is_done_to_the_scans_is_not_done_to_those_read_later() -> None:
    """The file is read once in a process, and whoever changes its scans has changed their own."""
    one = digits("train")
    before = [t.clone() for t in one.tensors]
    for tensor in one.tensors:
        tensor.zero_()
    assert all(map(torch.equal, digits("train").tensors, before))


def test_digits_are_ready_to_be_fetched_by_index() -> None:
    """The type is exactly TensorDataset, of normalised float32 images and int64 targets."""
    dataset = digits("train")
    inputs, targets = dataset.tensors
    assert type(dataset) is TensorDataset
    assert inputs.shape[1:] == (1, 8, 8)
    assert (inputs.dtype, targets.dtype) == (torch.float32, torch.int64)
    assert abs(float(inputs.mean())) < 0.01
    assert abs(float(inputs.std()) - 1) < 0.01
    assert dataset.classes == list("0123456789")  # type: ignore[attr-defined]


def test_unknown_split_names_the_nearest() -> None:
    """A misspelt split is bad input that names the right one."""
    with pytest.raises(BadInputError, match="did you mean 'train'"):
        digits("trian")
