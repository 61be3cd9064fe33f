"""Constants that a loop multiplies its loss by, wherever it does, and what all its micro-batches share.

Every loop is measured against the loss of the whole window, taken by hand in float64.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.audit.loops import Stepped, stepped

D = torch.float64
N, SAMPLES = 3, 4


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def window(accum_steps: int = N) -> list[tuple[Tensor, Tensor]]:
    """Return micro-batches of which some labels are ignored, as many in each."""
    torch.manual_seed(1)
    labels = [torch.randint(3, (SAMPLES,)) for _ in range(accum_steps)]
    return [
        (torch.randn(SAMPLES, 6, dtype=D), torch.where(torch.arange(4) < 1, -100, y)) for y in labels
    ]


def whole(model: Any, accum_steps: int = N) -> Tensor:
    x, y = map(torch.cat, zip(*window(accum_steps), strict=True))
    return F.cross_entropy(model(x), y)


def divided_in_place(model: Any, x: Tensor, y: Tensor) -> Tensor:
    loss = F.cross_entropy(model(x), y)
    loss /= N
    return loss


def divided_by_method(model: Any, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y).div_(N)


COUNTED = sum(int((y >= 0).sum()) for _, y in window())


def times_n_in_place(model: Any, x: Tensor, y: Tensor) -> Tensor:
    """Take back the division by N that the trainer will do."""
    loss = F.cross_entropy(model(x), y, reduction="sum") / COUNTED
    loss *= N
    return loss


def judged(function: Callable[..., Tensor], by: float, accum_steps: int = N) -> Stepped:
    def passes(model: Any, _: Any) -> None:
        for x, y in window(accum_steps):
            (function(model, x, y) / by).backward()

    return stepped(net(), function, passes, lambda model: whole(model, accum_steps))


@pytest.mark.parametrize(
    ("function", "right", "wrong"),
    [(divided_in_place, 1, N), (divided_by_method, 1, N), (times_n_in_place, N, 1)],
)
def test_what_a_function_does_to_its_loss_in_place_is_counted_once(
    function: Callable[..., Tensor], right: int, wrong: int
) -> None:
    """Divided as it needs it a loop is sound, and divided once more, or once less, it is caught."""
    sound, faulty = judged(function, right), judged(function, wrong)
    assert sound.gap <= sound.rounding
    assert sound.audit.sound, str(sound.audit)
    assert faulty.gap > 0.1
    assert (faulty.audit.verdict, faulty.audit.cause) == ("biased", "loss scale"), str(faulty.audit)


def test_a_count_of_the_average_micro_batch_is_one_of_the_window() -> None:
    """The sum over (n / N), and over N, is the sum over n; over n and N it is not."""
    for count, by in ((torch.tensor(COUNTED / N, dtype=D), N), (torch.tensor(float(COUNTED)), N)):

        def passes(model: Any, _: Any, count: Tensor = count, by: int = by) -> None:
            for x, y in window():
                (F.cross_entropy(model(x), y, reduction="sum") / count / by).backward()

        found = stepped(net(), None, passes, whole)
        assert found.audit.sound == (found.gap <= found.rounding) == (count < COUNTED), str(found.audit)


def test_a_literal_two_is_said_where_it_may_be_n() -> None:
    """At N = 2 half a loss and a division by N are one number: it is taken as given, never silently."""

    def half(model: Any, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(model(x), y) / 2

    found = judged(half, 2, accum_steps=2)
    assert found.gap == pytest.approx(0.5)
    assert "0.5 in its source, as N would, which is taken as given" in found.audit.report()


@pytest.mark.parametrize("by", [1, N])
def test_hooks_that_scale_every_gradient_are_the_loops_division(by: int) -> None:
    """Gradients that are divided by N as they come need no division of the loss beside it."""

    def passes(model: Any, _: Any) -> None:
        handles = [p.register_hook(lambda g: g / N) for p in model.parameters()]
        for x, y in window():
            (F.cross_entropy(model(x), y) / by).backward()
        for handle in handles:
            handle.remove()

    found = stepped(net(), None, passes, whole)
    assert (found.gap <= found.rounding) == (by == 1)
    assert found.audit.sound == (by == 1), str(found.audit)


def test_a_mask_that_is_as_long_as_a_batch_is_shared() -> None:
    """What every micro-batch is given alike is tried as their own, and then as one for all."""

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.layer = nn.MultiheadAttention(6, 2, batch_first=True).double()

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            out: Tensor = self.layer(x, x, x, attn_mask=mask, need_weights=False)[0]
            return out

    torch.manual_seed(1)
    parts = [(torch.randn(3, 3, 6, dtype=D), torch.randn(3, 3, 6, dtype=D)) for _ in range(N)]
    causal = torch.triu(torch.ones(3, 3, dtype=torch.bool), 1)

    def passes(model: Any, _: Any) -> None:
        for x, y in parts:
            (F.mse_loss(model(x, causal), y) / N).backward()

    def large(model: Any) -> Tensor:
        x, y = map(torch.cat, zip(*parts, strict=True))
        return F.mse_loss(model(x, causal), y)

    found = stepped(Attention(), None, passes, large)
    assert found.gap <= found.rounding
    assert found.audit.sound, str(found.audit)


def test_no_verdict_is_taken_from_a_pass_that_depends_on_the_order_of_samples() -> None:
    """An index into the batch, as of mixup, means other samples when all are joined."""

    class Mixup(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = net()

        def forward(self, x: Tensor, partner: Tensor) -> Tensor:
            out: Tensor = self.inner(0.7 * x + 0.3 * x[partner])
            return out

    torch.manual_seed(2)
    parts = [(x, torch.randperm(SAMPLES), y) for x, y in window()]

    def passes(model: Any, _: Any) -> None:
        for x, partner, y in parts:
            (F.cross_entropy(model(x, partner), y) / N).backward()

    def large(model: Any) -> Tensor:
        every = [(x, partner + SAMPLES * i, y) for i, (x, partner, y) in enumerate(parts)]
        x, partner, y = map(torch.cat, zip(*every, strict=True))
        return F.cross_entropy(model(x, partner), y)

    found = stepped(Mixup(), None, passes, large)
    assert found.gap <= found.rounding
    assert found.audit.verdict in ("equivalent", "inconclusive"), str(found.audit)
