"""The cause that is found for a window's gradient, where several things move in it."""

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gaccum_exp import watch
from gaccum_exp.audit.verdict import remedy_of_counts

D = torch.float64


class Centred(nn.Module):
    """Distance to a centre that every call moves."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate
        self.register_buffer("centre", torch.full((2,), rate, dtype=D))

    def forward(self, output: Tensor) -> Tensor:
        loss = (output * self.centre.clone()).sigmoid().mean()
        with torch.no_grad():
            self.centre.mul_(1 - self.rate).add_(output.detach().square().mean(0))
        return loss


def hidden(*rates: float) -> Callable[[Tensor], Tensor]:
    """Return a loss that calls modules which nothing outside it shows."""
    held = SimpleNamespace(calls=[Centred(rate) for rate in rates])
    return lambda output: sum((call(output) for call in held.calls), torch.zeros((), dtype=D))


@pytest.mark.parametrize("rates", [(0.3,), (0.3, 0.6)])
@pytest.mark.parametrize("normed", [False, True], ids=["plain", "with a frozen norm"])
def test_states_that_move_together_are_not_laid_at_the_models_door(
    rates: tuple[float, ...], normed: bool
) -> None:
    """No one of them, held alone, makes the gradient right: all have to be, and the model's need not."""
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(3, dtype=D).eval()
    model = nn.Sequential(*[norm] * normed, nn.Linear(3, 2, dtype=D))
    criterion, optimizer = hidden(*rates), torch.optim.SGD(model.parameters(), lr=0.1)
    with watch(model, criterion, optimizer) as audit:
        for x in torch.randn(3, 4, 3, dtype=D):
            (criterion(F.silu(model(x))) / 3).backward()
        optimizer.step()
    assert audit.verdict == "biased"
    assert (audit.culprit, audit.culprit_type) == ("beside the model", "Centred")


def test_counts_are_said_whole() -> None:
    """Pixels and tokens are many, and a reader compares them with their own."""
    said = remedy_of_counts([4, 4], [15616.0, 7424.5])
    assert said.startswith("micro-batches count 15616, 7424 in their loss")
