"""What Python code hands over: under its address where it has one, else by name, digest and copy."""

import functools
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from gaccum_exp import BadInputError
from gaccum_exp.api.objects import HandedOver
from gaccum_exp.arms import handed_over
from gaccum_exp.config.arguments import written
from tests.strangers import Net, Points


class Stream(IterableDataset[int]):
    def __iter__(self) -> Any:
        return iter(range(3))


class Open(Dataset[Any]):
    def __init__(self) -> None:
        self.numbers = (n for n in range(3))

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> int:
        return index


def added(**objects: object) -> HandedOver:
    """Return these objects handed over."""
    given = HandedOver()
    for name, value in objects.items():
        getattr(given, f"add_{name}")(value)
    return given


def digest(**objects: object) -> str:
    """Return the digest that an object is recorded by."""
    overrides = added(**objects).overrides
    return next(value for key, value in overrides.items() if key.endswith(".digest"))


def copy_of(value: object) -> Any:
    """Return an object as an arm would get it."""
    packed = handed_over.pack("model", value, "")
    return torch.load(io.BytesIO(packed.content), weights_only=False)


@pytest.mark.parametrize(
    ("objects", "expected"),
    [
        (
            {"optimizer": functools.partial(torch.optim.SGD, lr=0.1, nesterov=True, momentum=0.9)},
            ["torch.optim.SGD", "0.1", "true", "0.9"],
        ),
        ({"optimizer": torch.optim.AdamW}, ["torch.optim.AdamW", "0.001"]),
        ({"optimizer": torch.optim.Adafactor}, ["torch.optim.Adafactor", "0.01"]),
        ({"model": functools.partial(Net)}, ["tests.strangers.Net"]),
        ({"data": Points}, ["tests.strangers.Points"]),
        ({"data": (Points, functools.partial(Points, 7))}, ["tests.strangers.Points", None]),
        (
            {"criterion": functools.partial(nn.CrossEntropyLoss, ignore_index=3)},
            ["torch.nn.CrossEntropyLoss", "3"],
        ),
        ({"criterion": copy_of}, ["test_objects.copy_of", "true"]),
    ],
)
def test_what_can_be_imported_is_written_as_anybody_would_write_it(
    objects: dict[str, object], expected: list[str | None]
) -> None:
    """Its shortest address, and its arguments as keys; only what has no address is handed over."""
    given = added(**objects)
    values = [value for value in given.overrides.values() if value != "custom"]
    assert len(given.objects) == expected.count(None)
    for value in filter(None, expected):
        assert any(found.endswith(value) for found in values), (value, values)


def test_a_copy_shares_nothing_with_the_object_and_keeps_what_is_tied() -> None:
    """Weights that are one stay one, a lambda and a local class come along, and no gradient does."""
    scale = torch.tensor(2.0)

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
            self.second.weight = self.first.weight
            self.view = self.first.weight.detach()[0]
            self.activation = lambda x: x * scale

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.activation(self.first(x)))

    model, x = Tied(), torch.randn(2, 3)
    model(x).sum().backward()
    copied = copy_of(model)
    assert torch.equal(copied(x), model(x))
    assert copied.second.weight is copied.first.weight
    assert copied.view.data_ptr() == copied.first.weight.data_ptr() != model.view.data_ptr()
    assert copied.first.weight.grad is None


def scaled(factor: float) -> Callable[[Tensor], Tensor]:
    return lambda x: x * factor


def test_a_digest_changes_with_weights_numbers_and_code_and_with_nothing_else() -> None:
    """So that a sweep goes on with the same objects, made again, and never with others."""

    def net(hidden: int = 4, fill: float = 0.5, act: Any = torch.relu) -> nn.Module:
        model = nn.Sequential(nn.Linear(2, hidden), nn.ReLU())
        model[0].weight.data.fill_(fill)
        model[0].bias.data.zero_()
        model.act = act
        return model

    models = [net(), net(5), net(fill=0.6), net(act=scaled(1.0)), net(act=scaled(2.0))]
    models += [net(act=lambda x: x - 1.0), net(act=lambda x: x + 1.0)]
    assert len({digest(model=model) for model in models}) == len(models)
    assert digest(model=net(act=scaled(2.0))) == digest(model=net(act=scaled(2.0)))
    data = [[(torch.ones(2), n) for n in range(size)] for size in (3, 4)]
    data += [TensorDataset(torch.zeros(3, n)) for n in (2, 3)]
    assert len({digest(data=of) for of in data}) == len(data)
    assert digest(data=TensorDataset(torch.zeros(3, 2))) == digest(data=data[2])


