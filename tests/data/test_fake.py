"""Images of noise: any size, and the same every time."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch.utils.data import TensorDataset

from gaccum_exp.data import fake as module
from gaccum_exp.data.fake import fake
from gaccum_exp.errors import BadInputError


@pytest.mark.parametrize(
    ("image_size", "shape"),
    [(12, (3, 12, 12)), ([1, 8, 6], (1, 8, 6)), ((2, 5, 5), (2, 5, 5)), ([4, 3, 3], (4, 3, 3))],
)
def test_images_have_the_size_asked_for(image_size: int | Sequence[int], shape: tuple[int, ...]) -> None:
    """A number is the side of a colour image, and three numbers are channels, height and width."""
    dataset = fake(6, image_size, num_classes=3)
    inputs, targets = dataset.tensors  # type: ignore[attr-defined]
    assert inputs.shape == (6, *shape)
    assert -1 <= inputs.min() < -0.9
    assert 0.9 < inputs.max() <= 1
    assert set(targets.tolist()) <= {0, 1, 2}
    assert dataset.classes == ["0", "1", "2"]  # type: ignore[attr-defined]
    assert type(dataset) is TensorDataset


def test_images_do_not_depend_on_the_seed_nor_move_the_generator() -> None:
    """Two seeds see the same noise, and the run's generator stays where it was."""
    torch.manual_seed(1)
    state = torch.get_rng_state()
    one = fake(4, 8, 10)
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(2)
    assert torch.equal(one[:][0], fake(4, 8, 10)[:][0])


def test_offset_of_the_size_gives_other_images() -> None:
    """Splits that are a size apart share no image."""
    train, held_out = fake(10, 8, 10)[:][0], fake(10, 8, 10, random_offset=10)[:][0]
    assert not any(torch.equal(a, b) for a in train for b in held_out)
    assert torch.equal(fake(10, 8, 10, random_offset=9)[:][0][1], held_out[0])


def test_more_than_fits_in_memory_is_made_when_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """A large set is drawn an image at a time, and the images are the same."""
    ready = fake(5, 8, 10)
    monkeypatch.setattr(module, "MOST_BYTES_IN_MEMORY", 5 * 3 * 8 * 8 * 4 - 1)
    lazy = fake(5, 8, 10)
    assert type(lazy) is not TensorDataset
    assert len(lazy) == 5  # type: ignore[arg-type]
    for index in range(5):
        assert torch.equal(lazy[index][0], ready[index][0])
        assert int(lazy[index][1]) == int(ready[index][1])
    assert lazy.classes == ready.classes  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("changed", "key"),
    [
        ({"size": 0}, r"data\.size=0"),
        ({"num_classes": 0}, r"data\.num_classes=0"),
        ({"image_size": 0}, r"data\.image_size=0"),
        ({"image_size": [5, 8, 8]}, r"data\.image_size=\[5, 8, 8\]"),
        ({"image_size": [8, 8]}, r"data\.image_size=\[8, 8\]"),
    ],
)
def test_impossible_sizes_are_bad_input(changed: dict[str, Any], key: str) -> None:
    """A size that no image can have is refused with its key and value."""
    arguments: dict[str, Any] = {"size": 4, "image_size": 8, "num_classes": 10}
    with pytest.raises(BadInputError, match=key):
        fake(**(arguments | changed))
