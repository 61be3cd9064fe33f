"""Training under strategy=cached: every N is the training of the large batch in one pass."""

from typing import Any

import pytest
import torch

from gaccum_exp.errors import BadInputError
from gaccum_exp.memory.storages import BudgetExceededError
from gaccum_exp.train.build import build
from gaccum_exp.train.state import TrainState
from gaccum_exp.train.step import take_step
from tests.contrastive import CONTRASTIVE
from tests.support import settings, trained

EXACT = "runtime.precision=fp64"


def weights(state: TrainState) -> torch.Tensor:
    return torch.cat([p.detach().double().flatten() for p in state.parameters])


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("accum.max_grad_norm=0.1",),
        ("optimizer=adamw",),
        ("optimizer=custom", "optimizer._target_=torch.optim.LBFGS", "+optimizer.max_iter=3"),
        ("accum.partial_window=carry", "accum.buffer_dtype=float32"),
        ("accum.reduction=sum", "accum.sum_scale=none", "criterion._target_=torch.nn.CrossEntropyLoss",
         "model._target_=tests.strangers.Net"),
    ],
)  # fmt: skip
def test_every_n_is_the_large_batchs_training(overrides: tuple[str, ...]) -> None:
    """Weights and loss curve, over windows of ten and of three samples; clipped, and with a closure."""
    (one, reference), *others = [
        trained(*CONTRASTIVE, EXACT, *overrides, f"accum.steps={n}") for n in (1, 3, 4)
    ]
    for state, sink in others:
        assert torch.allclose(weights(state), weights(one), rtol=1e-11, atol=1e-13)
        assert sink.curve("train/loss") == pytest.approx(reference.curve("train/loss"), rel=1e-12)
        assert sink.tags["verdict"] in ("equivalent", "identical")


@pytest.mark.parametrize(
    ("overrides", "tolerance"),
    [
        (("runtime.precision=bf16",), 0.02),
        (("runtime.precision=bf16", "runtime.weight_dtype=same", "accum.buffer_dtype=float32"), 0.05),
        (("runtime.precision=fp16",), 0.005),
        (("runtime.activation_checkpointing=true",), 1e-5),
    ],
)
def test_half_precision_and_checkpointing_follow_the_one_pass(
    overrides: tuple[str, ...], tolerance: float
) -> None:
    """As closely as their rounding lets them; under float16 with a GradScaler."""
    one, other = (trained(*CONTRASTIVE, *overrides, f"accum.steps={n}") for n in (1, 3))
    moved = weights(one[0]) - weights(build(settings(*CONTRASTIVE, *overrides)))
    assert (weights(one[0]) - weights(other[0])).norm() < tolerance * max(moved.norm(), 1.0)
    assert other[1].curve("train/loss") == pytest.approx(one[1].curve("train/loss"), rel=tolerance)


def test_a_window_without_memory_is_repeated_in_more_micro_batches(monkeypatch: Any) -> None:
    """In the second pass; the weights are those of a run that began so."""
    overrides = (*CONTRASTIVE, EXACT, "accum.on_oom=increase_steps")
    expected = weights(trained(*overrides, "accum.steps=4")[0])
    from gaccum_exp.core.cached import Cached

    second_pass = Cached.second_pass

    def scarce(self: Cached, model: Any, loss_fn: Any, micro_batch: Any, *rest: Any) -> None:
        if len(micro_batch[0]) > 4:
            raise BudgetExceededError("too much")
        second_pass(self, model, loss_fn, micro_batch, *rest)

    monkeypatch.setattr(Cached, "second_pass", scarce)
    state, sink = trained(*overrides, "accum.steps=2", "audit.at_start=false")
    assert sink.tags["accum.steps_used"] == "4"
    assert torch.allclose(weights(state), expected, rtol=1e-11, atol=1e-13)


def test_what_does_not_suit_the_strategy_ends_before_training() -> None:
    """A module that mixes samples, by name, unless N = 1; and the mean of means."""
    mixing = (*CONTRASTIVE, "model._target_=tests.contrastive.Normalised")
    with pytest.raises(BadInputError, match=r"one\.1. \(BatchNorm1d\)"):
        build(settings(*mixing, "accum.steps=2"))
    state = build(settings(*mixing))
    take_step(state, next(state.windows_from(0)))
    with pytest.raises(BadInputError, match=r"accum\.reduction=mean has no meaning"):
        build(settings(*CONTRASTIVE, "accum.reduction=mean"))
    with pytest.raises(BadInputError, match=r"strategy\._target_=.*gives InfoNCE, not a .*InPlace"):
        build(settings(*CONTRASTIVE, "strategy._target_=tests.contrastive.InfoNCE"))
