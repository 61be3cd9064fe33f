"""Numbers about a whole gradient."""

import pytest
import torch
from torch import Tensor, nn

from gaccum_exp.core.gradient import gradient_norm


def parameters(*gradients: Tensor) -> list[nn.Parameter]:
    made = []
    for gradient in gradients:
        made.append(nn.Parameter(torch.zeros(gradient.shape, dtype=gradient.dtype)))
        made[-1].grad = gradient
    return made


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_the_norm_of_a_gradient_has_the_digits_of_float32_at_least(dtype: torch.dtype) -> None:
    """Of bfloat16 and float16 as well, alone and beside wider ones."""
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(size, generator=generator).to(dtype) for size in (300, 1000, 7)]
    wide = torch.randn(50, generator=generator)
    for gradients in (drawn, [*drawn, wide]):
        exact = torch.cat([g.double() for g in gradients]).norm()
        found = gradient_norm(parameters(*gradients))
        assert found.dtype in (torch.float32, torch.float64)
        assert float(found) == pytest.approx(float(exact), rel=1e-6)


def test_a_large_float16_gradient_has_a_finite_norm() -> None:
    """300 times 300 is beyond float16, and its root is not."""
    assert float(gradient_norm(parameters(torch.full((10,), 300.0).half()))) == pytest.approx(
        948.683, 1e-5
    )
