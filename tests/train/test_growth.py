"""A batch that grows where the schedule would let the rate fall: in a training, and where it cannot."""

import copy
import logging
import math
from functools import lru_cache

import pytest
import torch
from torch import Tensor, nn

from gaccum_exp.arms.plan import predicted_peak
from gaccum_exp.audit.result import Audit
from gaccum_exp.errors import BadInputError
from gaccum_exp.tracking.records import RunRecord
from gaccum_exp.train import audits as certify
from gaccum_exp.train.build import build, load
from gaccum_exp.train.state import TrainState
from tests.program import Program
from tests.support import STRANGER, settings, trained

pytestmark = pytest.mark.usefixtures("undrawn")

COMMON = (
    *STRANGER, "data.global_batch_size=null", "data.micro_batch_size=2", "+data.train.samples=60",
    "scheduler=cosine", "audit.at_start=false", "train.epochs=3",
)  # fmt: skip
GROWING = (*COMMON, "accum.grow=auto", "accum.grow_to=6")


def weights(state: TrainState) -> Tensor:
    return torch.cat([p.detach().flatten() for p in state.parameters])


def cosine(done: float) -> float:
    return 0.5 + math.cos(math.pi * done) / 2


def by_hand(window_at: int) -> tuple[int, float]:
    """N from 1 to 6, and the rate of SGD over its peak, of the window at one of 180 samples."""
    alpha = cosine(window_at // 2 / 90)
    n = min(6, math.floor(1 / alpha + 1e-9))
    return n, n * alpha


OPTIMIZERS = {
    "sgd": ("optimizer=sgd", "optimizer.momentum=0.9", "optimizer.lr=0.1"),
    "adam": ("optimizer=adamw", "optimizer.lr=0.01"),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_it_is_the_training_written_out(kind: str) -> None:
    """Weights in float64 and every rate: SGD's is the cosine's times N, AdamW's times its root."""
    state, sink = trained(*GROWING, *OPTIMIZERS[kind])
    model = copy.deepcopy(build(settings(*GROWING, *OPTIMIZERS[kind])).model)
    lr = state.settings.optimizer["lr"]
    optimizer = (
        torch.optim.SGD(model.parameters(), lr, momentum=0.9)
        if kind == "sgd"
        else torch.optim.AdamW(model.parameters(), lr, weight_decay=0.01)
    )
    at, expected = 0, []
    for epoch_end in (60, 120, 180):
        while at < epoch_end:
            n, rate = by_hand(at)
            rate *= lr if kind == "sgd" else lr / math.sqrt(n)
            expected.append(rate)
            samples = min(2 * n, epoch_end - at)
            x, y = zip(*(state.train_data[index] for index in order()[at : at + samples]), strict=True)
            at += samples
            optimizer.param_groups[0]["lr"] = rate
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(torch.stack(x)), torch.tensor(y)).backward()
            optimizer.step()
    assert len(expected) < 60
    assert sink.curve("optim/lr") == pytest.approx(expected, rel=1e-12)
    assert torch.allclose(weights(state), nn.utils.parameters_to_vector(model.parameters()), rtol=1e-10)


@lru_cache
def order() -> list[int]:
    """The samples of the training at the first batch."""
    plan = load(settings(*COMMON)).plan
    return [index for step in range(90) for index in plan.indices(step).tolist()]


def test_until_n_changes_it_is_the_training_that_does_not_grow() -> None:
    """Bit for bit through the warm-up, and until the cosine has fallen to one half of the peak."""
    warm = ("scheduler=warmup_cosine", "scheduler.warmup_ratio=0.3", "optimizer=adamw")
    _, growing = trained(*GROWING, *warm)
    _, falling = trained(*COMMON, *warm)
    for curve, same in (("optim/lr", 59), ("train/loss", 60)):
        assert growing.curve(curve)[:59] == falling.curve(curve)[:59]
        assert growing.curve(curve)[same] != falling.curve(curve)[same]
    # N = 2 begins at an epoch's last window, of two samples, whose loss is added up in another order.
    assert growing.curve("train/loss")[59] == pytest.approx(falling.curve("train/loss")[59], rel=1e-12)
    assert len(growing.curve("train/loss")) < len(falling.curve("train/loss")) == 90


def test_a_length_in_steps_is_that_of_as_many_first_batches() -> None:
    """Their samples, of which the last window holds what is left."""
    state = build(settings(*GROWING, "train.epochs=null", "train.steps=50"))
    assert sum(state.plan.size(k) for k in range(state.total_steps)) == 100
    sizes = [state.plan.size(k) for k in range(state.total_steps)]
    assert sizes[-1] < sizes[-2]
    assert state.schedule_steps == 50


def test_windows_in_which_nothing_counts_pass_by_in_samples() -> None:
    """Each other window has the N and the rate of the sample at which it begins, also where the first
    ones are no steps."""
    nothing = ("data.train._target_=tests.train.test_growth.SomeIgnored", "accum.grow=sgd")
    _, sink = trained(*GROWING, *nothing)
    _, whole = trained(*GROWING, "accum.grow=sgd")
    rates = dict(zip(steps(whole), whole.curve("optim/lr"), strict=True))
    found = dict(zip(steps(sink), sink.curve("optim/lr"), strict=True))
    assert min(found) > 1
    assert len(found) < len(rates)
    assert found == {step: rates[step] for step in found}


def steps(sink: object) -> list[int]:
    return [p.global_step for p in sink.points if "optim/lr" in p.values]  # type: ignore[attr-defined]


class SomeIgnored(torch.utils.data.Dataset[tuple[Tensor, int]]):
    """Points, of which those do not count that come first in the first two epochs."""

    def __init__(self, samples: int) -> None:
        from tests.strangers import Points

        self.points = Points(samples)
        self.ignored = {*order()[:4], *order()[60:70]}

    def __len__(self) -> int:
        return len(self.points)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        x, y = self.points[index]
        return x, -100 if index in self.ignored else y


def test_a_window_is_audited_whenever_n_has_doubled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not at each of its six stages; on full windows."""
    found = []

    def note(state: TrainState, window: list[tuple[Tensor, Tensor]], global_step: int) -> Audit:
        found.append([len(y) for _, y in window])
        return Audit("equivalent", len(window), "global_mean")

    monkeypatch.setattr(certify, "audit", note)
    trained(*GROWING, "audit.at_start=true")
    assert found == [[2], [2] * 2, [2] * 4]
    assert len(build(settings(*GROWING)).stage_windows) >= 6


@pytest.mark.parametrize(
    ("optimizer", "rule"),
    [("SGD", "linear"), ("AdamW", "sqrt"), ("NAdam", "sqrt"), ("RMSprop", "sqrt")],
)
def test_auto_takes_the_optimizers_own_rule(optimizer: str, rule: str) -> None:
    """At four times the batch, four times the schedule's rate or twice."""
    named = ("optimizer=custom", f"optimizer._target_=torch.optim.{optimizer}", "optimizer.lr=0.01")
    loaded = load(settings(*GROWING, *named))
    assert loaded.growth is not None
    (at,) = (stage.start for stage in loaded.growth.stages if stage.global_batch_size == 8)
    assert loaded.growth.factors[at] == (4.0 if rule == "linear" else 2.0)


def test_the_rule_of_another_optimizer_is_followed_and_said(caplog: pytest.LogCaptureFixture) -> None:
    """For those who want to see what it does."""
    with caplog.at_level(logging.WARNING):
        load(settings(*GROWING, "accum.grow=sgd", "optimizer=adamw"))
    assert [record.message for record in caplog.records] == [
        "accum.grow=sgd is not the rule of AdamW, which is accum.grow=adam"
    ]


def test_the_data_set_bounds_n() -> None:
    """Without accum.grow_to a window holds all of it at most; under drop too, at any length."""
    for rule in ("exact", "carry", "drop"):
        state = build(settings(*COMMON, "accum.grow=auto", f"accum.partial_window={rule}"))
        assert state.settings.accum_steps <= 30
        assert state.plan.full_window <= 60
    state = build(settings(*COMMON, "accum.grow=auto", "train.epochs=40"))
    assert (state.settings.accum_steps, state.plan.full_window) == (30, 60)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("accum.grow=adamw",), r"accum\.grow=adamw: not one of null, auto, sgd, adam, did you mean"),
        (("accum.grow=null",), r"accum\.grow_to=6: no batch grows; accum\.grow=auto lets one grow"),
        (("scheduler=none",), r"grow=auto: the batch grows where .* no scheduler .* scheduler=cosine$"),
        (("accum.steps=6",), r"accum\.grow_to=6: must be above accum\.steps=6, the first N"),
        (
            ("accum.steps=auto",),
            r"=auto and accum\.grow=auto are both N: set accum\.steps to the first N",
        ),
        (
            ("accum.schedule={0:1,1:2}",),
            r"accum\.grow=auto and accum\.schedule=\{0:1,1:2\} are both N: set only one of them",
        ),
        (("accum.schedule_lr=sqrt",), r"accum\.schedule_lr=sqrt: there is no accum\.schedule"),
        (
            ("data.micro_batch_size=null", "data.global_batch_size=10", "accum.steps=4"),
            r"accum\.steps=4 does not divide data\.global_batch_size=10; set data\.micro_batch_size",
        ),
    ],
)
def test_what_contradicts_it_is_refused_before_anything_is_loaded(
    overrides: tuple[str, ...], said: str
) -> None:
    """In one line, with the way out."""
    with pytest.raises(BadInputError, match=said) as refused:
        settings(*GROWING, *overrides)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("optimizer=muon",), r"grow=auto: no rule is known for MuonWithAdamW; say accum\.grow=sgd"),
        (
            ("scheduler._target_=torch.optim.lr_scheduler.CosineAnnealingWarmRestarts",
             "+scheduler.T_0=30", "~scheduler.final_ratio"),
            r"CosineAnnealingWarmRestarts lets the learning rate rise again at step 30 of 90",
        ),
        (("optimizer.lr=0",), r"accum\.grow=auto: the learning rate is never above 0"),
        (("scheduler.final_ratio=0.8",), r"falls to 0\.8 of its peak, .* accum\.steps=4 at a quarter"),
        (("accum.steps=4", "data.micro_batch_size=15"), r"N can be no more than 4 with micro-batches"),
        (("accum.partial_window=error",), r"grow=auto: accum\.partial_window=error: .* becomes 4, the"),
    ],
)  # fmt: skip
def test_what_no_batch_can_follow_is_refused(overrides: tuple[str, ...], said: str) -> None:
    """In one line, with the way out."""
    with pytest.raises(BadInputError, match=said) as refused:
        load(settings(*GROWING, *overrides))
    assert "\n" not in str(refused.value)


