"""Training: paired arms, one step at a time, measured."""

import math
import os
import subprocess
import sys
import time
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gaccum_exp.core.feed import windows
from gaccum_exp.core.step_times import waited_s
from gaccum_exp.core.window import WindowPlan
from gaccum_exp.errors import BadInputError
from gaccum_exp.memory.storages import StorageTracker
from gaccum_exp.tracking.sink import NonFiniteLossError
from gaccum_exp.train.build import build
from gaccum_exp.train.clock import KEPT_WINDOWS, WARMUP_WINDOWS, StepClock
from tests.strangers import Points
from tests.support import SMALL, STRANGER, Collected, settings, step_at, train_to_end, trained


def weights(experiment: Any) -> Tensor:
    return torch.cat([p.detach().flatten() for p in experiment.model.parameters()])


def fetched(*overrides: str) -> list[tuple[Tensor, Tensor]]:
    """The samples of every optimizer step, micro-batches joined."""
    experiment = build(settings(*STRANGER, *overrides))
    return [
        tuple(torch.cat(parts) for parts in zip(*window, strict=True))
        for window in experiment.windows_from(0)
    ]  # type: ignore[misc]


@hypothesis_settings(max_examples=25, suppress_health_check=list(HealthCheck))
@given(
    samples=st.integers(1, 23),
    size=st.integers(1, 9),
    steps=st.integers(2, 9),
    seed=st.integers(0, 5),
    rule=st.sampled_from(["exact", "carry", "drop"]),
    reduction=st.sampled_from(["mean", "sum"]),
)
def test_arms_are_paired(
    samples: int, size: int, steps: int, seed: int, rule: str, reduction: str
) -> None:
    """Step k has the same samples and the same augmentation for every N and reduction."""
    if samples < size:
        return
    common = (
        f"+data.train.samples={samples}",
        "+data.train.noise=0.1",
        f"data.global_batch_size={size}",
        f"accum.partial_window={rule}",
        f"seed={seed}",
        "train.epochs=2",
    )
    reference = fetched(*common, "accum.steps=1")
    arm = fetched(*common, f"accum.steps={min(steps, size)}", f"accum.reduction={reduction}")
    assert len(reference) == len(arm) > 0
    for (x, y), (other_x, other_y) in zip(reference, arm, strict=True):
        assert torch.equal(x, other_x)
        assert torch.equal(y, other_y)


def test_the_number_of_workers_changes_no_sample_and_no_draw() -> None:
    """In this process or in two others, in the same micro-batches."""
    plan = WindowPlan(10, 4, seed=1)
    noisy = Points(10, noise=0.5)
    in_process, in_workers = (
        list(windows(noisy, plan, accum_steps=3, global_steps=range(5), workers=workers))
        for workers in (0, 2)
    )
    for a, b in zip(in_process, in_workers, strict=True):
        assert [len(x) for x, _ in a] == [len(x) for x, _ in b]
        for (x, y), (other_x, other_y) in zip(a, b, strict=True):
            assert torch.equal(x, other_x)
            assert torch.equal(y, other_y)


def test_a_later_window_can_be_fetched_without_those_before_it() -> None:
    """With the same augmentation, which is what resuming needs."""
    plan, noisy = WindowPlan(10, 4, seed=1), Points(10, noise=0.5)
    everything = list(windows(noisy, plan, accum_steps=2, global_steps=range(6)))
    (alone,) = windows(noisy, plan, accum_steps=2, global_steps=range(4, 5))
    assert torch.equal(alone[0][0], everything[4][0][0])


@pytest.mark.parametrize("workers", [0, 2])
def test_in_a_control_the_augmentation_follows_the_sample(workers: int) -> None:
    """The rows of every window are those of the plain order, permuted; not one draw is another."""
    noisy = Points(10, noise=0.5)
    plain, control = (
        list(windows(noisy, plan, accum_steps=1, global_steps=range(5), workers=workers))
        for plan in (WindowPlan(10, 4, seed=1), WindowPlan(10, 4, seed=1, control_seed=3))
    )
    for step, (((x, y),), ((permuted_x, permuted_y),)) in enumerate(zip(plain, control, strict=True)):
        order = WindowPlan(10, 4, seed=1, control_seed=3).positions(step)
        assert torch.equal(x[order], permuted_x)
        assert torch.equal(y[order], permuted_y)
    assert any(not torch.equal(a[0][0], b[0][0]) for a, b in zip(plain, control, strict=True))


