"""float16: the loss is scaled, and a window whose gradient overflows is no step and no measure."""

import copy
import math
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from gaccum_exp.errors import BadInputError
from gaccum_exp.tracking.progress import Progress
from gaccum_exp.train.audits import audit
from gaccum_exp.train.build import build
from gaccum_exp.train.state import TrainState
from tests.audit.test_untouched import same
from tests.support import STRANGER, Collected, settings, step_at, train_to_end, trained

FP16 = "runtime.precision=fp16"
POINTS = (*STRANGER, "data.global_batch_size=8")
LOUD = (*POINTS, "model._target_=tests.strangers.Loud", "+model.amplitude=30", FP16)
"""Its gradient overflows at the first loss scale, 65536, and no more at a smaller one."""
OVERFLOWING = (*POINTS, "model._target_=tests.strangers.Overflowing", FP16)
HOPELESS = (*POINTS, "model._target_=tests.strangers.Loud", "+model.amplitude=1e9", FP16)
"""Its inputs are infinite in float16, whatever the loss is scaled by."""


def weights(experiment: TrainState) -> list[Tensor]:
    return [p.detach().clone() for p in experiment.parameters]


def steps_of(*overrides: str) -> tuple[list[Mapping[str, Any]], list[bool], TrainState]:
    """Train window by window; return each one's metrics, and whether it moved any weight."""
    experiment = build(settings(*overrides))
    values, moved = [], []
    for step, window in enumerate(experiment.windows_from(0)):
        before = weights(experiment)
        values.append(step_at(experiment, window, step))
        moved.append(not all(map(torch.equal, before, weights(experiment))))
    return values, moved, experiment


def run(*overrides: str) -> Collected:
    """Train to the end, which may be an error; return what was recorded."""
    experiment, sink = build(settings(*overrides)), Collected()
    with Progress("test", experiment.total_steps) as progress:
        try:
            train_to_end(experiment, sink, progress)
        finally:
            sink.deliver()
    return sink


ADAMW = ("optimizer=custom", "optimizer._target_=torch.optim.AdamW")
OPTIMIZERS = {
    "sgd": (),
    "adamw": (*ADAMW, "+optimizer.foreach=false"),
    "fused adamw": (*ADAMW, "+optimizer.fused=true"),
}


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_window_whose_gradient_overflows_moves_neither_weights_nor_schedule(
    optimizer: str, n: int
) -> None:
    """Bit for bit; it says so, its loss scale is halved for the next, and later windows are steps."""
    common = (*LOUD, *OPTIMIZERS[optimizer], "scheduler=cosine", "train.steps=9",
              "optimizer.lr=1e-4", f"accum.steps={n}")  # fmt: skip
    values, moved, _ = steps_of(*common)
    skipped = [v["optim/skipped"] for v in values]
    first = skipped.index(0.0)
    assert 1 <= first <= 6
    assert skipped == [1.0] * first + [0.0] * (9 - first)
    assert moved == [not s for s in skipped]
    scales = [v["optim/loss_scale"] for v in values]
    assert scales == [65536.0 * 0.5 ** min(step, first) for step in range(9)]
    half_cosine = [0.5 + math.cos(math.pi * k / 9) / 2 for k in range(9)]
    rates = [v["optim/lr"] / values[0]["optim/lr"] for v in values]
    assert rates == pytest.approx([1.0] * first + half_cosine[: 9 - first])


def test_skipped_windows_are_counted_and_their_infinite_numbers_left_out() -> None:
    """The loss of a skipped window is finite here, and stays; its gradient's norm is not."""
    _, sink = trained(*LOUD, "train.steps=9", "accum.steps=2")
    skipped = sink.curve("optim/skipped")
    assert sink.curve("train/skipped_windows") == [sum(skipped)] != [0.0]
    assert len(sink.curve("train/loss")) == 9
    assert len(sink.curve("optim/grad_norm")) == 9 - sum(skipped)
    assert all(map(math.isfinite, sink.curve("optim/grad_norm")))


def test_a_loss_that_is_not_finite_is_left_out_and_does_not_end_the_run() -> None:
    """Once, in the fourth pass; in float32 it would have ended it."""
    _, sink = trained(*OVERFLOWING, "train.steps=9", "audit.at_start=false")
    assert [p.global_step for p in sink.points if "train/loss" in p.values] == [1, 2, 3, 5, 6, 7, 8, 9]
    assert sink.curve("train/skipped_windows") == [1.0]
    assert sink.curve("optim/loss_scale") == [65536.0] * 4 + [32768.0] * 5


def test_where_every_window_is_skipped_there_is_no_training_that_could_be_called_finished() -> None:
    """Nor where the others are empty; and it is said in one sentence."""
    with pytest.raises(BadInputError, match=r"^runtime\.precision=fp16: no window had a finite grad"):
        run(*HOPELESS, "train.steps=4")
    ignored = ("data.train._target_=tests.strangers.Ignored", "data.global_batch_size=1")
    with pytest.raises(BadInputError, match="no window had a finite gradient, so none was a step"):
        run(*HOPELESS, *ignored, "train.epochs=1")


