"""The reductions' formulas, each against the one pass that it says it equals."""

import pytest
import torch
from torch import Tensor, nn

from gaccum_exp import accumulate_gradients
from gaccum_exp.core.reductions import GlobalMean, Mean, Sum, reduction_named, stacked

COUNTS = (3.0, 1.0, 4.0)


@pytest.mark.parametrize("name", ["global_mean", "mean", "sum"])
def test_the_divisors_are_those_of_the_formulas(name: str) -> None:
    """n, N·nᵢ and a constant."""
    reduction = reduction_named(name, 5.0 if name == "sum" else 1.0)
    expected = {"global_mean": [8.0] * 3, "mean": [9.0, 3.0, 12.0], "sum": [5.0] * 3}[name]
    assert [reduction.divisor(n, 8.0, 3) for n in COUNTS] == expected
    assert reduction.name == name


def gradient(sizes: list[int], name: str, constant: float) -> Tensor:
    """The gradient of a linear model on the same eight samples, split so."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2).double()
    x, y = torch.randn(8, 3, dtype=torch.float64), torch.randint(2, (8,))
    window = list(zip(x.split(sizes), y.split(sizes), strict=True))
    accumulate_gradients(model, nn.CrossEntropyLoss(), window, reduction=name, sum_divisor=constant)  # type: ignore[arg-type]
    assert model.weight.grad is not None
    return model.weight.grad


@pytest.mark.parametrize(("name", "constant"), [("global_mean", 1.0), ("mean", 1.0), ("sum", 5.0)])
def test_one_pass_is_so_many_times_the_mean_gradient(name: str, constant: float) -> None:
    """As the reduction says; and so is the split window, where the reduction needs no equal parts."""
    mean = gradient([8], "mean", 1.0)
    reduction = reduction_named(name, constant)
    factor = reduction.one_pass_factor(8.0)
    assert torch.allclose(gradient([8], name, constant), factor * mean, rtol=1e-12)
    split = gradient([3, 1, 4], name, constant)
    assert torch.allclose(split, factor * mean, rtol=1e-12) is not reduction.needs_equal_parts
    assert torch.allclose(gradient([4, 4], name, constant), factor * mean, rtol=1e-12)


def test_a_begun_window_goes_on_at_another_n_but_under_mean() -> None:
    """Its 1/N is spent; the others' divisors do not depend on N."""
    for reduction in (GlobalMean(), Mean(), Sum(2.0)):
        independent = reduction.divisor(3.0, 8.0, 2) == reduction.divisor(3.0, 8.0, 4)
        assert reduction.splits_again is independent


def test_the_constant_of_a_sum_follows_the_batch_of_its_stage() -> None:
    """The literal sum has none to follow."""
    assert Sum(8.0).at_batch_share(0.25).divisor(1.0, None, 1) == 2.0
    assert Sum().at_batch_share(0.25).divisor(1.0, None, 1) == 1.0
    mean = Mean()
    assert mean.at_batch_share(0.25) is mean


def test_models_trained_as_one_have_each_its_own_divisor() -> None:
    """The same formulas on tensors (models,)."""
    counts, totals = torch.tensor([3.0, 2.0]), torch.tensor([8.0, 6.0])
    several = stacked([Sum(4.0), Sum(7.0)])
    assert torch.as_tensor(several.divisor(counts, totals, 2)).tolist() == [4.0, 7.0]
    assert torch.as_tensor(stacked([Mean(), Mean()]).divisor(counts, totals, 2)).tolist() == [6.0, 4.0]
    of_all = stacked([GlobalMean(), GlobalMean()])
    assert torch.as_tensor(of_all.divisor(counts, totals, 2)).tolist() == [8.0, 6.0]


@pytest.mark.parametrize(
    ("name", "constant", "why"), [("median", 1.0, "not one of"), ("mean", 2.0, "has no meaning")]
)
def test_what_is_no_reduction_is_refused(name: str, constant: float, why: str) -> None:
    """With the names that there are, and a constant only for the sum."""
    with pytest.raises(ValueError, match=why):
        reduction_named(name, constant)
