"""N that changes in training: what it does to windows, learning rate, audits and measurements."""

import copy
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from gaccum_exp.audit.result import Audit
from gaccum_exp.errors import BadInputError
from gaccum_exp.train import audits as certify
from gaccum_exp.train.build import build
from gaccum_exp.train.state import TrainState
from tests.support import STRANGER, Collected, settings, step_at, trained

MICRO_OF_4 = ("data.global_batch_size=null", "data.micro_batch_size=4", "+data.train.samples=22")
GROWING = (*MICRO_OF_4, "accum.schedule={0:1,2:2,4:4}")


def weights(experiment: TrainState) -> Tensor:
    return torch.cat([p.detach().flatten() for p in experiment.parameters])


def seen(*overrides: str) -> list[list[int]]:
    """The sizes of every window's micro-batches."""
    experiment = build(settings(*STRANGER, *overrides))
    return [[len(y) for _, y in window] for window in experiment.windows_from(0)]


def test_where_micro_batches_are_fixed_the_global_batch_grows_with_n() -> None:
    """From its epochs on; what an epoch leaves over is split as evenly as possible."""
    small = [[4]] * 5 + [[2]]
    middle = [[4, 4], [4, 4], [3, 3]]
    large = [[4, 4, 4, 4], [2, 2, 1, 1]]
    assert seen(*GROWING, "train.epochs=6") == 2 * small + 2 * middle + 2 * large


def test_stages_may_begin_at_a_step() -> None:
    """In the middle of an epoch, whose rest is then cut anew."""
    by_step = (*MICRO_OF_4, "accum.schedule_by=step", "accum.schedule={0:1,2:2,3:4}")
    assert seen(*by_step, "train.steps=5") == [[4], [4], [4, 4], [2, 2, 1, 1], [4, 4, 4, 4]]


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("rule", ["exact", "carry", "drop"])
def test_where_the_global_batch_is_fixed_a_schedule_changes_no_weight(rule: str, optimizer: str) -> None:
    """Only how windows are split: in float64 it ends where N = 1 does."""
    common = ("data.global_batch_size=7", "+data.train.samples=23", f"optimizer={optimizer}",
              f"accum.partial_window={rule}", "train.epochs=4")  # fmt: skip
    scheduled = (*common, "accum.schedule={0:1,1:3,2:5}")
    assert {1, 3, 5} <= set(map(len, seen(*scheduled)))
    experiment, _ = trained(*STRANGER, *scheduled)
    reference, _ = trained(*STRANGER, *common)
    assert torch.allclose(weights(experiment), weights(reference), rtol=1e-11, atol=1e-12)


FACTORS: dict[str, Callable[[float], float]] = {
    "none": lambda share: 1.0,
    "linear": lambda share: share,
    "sqrt": math.sqrt,
}


@pytest.mark.parametrize("scheduler", ["none", "cosine"])
@pytest.mark.parametrize("rule", FACTORS)
def test_the_learning_rate_follows_the_global_batch_as_asked(rule: str, scheduler: str) -> None:
    """Against SGD written out: the schedule's own rate, times what the batch is of the largest."""
    common = (*STRANGER, *GROWING, f"accum.schedule_lr={rule}", f"scheduler={scheduler}",
              "train.epochs=5", "optimizer.momentum=0")  # fmt: skip
    twin = build(settings(*common))
    model = copy.deepcopy(twin.model)
    rates = []
    stages = [4] * 12 + [8] * 6 + [16] * 2
    for step, (window, size) in enumerate(zip(twin.windows_from(0), stages, strict=True)):
        cosine = 0.5 + math.cos(math.pi * step / 20) / 2 if scheduler == "cosine" else 1.0
        rates.append(0.1 * cosine * FACTORS[rule](size / 16))
        x, y = (torch.cat(parts) for parts in zip(*window, strict=True))
        model.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        with torch.no_grad():
            for p in model.parameters():
                assert p.grad is not None
                p -= rates[-1] * p.grad
    experiment, sink = trained(*common)
    assert sink.curve("optim/lr") == pytest.approx(rates, rel=1e-12)
    assert torch.allclose(weights(experiment), torch.cat([p.flatten() for p in model.parameters()]))
    assert experiment.optimizer.param_groups[0]["lr"] == pytest.approx(
        0.0 if scheduler == "cosine" else 0.1
    )


