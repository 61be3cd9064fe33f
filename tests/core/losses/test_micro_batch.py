"""A micro-batch taken apart: the model's arguments, the targets, the tokens, the outputs."""

from collections import OrderedDict, UserDict, namedtuple
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from gaccum_exp import accumulate_gradients
from gaccum_exp.core.losses.micro_batch import (
    TARGETS,
    outputs_in,
    run_model,
    split_micro_batch,
    tokens_in,
)
from gaccum_exp.errors import BadInputError

X, Y, Z = torch.zeros(2, 3), torch.ones(2), torch.full((2,), 2.0)
LABELS = torch.tensor([[1, 2, -100], [-100, -100, 4]])


class Called(nn.Module):
    """Returns what it is called with."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return args, kwargs


@pytest.mark.parametrize(
    ("micro_batch", "targets"),
    [
        ((X, Y), [Y]),
        ([X, Y], [Y]),
        ((X, Y, Z), [Y, Z]),
        ((X, (Y, Z)), [Y, Z]),
        ((X, [Y], Z), [Y, Z]),
        ((X,), []),
    ],
)
def test_the_first_part_is_the_models_and_the_rest_are_targets(
    micro_batch: Any, targets: list[Any]
) -> None:
    """Pairs, several targets, nested targets, and none."""
    inputs, found = split_micro_batch(micro_batch)
    assert run_model(Called(), inputs) == ((X,), {})
    assert [id(t) for t in found] == [id(t) for t in targets]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kind", [dict, OrderedDict, UserDict])
def test_a_mapping_has_its_target_by_name_and_the_rest_are_arguments_by_name(
    target: str, kind: Any
) -> None:
    """Also where it is a dictionary only in behaviour, as transformers' BatchEncoding is; it is kept."""
    micro_batch = kind({"input_ids": X, target: Y, "attention_mask": Z})
    inputs, targets = split_micro_batch(micro_batch)
    assert run_model(Called(), inputs) == ((), {"input_ids": X, "attention_mask": Z})
    assert targets == [Y]
    assert set(micro_batch) == {"input_ids", target, "attention_mask"}


def test_of_several_names_the_first_is_the_target() -> None:
    """`labels` before `target`: the other is the model's."""
    inputs, targets = split_micro_batch({"target": Z, "labels": Y, "x": X})
    assert targets == [Y]
    assert run_model(Called(), inputs) == ((), {"target": Z, "x": X})


def test_an_input_that_is_itself_a_dictionary_is_one_argument() -> None:
    """In a pair nothing is spread: the model gets the dictionary as it is."""
    inputs, _ = split_micro_batch(({"a": X, "labels": Y}, Z))
    assert run_model(Called(), inputs) == (({"a": X, "labels": Y},), {})


def test_what_has_no_target_is_refused_with_its_keys_or_its_kind() -> None:
    """The way out is named: a loss function of one's own."""
    with pytest.raises(
        BadInputError, match=r"keys x, 3 has none of labels, label, targets, target; use"
    ):
        split_micro_batch({"x": X, 3: Y})
    for bare in (X, "text", 4, None):
        with pytest.raises(BadInputError, match=f"this one is {type(bare).__name__}; use a loss_fn"):
            split_micro_batch(bare)


def test_a_mapping_and_a_pair_give_the_same_gradient() -> None:
    """The same samples either way, through accumulate_gradients."""

    class Named(nn.Linear):
        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return super().forward(inputs)

    x, y = torch.randn(6, 3, dtype=torch.float64), torch.tensor([0, 1, 2, 2, 1, 0])
    parts = list(zip(x.split([4, 2]), y.split([4, 2]), strict=True))
    gradients = []
    for window in (parts, [{"inputs": a, "label": b} for a, b in parts]):
        torch.manual_seed(0)
        model = Named(3, 3).double()
        accumulate_gradients(model, nn.CrossEntropyLoss(), window)
        gradients.append(model.weight.grad)
    assert gradients[0] is not None
    assert torch.equal(*gradients)


def test_tokens_are_the_labels_that_are_asked_for() -> None:
    """Of pairs and mappings, under any ignore_index."""
    for micro_batch in ((X, LABELS), {"input_ids": X, "labels": LABELS}):
        assert tokens_in(micro_batch) == 3
        assert tokens_in(micro_batch, ignore_index=4) == 5
    assert tokens_in((X, LABELS.clone().fill_(-100))) == 0


@pytest.mark.parametrize(
    "micro_batch",
    [
        (X, torch.tensor([1, 2])),
        (X, LABELS.double()),
        (X, torch.zeros(2, 3, 4, dtype=torch.int64)),
        (X, LABELS.bool()),
        (X, "text"),
        (X,),
        {"x": X},
        X,
    ],
)
def test_what_has_no_sequences_of_labels_has_no_tokens(micro_batch: Any) -> None:
    """Classes, regressions, segmentations, masks, and whatever is no micro-batch for a criterion."""
    assert tokens_in(micro_batch) is None


Inception = namedtuple("Inception", ["logits", "aux_logits"])


@pytest.mark.parametrize(
    ("outputs", "expected"),
    [
        (X, [X]),
        ((X, Y), [X, Y]),
        ([X, Y], [X, Y]),
        (SimpleNamespace(logits=X, loss=Y), [X]),
        ({"logits": X, "hidden": Y}, [X]),
        (OrderedDict(logits=X), [X]),
        (Inception(X, Y), [X, Y]),
    ],
)
def test_outputs_are_a_list_and_of_an_object_with_logits_those(
    outputs: Any, expected: list[Any]
) -> None:
    """A tuple with names stays one: torchvision's Inception has an auxiliary head beside `logits`."""
    assert [id(t) for t in outputs_in(outputs)] == [id(t) for t in expected]


def test_outputs_that_are_not_understood_are_handed_on_as_they_are() -> None:
    """A mapping without logits, as of torchvision's segmentation models, is the criterion's affair."""
    outputs = {"out": X, "aux": Y}
    assert outputs_in(outputs) == [outputs]
    nothing = SimpleNamespace(logits=None)
    assert outputs_in(nothing) == [nothing]
