"""The audit of a window under strategy=cached: one pass, and the same loss over the window's outputs."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gaccum_exp.audit.audit_window import audit_window
from gaccum_exp.core.cached import Cached
from gaccum_exp.core.strategies import IN_PLACE, InPlace
from gaccum_exp.errors import BadInputError
from tests.contrastive import InfoNCE, Normalised, Towers

WINDOW = list(
    zip(
        *(t.split([4, 4, 3]) for t in (torch.linspace(-2, 2, 22).view(11, 2).sin(), torch.zeros(11))),
        strict=True,
    )
)


def towers(dropout: float = 0.0) -> Towers:
    torch.manual_seed(0)
    return Towers(dropout)


def sampled(model: nn.Module, micro_batch: Any) -> tuple[Tensor, int]:
    """A loss that draws its negatives, once its outputs are there."""
    one, other = model(micro_batch[0])
    logits = one @ other[torch.randperm(len(other))].T
    return F.cross_entropy(logits, torch.arange(len(one)), reduction="sum"), len(one)


def several(model: nn.Module, micro_batch: Any) -> dict[str, Any]:
    """Terms of samples and of sums, counted late."""
    one, other = model(micro_batch[0])
    return {
        "near": ((one - other).square().sum(), (micro_batch[0][:, 0] > -0.5).sum()),
        "spread": (one.softmax(1).sum(0), len(one), 0.5, lambda mean: mean.square().sum()),
    }


class Careless(Cached):
    """Draws anew in the second pass."""

    def second_pass(self, *arguments: Any) -> None:
        torch.manual_seed(1)
        super().second_pass(*arguments)


class Forgetful(Cached):
    """Leaves out a micro-batch."""

    def second_pass(self, model: Any, loss_fn: Any, micro_batch: Any, *rest: Any) -> None:
        if len(micro_batch[0]) == 4:
            super().second_pass(model, loss_fn, micro_batch, *rest)


def test_a_loss_that_couples_samples_is_equivalent_under_the_strategy_alone() -> None:
    """In place it is biased, and the loss is to blame."""
    criterion = InfoNCE()
    found = audit_window(towers(), criterion, WINDOW, strategy=Cached())
    assert found.verdict == "equivalent"
    assert found.e64 is not None
    assert found.e64 < 1e-14
    names = {row.name for row in found.parameters}
    assert "criterion.temperature" in names

    def loss_fn(model: Any, micro_batch: Any) -> tuple[Tensor, int]:
        return criterion(*model(micro_batch[0]), micro_batch[1]) * len(micro_batch[0]), len(
            micro_batch[0]
        )

    in_place = audit_window(towers(), loss_fn, WINDOW, strategy=IN_PLACE)
    assert (in_place.verdict, in_place.cause) == ("biased", "loss not additive over samples")
    assert audit_window(towers(), loss_fn, WINDOW, strategy=Cached()).verdict == "equivalent"


def test_draws_of_both_passes_are_replayed() -> None:
    """Dropout is stochastic, and with the draws held the gradient is the large batch's."""
    found = audit_window(towers(0.3), InfoNCE(), WINDOW, strategy=Cached())
    assert (found.verdict, found.culprit) == ("stochastic", "one.2")
    assert found.e64 is not None
    assert found.e64 < 1e-14
    assert found.detail is None


@pytest.mark.parametrize("strategy", [IN_PLACE, Cached()])
@pytest.mark.parametrize(("dropout", "verdict"), [(0.0, "equivalent"), (0.3, "stochastic")])
def test_micro_batches_that_come_twice_are_told_apart(
    strategy: InPlace, dropout: float, verdict: str
) -> None:
    """In place terms are counted first, under the strategy outputs; and a window may hold one twice."""
    x = WINDOW[0][0]
    for window in (WINDOW, [WINDOW[0], WINDOW[2], WINDOW[0], WINDOW[0]], [x, x, WINDOW[2][0]]):
        bare = isinstance(window[0], Tensor)

        def loss_fn(model: nn.Module, micro_batch: Any, bare: bool = bare) -> Any:
            return several(model, (micro_batch,) if bare else micro_batch)

        found = audit_window(towers(dropout), loss_fn, window, strategy=strategy)
        assert found.verdict == verdict, str(found)
        assert found.e64 is not None
        assert found.e64 < 1e-14
        assert found.detail is None


@pytest.mark.parametrize(
    ("model", "strategy", "verdict"),
    [
        (towers(0.3), Careless(), "inconclusive"),
        (towers(), Forgetful(), "biased"),
    ],
)
def test_a_faulty_strategy_is_never_called_equivalent(
    model: nn.Module, strategy: Cached, verdict: str
) -> None:
    """Other draws in the second pass, and a micro-batch left out."""
    assert audit_window(model, InfoNCE(), WINDOW, strategy=strategy).verdict == verdict


def test_draws_of_the_loss_itself_are_never_called_equivalent() -> None:
    """The window's loss draws others than those of its micro-batches."""
    found = audit_window(towers(), sampled, WINDOW, strategy=Cached())
    assert not found.sound
    assert "the loss of the whole window draws" in str(found.detail)


def test_a_module_that_mixes_samples_is_refused_with_its_name() -> None:
    """As training does."""
    with pytest.raises(BadInputError, match=r"one\.1. \(BatchNorm1d\)"):
        audit_window(Normalised(), InfoNCE(), WINDOW, strategy=Cached())