class TwoRates(torch.optim.SGD):
    """Biases have a tenth of the rate, in a group of their own."""

    def __init__(self, params: list[Tensor], lr: float) -> None:
        parts = ([p for p in params if (p.ndim > 1) == matrices] for matrices in (True, False))
        super().__init__(
            [{"params": of, "lr": lr / by} for of, by in zip(parts, (1, 10), strict=True)], lr
        )


def test_one_batch_follows_groups_of_one_schedule_alone() -> None:
    """A cosine that multiplies the rates of both is one; a floor that both fall to is not."""
    two = (
        *GROWING,
        "optimizer=custom",
        "optimizer._target_=tests.train.test_growth.TwoRates",
        "optimizer.lr=0.1",
    )
    assert len(build(settings(*two)).optimizer.param_groups) == 2
    floor = ("scheduler=none", "scheduler._target_=torch.optim.lr_scheduler.CosineAnnealingLR",
             "+scheduler.T_max=90", "+scheduler.eta_min=0.005")  # fmt: skip
    with pytest.raises(
        BadInputError, match=r"grow=auto: at step \d+ the learning rate of .* group 2 is"
    ):
        build(settings(*two, *floor))


def test_the_predicted_peak_is_that_of_the_largest_n() -> None:
    """Not of the first, which holds no gradient beside its activations."""
    grown, fixed = settings(*GROWING), settings(*COMMON, "accum.steps=6")
    loaded = load(grown)
    ours, theirs = predicted_peak(loaded.in_stages(grown), loaded), predicted_peak(fixed, load(fixed))
    assert ours is not None
    assert theirs is not None
    assert ours.bytes == theirs.bytes


