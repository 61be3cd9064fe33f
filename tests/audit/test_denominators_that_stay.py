"""Denominators that are the same whatever a micro-batch holds: what is said of their windows."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gaccum_exp.audit.audit_window import audit_window
from gaccum_exp.core.reductions import reduction_named

F64 = torch.float64


class Constant(nn.Module):
    """Divides its sum by a constant."""

    reduction = "mean"

    def __init__(self, by: float = 64.0) -> None:
        super().__init__()
        self.by = by

    def forward(self, o: Tensor, t: Tensor) -> Tensor:
        total = F.cross_entropy(o, t, reduction="sum")
        return total if self.reduction == "sum" else total / self.by


def audited(loss_fn: Any, reduction: Any = "global_mean", sizes: tuple[int, ...] = (3, 2, 2)) -> Any:
    torch.manual_seed(0)
    model = nn.Linear(4, 3).double()
    window = [(torch.randn(n, 4, dtype=F64), torch.randint(0, 3, (n,))) for n in sizes]
    return audit_window(model, loss_fn, window, reduction=reduction_named(reduction))


def mean_over_one(model: nn.Module, micro_batch: Any) -> Any:
    return F.cross_entropy(model(micro_batch[0]), micro_batch[1]), 1


def square_mean_over_eight(model: nn.Module, micro_batch: Any) -> Any:
    return model(micro_batch[0]).square().mean(), 8.0


@pytest.mark.parametrize("loss_fn", [mean_over_one, square_mean_over_eight])
def test_means_that_are_called_sums_are_unequal_denominators(loss_fn: Any) -> None:
    """They are weighed alike and hold unlike many samples; of equal ones the mean is right."""
    audit = audited(loss_fn)
    assert (audit.verdict, audit.cause) == ("biased", "unequal denominators")
    assert "3, 2, 2 samples" in audit.remedy
    assert "sum" in audit.remedy
    assert audited(loss_fn, "mean", (2, 2, 2)).verdict == "equivalent"


def test_a_coupling_loss_over_one_still_couples() -> None:
    """The denominator alone is no proof: weighed by samples these are not the large batch's."""

    def contrastive(model: nn.Module, micro_batch: Any) -> Any:
        o = model(micro_batch[0])
        return F.cross_entropy(o @ o.flip(1).T, torch.arange(len(o))), 1

    assert audited(contrastive).cause == "loss not additive over samples"


@pytest.mark.parametrize("loss_fn", [
    Constant(), Constant(0.5), lambda m, b: (F.cross_entropy(m(b[0]), b[1], reduction="sum"), 64),
])  # fmt: skip
def test_a_constant_divisor_under_mean_is_not_called_divided_twice(loss_fn: Any) -> None:
    """There the division by N is the only one that is too many."""
    audit = audited(loss_fn, "mean")
    assert (audit.verdict, audit.cause) == ("biased", "loss scale")
    assert "constant" in audit.remedy
    assert "global_mean" in audit.remedy
    assert "twice" not in audit.remedy


def test_a_loss_that_divides_by_n_itself_still_divides_twice() -> None:
    """Under mean, with denominators that do add up."""

    def divided(model: nn.Module, micro_batch: Any) -> Any:
        n = len(micro_batch[1])
        return F.cross_entropy(model(micro_batch[0]), micro_batch[1], reduction="sum") / (7 / n), n

    assert "constant" not in str(audited(divided, "mean").remedy)
