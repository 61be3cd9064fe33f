"""The audit of strategies that take the optimizer's step themselves: by that step."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gaccum_exp import accumulate_gradients
from gaccum_exp.audit.audit_window import audit_window
from gaccum_exp.core.adam_a import AdamA
from gaccum_exp.core.batch_size_invariant_adam import BatchSizeInvariantAdam
from gaccum_exp.core.strategies import AccumulatorState

SIZES = [4, 3, 2]


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    samples = sum(SIZES)
    return torch.randn(samples, 5, generator=generator), torch.randint(
        3, (samples,), generator=generator
    )


def window() -> list[tuple[Tensor, Tensor]]:
    return list(zip(*(t.split(SIZES) for t in batch()), strict=True))


def net(*between: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), *between, nn.Tanh(), nn.Linear(6, 3))


def bound(strategy: AdamA, model: nn.Module) -> AdamA:
    """Return the strategy for an optimizer that has taken two steps."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, eps=1e-4, weight_decay=0.1)
    for _ in range(2):
        accumulate_gradients(model, nn.CrossEntropyLoss(), window())
        optimizer.step()
        optimizer.zero_grad()
    return strategy.for_optimizer(optimizer)


class AtTheEnd(AdamA):
    """Holds the window's gradient, and gives it to the moments at the end: it is Adam."""

    @contextmanager
    def collecting(
        self, state: AccumulatorState, parameters: Sequence[nn.Parameter], *, rescaled: bool
    ) -> Iterator[None]:
        yield
        held = [(p, p.grad) for p in parameters]
        for parameter in parameters:
            parameter.grad = None
        with super().collecting(state, parameters, rescaled=rescaled):
            for parameter, parameter.grad in held:
                self._fold(state, parameter)


def step_by_hand(of: nn.Module, optimizer: Any, gradients: Sequence[list[Tensor]]) -> Tensor:
    """Return the step from the optimizer's moments with the squares of these gradients added up."""
    steps = []
    for i, p in enumerate(of.parameters()):
        state, mine = optimizer.state[p], [gradient[i] for gradient in gradients]
        m = 0.9 * state["exp_avg"].double() + 0.1 * sum(mine)
        v = 0.999 * state["exp_avg_sq"].double() + 0.001 * sum(g**2 for g in mine)
        root = (v / (1 - 0.999**3)).sqrt() + 1e-4
        steps.append((m / (1 - 0.9**3) / root).flatten())
    return torch.cat(steps)


def test_the_step_of_adam_a_is_compared_with_adams_from_the_present_moments() -> None:
    """By hand in float64 the same distance; weights, moments and gradients stay bit for bit."""
    model = net()
    strategy = bound(AdamA(), model)
    before = copy.deepcopy([*model.parameters(), *strategy.optimizer.state.values()])
    found = audit_window(model, nn.CrossEntropyLoss(), window(), strategy=strategy)
    after = [*model.parameters(), *strategy.optimizer.state.values()]
    for one, other in zip(before, after, strict=True):
        ours, theirs = ([of] if isinstance(of, Tensor) else [*of.values()] for of in (one, other))
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert all(p.grad is None for p in model.parameters())

    exact = copy.deepcopy(model).double()
    gradients = []
    for x, y in window():
        loss = F.cross_entropy(exact(x.double()), y, reduction="sum") / sum(SIZES)
        gradients.append(list(torch.autograd.grad(loss, list(exact.parameters()))))
    whole = [sum(parts) for parts in zip(*gradients, strict=True)]
    of, one = (step_by_hand(model, strategy.optimizer, given) for given in (gradients, [whole]))
    assert found.e64 == pytest.approx(float((of - one).norm() / one.norm()), rel=1e-9)
    assert (found.verdict, found.cause) == ("biased", "another optimizer")
    assert found.e == pytest.approx(found.e64, rel=1e-4)
    assert found.floor is not None
    assert found.floor < 1e-5
    assert found.scale == pytest.approx(1.0)
    assert "strategy=in_place takes the large batch's step" in str(found.remedy)
    assert "e64, e and floor are of the optimizer's step" in str(found.detail)


def test_a_strategy_that_takes_adams_step_is_equivalent() -> None:
    """It is the step that is judged, and not the strategy's name."""
    model = net()
    found = audit_window(model, nn.CrossEntropyLoss(), window(), strategy=bound(AtTheEnd(), model))
    assert (found.verdict, found.cause, found.remedy) == ("equivalent", None, None)


@pytest.mark.parametrize(
    ("between", "cause"),
    [(nn.BatchNorm1d(6), "batch statistics"), (nn.Dropout(0.3), "another optimizer")],
    ids=["batch norm", "dropout"],
)
def test_what_biases_the_gradient_itself_is_said_first(between: nn.Module, cause: str) -> None:
    """Draws are held: then the step is another in its expectation too."""
    model = net(between)
    found = audit_window(model, nn.CrossEntropyLoss(), window(), strategy=bound(AdamA(), model))
    assert (found.verdict, found.cause) == ("biased", cause)


def test_with_one_micro_batch_it_is_the_large_batch_unless_the_rate_is_scaled() -> None:
    """Of `base_steps` = 2 one micro-batch is half a window."""
    for strategy, verdict in (
        (AdamA(), "identical"),
        (BatchSizeInvariantAdam(), "identical"),
        (BatchSizeInvariantAdam(2), "biased"),
    ):
        model = net()
        found = audit_window(model, nn.CrossEntropyLoss(), [batch()], strategy=bound(strategy, model))
        assert found.verdict == verdict
    assert found.e64 == pytest.approx(0.5, rel=0.2)