def test_tensors_in_memory_are_fetched_as_the_loader_would() -> None:
    """The fast path and the DataLoader give the same micro-batches."""
    points = Points(11)
    tensors = torch.utils.data.TensorDataset(points.x, torch.tensor(points.y))
    plan = WindowPlan(11, 4, seed=2)
    slow = windows(points, plan, accum_steps=3, global_steps=range(6))
    fast = windows(tensors, plan, accum_steps=3, global_steps=range(6))
    for a, b in zip(slow, fast, strict=True):
        for (x, y), (other_x, other_y) in zip(a, b, strict=True):
            assert torch.equal(x, other_x)
            assert torch.equal(y, other_y)


def test_initial_weights_depend_on_the_seed_alone() -> None:
    """Not on N, the reduction or the data's size."""
    first = weights(build(settings(*STRANGER, "accum.steps=1")))
    second = weights(
        build(settings(*STRANGER, "accum.steps=4", "accum.reduction=sum", "+data.train.samples=9"))
    )
    other = weights(build(settings(*STRANGER, "seed=1")))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("rule", ["exact", "carry", "drop"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_global_mean_trains_as_the_large_batch_where_nothing_divides(rule: str, optimizer: str) -> None:
    """23 samples, global batch 7, N = 3 and 5: the same weights in float64 after three epochs."""
    common = (*STRANGER, f"optimizer={optimizer}", "+data.train.samples=23", "data.global_batch_size=7",
              f"accum.partial_window={rule}", "train.epochs=3")  # fmt: skip
    reference = weights(trained(*common, "accum.steps=1")[0])
    for steps in (3, 5):
        arm = weights(trained(*common, f"accum.steps={steps}")[0])
        assert torch.allclose(arm, reference, rtol=1e-11, atol=1e-12)


def test_mean_drifts_from_the_large_batch_where_the_micro_batches_are_unequal() -> None:
    """The negative control of the test above."""
    common = (*STRANGER, "+data.train.samples=23", "data.global_batch_size=7", "train.epochs=3")
    reference = weights(trained(*common)[0])
    arm = weights(trained(*common, "accum.steps=3", "accum.reduction=mean")[0])
    assert (arm - reference).norm() / reference.norm() > 1e-3


def test_sum_divided_by_the_constant_is_the_global_mean_on_full_windows() -> None:
    """And differs where the last window is partial: it weighs samples, not windows."""
    for samples, same in ((24, True), (22, False)):
        common = (*STRANGER, f"+data.train.samples={samples}", "data.global_batch_size=8",
                  "accum.steps=3", "train.epochs=2")  # fmt: skip
        mean = weights(trained(*common)[0])
        scaled = weights(trained(*common, "accum.reduction=sum")[0])
        assert torch.allclose(mean, scaled, rtol=1e-12, atol=1e-13) == same


def test_the_constant_is_found_for_a_loss_that_counts_after_the_forward_pass() -> None:
    """On labels of which half are ignored, whatever N; and the model is left untouched."""
    common = (*STRANGER, "data.train._target_=tests.strangers.Ignored", "data.global_batch_size=24",
              "accum.reduction=sum")  # fmt: skip
    late = (
        "criterion=custom",
        "criterion._target_=tests.strangers.count_labels",
        "+criterion._partial_=true",
    )
    divisors = {
        build(settings(*common, *how, f"accum.steps={n}")).reduction.constant
        for how in ((), late)
        for n in (1, 5)
    }
    assert divisors == {12.0}
    assert build(settings(*common, "accum.sum_scale=none")).reduction.constant == 1.0


def test_a_strangers_loss_function_trains_as_the_criterion_it_computes() -> None:
    """loss_fn(model, micro_batch) -> (loss_sum, denominator), by _target_."""
    common = (*STRANGER, "data.train._target_=tests.strangers.Ignored", "data.global_batch_size=7",
              "accum.steps=3", "train.epochs=2")  # fmt: skip
    late = (
        "criterion=custom",
        "criterion._target_=tests.strangers.count_labels",
        "+criterion._partial_=true",
    )
    assert torch.allclose(weights(trained(*common)[0]), weights(trained(*common, *late)[0]), rtol=1e-12)


def test_a_window_in_which_nothing_counts_takes_no_step_and_is_counted() -> None:
    """One sample a window, every second one ignored: half of the windows."""
    ignored = "data.train._target_=tests.strangers.Ignored"
    _, sink = trained(*STRANGER, ignored, "data.global_batch_size=1", "train.epochs=1")
    assert len(sink.curve("train/loss")) == 12
    assert sink.curve("train/empty_windows") == [12.0]


OPTIMIZERS = ("SGD", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop", "Rprop", "Adagrad",
              "Adadelta", "ASGD", "Adafactor", "LBFGS")  # fmt: skip


@pytest.mark.parametrize("name", [*OPTIMIZERS, "Muon with AdamW"])
def test_every_optimizer_of_torch_trains_and_agrees_with_one_pass(name: str) -> None:
    """By _target_, L-BFGS with its closure included; SparseAdam wants sparse gradients."""
    if name == "Muon with AdamW":
        which = ("optimizer=muon",)
    else:
        which = ("optimizer=custom", f"optimizer._target_=torch.optim.{name}", "optimizer.lr=0.01")
    common = (*STRANGER, *which, "data.global_batch_size=8", "train.epochs=2", "+model.hidden=8")
    reference, sink = trained(*common)
    arm, _ = trained(*common, "accum.steps=3")
    before = weights(build(settings(*common)))
    assert (weights(reference) - before).norm() > 1e-4
    # Muon orthogonalises in bfloat16 and Adafactor divides by running means that start near zero.
    tolerance = 1e-2 if "Muon" in name else 1e-8
    assert (weights(arm) - weights(reference)).norm() < tolerance * weights(reference).norm()
    assert len(sink.curve("train/loss")) == 6


@pytest.mark.parametrize("scheduler", ["cosine", "warmup_cosine", "multistep"])
def test_the_schedule_moves_once_per_optimizer_step(scheduler: str) -> None:
    """The rates of N = 4 are those of N = 1, and they do change."""
    common = (*STRANGER, "data.global_batch_size=4", "train.steps=12", f"scheduler={scheduler}")
    rates = [trained(*common, f"accum.steps={n}")[1].curve("optim/lr") for n in (1, 4)]
    assert rates[0] == rates[1]
    assert len(set(rates[0])) > 2
    if scheduler == "multistep":
        assert rates[0] == pytest.approx([0.1] * 6 + [0.01] * 3 + [0.001] * 3)


def test_dropout_is_the_same_at_every_repetition_of_a_step() -> None:
    """Reseeded per seed and step: two runs are equal, two seeds are not."""
    noisy = (*STRANGER, "+model.dropout=0.5", "data.global_batch_size=8", "train.epochs=1")
    runs = [weights(trained(*noisy, f"seed={seed}")[0]) for seed in (0, 0, 1)]
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


def test_the_reported_loss_is_the_windows_and_the_norm_is_of_what_the_optimizer_gets() -> None:
    """Against one pass over the same window, computed here."""
    experiment = build(settings(*STRANGER, "data.global_batch_size=7", "accum.steps=3"))
    twin = build(settings(*STRANGER, "data.global_batch_size=7"))
    window = next(experiment.windows_from(0))
    x, y = (torch.cat(parts) for parts in zip(*window, strict=True))
    loss = torch.nn.functional.cross_entropy(twin.model(x), y)
    loss.backward()
    norm = torch.cat([p.grad.flatten() for p in twin.parameters if p.grad is not None]).norm()
    values = step_at(experiment, window, 0)
    assert float(values["train/loss"]) == pytest.approx(loss.item(), rel=1e-12)
    assert float(values["optim/grad_norm"]) == pytest.approx(float(norm), rel=1e-12)


def test_a_loss_that_is_not_a_number_ends_the_run_with_its_step() -> None:
    """And the curve up to there is kept."""
    experiment = build(settings(*STRANGER, "model._target_=tests.strangers.Diverging", "train.steps=9"))
    from gaccum_exp.tracking.progress import Progress

    sink = Collected()
    with pytest.raises(NonFiniteLossError, match="nan at step 4"), Progress("test", 9) as progress:
        train_to_end(experiment, sink, progress)
    curve = sink.curve("train/loss")
    assert len(curve) == 4
    assert [math.isnan(v) for v in curve] == [False, False, False, True]


def test_memory_is_measured_by_category_and_adds_up() -> None:
    """The categories sum to the peak, the parameters are what they are, and more N needs less."""
    peaks = []
    for steps in (1, 4):
        experiment, sink = trained("model=mlp", "data.global_batch_size=512", f"accum.steps={steps}",
                                   "optimizer=adamw", "train.steps=4", "runtime.device=cpu")  # fmt: skip
        last = sink.last
        parts = ["parameters", "gradients", "optimizer_state", "activations", "temporaries", "inputs"]
        assert sum(last[f"memory/{part}_bytes"] for part in parts) == last["memory/peak_bytes"]
        size = 4 * sum(p.numel() for p in experiment.model.parameters())
        assert last["memory/parameters_bytes"] == size
        assert 2 * size <= last["memory/optimizer_state_bytes"] <= 2 * size + 4096
        assert sink.tags["memory.source"] == "tracker"
        assert sink.tags["memory.peak_phase"] in ("forward/backward", "optimizer step")
        peaks.append(last["memory/peak_bytes"])
    assert peaks[1] < 0.8 * peaks[0]


def test_measuring_memory_changes_no_result() -> None:
    """The tracked window is an ordinary step: the weights are bit for bit those of the bare loop."""
    common = (
        *STRANGER,
        "+model.dropout=0.3",
        "data.global_batch_size=8",
        "accum.steps=2",
        "train.steps=5",
    )
    measured = trained(*common)[0]
    bare = build(settings(*common))
    for step, window in enumerate(bare.windows_from(0)):
        step_at(bare, window, step)
    assert torch.equal(weights(measured), weights(bare))


def test_evaluation_is_whole_and_leaves_the_model_as_it_was() -> None:
    """Loss and accuracy over the held-out set in batches that do not divide it; frozen parts stay so."""
    from gaccum_exp.train.evaluation import evaluate

    experiment = build(
        settings(
            *STRANGER,
            "data.eval._target_=tests.strangers.Points",
            "+data.eval.seed=1",
            "data.eval_batch_size=7",
            "+model.dropout=0.5",
        )
    )
    experiment.model.layers[0].eval()  # type: ignore[index, union-attr]
    values = evaluate(experiment)
    assert experiment.model.training
    assert not experiment.model.layers[0].training  # type: ignore[index, union-attr]
    points = Points(seed=1)
    logits = experiment.model.eval()(points.x)
    expected = torch.nn.functional.cross_entropy(logits, torch.tensor(points.y))
    assert float(values["eval/loss"]) == pytest.approx(expected.item(), rel=1e-12)
    right = (logits.argmax(1) == torch.tensor(points.y)).double().mean()
    assert float(values["eval/accuracy"]) == pytest.approx(right.item())


def test_evaluation_comes_at_its_interval_and_at_the_end() -> None:
    """Every third of eight steps, and after the last; or once an epoch."""
    common = (*STRANGER, "data.eval._target_=tests.strangers.Points", "data.global_batch_size=8")
    _, sink = trained(*common, "train.steps=8", "train.eval_every_steps=3")
    assert [p.global_step for p in sink.points if "eval/loss" in p.values] == [3, 6, 8]
    _, sink = trained(*common, "train.epochs=2")
    assert [p.global_step for p in sink.points if "eval/loss" in p.values] == [3, 6]


def stranger(name: str) -> str:
    return f"tests.strangers.{name}"


SHORT = (*STRANGER, "data.global_batch_size=8", "train.steps=6", "accum.steps=2")
OWN_CRITERION = ("criterion=custom", f"criterion._target_={stranger('OwnCrossEntropy')}")
TWO_VIEWS = (
    "criterion=custom",
    f"criterion._target_={stranger('two_views')}",
    "+criterion._partial_=true",
)


@pytest.mark.parametrize(
    "overrides",
    [
        (f"model._target_={stranger('Frozen')}",),
        (f"model._target_={stranger('Lazy')}",),
        OWN_CRITERION,
        TWO_VIEWS,
    ],
    ids=["frozen", "lazy", "own criterion", "two views"],
)
def test_a_strangers_model_or_loss_is_trained_and_measured(overrides: tuple[str, ...]) -> None:
    """With parameters that are frozen or lazy, an unknown criterion, several calls of the model."""
    _, sink = trained(*SHORT, *overrides)
    assert len(sink.curve("train/loss")) == 6
    assert sink.last["memory/peak_bytes"] > 0


def test_a_sparse_embedding_is_tracked_by_its_rows() -> None:
    """Its gradient is no dense table."""
    _, sink = trained(*SHORT, f"model._target_={stranger('Embedded')}")
    assert sink.last["memory/peak_bytes"] > 0


def test_a_model_that_cannot_be_tracked_is_trained_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As it would have been without the attempt, running statistics included; and it is said."""
    overrides = (*SHORT, f"model._target_={stranger('Embedded')}")
    followed = 0

    def refuse(*args: object) -> None:
        nonlocal followed
        followed += 1
        if followed > 20:
            raise NotImplementedError("no storage to look at")

    monkeypatch.setattr(StorageTracker, "_add", refuse)
    experiment, sink = trained(*overrides)
    assert "memory/peak_bytes" not in sink.last
    bare = build(settings(*overrides))
    for step, window in enumerate(bare.windows_from(0)):
        step_at(bare, window, step)
    assert torch.equal(weights(experiment), weights(bare))
    means = [e.model.norm.running_mean for e in (experiment, bare)]  # type: ignore[union-attr]
    assert torch.equal(*means)  # type: ignore[arg-type]


def test_memory_and_time_are_those_of_full_windows() -> None:
    """Three windows an epoch, the third one short: it is not the one that is measured."""
    peaks = []
    for samples in (24, 17):
        _, sink = trained(*STRANGER, f"+data.train.samples={samples}", "data.global_batch_size=8",
                          "+model.hidden=64", "train.steps=7")  # fmt: skip
        peaks.append(sink.last["memory/peak_bytes"])
    assert peaks[0] == peaks[1]


def test_data_drawn_when_the_set_is_made_is_the_same_for_every_arm() -> None:
    """And another one for another seed."""
    common = (f"data.train._target_={stranger('DrawnAtOnce')}", "train.steps=1")
    torch.manual_seed(1)
    first = fetched(*common)[0][0]
    torch.manual_seed(2)
    assert torch.equal(first, fetched(*common, "accum.steps=2")[0][0])
    assert not torch.equal(first, fetched(*common, "seed=5")[0][0])


def test_a_data_set_may_bring_its_own_collate_fn() -> None:
    """As many do; labels are all 1 here."""
    (window,) = fetched(f"data.train._target_={stranger('Collating')}", "train.steps=1")
    assert window[1].tolist() == [1] * 24


def test_noise_from_numpy_and_python_does_not_depend_on_the_workers() -> None:
    """Fetching in this process must not move the generators that the model draws from."""
    curves = []
    for workers in (0, 2):
        _, sink = trained(*SHORT, f"model._target_={stranger('NumpyNoise')}", f"data.workers={workers}")
        curves.append(sink.curve("train/loss"))
    assert curves[0] == curves[1]


def test_a_window_in_which_nothing_counts_is_skipped_by_a_closure_too() -> None:
    """L-BFGS evaluates the window itself."""
    lbfgs = ("optimizer=custom", "optimizer._target_=torch.optim.LBFGS", "optimizer.lr=0.1")
    ignored = f"data.train._target_={stranger('Ignored')}"
    _, sink = trained(*STRANGER, *lbfgs, ignored, "data.global_batch_size=1", "train.epochs=1")
    assert sink.curve("train/empty_windows") == [12.0]
    assert all(math.isfinite(loss) for loss in sink.curve("train/loss"))


def test_class_weights_are_as_precise_as_the_model() -> None:
    """A list on the command line, a float64 model."""
    experiment, _ = trained(*SHORT, "+criterion.weight=[1.0,2.0,0.5]")
    assert experiment.criterion_loss is not None
    assert experiment.criterion_loss.criterion.weight.dtype == torch.float64  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("criterion=mse",), r"would broadcast .*output \(2, 3\) against the target \(2,\)"),
        (("+criterion.weight=[1.0]",), r"criterion: fails on the first samples .*\(2, 2\).*\(2, 3\)"),
        (("model._target_=torch.nn.LSTM", "+model.input_size=7", "+model.hidden_size=3"),
         r"model: fails on the first samples .*\(2, 2\)"),
        ((f"data.train._target_={stranger('Dicts')}",), r"keys x, y has none of labels.*loss_fn"),
        (("+model.input_shape=null", f"data.train._target_={stranger('Dicts')}"), r"shape: .*dict"),
        (("scheduler=cosine", "scheduler._target_=torch.optim.lr_scheduler.ReduceLROnPlateau",
          "~scheduler.final_ratio"), r"ReduceLROnPlateau: steps on a metric"),
        (("criterion=custom", "criterion._target_=torch.nn.CTCLoss"), r"refused for criterion CTCLoss"),
        (("data.train=null",), r"data.train._target_ must be set"),
        (("criterion=custom", "criterion._target_=torch.nn.Identity"), r"no attribute `reduction`"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_said_before_training(overrides: tuple[str, ...], said: str) -> None:
    """With the shapes, and in the words of the configuration."""
    with pytest.raises(BadInputError, match=said):
        build(settings(*STRANGER, *overrides))


def test_where_nothing_counts_there_is_no_training_that_could_be_called_finished() -> None:
    """Every label is the one to ignore."""
    nothing = (f"data.train._target_={stranger('Collating')}", "+criterion.ignore_index=1")
    with pytest.raises(BadInputError, match=r"nothing in data\.train counts"):
        trained(*STRANGER, *nothing, "train.steps=3")
    with pytest.raises(BadInputError, match=r"accum\.sum_scale=none"):
        trained(*STRANGER, *nothing, "train.steps=3", "accum.reduction=sum")


def test_the_clock_keeps_its_size_and_forgets_the_warm_up() -> None:
    """A long run is timed by its latest windows, a very short one by its last."""
    clock = StepClock(torch.device("cpu"), Collected())
    assert clock.step_time_s() is None
    for done in range(1, WARMUP_WINDOWS + KEPT_WINDOWS + 10):
        clock.count(0.0, 1.0)
        assert len(clock._windows) == min(max(1, done - WARMUP_WINDOWS), KEPT_WINDOWS)


@pytest.mark.skipif(waited_s() is None, reason="the system does not tell how long a thread waited")
def test_a_training_beside_another_process_knows_how_long_it_waited() -> None:
    """On one processor that two share it is a good part, which no quartile shows."""
    here, clock = os.sched_getaffinity(0), StepClock(torch.device("cpu"), Collected())
    os.sched_setaffinity(0, {min(here)})
    other = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        clock.begin(None)  # type: ignore[arg-type]  # of which it takes nothing
        until = time.process_time() + 0.3
        while time.process_time() < until:
            pass
        share = clock.waiting_share()
    finally:
        other.kill()
        other.wait()
        os.sched_setaffinity(0, here)
    assert share is not None
    assert 0.2 < share < 1.0


@pytest.mark.parametrize(("windows", "timed"), [(2, 0), (6, 0), (7, 1), (16, 10)])
def test_the_spread_of_the_step_time_is_of_the_windows_after_warm_up(windows: int, timed: int) -> None:
    """Windows in the warm-up give a time, of which it is known that none was timed after it.

    The first window does not count at all: its memory is measured.
    """
    _, sink = trained(*STRANGER, f"train.steps={windows}", "audit.at_start=false")
    assert sink.last["time/step_windows"] == timed
    median_s = sink.last["time/step_s"]
    if timed > 1:
        assert 0 < sink.last["time/step_low_s"] <= median_s <= sink.last["time/step_high_s"]
    else:
        assert median_s > 0
        assert not {"time/step_low_s", "time/step_high_s"} & sink.last.keys()


class Readings(TorchDispatchMode):
    """Counts the operators that hand a tensor's value to the host, which waits for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("reduction", ["global_mean", "mean", "sum"])
def test_no_value_is_read_between_two_deliveries(reduction: str) -> None:
    """Not in fetching, counting, clipping, stepping or recording: the delivery reads all of them.

    With SGD: AdamW reads its count of steps, which it keeps on the host.
    """
    experiment = build(settings(*SMALL, f"accum.reduction={reduction}", "accum.steps=3",
                                "accum.max_grad_norm=1"))  # fmt: skip
    feed, sink = experiment.windows_from(0), Collected()
    with Readings() as readings:
        for step in range(6):
            sink.record(step + 1, step_at(experiment, next(feed), step))
        assert readings.count == 0
        sink.deliver()
    assert len(sink.curve("train/loss")) == 6
    with Readings() as readings:
        float(torch.ones(()))
    assert readings.count == 1