def test_a_loss_scale_that_has_sunk_to_zero_ends_the_run() -> None:
    """2^16 is halved to nothing in 166 windows, and no later one could be a step."""
    with pytest.raises(BadInputError, match="loss scale has sunk to 0 after 167 windows without"):
        run(*HOPELESS, "train.steps=400", "audit.at_start=false")


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("clip", ["null", "0.01"])
def test_the_gradient_is_unscaled_once_a_window_and_before_it_is_clipped(n: int, clip: str) -> None:
    """Against the same window in float32: norm, and the step that SGD makes of it."""
    overrides = (*POINTS, "model._target_=tests.strangers.Loud", "optimizer.momentum=0",
                 f"accum.max_grad_norm={clip}")  # fmt: skip
    exact = build(settings(*overrides))
    half = build(settings(*overrides, FP16, f"accum.steps={n}"))
    before = torch.cat([p.flatten() for p in weights(exact)])
    steps, norms = [], []
    for experiment in (exact, half):
        norms.append(step_at(experiment, next(experiment.windows_from(0)), 0)["optim/grad_norm"])
        steps.append(torch.cat([p.flatten() for p in weights(experiment)]) - before)
    assert float(norms[1]) == pytest.approx(float(norms[0]), rel=2e-3)
    assert (steps[1] - steps[0]).norm() < 2e-3 * steps[0].norm()
    clipped = 1.0 if clip == "null" else float(clip) / float(norms[0])
    assert float(steps[0].norm()) == pytest.approx(0.1 * float(norms[0]) * clipped, rel=1e-3)


def test_memory_is_that_of_a_step_where_the_first_windows_are_none() -> None:
    """The peak of a run that skips three windows is that of one that skips none."""
    adamw = (*OPTIMIZERS["adamw"], "train.steps=12", "audit.at_start=false")
    peaks = []
    for amplitude in (1, 30):
        _, sink = trained(*LOUD, *adamw, f"model.amplitude={amplitude}")
        # Not the process's resident set: what else this process did before is in it.
        peaks.append(
            {k: v for k, v in sink.last.items() if k.startswith("memory/") and "resident" not in k}
        )
    assert sink.last["train/skipped_windows"] >= 3
    assert peaks[0] == peaks[1] != {}
    assert peaks[0]["memory/optimizer_state_bytes"] > 0


def test_an_audit_whose_gradient_overflows_takes_a_smaller_loss_scale_and_says_so() -> None:
    """As the scaler will; the norms are of the gradient itself, whatever it was scaled by."""
    for amplitude, said in (
        (30, r"at a loss scale of 4096, since the gradient overflows at 65536"),
        (1, None),
    ):
        experiment = build(settings(*LOUD, f"model.amplitude={amplitude}", "accum.steps=3"))
        found = audit(experiment, next(experiment.windows_from(0)), 0)
        assert (found.verdict, found.detail) == ("equivalent", said)
        assert found.e64 is not None
        assert found.e64 < 1e-12
        twin = build(settings(*LOUD, f"model.amplitude={amplitude}", "runtime.precision=fp32"))
        norm = float(step_at(twin, next(twin.windows_from(0)), 0)["optim/grad_norm"])
        assert math.hypot(*(row.norm for row in found.parameters)) == pytest.approx(norm, rel=1e-2)


def test_an_audit_of_what_overflows_at_any_scale_is_inconclusive() -> None:
    """And ends."""
    experiment = build(settings(*HOPELESS, "accum.steps=2"))
    found = audit(experiment, next(experiment.windows_from(0)), 0)
    assert (found.verdict, found.detail) == ("inconclusive", "the gradient is not finite")


PRECISIONS = {
    "bf16": ("runtime.precision=bf16",),
    "fp16": (FP16,),
    "pure bf16": ("runtime.precision=bf16", "runtime.weight_dtype=same", "accum.buffer_dtype=float32"),
}


def state_of(experiment: TrainState) -> list[Any]:
    """Everything that an audit could have moved."""
    scaler = {} if experiment.scaler is None else experiment.scaler.state_dict()
    states = [dict(experiment.model.state_dict()), experiment.optimizer.state_dict(), scaler]
    gradients = [p.grad for p in experiment.parameters]
    draws = [torch.get_rng_state(), random.getstate(), np.random.get_state()]
    return copy.deepcopy([*states, gradients, draws])


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_training_in_half_precision_ends_bit_for_bit_as_without_its_audits(precision: str) -> None:
    """Weights, statistics, optimizer, loss scale and growth tracker, gradients and random state."""
    common = (*POINTS, "model._target_=tests.train.test_loss_scale.Disturbed", *PRECISIONS[precision],
              "train.steps=7", "accum.steps=3", "optimizer=adamw")  # fmt: skip
    ends, curves = [], []
    for audits in ("audit.at_start=false", "audit.at_start=true", "audit.every_steps=1"):
        random.seed(0)
        np.random.seed(0)
        experiment, sink = trained(*common, audits)
        ends.append(state_of(experiment))
        curves.append(sink.curve("train/loss"))
    assert same(ends[1], ends[0])
    assert same(ends[2], ends[0])
    assert curves[0] == curves[1] == curves[2]
    if precision == "fp16":
        halved = int(math.log2(65536 / ends[0][2]["scale"]))
        assert ends[0][2]["_growth_tracker"] == 7 - halved < 7
    window = next(experiment.windows_from(0))
    before = state_of(experiment)
    assert audit(experiment, window, 0).e64 is not None
    assert same(state_of(experiment), before)


class Disturbed(nn.Module):
    """Everything that an audit could disturb: running statistics, random draws, a loss scale."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.BatchNorm1d(2), nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 2) -> logits (batch, 3)."""
        normed = self.norm(x.to(self.linear.weight.dtype))
        return self.linear(nn.functional.dropout(normed, 0.3, self.training) * 60)
