"""Compensated sums of micro gradients in bfloat16, against Kahan's by hand and float32 buffers."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gaccum_exp import accumulate_gradients
from gaccum_exp.core.accumulate import accumulate
from gaccum_exp.core.compensated import Compensated
from gaccum_exp.core.losses.criterion import as_loss_fn
from gaccum_exp.core.reductions import reduction_named
from gaccum_exp.core.strategies import AccumulatorState
from gaccum_exp.errors import BadInputError


def model(dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).to(dtype)


def window(n: int, dtype: torch.dtype = torch.bfloat16) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(1, 6, generator=generator).to(dtype), torch.randint(4, (1,), generator=generator))
        for _ in range(n)
    ]


def loss_of(of: nn.Module, part: Any) -> Tensor:
    return F.cross_entropy(of(part[0]).float(), part[1], reduction="sum")


def late(of: nn.Module, part: Any) -> tuple[Tensor, float]:
    """A loss whose denominator is known only after the forward pass."""
    return loss_of(of, part), float(len(part[1]))


def kahan(of: nn.Module, parts: list[Any], divisor: float) -> list[Tensor]:
    """Return the sums of the micro gradients, every operation rounded to the parameters' type."""
    sums: list[Tensor] = []
    lost: list[Tensor] = []
    for part in parts:
        alone = copy.deepcopy(of)
        (loss_of(alone, part) / divisor).backward()
        gradients = [p.grad for p in alone.parameters() if p.grad is not None]
        if not sums:
            sums, lost = gradients, [torch.zeros_like(g) for g in gradients]
            continue
        for i, g in enumerate(gradients):
            y = g - lost[i]
            t = sums[i] + y
            lost[i] = (t - sums[i]) - y
            sums[i] = t
    return sums


def grads(of: nn.Module) -> list[Tensor]:
    return [p.grad for p in of.parameters() if p.grad is not None]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_are_kahans_bit_for_bit(dtype: torch.dtype) -> None:
    """Of 40 micro-batches, and what was in `.grad` before is added to them."""
    of, parts = model(dtype), window(40, dtype)
    expected = kahan(of, parts, 40)
    accumulate_gradients(of, nn.CrossEntropyLoss(), parts, strategy="compensated")
    assert all(torch.equal(a, b) for a, b in zip(grads(of), expected, strict=True))
    assert not any(p._post_accumulate_grad_hooks for p in of.parameters())
    accumulate_gradients(of, nn.CrossEntropyLoss(), parts, strategy="compensated")
    assert all(torch.equal(a, b + b) for a, b in zip(grads(of), expected, strict=True))


def test_it_is_as_near_as_a_float32_buffer_and_no_nearer() -> None:
    """512 micro-batches: within a fifth of that one's error, of which plain bfloat16 has five times."""
    parts = window(512)
    exact = model().double()
    for x, y in parts:
        (F.cross_entropy(exact(x.double()), y) / 512).backward()
    errors = {}
    for name, how in {
        "plain": {},
        "compensated": {"strategy": Compensated()},
        "float32": {"buffer_dtype": torch.float32},
    }.items():
        of = model()
        accumulate_gradients(of, nn.CrossEntropyLoss(), parts, **how)  # type: ignore[arg-type]
        gaps = [(a.double() - b).norm() for a, b in zip(grads(of), grads(exact), strict=True)]
        errors[name] = float(torch.stack(gaps).norm())
    assert errors["compensated"] == pytest.approx(errors["float32"], rel=0.2), errors
    assert errors["plain"] > 5 * errors["compensated"], errors


def test_wider_parameters_are_added_up_in_place() -> None:
    """Bit for bit, in float32."""
    of, plain = model(torch.float32), model(torch.float32)
    for each, how in ((of, "compensated"), (plain, "in_place")):
        parts = window(9, torch.float32)
        accumulate_gradients(each, nn.CrossEntropyLoss(), parts, strategy=how)  # type: ignore[arg-type]
    assert all(torch.equal(a, b) for a, b in zip(grads(of), grads(plain), strict=True))


def test_a_window_counted_late_is_rescaled_once() -> None:
    """By a power of two, which rounds nothing; one in which nothing counts leaves no gradient."""
    of = model()
    halves = [(torch.cat([x, x]), torch.cat([y, y])) for x, y in window(1)] + window(6)
    expected = kahan(of, halves, 14.0)  # the first one's count of 2, times 7, stands in for all of 8
    accumulate_gradients(of, late, halves, strategy="compensated")
    for got, total in zip(grads(of), expected, strict=True):
        assert torch.equal(got, total * (14.0 / 8.0))
    nothing = model()
    accumulate_gradients(
        nothing, lambda m, part: (loss_of(m, part), 0.0), window(3), strategy="compensated"
    )
    assert not grads(nothing)


def test_a_window_that_is_interrupted_goes_on_with_its_compensation() -> None:
    """Bit for bit, from after any micro-batch."""
    parts, loss_fn = window(6), as_loss_fn(nn.CrossEntropyLoss(), "global_mean")
    whole, kept = model(), []
    names = {p: name for name, p in whole.named_parameters()}
    how = reduction_named("global_mean"), Compensated()
    accumulate(whole, loss_fn, parts, *how, after=lambda s: kept.append(s.state_dict(names)))
    for held in kept:
        again = model()
        begun = AccumulatorState.from_state_dict(held, dict(again.named_parameters()))
        accumulate(again, loss_fn, parts, *how, begun=begun)
        assert all(torch.equal(a, b) for a, b in zip(grads(again), grads(whole), strict=True))


def test_what_it_does_not_add_up_is_refused() -> None:
    """Sparse gradients, and buffers of another type."""
    of = nn.Embedding(4, 2, sparse=True).bfloat16()

    def loss_fn(m: nn.Module, rows: Tensor) -> tuple[Tensor, int]:
        return m(rows).float().sum(), len(rows)

    with pytest.raises(BadInputError, match=r"is sparse: use sparse=False"):
        accumulate_gradients(of, loss_fn, [torch.tensor([0, 1])] * 2, strategy="compensated")
    with pytest.raises(BadInputError, match=r"two ways to add micro gradients up"):
        accumulate_gradients(
            of, loss_fn, [torch.tensor([0])], strategy="compensated", buffer_dtype=torch.float32
        )
