"""The perceptron takes any shape and draws nothing unless asked to."""

from typing import Any

import pytest
import torch
from torch import nn

from gaccum_exp.errors import BadInputError
from gaccum_exp.models.mlp import ACTIVATIONS, MLP


def linear(model: nn.Module) -> list[nn.Linear]:
    """Return the linear layers in order."""
    return [layer for layer in model.modules() if isinstance(layer, nn.Linear)]


@pytest.mark.parametrize("shape", [(7,), (1, 8, 8), (3, 4, 5), (2, 3, 2, 2)])
def test_inputs_of_any_shape_are_flattened(shape: tuple[int, ...]) -> None:
    """The first layer is as wide as one sample has elements, the last as there are classes."""
    model = MLP(hidden=[6, 5], input_shape=shape, num_classes=4)
    assert model(torch.randn(2, *shape)).shape == (2, 4)
    widths = [(layer.in_features, layer.out_features) for layer in linear(model)]
    assert widths == [(torch.Size(shape).numel(), 6), (6, 5), (5, 4)]


def test_without_hidden_layers_it_is_linear() -> None:
    """An empty list of hidden layers gives softmax regression."""
    model = MLP(hidden=[], input_shape=[3], num_classes=2).double()
    one, other = torch.randn(2, 1, 3, dtype=torch.float64)
    between = model((one + other) / 2)
    torch.testing.assert_close(between, (model(one) + model(other)) / 2)


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_activation_stands_after_every_hidden_layer(activation: str) -> None:
    """The named activation, once per hidden layer and not after the last layer."""
    model = MLP([4, 4], activation, input_shape=[3], num_classes=2)
    kinds = [type(layer) for layer in model.layers]
    of_it = ACTIVATIONS[activation]
    assert kinds == [nn.Flatten, nn.Linear, of_it, nn.Linear, of_it, nn.Linear]


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_forward_draws_random_numbers_only_with_dropout(dropout: float) -> None:
    """The generator moves in a training pass exactly when dropout was asked for."""
    model = MLP(dropout=dropout, input_shape=[3], num_classes=2)
    state = torch.get_rng_state()
    model(torch.ones(4, 3))
    assert torch.equal(state, torch.get_rng_state()) == (dropout == 0)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"activation": "rellu"}, "did you mean 'relu'"),
        ({"hidden": [4, 0]}, "model.hidden=[4, 0]"),
        ({"dropout": 1.0}, "model.dropout=1.0"),
        ({"dropout": -0.1}, "model.dropout=-0.1"),
        ({"num_classes": None}, "model.num_classes is not known"),
        ({"num_classes": 0}, "model.num_classes=0"),
        ({"input_shape": None}, "model.input_shape is not known"),
        ({"input_shape": [3, 0]}, "model.input_shape=[3, 0]"),
        ({"input_shape": []}, "model.input_shape=[]"),
    ],
)
def test_impossible_values_are_bad_input(changed: dict[str, Any], words: str) -> None:
    """The message has the key and the value, or the nearest name."""
    with pytest.raises(BadInputError) as caught:
        MLP(**({"input_shape": [3], "num_classes": 2} | changed))
    assert words in str(caught.value)
