"""Complex numbers keep both their parts wherever precision changes, or a size is taken."""

import pytest
import torch
from torch import Tensor, nn

from gaccum_exp import accumulate_gradients
from gaccum_exp.core import gradient
from gaccum_exp.core.dtypes import in_precision, is_narrower, module_in_precision, wide
from gaccum_exp.core.losses.placement import Placement
from gaccum_exp.core.strategies import AccumulatorState, Buffered

C64, C128 = torch.complex64, torch.complex128
F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16


@pytest.mark.parametrize(
    ("own", "real", "made"),
    [
        (F32, F64, F64),
        (F32, BF16, BF16),
        (C64, F64, C128),
        (C128, F32, C64),
        (C64, BF16, C64),
        (C64, None, C64),
        (torch.int64, F64, torch.int64),
        (torch.bool, BF16, torch.bool),
    ],
)
def test_a_number_stays_of_its_kind_in_another_precision(
    own: torch.dtype, real: torch.dtype | None, made: torch.dtype
) -> None:
    """Complex ones stay complex, integers what they are."""
    assert in_precision(own, real) == made


def test_precisions_are_compared_and_not_sizes_in_memory() -> None:
    """complex64 has as many bytes as float64, and half its digits."""
    assert is_narrower(C64, F64)
    assert not is_narrower(C64, F32)
    assert not is_narrower(C128, F64)
    assert is_narrower(BF16, F32)


def complex_gradient(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "filter": torch.randn(5, 3, dtype=C64, generator=generator),
        "bias": torch.randn(4, generator=generator),
        "adjoint": torch.randn(6, dtype=C64, generator=generator).conj(),
    }


def numbers(of: dict[str, Tensor]) -> list[complex]:
    """Return the elements as Python has them, one by one."""
    return [complex(x) for name in sorted(of) for x in of[name].flatten().tolist()]


def test_norms_products_and_distances_are_those_of_both_parts() -> None:
    """Against sums over Python's complex numbers."""
    one, other = complex_gradient(0), complex_gradient(1)
    a, b = numbers(one), numbers(other)
    length = sum(abs(y) ** 2 for y in b) ** 0.5
    gap = sum(abs(x - y) ** 2 for x, y in zip(a, b, strict=True)) ** 0.5
    product = sum((x * y.conjugate()).real for x, y in zip(a, b, strict=True))
    assert gradient.norm(other) == pytest.approx(length, rel=1e-14)
    assert gradient.distance(one, other) == pytest.approx(gap / length, rel=1e-14)
    assert gradient.dot(one, other) == pytest.approx(product, rel=1e-13)
    parameters = [nn.Parameter(torch.zeros_like(g)) for g in other.values()]
    for parameter, g in zip(parameters, other.values(), strict=True):
        parameter.grad = g.resolve_conj()
    assert float(gradient.gradient_norm(parameters)) == pytest.approx(length, rel=1e-6)


def test_a_gradient_is_coarse_only_where_both_parts_are() -> None:
    """A real part of bfloat16's precision says nothing of the imaginary one."""
    part = torch.randn(8).bfloat16().float()
    assert gradient.coarse({"w": torch.complex(part, part)}, 4)
    assert not gradient.coarse({"w": torch.complex(part, torch.randn(8))}, 4)


def test_a_module_moves_to_a_precision_with_its_imaginary_parts() -> None:
    """torch's own `module.to(torch.float64)` drops them."""
    module = nn.Linear(2, 2, dtype=C64)
    module.register_buffer("count", torch.tensor(3))
    before = module.weight.detach().clone()
    moved = module_in_precision(module, None, F64)
    assert moved.weight.dtype == C128
    assert moved.count.dtype == torch.int64
    assert torch.equal(moved.weight.detach(), wide(before))


def test_inputs_are_placed_in_the_precision_of_the_weights() -> None:
    """complex64 samples in complex128 under float64, and as they are under bfloat16."""
    batch = torch.randn(2, dtype=C64), torch.randn(2), torch.arange(2)
    kinds = [[t.dtype for t in Placement(None, dtype=real).place(batch)] for real in (F64, BF16)]
    assert kinds == [[C128, F64, torch.int64], [C64, BF16, torch.int64]]


class Filter(nn.Module):
    """A filter of complex64 weights over Fourier coefficients, as neural operators have them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.randn(5, dtype=C64))

    def forward(self, x: Tensor) -> Tensor:
        return torch.fft.irfft(torch.fft.rfft(x) * self.weight, n=8)


def test_complex_micro_gradients_are_added_up_in_a_wider_buffer() -> None:
    """In float64's precision they are rounded once; in float32's none is needed."""
    window = [(1e-4**i * torch.randn(3, 8), torch.randn(3, 8)) for i in range(3)]
    model, micro = Filter(), [Filter() for _ in window]
    accumulate_gradients(model, nn.MSELoss(), window, reduction="sum", buffer_dtype=F64)
    for of, micro_batch in zip(micro, window, strict=True):
        accumulate_gradients(of, nn.MSELoss(), [micro_batch], reduction="sum")
    total = torch.stack([of.weight.grad.to(C128) for of in micro]).sum(0)  # type: ignore[union-attr]
    assert model.weight.grad is not None
    assert torch.equal(model.weight.grad, total.to(C64))
    with Buffered(F32).collecting(AccumulatorState([1]), [model.weight], rescaled=False):
        assert not model.weight._post_accumulate_grad_hooks


def test_gaps_are_visited_in_the_gradients_own_order() -> None:
    """A set's order differs between processes, and with it the last bit of what is added up."""
    one = {f"layer{i}": torch.ones(1) for i in range(40)}
    other = {f"layer{i}": torch.ones(1) for i in range(20, 60)}
    assert [name for name, _ in gradient.gaps(one, other)] == [f"layer{i}" for i in range(60)]
