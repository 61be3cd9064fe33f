"""The default model: what its normalisations couple, and that it learns."""

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from gaccum_exp.data.digits import digits
from gaccum_exp.errors import BadInputError
from gaccum_exp.models.cnn import CNN, NORMS


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 8, 8), (2, 9, 5), (3, 32, 32)])
@pytest.mark.parametrize("norm", sorted(NORMS))
def test_images_of_any_size_give_logits(norm: str, shape: tuple[int, int, int]) -> None:
    """Every normalisation takes every image size, also at a width that 8 does not divide."""
    model = CNN(norm, width=6, input_shape=shape, num_classes=7)
    assert model(torch.randn(3, *shape)).shape == (3, 7)


@pytest.mark.parametrize("norm", sorted(NORMS))
def test_only_batch_norm_couples_the_samples(norm: str) -> None:
    """A training pass over half the batch gives the same logits, except with BatchNorm."""
    torch.manual_seed(0)
    model = CNN(norm, input_shape=[3, 8, 8], num_classes=4).double()
    images = torch.randn(6, 3, 8, 8, dtype=torch.float64)
    difference = (model(images)[:3] - model(images[:3])).abs().max()
    assert (difference > 1e-3) == (norm == "batch")
    assert difference < 1e-12 or norm == "batch"


@pytest.mark.parametrize("norm", ["group", "layer", "batch"])
def test_normalised_networks_ignore_the_contrast_of_their_features(norm: str) -> None:
    """Scaling the first convolution changes nothing, which without normalisation it does."""
    images = torch.randn(4, 1, 8, 8, dtype=torch.float64)

    def change(kind: str) -> float:
        torch.manual_seed(0)
        model = CNN(kind, input_shape=[1, 8, 8], num_classes=4).double()
        before = model(images)
        with torch.no_grad():
            model.features[0].weight.mul_(50)  # type: ignore[union-attr, operator]
        return float((model(images) - before).detach().abs().max())

    assert 10 * change(norm) < change("none")


@pytest.mark.parametrize(("side", "convolutions"), [(2, 2), (8, 4), (9, 5), (28, 6), (32, 6)])
def test_last_convolution_sees_two_positions_a_side(side: int, convolutions: int) -> None:
    """The larger the image, the more convolutions, so that the last map is 2×2."""
    model = CNN(input_shape=[1, side, side], num_classes=4)
    assert model.features(torch.randn(1, 1, side, side)).shape[-2:] == (2, 2)
    kinds = [type(layer).__name__ for layer in model.features]
    assert kinds.count("Conv2d") == convolutions


def test_groups_and_layer_differ() -> None:
    """GroupNorm has 8 groups of channels where the width allows, layer normalisation one."""
    for norm, width, groups in (("group", 16, 8), ("group", 6, 2), ("layer", 16, 1)):
        model = CNN(norm, width, input_shape=[1, 8, 8], num_classes=4)
        assert model.features[1].num_groups == groups


@pytest.mark.parametrize("norm", sorted(NORMS))
def test_forward_draws_no_random_numbers(norm: str) -> None:
    """A training pass leaves the generator where it was."""
    model = CNN(norm, input_shape=[1, 8, 8], num_classes=4)
    images = torch.randn(4, 1, 8, 8)
    state = torch.get_rng_state()
    model(images)
    assert torch.equal(state, torch.get_rng_state())


def train(
    model: CNN,
    inputs: torch.Tensor,
    targets: torch.Tensor,
    *,
    epochs: int,
    batch: int,
    lr: float = 0.1,
) -> None:
    """SGD with momentum, in an order that the seed decides."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    for _ in range(epochs):
        for chosen in torch.randperm(len(inputs)).split(batch):
            optimizer.zero_grad()
            F.cross_entropy(model(inputs[chosen]), targets[chosen]).backward()
            optimizer.step()


def test_default_network_learns_the_digits() -> None:
    """Fifteen epochs at the default batch, rate and width recognise 96 % of held-out digits."""
    torch.manual_seed(0)
    model = CNN(input_shape=[1, 8, 8], num_classes=10)
    train(model, *digits("train").tensors, epochs=15, batch=256)
    inputs, targets = digits("test").tensors
    with torch.no_grad():
        accuracy = float((model(inputs).argmax(1) == targets).float().mean())
    assert accuracy >= 0.96


def test_images_in_colour_of_32_pixels_are_learnt() -> None:
    """Thin and thick stripes in red or blue, 3×32×32, are told apart by width and colour."""
    torch.manual_seed(0)
    targets = torch.arange(64) % 4
    shift = torch.randint(0, 8, (64, 1))
    period = 4 * (1 + targets % 2)[:, None]
    stripes = ((torch.arange(32) + shift) % period < period // 2).float()
    images = torch.zeros(64, 3, 32, 32)
    images[torch.arange(64), 2 * (targets // 2)] = stripes[:, None, :].expand(-1, 32, -1)
    model = CNN(input_shape=[3, 32, 32], num_classes=4)
    train(model, images, targets, epochs=16, batch=32, lr=0.01)
    assert float((model(images).argmax(1) == targets).float().mean()) >= 0.95


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"norm": "grupo"}, "did you mean 'group'"),
        ({"norm": "instance"}, "none, batch, group, layer"),
        ({"width": 0}, "model.width=0"),
        ({"input_shape": [64]}, "[64]; model=mlp takes any shape"),
        ({"input_shape": None}, "model.input_shape is not known"),
        ({"num_classes": None}, "model.num_classes is not known"),
    ],
)
def test_impossible_values_are_bad_input(changed: dict[str, Any], words: str) -> None:
    """The message has the key and the value, or the nearest name."""
    with pytest.raises(BadInputError) as caught:
        CNN(**({"input_shape": [1, 8, 8], "num_classes": 2} | changed))
    assert words in str(caught.value)
