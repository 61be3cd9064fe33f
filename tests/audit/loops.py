"""Loops as people write them, sound and faulty, each of one optimizer step or two."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gaccum_exp import watch
from gaccum_exp.audit.result import Audit
from tests.audit.support import CE, large_batch, net, relative, taken

Pairs = Sequence[tuple[Tensor, Tensor]]
Loop = Callable[[nn.Module, torch.optim.Optimizer, Pairs], None]


def watched(
    loop: Loop, parts: Pairs, model: nn.Module | None = None, criterion: Any = CE, lr: float = 0.1
) -> Audit:
    """Return the audit of a loop of one optimizer step or more."""
    model = net() if model is None else model
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    with watch(model, criterion, optimizer) as audit:
        loop(model, optimizer, parts)
    return audit.worst


class Stepped(NamedTuple):
    """What `watch` says of a loop, and what is measured beside it."""

    audit: Any
    gap: float
    """How far the gradient that the optimizer took is off the large batch's in float64, relative."""
    rounding: float
    """What a sound loop may be off by."""


def stepped(
    model: nn.Module,
    criterion: Any,
    passes: Callable[[Any, Any], None],
    large: Callable[[Any], Tensor],
    most: float | None = None,
) -> Stepped:
    """Watch the passes of one window and its step, and measure it against the loss `large(model)`.

    The step is taken here, unless `passes` has taken it.
    Where the loop clips its gradient, `most` is the norm.
    """
    single = any(p.dtype in (torch.float32, torch.complex64) for p in model.parameters())
    expected = large_batch(model, large)
    if most is not None:
        norm = sum(float(g.square().sum()) for g in expected.values()) ** 0.5
        expected = {name: g * min(1.0, most / (norm + 1e-6)) for name, g in expected.items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    found = taken(model, optimizer)
    with watch(model, criterion, optimizer) as audit:
        passes(model, optimizer)
        if not found:
            optimizer.step()
    return Stepped(audit, relative(found[-1], expected), 1e-5 if single else 1e-12)


def looped(each: Callable[[nn.Module, Tensor, Tensor, Pairs], Tensor | None]) -> Loop:
    """Return the loop that back-propagates a loss per micro-batch, and steps."""

    def loop(model: nn.Module, optimizer: torch.optim.Optimizer, parts: Pairs) -> None:
        for inputs, labels in parts:
            loss = each(model, inputs, labels, parts)
            if loss is not None:
                loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return loop


def count(parts: Pairs) -> int:
    return sum(len(y) for _, y in parts)


def autocast(model: nn.Module, x: Tensor, y: Tensor, parts: Pairs) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return CE(model(x), y) * len(y) / count(parts)


def clipped(model: nn.Module, optimizer: torch.optim.Optimizer, parts: Pairs) -> None:
    for x, y in parts:
        (CE(model(x), y) * len(y) / count(parts)).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    optimizer.step()


def divided_afterwards(model: nn.Module, optimizer: torch.optim.Optimizer, parts: Pairs) -> None:
    for x, y in parts:
        F.cross_entropy(model(x), y, reduction="sum").backward()
    for parameter in model.parameters():
        parameter.grad /= count(parts)
    optimizer.step()


def two_losses(model: nn.Module, x: Tensor, y: Tensor, parts: Pairs) -> Tensor:
    out = model(x)
    return (CE(out, y) + 0.3 * CE(2 * out, y)) * len(y) / count(parts)


SOUND_LOOPS: dict[str, tuple[Loop, Any]] = {
    "weighed by size": (looped(lambda m, x, y, w: CE(m(x), y) * len(y) / count(w)), CE),
    "sums over the count": (
        looped(lambda m, x, y, w: F.cross_entropy(m(x), y, reduction="sum") / count(w)),
        F.cross_entropy,
    ),
    "a loss found by itself": (
        looped(lambda m, x, y, w: F.cross_entropy(m(x), y) * len(y) / count(w)),
        None,
    ),
    "autocast": (looped(autocast), CE),
    "clipped once": (clipped, CE),
    "divided afterwards": (divided_afterwards, F.cross_entropy),
    "two losses": (looped(two_losses), CE),
    "something between": (looped(lambda m, x, y, w: CE(m(x) * 2 - 1, y) * len(y) / count(w)), CE),
}
FAULTY_LOOPS: dict[str, Loop] = {
    "not divided": looped(lambda m, x, y, w: CE(m(x), y)),
    "divided twice": looped(lambda m, x, y, w: CE(m(x), y) / len(w) ** 2),
    "mean of means": looped(lambda m, x, y, w: CE(m(x), y) / len(w)),
    "divided by more": looped(lambda m, x, y, w: CE(m(x), y) * len(y) / count(w) / 2),
    "weighed by place": looped(lambda m, x, y, w: CE(m(x), y) * (1 if x is w[0][0] else 0.5)),
}


def faulty_loop(name: str) -> Loop:
    return FAULTY_LOOPS[name] if name in FAULTY_LOOPS else AROUND[name]


def zeroed_inside(model: nn.Module, optimizer: torch.optim.Optimizer, parts: Pairs) -> None:
    for x, y in parts:
        optimizer.zero_grad()
        (CE(model(x), y) / len(parts)).backward()
    optimizer.step()


def clipped_inside(model: nn.Module, optimizer: torch.optim.Optimizer, parts: Pairs) -> None:
    for x, y in parts:
        (CE(model(x), y) * len(y) / count(parts)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.05)
    optimizer.step()


def never_zeroed(model: nn.Module, optimizer: torch.optim.Optimizer, parts: Pairs) -> None:
    for _ in range(2):
        for x, y in parts:
            (CE(model(x), y) * len(y) / count(parts)).backward()
        optimizer.step()


def stepped_inside(model: nn.Module, optimizer: torch.optim.Optimizer, parts: Pairs) -> None:
    for x, y in parts:
        (CE(model(x), y) * len(y) / count(parts)).backward()
        optimizer.step()


AROUND: dict[str, Loop] = {
    "zeroed inside": zeroed_inside,
    "clipped inside": clipped_inside,
    "never zeroed": never_zeroed,
    "stepped inside": stepped_inside,
}
