"""Training under strategies that put micro gradients into Adam's moments as they come."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from gaccum_exp import plan_memory
from gaccum_exp.arms import plan as planning
from gaccum_exp.core.adam_a import AdamA
from gaccum_exp.errors import BadInputError
from gaccum_exp.train.build import build, load
from gaccum_exp.train.loop import hooks_of
from tests.support import SMALL, STRANGER, Collected, settings, trained
from tests.train.checkpoint.resumes import Training, gone_on, stopped_at

QUIET = ("audit.at_start=false", "accum.steps=4")
WIDE = ("model=mlp", "model.hidden=[64,64,64]", "runtime.device=cpu", "train.steps=4",
        "data.global_batch_size=8", "optimizer=adamw")  # fmt: skip
POINTS = (*STRANGER, *QUIET, "train.steps=5", "optimizer=adamw", "data.global_batch_size=16")


@pytest.mark.parametrize("strategy", ["adam_a", "batch_size_invariant_adam"])
def test_a_run_says_that_it_is_another_optimizer_and_records_no_norm(strategy: str) -> None:
    """With a schedule, over partial windows; the arm of N = 1 is identical to the large batch."""
    of = (*SMALL, "optimizer=adamw", f"strategy={strategy}", "scheduler=cosine", "train.steps=3",
          "data.global_batch_size=600")  # fmt: skip
    if strategy != "adam_a":  # which has no partial windows
        of = (*of, "accum.partial_window=carry")
    (_, one), (state, four) = (trained(*of, f"accum.steps={n}") for n in (1, 4))
    assert one.tags["verdict"] == "identical"
    assert (four.tags["verdict"], four.tags["cause"]) == ("biased", "another optimizer")
    assert not four.curve("optim/grad_norm")
    assert len(four.curve("train/loss")) == len(four.curve("optim/lr")) == 3
    assert four.curve("train/loss")[0] == pytest.approx(one.curve("train/loss")[0], rel=1e-6)
    assert four.curve("train/loss")[1:] != one.curve("train/loss")[1:]
    assert state.optimizer.param_groups[0]["lr"] < 0.001


def test_memory_falls_by_the_gradients_and_that_is_predicted() -> None:
    """At N = 8, where the passes hold most: within 64 bytes what task=plan says, and the API as well."""
    held: dict[str, Any] = {}
    for strategy in ("in_place", "adam_a"):
        call = (*WIDE, f"strategy={strategy}", "accum.steps=8", "audit.at_start=false")
        configured = settings(*call)
        predicted = planning.predicted_peak(configured, load(configured))
        state, sink = trained(*call)
        held[strategy] = sink.last
        assert predicted is not None
        assert predicted.bytes == pytest.approx(sink.last["memory/peak_bytes"], abs=64)
    weights = sum(p.nbytes for p in state.parameters)
    # Of the gradients one layer's is there at a time.
    saved = held["in_place"]["memory/peak_bytes"] - held["adam_a"]["memory/peak_bytes"]
    assert saved > 0.5 * weights

    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3))
    batch = torch.randn(8, 64), torch.zeros(8, dtype=torch.long)
    planned = {
        name: plan_memory(
            model, nn.CrossEntropyLoss(), batch, torch.optim.AdamW, strategy=strategy
        ).row(8).peak.bytes
        for name, strategy in (("in place", "in_place"), ("AdamA", AdamA()))  # type: ignore[arg-type]
    }  # fmt: skip
    assert planned["in place"] - planned["AdamA"] > 0.4 * sum(p.nbytes for p in model.parameters())


@pytest.mark.parametrize(
    "overrides",
    [
        ("strategy=adam_a",),
        ("strategy=adam_a", "accum.reduction=mean"),
        ("strategy=batch_size_invariant_adam", "strategy.base_steps=2", "accum.partial_window=carry"),
    ],
)
def test_a_begun_window_goes_on_bit_for_bit_and_as_it_was_split(
    tmp_path: Path, overrides: tuple[str, ...]
) -> None:
    """Stopped after three of four micro-batches: what is in the moments is of the N that it had."""
    of = (*POINTS, *overrides)
    whole = Training(*of).train()
    stopped_at(tmp_path, (2, 3), *of)
    again, said = gone_on(tmp_path, *of)
    assert said is None
    assert torch.equal(again.weights, whole.weights)
    last = (*of, "train.steps=3")
    ended = Training(*last).train()
    other = tmp_path / "other"
    stopped_at(other, (2, 3), *last)
    finer, said = gone_on(other, *last, "accum.steps=8")
    assert said is None
    assert torch.equal(finer.weights, ended.weights)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (("accum.max_grad_norm=1.0",), r"accum\.max_grad_norm=1\.0 has no meaning under strategy="),
        (("runtime.precision=fp16",), r"runtime\.precision=fp16, with its GradScaler, has no meaning"),
        (("accum.on_oom=increase_steps",), r"accum\.on_oom=increase_steps has no meaning"),
        (("accum.buffer_dtype=float32",), r"accum\.buffer_dtype=float32 has no meaning"),
        (("strategy=batch_size_invariant_adam", "optimizer=sgd"), "is SGD: use optimizer=adamw"),
        (("optimizer=muon",), "is MuonWithAdamW: use optimizer=adamw"),
        (("+optimizer.fused=true",), r"optimizer\.fused=true"),
    ],
)
def test_what_has_no_meaning_is_refused_by_name(asked: tuple[str, ...], said: str) -> None:
    """In one line, before anything is trained."""
    with pytest.raises(BadInputError, match=said) as refusal:
        build(settings(*SMALL, "optimizer=adamw", "strategy=adam_a", *QUIET, *asked))
    assert "\n" not in str(refusal.value)


def test_a_noise_scale_is_refused() -> None:
    """No sum of micro gradients is held that each could be compared with."""
    of = settings(*POINTS, "strategy=adam_a", "noise.every_steps=1")
    state = build(of)
    hooks, _ = hooks_of(state, Collected(), progress=None)  # type: ignore[arg-type]
    with pytest.raises(BadInputError, match=r"noise.every_steps=1 is refused: under strategy=adam_a"):
        hooks.begin(state)


def test_compensated_sums_train_as_float32_buffers_do_for_as_much_memory() -> None:
    """bfloat16 weights: the same verdict, the same bytes, losses within a hundredth."""
    of = (*WIDE, "runtime.precision=bf16", "runtime.weight_dtype=same", "accum.steps=8")
    (_, buffered), (_, compensated), (_, plain) = (
        trained(*of, how)
        for how in ("accum.buffer_dtype=float32", "strategy=compensated", "strategy=in_place")
    )
    assert compensated.tags["verdict"] == buffered.tags["verdict"]
    assert compensated.curve("train/loss") == pytest.approx(buffered.curve("train/loss"), rel=0.01)
    peaks = [sink.last["memory/peak_bytes"] for sink in (plain, buffered, compensated)]
    assert peaks[0] < peaks[1]
    assert peaks[2] == pytest.approx(peaks[1], rel=0.03)