def test_every_group_of_parameters_follows_and_has_its_own_rate_back() -> None:
    """Muon's matrices and AdamW's biases; also where the step fails."""

    common = (*STRANGER, *GROWING, "optimizer=muon", "accum.schedule_lr=linear", "train.epochs=6")
    experiment = build(settings(*common))
    rates = [group["lr"] for group in experiment.optimizer.param_groups]
    during = []
    experiment.model.register_forward_pre_hook(
        lambda *_: during.append([group["lr"] for group in experiment.optimizer.param_groups])
    )
    window = next(experiment.windows_from(0))
    step_at(experiment, window, 0)
    assert during == [[rate / 4 for rate in rates]]
    assert [group["lr"] for group in experiment.optimizer.param_groups] == rates
    with pytest.raises(RuntimeError):
        step_at(experiment, [(torch.ones(1, 7), torch.ones(1))], 0)
    assert [group["lr"] for group in experiment.optimizer.param_groups] == rates


def audited(monkeypatch: pytest.MonkeyPatch, *overrides: str) -> list[tuple[int, list[int]]]:
    """Train; return the windows that were audited, and their micro-batches' sizes."""
    found = []

    def note(experiment: TrainState, window: list[tuple[Tensor, Tensor]], global_step: int) -> Audit:
        found.append((global_step, [len(y) for _, y in window]))
        return Audit("equivalent", len(window), "global_mean")

    monkeypatch.setattr(certify, "audit", note)
    trained(*STRANGER, *overrides)
    return found


def test_the_first_window_of_every_stage_is_audited(monkeypatch: pytest.MonkeyPatch) -> None:
    """As it is split there; of stages that training does not reach, none."""
    expected = [(0, [4]), (12, [4, 4]), (18, [4, 4, 4, 4])]
    assert audited(monkeypatch, *GROWING, "train.epochs=6") == expected
    assert audited(monkeypatch, *GROWING, "train.epochs=4") == expected[:2]
    assert audited(monkeypatch, *GROWING, "train.epochs=6", "audit.at_start=false") == []


@pytest.mark.parametrize(
    ("schedule", "first", "full"),
    [("{0:1,5:4}", 5, [4, 4, 4, 4]), ("{0:5,1:2}", 1, [4, 4])],
    ids=["growing", "shrinking"],
)
def test_a_stage_that_begins_with_the_rest_of_an_epoch_is_audited_on_its_first_full_window(
    monkeypatch: pytest.MonkeyPatch, schedule: str, first: int, full: list[int]
) -> None:
    """On two samples N = 4 would be judged as N = 2."""
    by_step = (*MICRO_OF_4, "accum.schedule_by=step", f"accum.schedule={schedule}", "train.steps=8")
    sizes = seen(*by_step)
    assert sizes[first : first + 2] == [[1, 1], full]
    assert audited(monkeypatch, *by_step) == [(0, sizes[0]), (first + 1, full)]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("{1:2}",), r"accum\.schedule=\{1: 2\}: must say N from 0 on, e\.g\. \{0:1,4:2,8:4\}$"),
        (("{0:1,-2:2}",), r"accum\.schedule=\{0: 1, -2: 2\}: must say N from 0 on"),
        (("{0:1,2:1.5}",), r"2: 1\.5\}: must say N from 0 on"),
        (("{0:1,2:true}",), r"2: True\}: must say N from 0 on"),
        (("{0:1,a:2}",), r"'a': 2\}: must say N from 0 on"),
        (("{}",), r"accum\.schedule=\{\}: must say N from 0 on"),
        (("4",), r"accum\.schedule=4: must say N from 0 on"),
        (("[1,2]",), r"accum\.schedule=\[1, 2\]: must say N from 0 on"),
        (("{0:1,3:0}",), r"accum\.schedule\.3=0: must be at least 1"),
        (("{0:1,3:512}",), r"data\.global_batch_size=256 cannot be split into accum\.schedule\.3=512"),
        (
            ("{0:1,2:4}", "accum.steps=2"),
            r"accum\.steps=2 and accum\.schedule=\{0: 1, 2: 4\} are both N",
        ),
        (
            ("{0:1,2:4}", "data.micro_batch_size=8"),
            r"=256, data\.micro_batch_size=8 and accum\.steps=4 do",
        ),
        (("{0:1,2:4}", "data.micro_batch_size=x"), r"data\.micro_batch_size=x: not an integer"),
        (("{0:1,2:4}", "data.global_batch_size=1.5"), r"data\.global_batch_size=1\.5: not an integer"),
        (("{0:1,2:4}", "data.micro_batch_size=-8"), r"data\.micro_batch_size=-8: must be at least 1"),
        (
            ("null", "accum.schedule_lr=linear"),
            r"accum\.schedule_lr=linear: there is no accum\.schedule",
        ),
        (("{0:1}", "accum.schedule_lr=cubic"), r"schedule_lr=cubic: not one of none, linear, sqrt"),
        (
            ("{0:1}", "accum.schedule_by=epochs"),
            r"schedule_by=epochs: not one of .*did you mean 'epoch'",
        ),
    ],
)
def test_a_schedule_that_cannot_be_followed_is_refused(overrides: tuple[str, ...], said: str) -> None:
    """In one line, with the numbers."""
    schedule, *others = overrides
    with pytest.raises(BadInputError, match=said) as refused:
        settings(f"accum.schedule={schedule}", *others)
    assert "\n" not in str(refused.value)


