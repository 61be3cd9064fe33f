"""The modules of a model and of its loss, under names of their own."""

from collections import OrderedDict, defaultdict, deque, namedtuple
from typing import Any

import pytest
import torch
from torch import nn

from gaccum_exp.audit.rerun.sandbox import NamedModules, sandbox


class WithCriterion(nn.Module):
    """A model whose own part is called `criterion`."""

    def __init__(self) -> None:
        super().__init__()
        self.criterion = nn.Linear(2, 2)


def test_a_part_called_criterion_does_not_hide_behind_the_loss_functions() -> None:
    """Every parameter of both has a name, and none keeps a gradient in the sandbox."""
    model, criterion = WithCriterion(), nn.Linear(2, 2)
    every = [*model.parameters(), *criterion.parameters()]
    for parameter in every:
        parameter.grad = torch.ones_like(parameter)
    modules = NamedModules(model, criterion)
    assert list(modules.parameters()) == [
        *("criterion.weight", "criterion.bias", "criterion_.weight", "criterion_.bias")
    ]
    assert modules.compared == set(modules.parameters())
    with sandbox(modules) as copies:
        assert len(copies) == len(every)
        assert all(p.grad is None for p in every)
    assert all(p.grad is not None for p in every)


def test_a_sandbox_leaves_attributes_as_they_were() -> None:
    """Those set anew, added and deleted inside, and what stands inside an object of the user's."""

    class Meter:
        total = 0.0

    model: nn.Module = nn.Linear(2, 2)
    model.meter, model.seen = Meter(), [1]
    before = dict(vars(model))
    with sandbox(NamedModules(model)):
        model.meter.total = 1.0
        model.seen.append(2)
        model.added = 3
        del model.in_features
        model.register_buffer("late", torch.zeros(1))
    assert vars(model) == before
    assert (model.meter.total, model.seen) == (0.0, [1])
    assert not list(model.buffers())


Pair = namedtuple("Pair", ["one", "other"])


class Listed(list[Any]):
    """A list of somebody's own kind."""


@pytest.mark.parametrize(
    "of",
    [
        *(list, deque, Listed, tuple),
        *(lambda ts: Pair(*ts), lambda ts: OrderedDict(a=ts[0], b=ts[1])),
        *(lambda ts: dict(enumerate(ts)), lambda ts: defaultdict(int, enumerate(ts))),
    ],
    ids=["list", "deque", "own", "tuple", "named tuple", "ordered", "dict", "defaultdict"],
)
def test_tensors_in_any_container_are_copies(of: Any) -> None:
    """In float64, and what is written to them stays inside; a tensor that is held twice is one copy."""
    model: nn.Module = nn.Linear(2, 2)
    tensors = [torch.zeros(2), torch.ones(2)]
    model.kept, model.first = of(tensors), tensors[0]
    kept = model.kept
    with sandbox(NamedModules(model), dtype=torch.float64):
        inside = list(model.kept.values() if isinstance(model.kept, dict) else model.kept)
        assert type(model.kept) is type(kept)
        assert inside[0] is model.first
        for tensor in inside:
            assert tensor.dtype == torch.float64
            tensor.add_(1)
    assert model.kept is kept
    assert torch.equal(torch.stack(tensors), torch.tensor([[0.0, 0.0], [1.0, 1.0]]))
