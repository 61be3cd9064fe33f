"""The noise scale of a training: recorded at intervals, refused where there is none, not in its way."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gaccum_exp.core.noise_scale import Noise, quotient_of_means
from gaccum_exp.errors import BadInputError
from gaccum_exp.tracking import metrics
from gaccum_exp.train.build import build, load
from gaccum_exp.train.hooks import WINDOW, Hooks
from gaccum_exp.train.noise_scale import NoiseScale
from gaccum_exp.train.stackable_seeds import NotStackableError, stackable
from gaccum_exp.train.state import TrainState
from gaccum_exp.train.step import take_step
from tests.support import STRANGER, Collected, settings, trained
from tests.train.checkpoint.resumes import Training, gone_on, stopped_at

HERE = "tests.train.test_noise_scale"
QUIET = ("audit.at_start=false", "train.steps=6", "data.global_batch_size=12", "accum.steps=4")
POINTS = (*STRANGER, *QUIET, "noise.every_steps=2")
DIGITS = ("model=mlp", "model.hidden=[8]", "runtime.device=cpu", *QUIET, "noise.every_steps=2")
RAGGED = ("model=gpt", "model.layers=1", "model.heads=2", "model.width=8", "data=ragged", "data.size=26",
          "data.eval_size=4", "data.mean_length=6", "data.vocab_size=8", "criterion=token_cross_entropy",
          "runtime.device=cpu", *QUIET, "noise.every_steps=2")  # fmt: skip


def noise_in(sink: Collected) -> dict[int, dict[str, float]]:
    """Return what was recorded of the noise, by global step."""
    points = [(p.global_step, {k: v for k, v in p.values.items() if "noise/" in k}) for p in sink.points]
    return {step: values for step, values in points if values}


def apart(state: TrainState, window: Any) -> tuple[list[Tensor], list[float], list[int]]:
    """Return the gradient of each micro-batch's loss sum, its denominator and its samples."""
    sums, counts, sizes = [], [], []
    for micro_batch in window:
        loss, n = state.loss_fn(state.model, micro_batch)  # type: ignore[misc]  # one term
        grads = torch.autograd.grad(loss, state.parameters)
        sums.append(torch.cat([g.double().flatten() for g in grads]))
        counts.append(float(n))
        sizes.append(len(micro_batch["labels"] if isinstance(micro_batch, dict) else micro_batch[0]))
    return sums, counts, sizes


def test_every_second_window_tells_what_its_separate_gradients_tell() -> None:
    """Trace and squared norm by the textbook, and the quotient of their means with its interval."""
    state, sink = build(settings(*POINTS, "optimizer.lr=0.3")), Collected()
    hooks, expected = Hooks([NoiseScale(state, sink)]), []
    hooks.begin(state)
    for window in state.windows_from(0):
        sums, n, b = apart(state, window)
        mean = sum(sums) / sum(n)
        gaps = [float((s - k * mean).square().sum()) / k for s, k in zip(sums, n, strict=True)]
        trace = sum(gaps) / 3
        if state.global_step % 2 == 0:
            expected.append(Noise(trace, float(mean.square().sum()) - trace / sum(b)))
        with hooks.around(WINDOW, state, window):
            values = take_step(state, window, hooks)
        state.global_step += 1
        hooks.after(state, window, values)
    sink.deliver()
    found = noise_in(sink)
    assert list(found) == [1, 3, 5]
    for number, values in enumerate(found.values(), 1):
        trace, norm = expected[number - 1]
        assert values[metrics.NOISE_TRACE] == pytest.approx(trace)
        assert values[metrics.NOISE_SQUARED_NORM] == pytest.approx(norm)
        value, low, high = quotient_of_means(expected[:number])
        said = [values.get(f"noise/scale{end}") for end in ("", "_low", "_high")]
        low = low if number > 1 else math.inf
        assert said == [pytest.approx(x) if math.isfinite(x) else None for x in (value, low, high)]
    assert sink.tags["noise.of"] == "population"