def test_a_schedule_is_recorded_as_one_value() -> None:
    """As it is written on the command line, in order; N is the largest, and so is the global batch."""
    flat = settings(*MICRO_OF_4[:2], "accum.schedule={4:4,0:1,2:2}").flat()
    assert flat["accum.schedule"] == "{0:1,2:2,4:4}"
    assert (flat["accum.steps"], flat["data.global_batch_size"]) == (4, 16)
    assert settings().flat()["accum.schedule"] is None


def memory(*overrides: str) -> float:
    _, sink = trained(*STRANGER, "+model.hidden=64", "audit.at_start=false", *overrides)
    return sink.last["memory/peak_bytes"]


@pytest.mark.parametrize("schedule", ["{0:4,2:1}", "{0:1,2:4}", "{0:4,3:1,9:2}"])
def test_memory_is_measured_where_micro_batches_are_largest(schedule: str) -> None:
    """A global batch of 8 by steps, whether the large micro-batches come first or last, few or many."""
    common = ("data.global_batch_size=8", "train.steps=12")
    scheduled = memory(*common, "accum.schedule_by=step", f"accum.schedule={schedule}")
    assert scheduled == memory(*common) != memory(*common, "accum.steps=4")


def test_memory_of_equal_micro_batches_is_measured_where_gradients_lie_beside_them() -> None:
    """The peak of a batch that grows is that of its largest N, on a full window."""
    growing = (*GROWING, "train.epochs=6", "optimizer.momentum=0")
    largest = ("data.global_batch_size=16", "accum.steps=4", "+data.train.samples=22", "train.epochs=6")
    assert memory(*growing) == memory(*largest, "optimizer.momentum=0")


def test_time_is_that_of_full_windows_of_the_largest_n(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sixteen samples a window, however long the smaller ones took."""
    from gaccum_exp.train.clock import StepClock

    monkeypatch.setattr(StepClock, "step_time_s", lambda self: 2.0 if self._windows else None)
    sink: Collected
    _, sink = trained(*STRANGER, *GROWING, "train.epochs=6", "audit.at_start=false")
    assert sink.last["throughput/samples_per_s"] == 8.0
    _, sink = trained(*STRANGER, *GROWING, "train.epochs=4")
    assert "time/step_s" not in sink.last


@pytest.mark.parametrize("reduction", ["sum", "global_mean"])
def test_a_sum_is_divided_by_what_a_full_window_of_its_own_stage_counts(reduction: str) -> None:
    """On full windows it is the global mean in every stage, so that no rate follows the batch twice."""
    common = (
        *STRANGER,
        *GROWING,
        "+data.train.samples=16",
        "accum.partial_window=drop",
        "train.epochs=6",
    )
    common = tuple(o for o in common if o != "+data.train.samples=22")
    experiment, _ = trained(*common, f"accum.reduction={reduction}", "accum.schedule_lr=linear")
    if reduction == "sum":
        assert [experiment.reduction_at(step).constant for step in experiment.plan.stage_starts] == [
            4,
            8,
            16,
        ]
    expected, _ = trained(*common, "accum.reduction=global_mean", "accum.schedule_lr=linear")
    assert torch.allclose(weights(experiment), weights(expected), rtol=1e-12)


def test_an_audit_alone_judges_the_stage_with_the_most_micro_batches() -> None:
    """N = 1 at the beginning is the large batch by itself, and says nothing."""
    experiment = build(settings(*STRANGER, *GROWING, "train.epochs=6", "task=audit"))
    (step,) = certify.telling_windows(experiment)
    assert [len(y) for _, y in next(experiment.windows_from(step))] == [4, 4, 4, 4]
