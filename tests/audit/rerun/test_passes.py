"""Runs of a window: each follows from its description, and leaves nothing for the next."""

from dataclasses import FrozenInstanceError, replace

import pytest
import torch
from torch import nn

from gaccum_exp.audit.configured_window import ConfiguredWindow
from gaccum_exp.audit.rerun.passes import (
    ACCUMULATED,
    ACCUMULATED64,
    ONE_PASS,
    ONE_PASS64,
    RECORDING,
    Pass,
    Rerun,
)
from gaccum_exp.core.gradient import Gradient, add, distance, identical
from gaccum_exp.core.losses.criterion import as_loss_fn
from gaccum_exp.core.reductions import GLOBAL_MEAN
from tests.audit.support import CE, HIDDEN, naive, net, whole, window

SIZES = (4, 4, 3)
WAYS = (ACCUMULATED, ACCUMULATED64, ONE_PASS, ONE_PASS64)


def rerun_of(*middle: nn.Module) -> Rerun:
    loss_fn = as_loss_fn(CE, "global_mean")
    rerun = Rerun(ConfiguredWindow(net(*middle), loss_fn, window(*SIZES), GLOBAL_MEAN))
    rerun.gradient(RECORDING)
    return rerun


def test_each_description_gives_the_gradient_of_a_naive_loop() -> None:
    """Split or at once, in float32 or float64."""
    rerun, n = rerun_of(), sum(SIZES)
    for how in WAYS:
        dtype = torch.float64 if how.float64 else torch.float32
        parts = [whole(window(*SIZES))] if how.at_once else window(*SIZES)
        expected = naive(net(), parts, [1 / n] * len(parts), dtype)
        found = rerun.gradient(how)
        assert {g.dtype for g in found.values()} == {dtype}
        assert distance(found, expected) < (1e-14 if how.float64 else 1e-6)


def test_a_run_leaves_nothing_for_the_next() -> None:
    """Constant draws, other orders, buffers set back: the same description gives the same bits after."""
    norm = nn.BatchNorm1d(HIDDEN)
    rerun = rerun_of(norm, nn.Dropout())
    before = [rerun.gradient(how) for how in WAYS]
    others = (
        replace(ACCUMULATED64, draws="constant"),
        replace(ONE_PASS, order=torch.arange(sum(SIZES)).flip(0)),
        replace(ACCUMULATED64, state_held_of=(norm,)),
        replace(ACCUMULATED, summed_in_float64=True),
    )
    for other in others:
        rerun.gradient(other)
    assert all(identical(rerun.gradient(how), was) for how, was in zip(WAYS, before, strict=True))
    assert rerun.draws.not_replayed == []


def test_micro_gradients_add_up_to_the_sum_in_float64() -> None:
    """One by one, or added on the way."""
    rerun, total = rerun_of(nn.LayerNorm(HIDDEN)), Gradient()
    for micro in rerun.micro_gradients(ACCUMULATED, lambda gradient: gradient):
        add(total, micro)
    assert identical(total, rerun.gradient(replace(ACCUMULATED, summed_in_float64=True)))


def test_a_description_cannot_be_changed() -> None:
    """What a run was asked for is what it did."""
    with pytest.raises(FrozenInstanceError):
        Pass().float64 = True  # type: ignore[misc]  # that is the claim
