"""Seeds as one training: each has the curve that it has alone; else they are trained one by one."""

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gaccum_exp.audit.agreement import RANGE
from gaccum_exp.config.schema import Settings
from gaccum_exp.core import stack
from gaccum_exp.core.reductions import Sum
from gaccum_exp.core.window import WindowPlan
from gaccum_exp.errors import BadInputError
from gaccum_exp.tracking.progress import Progress
from gaccum_exp.tracking.records import RunRecord
from gaccum_exp.tracking.sink import NonFiniteLossError
from gaccum_exp.train.build import build, load
from gaccum_exp.train.stackable_seeds import NotStackableError, stackable
from gaccum_exp.train.stacked_seeds import End, StackedState, train_stacked
from gaccum_exp.train.state import TrainState
from tests.program import Program, in_a_process
from tests.strangers import Points
from tests.support import STRANGER, Collected, settings, train_to_end

pytestmark = pytest.mark.usefixtures("undrawn")

EXACT = "runtime.precision=fp64"
CURVES = ("train/loss", "optim/lr", "optim/grad_norm", "eval/loss", "eval/accuracy")
MLP = ("model=mlp", "model.hidden=[12,8]", "data.global_batch_size=200", "runtime.device=cpu",
       "train.steps=10", "train.eval_every_steps=4")  # fmt: skip
GPT = ("model=gpt", "model.layers=1", "model.width=8", "model.heads=2", "data=text", "data.context=12",
       "criterion=token_cross_entropy", "data.global_batch_size=7", "train.steps=4", "optimizer=adamw",
       "runtime.device=cpu")  # fmt: skip
POINTS = (*STRANGER, "data.global_batch_size=7", "train.steps=9")
"""Windows of 7, 7, 7 and 3 samples in every epoch."""
WEIGHTED = "+criterion.weight=[1,2,1,3,1,1,1,0.5,1,1]"


def own(model: str) -> tuple[str, str]:
    """Choose a model of this file."""
    return "model=custom", f"model._target_=tests.train.test_stacked_seeds.{model}"


def seeds_of(*overrides: str, seeds: Sequence[int] = (0, 1, 5)) -> list[Settings]:
    return [settings(*overrides, f"seed={seed}") for seed in seeds]


def stacked(*overrides: str) -> tuple[list[TrainState], list[Collected], list[End]]:
    """Train three seeds as one."""
    of_seeds = seeds_of(*overrides)
    training = StackedState(stackable(of_seeds, load(of_seeds[0])))
    sinks = [Collected() for _ in of_seeds]
    with Progress("test", training.seeds[0].total_steps) as progress:
        ends = train_stacked(training, sinks, progress)
    return list(training.seeds), sinks, ends


def alone(one: Settings) -> tuple[TrainState, Collected, Exception | None]:
    """Train a seed the ordinary way; return also what ended it."""
    experiment, sink = build(one), Collected()
    try:
        with Progress("test", experiment.total_steps) as progress:
            train_to_end(experiment, sink, progress)
    except NonFiniteLossError as error:
        return experiment, sink, error
    return experiment, sink, None


def weights(experiment: TrainState) -> Tensor:
    return torch.cat([p.detach().double().flatten() for p in experiment.modules.parameters()])


def distance(one: TrainState, other: TrainState) -> float:
    return float((weights(one) - weights(other)).norm() / weights(other).norm())


def gap(one: Collected, other: Collected) -> float:
    """The largest relative difference between any two values of the curves."""
    pairs = [p for metric in CURVES for p in zip(one.curve(metric), other.curve(metric), strict=True)]
    assert len(pairs) > 3 * len(one.curve("train/loss"))
    return max(abs(a - b) / abs(b) if b else abs(a) for a, b in pairs)


WHOLE = pytest.mark.whole