def test_arms_whose_batch_grows_from_another_one_are_not_paired() -> None:
    """Nor are they with one that does not grow: N and the micro-batch decide the windows."""

    def run(n: int, **tags: str) -> RunRecord:
        params = {"accum.steps": str(n), "data.micro_batch_size": str(8 // n),
                  "data.global_batch_size": "8", "accum.grow": "adam"}  # fmt: skip
        return RunRecord("r", "1", "r", "FINISHED", 0, params, tags, {})

    growing = {
        "accum.largest_steps": "16",
        "data.largest_global_batch_size": "64",
        "global_batches": "8, 64",
    }
    one, two = run(1, **growing), run(2, **growing)
    assert one.training_config != two.training_config
    assert (one.accum_steps, one.global_batch_size) == (16, 64)
    assert run(1).training_config == run(2).training_config


def test_a_sweep_over_it_has_an_arm_each_and_no_pairs(program: Program) -> None:
    """With the largest N and batch in the table, what it grew from in the parameters, and the stages."""
    ended = program(
        "-m", "accum.grow=null,auto", "accum.grow_to=null", *COMMON[:-1], "train.epochs=1",
        "runtime.device=cpu", "accum.steps=1", "hydra.sweep.dir=swept",
    )  # fmt: skip
    assert ended.status == 0, ended.plain
    flat, grown = sorted(program.arms(), key=lambda run: run.accum_steps or 0)
    assert (flat.accum_steps, flat.global_batch_size) == (1, 2)
    assert grown.params["accum.steps"] == "1"
    assert grown.params["data.global_batch_size"] == "2"
    assert grown.accum_steps is not None
    assert grown.accum_steps > 4
    assert grown.global_batch_size == 2 * grown.accum_steps
    assert grown.tags["role"] == "candidate"
    assert grown.name.startswith(f"grow=auto · N=1 to {grown.accum_steps} · micro 2")
    assert grown.tags["global_batches"].startswith("2 from step 0, 4 from step")
    table = (program.folder / "swept" / "comparison.csv").read_text()
    assert table.count("reference") <= 3, table
