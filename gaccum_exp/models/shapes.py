"""Check the input shape and the number of classes that a model is built for."""

from collections.abc import Sequence

from gaccum_exp.errors import BadInputError


def known_shape(input_shape: Sequence[int] | None) -> tuple[int, ...]:
    """Return the shape of one sample's input, each dimension at least 1.

    Raises `BadInputError` where it is not known (null, and no data set to read it from).
    """
    if input_shape is None:
        raise BadInputError("model.input_shape is not known: give it, for example [1,8,8]")
    shape = tuple(int(size) for size in input_shape)
    if min(shape, default=0) < 1:
        raise BadInputError(f"model.input_shape={list(shape)} has no elements")
    return shape


def image_shape(input_shape: Sequence[int] | None, model: str) -> tuple[int, int, int]:
    """Return `input_shape` as (channels, height, width); `model` is named where it is not that."""
    shape = known_shape(input_shape)
    if len(shape) != 3:
        raise BadInputError(
            f"model={model} needs images of shape [channels, height, width], "
            f"and these inputs have the shape {list(shape)}; model=mlp takes any shape"
        )
    return shape[0], shape[1], shape[2]


def known_classes(num_classes: int | None) -> int:
    """Return the number of outputs, at least 1.

    Raises `BadInputError` where it is not known: the data set has no attribute `classes`.
    """
    if num_classes is None:
        raise BadInputError(
            "model.num_classes is not known, since the data set has no attribute `classes`: "
            "give the number of outputs, for example model.num_classes=10"
        )
    if num_classes < 1:
        raise BadInputError(f"model.num_classes={num_classes} must be at least 1")
    return num_classes
