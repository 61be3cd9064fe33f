"""What the tests of the audit share: small models, windows, naive computations."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

FEATURES, HIDDEN, CLASSES = 5, 6, 3
CE = nn.CrossEntropyLoss()
Gradients = dict[str, Tensor]


class Fn(nn.Module):
    """A stranger's module that computes one function."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def net(*middle: nn.Module, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Sequential:
    """Return a small classifier with these modules in the middle; theirs are `1`, `2`, …"""
    torch.manual_seed(seed)
    first, last = nn.Linear(FEATURES, HIDDEN), nn.Linear(HIDDEN, CLASSES)
    return nn.Sequential(first, *middle, nn.Tanh(), last).to(dtype)


def window(
    *sizes: int, dtype: torch.dtype = torch.float32, seed: int = 1
) -> list[tuple[Tensor, Tensor]]:
    """Return micro-batches of these sizes, with inputs and labels."""
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(n, FEATURES, generator=generator).to(dtype),
            torch.randint(CLASSES, (n,), generator=generator),
        )
        for n in sizes
    ]


def wide(t: Tensor) -> Tensor:
    """Return the tensor in double precision, a complex one in both parts."""
    return t.to(torch.complex128) if t.is_complex() else t.double() if t.is_floating_point() else t


def gradients(model: nn.Module) -> Gradients:
    """Return the gradients that are there, dense, and in float64."""
    return {
        name: wide(
            p.grad.detach().to_dense() if p.grad.layout != torch.strided else p.grad.detach()
        ).clone()
        for name, p in model.named_parameters()
        if p.grad is not None
    }


def large_batch(model: nn.Module, loss: Callable[[Any], Tensor]) -> Gradients:
    """Return the gradient of a loss of the whole window, of a copy of the model in float64."""
    model = copy.deepcopy(model)._apply(wide)  # type: ignore[no-untyped-call]
    model.zero_grad()
    loss(model).backward()
    return or_zero(model)


def or_zero(model: nn.Module) -> Gradients:
    """Return the gradients of all that is trained, zero where there is none."""
    there = gradients(model)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    return {n: there.get(n, torch.zeros_like(wide(p.detach()))) for n, p in trained.items()}


def taken(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Gradients]:
    """Return a list that gets each gradient as the optimizer takes it."""
    found: list[Gradients] = []
    optimizer.register_step_pre_hook(lambda *_: found.append(or_zero(model)))
    return found


def relative(found: Gradients, expected: Gradients) -> float:
    """Return ‖found − expected‖ / ‖expected‖ over all parameters; 0 where both are zero."""
    assert found.keys() == expected.keys()
    gap = sum(float((found[k] - expected[k]).abs().square().sum()) for k in expected)
    size = sum(float(expected[k].abs().square().sum()) for k in expected)
    return float((gap / size) ** 0.5) if size else float("inf") if gap else 0.0


def naive(
    model: nn.Module,
    micro_batches: Sequence[tuple[Tensor, Tensor]],
    weights: Sequence[float],
    dtype: torch.dtype = torch.float64,
) -> Gradients:
    """Return Σ weightᵢ ∇Sᵢ of cross entropy sums, in a plain loop on a copy of the model."""
    model = copy.deepcopy(model).to(dtype)
    model.zero_grad()
    for (inputs, labels), weight in zip(micro_batches, weights, strict=True):
        loss = F.cross_entropy(model(inputs.to(dtype)), labels, reduction="sum")
        (loss * weight).backward()
    return gradients(model)


def whole(micro_batches: Sequence[tuple[Tensor, ...]], dim: int = 0) -> Any:
    """Return the large batch."""
    return tuple(torch.cat(part, dim) for part in zip(*micro_batches, strict=True))


def plain_loop(
    model: nn.Module, optimizer: torch.optim.Optimizer, micro_batches: Sequence[Any], loss: Any = CE
) -> None:
    """The seed's loop with a mean-reduced criterion: one window."""
    for inputs, labels in micro_batches:
        (loss(model(inputs), labels) / len(micro_batches)).backward()
    optimizer.step()
    optimizer.zero_grad()