@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param((*MLP, "accum.steps=1"), marks=WHOLE),
        (*MLP, "accum.steps=3", "accum.reduction=mean", "optimizer=adamw", "scheduler=cosine"),
        pytest.param(
            (*MLP, "accum.steps=3", "accum.reduction=sum", "accum.max_grad_norm=0.3"), marks=WHOLE
        ),
        (*MLP, "accum.steps=7", WEIGHTED, "optimizer.weight_decay=0.01"),
        pytest.param((*MLP, "accum.steps=7", WEIGHTED, "accum.reduction=sum"), marks=WHOLE),
        pytest.param((*MLP, "accum.steps=7", WEIGHTED, "accum.reduction=mean"), marks=WHOLE),
        pytest.param(
            (*MLP, "accum.steps=5", "+criterion.ignore_index=3", "accum.reduction=mean"), marks=WHOLE
        ),
        (*MLP, "accum.steps=5", "+criterion.ignore_index=3", "accum.partial_window=carry"),
        (*MLP, "accum.schedule={0:1,1:3}", "data.micro_batch_size=50", "data.global_batch_size=null",
         "accum.schedule_lr=linear"),
        (*MLP, "accum.grow=auto", "scheduler=cosine", "data.micro_batch_size=50", "accum.grow_to=4",
         "data.global_batch_size=null", "optimizer=adamw"),
        (*MLP, "accum.steps=3", "criterion=mse", "data=custom", "model.num_classes=1",
         "model.input_shape=[2]", "data.train._target_=tests.train.test_stacked_seeds.line",
         "data.eval._target_=tests.train.test_stacked_seeds.line"),
        (*GPT, "accum.steps=3", "accum.max_grad_norm=0.5"),
        ("model=cnn", "model.width=2", "runtime.device=cpu", "train.steps=3", "accum.steps=2"),
    ],
    ids=lambda overrides: " ".join(o for o in overrides if o not in MLP and o not in GPT[1:]),
)  # fmt: skip
def test_every_seed_has_the_curve_and_the_weights_that_it_has_alone(overrides: tuple[str, ...]) -> None:
    """In float64: all reductions, partial windows, clipping, schedules, ignored and weighted labels."""
    experiments, sinks, ends = stacked(*overrides, EXACT)
    for one, experiment, sink, end in zip(
        seeds_of(*overrides, EXACT), experiments, sinks, ends, strict=True
    ):
        reference, curves, _ = alone(one)
        assert end.error is None
        assert gap(sink, curves) < 1e-12
        assert distance(experiment, reference) < 1e-12
        assert end.audit is not None
        assert sink.curve("audit/e64") == pytest.approx(curves.curve("audit/e64"), abs=1e-12)
        assert sink.tags["verdict"] == curves.tags["verdict"]


def line() -> torch.utils.data.TensorDataset:
    """Points of a line, for a regression."""
    x = torch.randn(450, 2, generator=torch.Generator().manual_seed(0))
    return torch.utils.data.TensorDataset(x, x.sum(1, keepdim=True))


def test_in_float32_a_seed_is_as_far_from_itself_as_another_order_takes_it() -> None:
    """The floor is measured: the same seed alone, with the samples of its windows in another order."""
    overrides = (
        *MLP,
        "model.activation=tanh",
        "accum.steps=3",
        "audit.at_start=false",
        "scheduler=cosine",
    )
    experiments, sinks, _ = stacked(*overrides)
    gaps, moved, curves, floors = [], [], [], []
    for one, experiment, sink in zip(seeds_of(*overrides), experiments, sinks, strict=True):
        reference, found, _ = alone(one)
        reordered, other, _ = alone(one.as_control(1))
        gaps.append(gap(sink, found))
        curves.append(gap(other, found))
        moved.append(distance(experiment, reference))
        floors.append(distance(reordered, reference))
    assert max(gaps) <= RANGE * max(curves)
    assert max(moved) <= RANGE * max(floors)


def test_a_strangers_model_and_data_are_trained_as_they_are_alone() -> None:
    """Frozen parameters, augmentation at every fetch, micro-batches in which nothing counts."""
    ignored = (*POINTS, "data.train._target_=tests.strangers.Ignored", "data.global_batch_size=8",
               "accum.steps=5")  # fmt: skip
    for overrides in (
        (*POINTS, "model._target_=tests.strangers.Frozen", "accum.steps=2"),
        (*POINTS, "+data.train.noise=0.2", "accum.steps=3"),
        ignored,
        (*ignored, "accum.reduction=mean"),
    ):
        experiments, sinks, _ = stacked(*overrides, EXACT)
        for one, experiment, sink in zip(seeds_of(*overrides, EXACT), experiments, sinks, strict=True):
            reference, curves, _ = alone(one)
            assert sink.curve("train/loss") == pytest.approx(curves.curve("train/loss"), rel=1e-12)
            assert distance(experiment, reference) < 1e-12