TRAINED = Net()
INSTANCE = torch.optim.SGD(TRAINED.parameters(), lr=0.1, momentum=0.9)


@pytest.mark.parametrize(
    ("objects", "said"),
    [
        ({"model": 3}, "model=int: must be a torch.nn.Module, or a function that makes one"),
        ({"criterion": "mse"}, "criterion=str: must be a criterion of torch.nn"),
        ({"optimizer": "sgd"}, "optimizer=str: must be called with parameters"),
        (
            {"optimizer": INSTANCE},
            "how it is made: optimizer=functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9)",
        ),
        ({"optimizer": lambda p: torch.optim.SGD(TRAINED.parameters())}, "take them as the argument"),
        (
            {"model": TRAINED, "criterion": lambda model, batch: TRAINED(batch[0])},
            "holds weights of the model",
        ),
        ({"data": DataLoader([1, 2])}, "data.train: a DataLoader cuts its own batches"),
        ({"data": Stream()}, "Stream has no samples by index"),
        ({"data": (torch.zeros(3, 2), torch.zeros(4))}, "data.train: tensors of 3 and 4 samples"),
        ({"data": ([1], [2], [3])}, "data: a tuple of 3 is neither (train, eval) nor tensors"),
        ({"data": {"train": [1]}}, "data.train=dict: must be a map-style data set"),
        ({"data": ([1], 5)}, "data.eval=int: must be a map-style data set"),
        ({"data": Open()}, "cannot be given to the process that trains (TypeError"),
        ({"data": Open()}, "hand over a function that makes it"),
    ],
)
def test_what_cannot_be_handed_over_is_refused_with_the_way_out(
    objects: dict[str, object], said: str
) -> None:
    """In one line, before anything runs."""
    with pytest.raises(BadInputError) as refused:
        added(**objects)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


def test_an_optimizer_that_asks_for_names_is_given_pairs(tmp_path: Path) -> None:
    """As a target does that has an argument `named_parameters`; its other options are keys."""

    def no_decay(named_parameters: list[tuple[str, Tensor]], lr: float) -> torch.optim.Optimizer:
        groups = [
            {"params": [p], "weight_decay": 0.1 * (name != "bias")} for name, p in named_parameters
        ]
        return torch.optim.SGD(groups, lr=lr)

    given = added(optimizer=no_decay)
    target, digest = (given.overrides[key] for key in ("optimizer._target_", "+optimizer.digest"))
    assert target == handed_over.CALLED_WITH_NAMES
    handed_over.write(tmp_path, given.objects)
    with handed_over.looked_for_in(tmp_path):
        pairs = list(nn.Linear(2, 1).named_parameters())
        made = handed_over.called_with_names(pairs, name="a", digest=digest.strip("'"), lr=0.5)
    assert [(group["weight_decay"], group["lr"]) for group in made.param_groups] == [
        (0.1, 0.5),
        (0, 0.5),
    ]


def test_a_target_whose_sweep_is_over_says_so() -> None:
    """As where its configuration is run again from a shell."""
    with pytest.raises(BadInputError, match=r"a.Net .* is gone with its sweep; go on from there"):
        handed_over.itself(name="a.Net", digest="00")


def test_values_are_written_as_overrides_have_them() -> None:
    """Words that mean something else are quoted, and what a configuration cannot hold is refused."""
    values = [None, True, 2, 0.5, "cpu", "null", "1", "it's", [1, "a b"], (0.9, 0.95)]
    assert [written(value) for value in values] == [
        *("null", "true", "2", "0.5", "cpu", "'null'", "'1'", r"'it\'s'", "[1,'a b']", "[0.9,0.95]"),
    ]
    with pytest.raises(TypeError, match="cannot hold Tensor"):
        written(torch.ones(1))