@pytest.mark.parametrize("more", [(), ("+model.dropout=0.3",), ("optimizer=adam",)])
def test_a_training_is_bit_for_bit_the_same_with_and_without(more: tuple[str, ...]) -> None:
    """Weights and curves; without it there is no hook, and nothing of it is recorded."""
    measured, sink = trained(*POINTS, *more)
    plain, other = trained(*POINTS, *more, "noise.every_steps=null")
    for one, same in zip(measured.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(one, same)
    assert sink.curve("train/loss") == other.curve("train/loss")
    assert noise_in(sink)
    assert not noise_in(other)
    hooks = Training(*POINTS, "noise.every_steps=null").hooks
    assert not any(isinstance(hook, NoiseScale) for hook in hooks)


def test_the_same_in_adams_metric_from_the_second_step_on() -> None:
    """Its state is made in the first one; SGD has none."""
    _, sink = trained(*DIGITS, "optimizer=adam")
    adam = {key for key in metrics.__dict__.values() if isinstance(key, str) and "noise/" in key}
    adam = {metrics.in_adam_metric(key) for key in adam}
    found = noise_in(sink)
    assert not adam & found[1].keys()
    assert {"noise/adam_trace", "noise/adam_squared_norm"} <= adam & found[3].keys()
    _, sink = trained(*DIGITS)
    assert not any(adam & values.keys() for values in noise_in(sink).values())


def test_of_token_counts_and_of_a_training_set() -> None:
    """Sequences are the units, tokens the denominator; of a training set the squared norm is larger."""
    (_, population), (_, training_set) = trained(*RAGGED), trained(*RAGGED, "noise.of=training_set")
    first, other = noise_in(population)[1], noise_in(training_set)[1]
    state = build(settings(*RAGGED))
    sums, n, b = apart(state, next(state.windows_from(0)))
    assert len(set(n)) > 1
    mean, tokens = sum(sums) / sum(n), sum(n)
    rough = (12 / tokens) ** 2 * sum(
        float((s - k * mean).square().sum()) / of for s, k, of in zip(sums, n, b, strict=True)
    ) / 3  # fmt: skip
    assert first[metrics.NOISE_TRACE] == pytest.approx(
        rough, rel=0.25
    )  # micro-batches weigh otherwise there
    assert other[metrics.NOISE_TRACE] == first[metrics.NOISE_TRACE]
    # The noise in a mean of 12 sequences of 26 is less by 12 / 26.
    gap = other[metrics.NOISE_SQUARED_NORM] - first[metrics.NOISE_SQUARED_NORM]
    assert gap == pytest.approx(first[metrics.NOISE_TRACE] / 26, rel=0.1)


def test_of_a_training_set_windows_of_two_epochs_are_not_measured() -> None:
    """Their samples are not drawn without replacement, which of the population is no matter."""
    of = (*DIGITS, "data.global_batch_size=600", "accum.partial_window=carry", "noise.every_steps=1")
    (state, of_set), (_, population) = trained(*of, "noise.of=training_set"), trained(*of)
    assert [state.plan.in_one_epoch(k) for k in range(6)] == [True, True, False, True, False, True]
    assert list(noise_in(population)) == [1, 2, 3, 4, 5, 6]
    assert list(noise_in(of_set)) == [1, 2, 4, 6]
    with pytest.raises(BadInputError, match=r"2000 samples holds some of data\.train's 1442 twice"):
        trained(*of, "data.global_batch_size=2000", "noise.of=training_set")


@pytest.mark.parametrize("more", [(), ("optimizer=adam",), ("accum.reduction=mean",)])
@pytest.mark.parametrize("at", [(2, 2), (3, 1), (4, 4)])
def test_a_training_that_goes_on_from_a_checkpoint_records_the_same(
    tmp_path: Path, at: tuple[int, int], more: tuple[str, ...]
) -> None:
    """Stopped inside a measured window, inside another one, and at the last micro-batch."""
    when = ("checkpoint.every_minutes=null", "checkpoint.every_steps=100")
    whole = Training(*POINTS, *more).train()
    stopped = stopped_at(tmp_path, at, *POINTS, *when, *more)
    stopped.sink.deliver()
    rest, _ = gone_on(tmp_path, *POINTS, *when, *more)
    assert torch.equal(rest.weights, whole.weights)
    curves = stopped.curves | rest.curves
    assert {k: v for k, v in curves.items() if "noise/" in k[1]} == {
        k: v for k, v in whole.curves.items() if "noise/" in k[1]
    }


def test_a_measured_window_that_goes_on_in_smaller_micro_batches_tells_what_these_tell(
    tmp_path: Path,
) -> None:
    """Two of three samples each were done, and the other six go on one by one."""
    when = ("checkpoint.every_minutes=null", "checkpoint.every_steps=100")
    stopped_at(tmp_path, (2, 2), *POINTS, *when)
    rest, _ = gone_on(tmp_path, *POINTS, *when, "accum.steps=12")
    state, _ = trained(*POINTS, "train.steps=2")
    state.total_steps = 3
    whole = [torch.cat(parts) for parts in zip(*next(state.windows_from(2)), strict=True)]
    sizes = [3, 3, 1, 1, 1, 1, 1, 1]
    sums, n, _ = apart(state, zip(*(t.split(sizes) for t in whole), strict=True))
    mean = sum(sums) / 12
    gaps = [float((s - k * mean).square().sum()) / k for s, k in zip(sums, n, strict=True)]
    assert rest.curves[3, metrics.NOISE_TRACE] == pytest.approx(sum(gaps) / 7)


def test_one_micro_batch_a_window_is_said_and_trained(caplog: pytest.LogCaptureFixture) -> None:
    """With the split that would tell; of a schedule the stages that have more are measured."""
    _, sink = trained(*POINTS, "accum.steps=1")
    assert not noise_in(sink)
    (said,) = [m for m in caplog.messages if "noise" in m]
    assert "is not measured: accum.steps=4 splits its 12 samples and has 4" in said
    _, sink = trained(*POINTS, "accum.steps=null", "accum.schedule={0:1,3:4}", "accum.schedule_by=step")
    assert list(noise_in(sink)) == [5]


class Couples(nn.Module):
    """A criterion over all pairs of a micro-batch."""

    reduction = "sum"

    def forward(self, outputs: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(outputs @ outputs.T, torch.arange(len(target)), reduction=self.reduction)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("model=cnn", "model.norm=batch", "model.width=4", "data=digits", "criterion=cross_entropy"),
         r"\(BatchNorm2d\) makes a sample's output depend on the other samples"),
        ((*STRANGER, "criterion=custom", f"criterion._target_={HERE}.Couples", "accum.reduction=sum",
          "accum.sum_scale=none"), "the criterion Couples couples the samples"),
        ((*STRANGER, "strategy=cached"), "strategy=cached"),
        ((*STRANGER, "optimizer=custom", "optimizer._target_=torch.optim.LBFGS", "optimizer.lr=0.1"),
         "LBFGS evaluates a window at several weights"),
        ((*RAGGED, "data.sort_by_length=true"), "data.sort_by_length=true"),
        ((*STRANGER, "+model.dropout=0.3", "noise.of=training_set"), "dropout.*noise.of=population"),
        ((*STRANGER, "+data.train.noise=0.1", "noise.of=training_set"),
         r"draws random numbers for a sample \(augmentation\).*noise.of=population"),
    ],
)  # fmt: skip
def test_what_has_no_noise_scale_is_refused_before_it_trains(more: tuple[str, ...], said: str) -> None:
    """In one line, with the module or the reason and with what to do; nothing has moved."""
    training = Training("runtime.device=cpu", *more, *QUIET, "noise.every_steps=2")
    before = training.weights
    with pytest.raises(BadInputError, match=f"noise.every_steps=2 is refused: .*{said}") as refusal:
        training.train()
    assert "\n" not in str(refusal.value)
    assert str(refusal.value).endswith("or use noise.every_steps=null")
    assert torch.equal(training.weights, before)
    assert not training.sink.points


