"""Losses that take gradients themselves, as a gradient penalty (Gulrajani et al. 2017) does."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gaccum_exp import accumulate_gradients
from gaccum_exp.audit.audit_window import audit_window
from gaccum_exp.core.cached import Cached
from gaccum_exp.core.modes import without_graph
from gaccum_exp.errors import BadInputError

F64 = torch.float64


def net(dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Linear(4, 6), nn.Dropout(dropout), nn.Tanh(), nn.Linear(6, 3)
    return nn.Sequential(*layers).double()


def window(sizes: tuple[int, ...] = (3, 2, 2)) -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(1)
    return [
        (torch.randn(n, 4, generator=g, dtype=F64), torch.randint(0, 3, (n,), generator=g))
        for n in sizes
    ]


def by_inputs(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    outputs = model(x)
    (slope,) = torch.autograd.grad(outputs.sum(), x, create_graph=True)
    return outputs, (slope.norm(dim=1) - 1).square()


def by_backward(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """A saliency taken by a backward pass of its own, as a constant."""
    outputs = model(x)
    copy = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(model(copy).square().sum(), copy)
    return outputs, slope.abs().sum(1) * outputs[:, 0].square()


def pair(model: nn.Module, micro_batch: Any, of: Any = by_inputs) -> Any:
    outputs, penalty = of(model, micro_batch[0])
    return F.cross_entropy(outputs, micro_batch[1], reduction="sum") + penalty.sum(), len(outputs)


def terms(model: nn.Module, micro_batch: Any, of: Any = by_inputs) -> Any:
    outputs, penalty = of(model, micro_batch[0])
    ce = F.cross_entropy(outputs, micro_batch[1], reduction="sum")
    balance = outputs.softmax(1).sum(0), len(outputs), 0.5, lambda p: p.square().sum()
    kept = (micro_batch[1] > 0).sum()
    return {"ce": (ce, len(outputs)), "gp": (penalty.sum(), kept + 1, 10.0), "balance": balance}


@pytest.mark.parametrize("of", [by_inputs, by_backward])
def test_terms_that_are_counted_late_may_take_gradients(of: Any) -> None:
    """The pass that counts has a graph then; its gradient is the large batch's."""
    large, small = net(), net()
    micro_batches = window()
    whole = tuple(torch.cat(column) for column in zip(*micro_batches, strict=True))
    found = terms(large, whole, of)
    kept = sum(int((y > 0).sum()) + 1 for _, y in micro_batches)
    balance = found["balance"][3](found["balance"][0] / 7)
    (found["ce"][0] / 7 + 10 * found["gp"][0] / kept + 0.5 * balance).backward()
    accumulate_gradients(small, lambda m, b: terms(m, b, of), micro_batches)
    for one, other in zip(small.parameters(), large.parameters(), strict=True):
        assert torch.allclose(one.grad, other.grad, rtol=1e-11, atol=1e-14)  # type: ignore[arg-type]


def test_the_counting_pass_begins_anew_with_the_same_draws() -> None:
    """With dropout the window draws what it draws where everything is counted beforehand."""

    class Counted:
        def __call__(self, model: nn.Module, micro_batch: Any) -> Any:
            return {name: term for name, term in terms(model, micro_batch).items() if name != "balance"}

        def count(self, micro_batch: Any) -> Any:
            return {"ce": len(micro_batch[1]), "gp": int((micro_batch[1] > 0).sum()) + 1}

    grads = []
    for loss_fn in (Counted(), Counted().__call__):
        model = net(0.5)
        torch.manual_seed(7)
        accumulate_gradients(model, loss_fn, window())
        grads.append([p.grad for p in model.parameters()])
    for one, other in zip(*grads, strict=True):
        assert torch.allclose(one, other, rtol=1e-12)  # type: ignore[arg-type]


@pytest.mark.parametrize("of", [by_inputs, by_backward])
@pytest.mark.parametrize("loss_fn", [pair, terms])
def test_a_penalty_is_audited(loss_fn: Any, of: Any) -> None:
    """The forward passes that the audit compares modules in have a graph where they need one."""
    sized = (3, 3) if loss_fn is terms else (3, 2, 2)

    def counted(model: nn.Module, micro_batch: Any) -> Any:
        found = loss_fn(model, micro_batch, of)
        if isinstance(found, dict):
            found["gp"] = (found["gp"][0], len(micro_batch[1]), 10.0)
        return found

    audit = audit_window(net(), counted, window(sized))
    assert audit.verdict == "equivalent", repr(audit)
    assert audit_window(net(), counted, window((4,))).verdict == "identical"


@pytest.mark.parametrize("of", [by_inputs, by_backward])
def test_cached_refuses_a_penalty_by_name(of: Any) -> None:
    """It is no function of the outputs."""
    loss_fn = lambda m, b: pair(m, b, of)  # noqa: E731
    with pytest.raises(BadInputError, match=r"strategy=cached is refused: .*gradient penalty.*in_place"):
        accumulate_gradients(net(), loss_fn, window(), strategy="cached")
    with pytest.raises(BadInputError, match=r"strategy=cached is refused: .*gradient penalty"):
        audit_window(net(), loss_fn, window(), strategy=Cached())


def test_another_error_is_not_asked_for_twice() -> None:
    """Only what asks for a graph is run again with one."""
    calls: list[bool] = []

    def failing() -> None:
        calls.append(torch.is_grad_enabled())
        raise RuntimeError("out of memory, say")

    with pytest.raises(RuntimeError, match="say"):
        without_graph(failing)
    assert calls == [False]