def test_windows_whose_shapes_part_ways_later_are_trained_all_the_same() -> None:
    """One long sample: the micro-batch that it is in cannot be stacked with those of other seeds."""
    overrides = (*POINTS, "model._target_=tests.strangers.OfSequences", "accum.steps=2",
                 "data.train._target_=tests.strangers.Padded", EXACT)  # fmt: skip
    of_seeds = seeds_of(*overrides, seeds=late(seeds=3))
    training = StackedState(stackable(of_seeds, load(of_seeds[0])))
    apart = [any(part.together is None for part in window) for window in training.windows_from(0)]
    assert True in apart
    assert False in apart
    sinks = [Collected() for _ in of_seeds]
    with Progress("test", 9) as progress:
        train_stacked(training, sinks, progress)
    for one, experiment, sink in zip(of_seeds, training.seeds, sinks, strict=True):
        reference, curves, _ = alone(one)
        assert sink.curve("train/loss") == pytest.approx(curves.curve("train/loss"), rel=1e-12)
        assert distance(experiment, reference) < 1e-12


def late(seeds: int) -> list[int]:
    """Seeds whose first two windows of 7 are without sample 0; the first seed's third has it."""
    found = [s for s in range(200) if all(0 not in WindowPlan(24, 7, s).indices(k) for k in (0, 1))]
    in_third = [s for s in found if 0 in WindowPlan(24, 7, s).indices(2)]
    return [in_third[0], *[s for s in found if s not in in_third][: seeds - 1]]


