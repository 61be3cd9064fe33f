"""State beside gradients: a pass that is taken twice, to count a window, moves it once."""

from collections import Counter, OrderedDict, defaultdict
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gaccum_exp import accumulate_gradients
from gaccum_exp.core.module_state import ObjectState

D = torch.float64


class Kept(nn.Module):
    """A model with a buffer that shows one number at several places, and one that each pass moves."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2, dtype=D)
        self.register_buffer("scale", torch.full((1,), 2.0, dtype=D).expand(2))
        self.register_buffer("seen", torch.zeros((), dtype=D))

    def forward(self, x: Tensor) -> Tensor:
        self.seen += len(x)
        out: Tensor = self.layer(x) * self.scale
        return out


class Distilled:
    """A loss of one term, which is counted late, against a teacher's outputs."""

    def __init__(self, teacher: nn.Module) -> None:
        self.teacher = teacher

    def __call__(self, model: nn.Module, x: Tensor) -> dict[str, tuple[Tensor, float]]:
        with torch.no_grad():
            target = self.teacher(x).clone()
        return {"distance": ((model(x) - target).square().sum(), float(len(x)))}


@pytest.fixture
def window() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(n, 3, generator=generator, dtype=D) for n in (4, 1, 2)]


def test_an_expanded_buffer_is_no_obstacle(window: list[Tensor]) -> None:
    """It cannot be written to, and so need not be put back: gradient and counter are a naive loop's."""
    torch.manual_seed(0)
    model, teacher = Kept(), nn.Linear(3, 2, dtype=D)
    accumulate_gradients(model, Distilled(teacher), window)
    found = model.layer.weight.grad
    assert found is not None
    assert float(model.seen) == 7
    (expected,) = torch.autograd.grad(
        sum((model(x) - teacher(x).detach()).square().sum() for x in window) / 7, [model.layer.weight]
    )
    assert torch.allclose(found, expected, rtol=1e-13)


def test_a_teacher_made_under_inference_mode_is_no_obstacle(window: list[Tensor]) -> None:
    """Its tensors count no versions, and nothing outside that mode moves them."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2, dtype=D)
    with torch.inference_mode():
        teacher = nn.Linear(3, 2, dtype=D).requires_grad_(False)
    loss = accumulate_gradients(model, Distilled(teacher), window).mean
    with torch.no_grad():
        expected = sum(float((model(x) - teacher(x)).square().sum()) for x in window) / 7
    assert float(loss) == pytest.approx(expected, rel=1e-13)


def test_parameters_that_are_not_stepped_are_kept_where_asked() -> None:
    """A moving average of weights is state, too; what an optimizer steps is not."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    stepped = {id(p) for p in model[0].parameters()}
    states = [ObjectState(layer, stepped) for layer in model]
    before = [layer.weight.clone() for layer in model]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    for state in states:
        state.put_back()
    assert torch.equal(model[0].weight, before[0] + 1)
    assert torch.equal(model[1].weight, before[1])


@pytest.mark.parametrize("kind", [dict, Counter, OrderedDict, lambda: defaultdict(float)])
def test_a_counter_of_any_kind_counts_each_pass_once(window: list[Tensor], kind: Any) -> None:
    """Three micro-batches, two of which run twice, are three."""

    class Counting(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            self.seen["passes"] = self.seen.get("passes", 0) + 1
            return super().forward(x)

    model: Any = Counting(3, 2, dtype=D)
    model.seen = kept = kind()
    accumulate_gradients(model, Distilled(nn.Linear(3, 2, dtype=D)), window)
    assert model.seen is kept
    assert dict(kept) == {"passes": 3}


@pytest.mark.parametrize("of", [list, tuple, lambda ms: dict(enumerate(ms))])
def test_modules_in_a_list_that_a_loss_function_holds_are_put_back(
    window: list[Tensor], of: Any
) -> None:
    """Teachers' statistics move once for each micro-batch."""
    teachers = of([nn.BatchNorm1d(3, affine=False, dtype=D) for _ in range(2)])

    def loss(model: nn.Module, x: Tensor) -> dict[str, tuple[Tensor, float]]:
        every = teachers.values() if isinstance(teachers, dict) else teachers
        target = torch.stack([teacher(x) for teacher in every]).mean()
        return {"distance": ((model(x) - target).square().sum(), float(len(x)))}

    accumulate_gradients(nn.Linear(3, 2, dtype=D), loss, [x for x in window if len(x) > 1] * 2)
    every = teachers.values() if isinstance(teachers, dict) else teachers
    assert [int(teacher.num_batches_tracked) for teacher in every] == [4, 4]
