"""Trees of values and tensors come back as they were, and nothing else is taken."""

import json
import math
import random
from collections import Counter, OrderedDict, defaultdict, deque
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gaccum_exp.train.checkpoint.encoding import Encoded, Held, NotKeptError, decode, encode

PLAIN = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.complex_numbers()
TREES = st.recursive(
    PLAIN | st.binary(max_size=5),
    lambda inside: (
        st.lists(inside, max_size=4)
        | st.lists(inside, max_size=4).map(tuple)
        | st.dictionaries(st.text(max_size=3) | st.integers(), inside, max_size=4)
        | st.dictionaries(st.sampled_from(["$tensor", "$", "a"]), inside, max_size=3)
    ),
    max_leaves=12,
)


def back(tree: Any) -> Any:
    """Return a tree that was written as JSON."""
    encoded = encode(tree)
    text = json.dumps(encoded.values, allow_nan=False)
    return decode(Encoded(json.loads(text), encoded.tensors))


@given(TREES)
def test_plain_values_come_back(tree: Any) -> None:
    """To the bit, with their types: repr tells 1 from 1.0, -0.0 from 0.0, and a list from a tuple."""
    assert repr(back(tree)) == repr(tree)


@pytest.mark.parametrize(
    "value",
    [
        Counter({3: 1, 5: 2}), OrderedDict(b=1, a=2), deque([1, 2], maxlen=3), {1, 2}, frozenset({"x"}),
        torch.Size([2, 3]), torch.float16, torch.device("cpu"), list(range(100)), tuple(range(-50, 50)),
        [2**70] * 40, [True] * 40, random.Random(3).getstate(), [0.1, -0.0] * 20,
        defaultdict(list, a=[1]), defaultdict(None, {2: 3}), Held("part", "model.0"), {Held("x"): 1},
        np.float32(0.1), np.int64(-3), math.pi,
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_what_optimizers_and_schedules_are_made_of_comes_back(value: Any) -> None:
    """With its type."""
    again = back({"inside": value})["inside"]
    assert type(again) is type(value)
    assert again == value
    assert repr(again) == repr(value)


@pytest.mark.parametrize("dtype", ["<f8", "<f2", ">i4", "<u4", "|b1", "<c8", "<U3"])
def test_arrays_come_back(dtype: str) -> None:
    """Of any type that is no object, in their shape."""
    array = np.arange(6).reshape(2, 3).astype(dtype)
    again = back(array)
    assert again.dtype == array.dtype
    assert np.array_equal(again, array)


def test_sparse_and_shared_tensors_come_back() -> None:
    """A tensor that stands at two places is one; a sparse one keeps rows that are listed twice."""
    shared = torch.randn(3)
    sparse = torch.sparse_coo_tensor([[0, 0, 2]], [1.0, 2.0, 3.0], (4,), check_invariants=True)
    again = back([shared, {"again": shared}, sparse])
    assert again[0] is again[1]["again"]
    assert torch.equal(again[0], shared)
    assert again[2]._nnz() == 3
    assert not again[2].is_coalesced()
    assert torch.equal(again[2].to_dense(), sparse.to_dense())


def test_a_copy_is_taken_of_what_goes_on() -> None:
    """What moves after it was encoded is as it was."""
    weight, note = torch.zeros(2), [1]
    encoded = encode({"weight": weight, "note": note})
    weight += 1
    note.append(2)
    assert torch.equal(decode(encoded)["weight"], torch.zeros(2))
    assert decode(encoded)["note"] == [1]


@pytest.mark.parametrize(
    "value", [Fraction(1, 3), print, np.array([print]), object(), type("F", (float,), {})(1)]
)
def test_anything_else_is_refused_by_name(value: Any) -> None:
    """With the place in the tree."""
    with pytest.raises(NotKeptError, match=r"^optimizer\.state\.1 is a "):
        encode({"optimizer": {"state": [0, value]}})


@pytest.mark.parametrize("values", [{"$dtype": "load"}, {"$tensor": "no"}, {"$call": "os.system"}])
def test_a_document_names_nothing_that_is_called(values: Any) -> None:
    """What it names is a tensor of the checkpoint, a dtype, or an error."""
    with pytest.raises((ValueError, KeyError, AttributeError)):
        decode(Encoded(values, {}))