def test_seeds_trained_as_one_are_not_where_it_is_asked_for() -> None:
    """They are trained one after the other, and the reason is said."""
    asked = [settings(*POINTS, f"seed={seed}", "sweep.vectorize=seed") for seed in (0, 1)]
    with pytest.raises(NotStackableError, match=r"noise\.every_steps=2"):
        stackable(asked, load(asked[0]))


def test_a_control_is_not_measured() -> None:
    """It is there for its loss curve alone."""
    state = build(settings(*POINTS).as_control(1))
    assert not NoiseScale.asked_for(state)


def test_a_window_that_comes_again_is_measured_once() -> None:
    """As split the second time, with nothing left of the first attempt."""
    state, sink = build(settings(*POINTS)), Collected()
    hook = NoiseScale(state, sink)
    hooks, window = Hooks([hook]), next(state.windows_from(0))
    hooks.begin(state)

    def attempt() -> None:
        with hooks.around(WINDOW, state, window):
            values = take_step(state, window, hooks)
        state.global_step += 1
        hooks.after(state, window, values)

    whole, state.loss_fn = state.loss_fn, Fails(state.loss_fn)  # type: ignore[assignment]  # a stand-in
    with pytest.raises(MemoryError):
        attempt()
    assert not any(p._backward_hooks for p in state.parameters)
    state.loss_fn = whole
    attempt()
    sink.deliver()
    _, other = trained(*POINTS, "train.steps=1")
    assert noise_in(sink) == noise_in(other)


class Fails:
    """Runs out of memory at its third pass."""

    def __init__(self, loss_fn: Any) -> None:
        self.wrapped, self.passes = loss_fn, 0
        self.count, self.window_denominator = loss_fn.count, loss_fn.window_denominator

    def __call__(self, model: nn.Module, micro_batch: Any) -> Any:
        self.passes += 1
        if self.passes == 3:
            raise MemoryError
        return self.wrapped(model, micro_batch)


@pytest.mark.parametrize("value", ["0", "-1"])
def test_an_interval_is_a_positive_number(value: str) -> None:
    """Or null."""
    with pytest.raises(BadInputError, match=r"noise\.every_steps"):
        settings(*POINTS, f"noise.every_steps={value}")
