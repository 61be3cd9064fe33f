"""A multilayer perceptron on inputs of any shape."""

import math
from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

from gaccum_exp.errors import BadInputError, nearest
from gaccum_exp.models.shapes import known_classes, known_shape

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
}


class MLP(nn.Module):
    """Flatten, then linear layers with an activation between them.

    Args:
        hidden: width of each hidden layer; an empty list leaves one linear layer.
        activation: `relu`, `gelu`, `silu` or `tanh`.
        dropout: probability of dropping a hidden unit, 0 ≤ dropout < 1; no seed pairs it across N.
        input_shape: shape of one sample's input.
        num_classes: number of outputs.

    Maps (batch, *input_shape) to (batch, num_classes). Raises `BadInputError` on unusable values.
    """

    def __init__(
        self,
        hidden: Sequence[int] = (256, 256),
        activation: str = "relu",
        dropout: float = 0.0,
        input_shape: Sequence[int] | None = None,
        num_classes: int | None = None,
    ) -> None:
        super().__init__()
        widths = [math.prod(known_shape(input_shape)), *hidden]
        if min(widths) < 1:
            raise BadInputError(f"model.hidden={list(hidden)} must hold layer widths of at least 1")
        if activation not in ACTIVATIONS:
            raise BadInputError(
                f"model.activation={activation} is none of {', '.join(ACTIVATIONS)}"
                + nearest(activation, ACTIVATIONS)
            )
        if not 0 <= dropout < 1:
            raise BadInputError(f"model.dropout={dropout} must be at least 0 and below 1")
        layers: list[nn.Module] = [nn.Flatten()]
        for fan_in, fan_out in pairwise(widths):
            layers += [nn.Linear(fan_in, fan_out), ACTIVATIONS[activation]()]
            layers += [nn.Dropout(dropout)] if dropout > 0 else []
        self.layers = nn.Sequential(*layers, nn.Linear(widths[-1], known_classes(num_classes)))

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the logits, (batch, num_classes), of inputs (batch, *input_shape)."""
        logits: Tensor = self.layers(inputs)
        return logits