@pytest.mark.parametrize(
    ("overrides", "why"),
    [
        (("model=cnn", "model.norm=batch", "model.width=2"), "passes change its buffer .*running_mean"),
        (("model.dropout=0.1",), "its passes draw random numbers"),
        (own("Noisy"), "its passes draw random numbers"),
        (own("Branching"), "data-dependent control flow"),
        (own("Projected"), "come out otherwise together"),
        (("optimizer=muon",), "otherwise together than alone"),
        (("optimizer=custom", "optimizer._target_=torch.optim.Adafactor"), "otherwise together"),
        (("optimizer=custom", "optimizer._target_=torch.optim.LBFGS"), "LBFGS evaluates a window"),
        (("optimizer.weight_decay=${seed}",), "optimizer.weight_decay depends on the seed"),
        (("data=ragged", "data.size=44", "data.mean_length=6", "data.vocab_size=8", *GPT[:4],
          "data.global_batch_size=8", "criterion=token_cross_entropy"),
         "micro-batches of its seeds differ in shape"),
        ((*STRANGER, "data.train._target_=tests.strangers.DrawnAtOnce"), "its data are drawn at random"),
        ((*STRANGER, "criterion=custom", "criterion._target_=tests.strangers.count_labels",
          "+criterion._partial_=true"), "known only after the forward pass"),
        (("runtime.precision=bf16",), "runtime.precision=bf16"),
        (("runtime.compile=true",), "runtime.compile=true"),
        (("accum.steps=auto",), "accum.steps=auto"),
        (("accum.on_oom=increase_steps",), "accum.on_oom=increase_steps"),
        (("strategy=cached",), "strategy.*Cached"),
        (("data.workers=2",), "data.workers=2"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)  # fmt: skip
def test_what_cannot_be_stacked_is_refused_with_its_reason(overrides: tuple[str, ...], why: str) -> None:
    """Found out by trying, but for what the stacked loop does not know at all."""
    of_seeds = seeds_of("model=mlp", "train.steps=3", "runtime.device=cpu", *overrides)
    with pytest.raises(NotStackableError, match=why):
        stackable(of_seeds, load(of_seeds[0]))


class Flat(torch.nn.Module):
    """A linear classifier of digits."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.linear(x.flatten(1))
        return logits


class Noisy(Flat):
    """Draws from torch's generator outside of any layer."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + 0.1 * torch.randn(1, dtype=x.dtype))


class Branching(Flat):
    """What it computes depends on values."""

    def forward(self, x: Tensor) -> Tensor:
        logits = super().forward(x)
        return logits if logits.sum() > 0 else 2 * logits


class Projected(Flat):
    """Holds a random tensor that is no buffer, so that nobody stacks it."""

    def __init__(self) -> None:
        super().__init__()
        self.projection = torch.randn(64, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(1) * self.projection.to(x.dtype))


def test_trying_out_leaves_no_trace_in_what_is_trained() -> None:
    """The experiments begin at the weights of their seeds, and no generator has moved."""
    of_seeds = seeds_of(*MLP)
    loaded = load(of_seeds[0])
    state = torch.get_rng_state()
    experiments = stackable(of_seeds, loaded)
    assert torch.equal(state, torch.get_rng_state())
    for one, experiment in zip(of_seeds, experiments, strict=True):
        assert torch.equal(weights(experiment), weights(build(one)))


@pytest.mark.parametrize("fault", ["samples", "norms", "divisors", "clipping"])
def test_a_planted_fault_is_found_before_training(monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    """Seeds that get each other's samples, norm, divisor or clipping factor are not alike alone."""
    from gaccum_exp.train import stacked_seeds as loop

    plain: Any = (
        stack.stacked_windows,
        stack.gradient_norms,
        stack.accumulate_stacked,
        stack.clip_gradients,
    )
    if fault == "samples":

        def swapped(*args: Any, **kwargs: Any) -> Iterator[Any]:
            for window in plain[0](*args, **kwargs):
                yield [
                    stack.MicroBatches(part.each[::-1], tuple(t.flip(0) for t in part.together))
                    for part in window
                ]

        monkeypatch.setattr(loop, "stacked_windows", swapped)
    elif fault == "norms":
        monkeypatch.setattr(loop, "gradient_norms", lambda p: plain[1](p).norm().expand(2))
    elif fault == "divisors":

        def reversed_divisors(of: Any, loss_fn: Any, window: Any, reduction: Sum) -> Any:
            return plain[2](of, loss_fn, window, Sum(reduction.constant.flip(0)))

        monkeypatch.setattr(loop, "accumulate_stacked", reversed_divisors)
    else:
        monkeypatch.setattr(loop, "clip_gradients", lambda p, m, norms: plain[3](p, m, norms.flip(0)))
    of_seeds = seeds_of(*MLP, WEIGHTED, "accum.reduction=sum", "accum.max_grad_norm=0.1")
    with pytest.raises(NotStackableError, match="otherwise together than alone"):
        stackable(of_seeds, load(of_seeds[0]))


def test_a_seed_whose_loss_is_not_finite_ends_alone() -> None:
    """With its curve up to there, as it would have alone; the others train to their end."""
    overrides = (*POINTS, "model._target_=tests.strangers.Fragile", EXACT)
    _, sinks, ends = stacked(*overrides)
    failed = 0
    for one, sink, end in zip(seeds_of(*overrides), sinks, ends, strict=True):
        _, curves, error = alone(one)
        assert str(end.error) == str(error)
        assert sink.curve("train/loss") == pytest.approx(
            curves.curve("train/loss"), rel=1e-12, nan_ok=True
        )
        failed += error is not None
    assert 0 < failed < len(ends)


class RarelyCounted(Points):
    """The labels of one window of one seed do not count."""

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        x, y = super().__getitem__(index)
        return x, -100 if index in WindowPlan(24, 7, late(1)[0]).indices(2) else y


def test_a_seed_with_a_window_in_which_nothing_counts_ends_with_the_reason() -> None:
    """Alone it would take no step there, and be one step behind the others from then on."""
    overrides = (*POINTS, "data.train._target_=tests.train.test_stacked_seeds.RarelyCounted", EXACT)
    of_seeds = [settings(*overrides, f"seed={seed}") for seed in late(3)]
    training = StackedState(stackable(of_seeds, load(of_seeds[0])))
    sinks = [Collected() for _ in of_seeds]
    with Progress("test", 9) as progress:
        ends = train_stacked(training, sinks, progress)
    assert isinstance(ends[0].error, BadInputError)
    assert "nothing in the window of step 3 counts under seed=" in str(ends[0].error)
    assert [end.error is None for end in ends[1:]] == [True] * (len(ends) - 1)
    for one, sink in zip(of_seeds[1:], sinks[1:], strict=True):
        assert sink.curve("train/loss") == pytest.approx(alone(one)[1].curve("train/loss"), rel=1e-12)


VECTORIZED = "sweep.vectorize=seed"
MEASURED = ("peak_bytes", "peak_ratio", "step_s", "step_ratio", "step_windows")
TOGETHER = ("model=mlp", "model.hidden=[8]", "model.activation=tanh", "runtime.device=cpu",
            "train.steps=7", "tracking.log_weights=true", EXACT)  # fmt: skip


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "comparison.csv").open() as file:
        return list(csv.DictReader(file))


def by_name(runs: list[RunRecord]) -> dict[str, RunRecord]:
    assert len({run.name for run in runs}) == len(runs)
    return {run.name: run for run in runs}


@pytest.mark.slow
def test_a_sweep_over_seeds_and_n_ends_as_the_ordinary_one(program: Program) -> None:
    """The same runs with the same names, parameters, tags and curves, the same table and verdicts."""
    arguments = "-m", *TOGETHER, "seed=0,2,1", "accum.steps=1,3"
    ordinary = program(*arguments)
    expected, table = by_name(program.arms()), rows(program.sweep_folder)
    vectorized = program(*arguments, VECTORIZED)
    assert (ordinary.status, vectorized.status) == (0, 0)
    found = by_name(program.arms())
    assert found.keys() == expected.keys()
    for name, run in found.items():
        other = expected[name]
        assert run.status == "FINISHED"
        assert run.tags["vectorized"] == "3 seeds"
        differing = {k for k in run.params if run.params[k] != other.params[k]}
        assert differing == {"sweep_id", "sweep.vectorize"}
        same = ("role", "verdict", "kind", "micro_batch_sizes", "data_digest", "device")
        assert [run.tags[key] for key in same] == [other.tags[key] for key in same]
        said, as_before = (set(one.tags["overrides"].split()) for one in (run, other))
        assert said == as_before | {VECTORIZED}
        for metric in CURVES:
            assert run.curves[metric].global_steps == other.curves[metric].global_steps
            assert run.curves[metric].values == pytest.approx(other.curves[metric].values, rel=1e-12)
        assert not {"time/step_s", "memory/peak_bytes"} & run.metrics.keys()
    for row, as_before in zip(rows(program.sweep_folder), table, strict=True):
        assert not any(row[column] for column in MEASURED)
        assert [row[k] for k in ("role", "accum_steps", "differs", "verdict", "status")] == [
            as_before[k] for k in ("role", "accum_steps", "differs", "verdict", "status")
        ]
        assert float(row["train_loss"]) == pytest.approx(float(as_before["train_loss"]), rel=1e-12)
        assert float(row["weight_distance"]) < 1e-12
    assert "3 seeds were trained as one (sweep.vectorize=seed)" in vectorized.plain
    assert len(list(program.sweep_folder.iterdir())) > 2
    jobs = sorted(path.parent.parent.name for path in program.sweep_folder.rglob("arm.json"))
    assert jobs == ["0", "0", "0", "1", "1", "1"]


def test_the_weights_kept_are_each_seeds_own(program: Program) -> None:
    """What the store holds is what the seed ends with alone, in the shapes of one model."""
    from gaccum_exp.tracking.sink import kept_weights

    program("-m", *TOGETHER, "seed=range(2)", VECTORIZED)
    for run in program.arms():
        kept = kept_weights(program.store(), run.run_id)
        assert kept is not None
        experiment, _, _ = alone(settings(*TOGETHER, f"seed={run.params['seed']}"))
        expected = dict(experiment.model.named_parameters())
        assert kept.keys() == expected.keys()
        for name, tensor in kept.items():
            torch.testing.assert_close(tensor, expected[name].detach(), rtol=1e-12, atol=1e-14)


def test_where_it_is_not_sound_a_sentence_and_the_ordinary_way(program: Program) -> None:
    """BatchNorm's running statistics: the seeds one after the other, each measured as ever."""
    ended = program("-m", "model=cnn", "model.norm=batch", "model.width=2", "train.steps=3",
                    "runtime.device=cpu", "seed=0,1", VECTORIZED)  # fmt: skip
    assert ended.status == 0
    said = [line for line in ended.lines if VECTORIZED in line]
    assert said == [
        "sweep.vectorize=seed: not for this arm: passes change its buffer features.1.running_mean; its "
        "seeds are trained one after the other"
    ]
    runs = program.arms()
    assert sorted(run.params["seed"] for run in runs) == ["0", "1"]
    assert all(run.metrics["time/step_s"] > 0 and "vectorized" not in run.tags for run in runs)
    assert all(row["peak_bytes"] for row in rows(program.sweep_folder))


def test_what_does_not_fit_at_once_is_trained_one_after_the_other(program: Program) -> None:
    """A budget that one seed fits, and three together do not."""
    program.tiny()
    (one,) = program.arms()
    budget = 2 * one.metrics["memory/predicted_peak_bytes"] / 2**30
    ended = program.tiny("-m", "seed=0,1,2", VECTORIZED, f"runtime.memory_budget_gib={budget}")
    assert ended.status == 0
    assert "3 seeds at once are predicted to hold" in ended.err
    assert [run.status for run in program.arms()] == ["FINISHED"] * 3


def test_a_failing_seed_is_recorded_as_it_would_be_alone(program: Program) -> None:
    """FAILED with the reason and the curve up to there; the others finish, and the status says 1."""
    fragile = (*POINTS, "model._target_=tests.strangers.Fragile", EXACT, "seed=0,1,5")
    assert program("-m", *fragile).status == 1
    expected = by_name(program.arms())
    assert program("-m", *fragile, VECTORIZED).status == 1
    found = by_name(program.arms())
    assert {run.status for run in found.values()} == {"FINISHED", "FAILED"}
    for name, run in found.items():
        assert run.tags["vectorized"] == "3 seeds"
        assert run.status == expected[name].status
        assert run.tags.get("failure") == expected[name].tags.get("failure")
        assert run.curves["train/loss"].global_steps == expected[name].curves["train/loss"].global_steps


def test_bad_input_is_refused_seed_by_seed(program: Program) -> None:
    """As in the ordinary sweep, whether the configuration or what is built from it is at fault."""
    for fault in ("accum.steps=0", "optimizer.lr=-1"):
        assert program.tiny("-m", "seed=0,1", fault, VECTORIZED).status == 1
        runs = program.arms()
        assert [run.status for run in runs] == ["FAILED"] * 2
        assert len({run.name for run in runs}) == 2
        assert len({run.tags["failure"] for run in runs}) == 1


def test_ctrl_c_ends_every_seeds_run(program: Program) -> None:
    """All are KILLED, and the sweep with them."""
    stranger = (*POINTS, "model._target_=tests.program.Interrupted", "seed=0,1")
    assert program("-m", *stranger, VECTORIZED).status == 130
    assert [run.status for run in program.arms()] == ["KILLED"] * 2


def test_controls_are_trained_beside_the_seeds_as_ever(program: Program) -> None:
    """The ordinary way, one for each seed of the one-pass arm."""
    program("-m", *TOGETHER, "seed=0,1", "audit.controls=1", VECTORIZED)
    roles = sorted(run.tags["role"] for run in program.arms())
    assert roles == ["control", "control", "reference", "reference"]


@pytest.mark.parametrize("line", [("seed=3",), ("-m", "seed=0"), ("-m", "train.steps=3")])
def test_with_nothing_to_stack_the_run_is_an_ordinary_one(
    program: Program, line: tuple[str, ...]
) -> None:
    """Without -m, or with one seed, the key changes nothing."""
    assert program.tiny(*line, "accum.steps=2", VECTORIZED).status == 0
    (run,) = program.arms()
    assert "vectorized" not in run.tags


def test_an_unknown_way_to_vectorize_is_refused_with_the_nearest(program: Program) -> None:
    """Not ignored, with -m or without."""
    ended = program.tiny("sweep.vectorize=seeds")
    assert ended.status == 2
    assert "sweep.vectorize=seeds: not one of null, seed, did you mean 'seed'?" in ended.err
    assert program.tiny("-m", "seed=0,1", "sweep.vectorize=seeds").status == 1
    assert program.tiny("sweep.seeds=[0,1]").status == 2


def test_a_studys_own_seeds_are_taken_too(program: Program) -> None:
    """Those that an overlay sweeps under `hydra.sweeper.params`."""
    few = "train.epochs=null", "train.steps=2", "accum.reduction=mean", "accum.steps=1,2"
    assert program("-m", "experiment=equivalence", "model=mlp", *few, VECTORIZED).status == 0
    found = sorted((run.params["seed"], run.params["accum.steps"]) for run in program.arms())
    assert found == [(seed, steps) for seed in ("0", "1", "2") for steps in ("1", "2")]
    assert all(run.tags["vectorized"] == "3 seeds" for run in program.arms())
    assert all(run.params["accum.reduction"] == "mean" for run in program.arms())


@pytest.mark.engines
def test_arms_of_seeds_run_side_by_side_under_joblib(home: Path) -> None:
    """Each job is an arm of all seeds, in a process of its own."""
    arguments = ("-m", *TOGETHER, "seed=0,1", "accum.steps=1,2", VECTORIZED,
                 "hydra/launcher=joblib", "hydra.launcher.n_jobs=2")  # fmt: skip
    ended = in_a_process(home, *arguments)
    assert ended.status == 0, ended.err
    (folder,) = (home / "multirun").iterdir()
    found = [(row["accum_steps"], row["differs"], row["status"]) for row in rows(folder)]
    assert found == [(steps, f"seed={seed}", "FINISHED") for seed in ("0", "1") for steps in ("1", "2")]
    assert not any(row["step_s"] for row in rows(folder))
