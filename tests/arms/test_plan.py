"""Planning, choosing and keeping to a budget, as the program's user sees it."""

import json
import shlex
from functools import partial
from typing import Any

import pytest
import torch
from mlflow import MlflowClient
from torch import Tensor, nn

from gaccum_exp.arms import plan as planning
from gaccum_exp.core.window import split_sizes
from gaccum_exp.errors import BadInputError
from gaccum_exp.memory.storages import CATEGORIES
from gaccum_exp.tracking.progress import Progress
from gaccum_exp.train.build import build, load
from gaccum_exp.train.memory_meters import MemoryMeters
from tests import strangers
from tests.program import Program
from tests.shortened import shortened
from tests.support import STRANGER, Collected, settings, train_to_end, trained

WIDE = ("model=mlp", "model.hidden=[256]", "data.global_batch_size=1024", "runtime.device=cpu")
SHORT = (*WIDE, "train.steps=4", "audit.at_start=false")
GIB = 2**30


def weights(experiment: Any) -> Tensor:
    return torch.cat([p.detach().flatten() for p in experiment.parameters])


def within(budget_bytes: int, *overrides: str) -> tuple[Any, Collected]:
    """Train under `increase_steps` with a budget."""
    call = (*SHORT, "accum.on_oom=increase_steps", *overrides)
    experiment, sink = build(settings(*call)), Collected()
    with Progress("test", experiment.total_steps) as progress:
        train_to_end(experiment, sink, progress, budget_bytes)
    return experiment, sink


def peak_of(*overrides: str) -> int:
    """Return the predicted peak of a configuration in bytes, and room for the sums of losses."""
    configured = settings(*overrides)
    peak = planning.predicted_peak(configured, load(configured))
    assert peak is not None
    return peak.bytes + 64


TEXT = ("criterion=token_cross_entropy", "data.global_batch_size=16", "model.layers=2", "model.width=32")
BUILT_IN = {
    "mlp": ("model=mlp", "data.global_batch_size=100", "optimizer=adamw"),
    "cnn": ("model=cnn", "data.global_batch_size=100", "+optimizer.fused=true"),
    "cnn, batch norm, bf16, clipped": (
        *("model=cnn", "model.norm=batch", "data.global_batch_size=100"),
        *("runtime.precision=bf16", "accum.max_grad_norm=1"),
    ),
    "gpt": ("model=gpt", "data=text", "data.context=32", *TEXT, "optimizer=adamw"),
    "gpt on ragged sequences, fused": (
        *("model=gpt", "data=ragged", "data.size=64", "data.eval_size=16", *TEXT),
        *("optimizer=adamw", "+optimizer.fused=true"),
    ),
    "gpt, pure bf16, float32 buffers": (
        *("model=gpt", "data=text", "data.context=32", *TEXT),
        *("runtime.precision=bf16", "runtime.weight_dtype=same", "accum.buffer_dtype=float32"),
    ),
    "torchvision, fp64, checkpointed": (
        *("model=torchvision", "model.name=resnet18", "data.global_batch_size=12"),
        *("runtime.precision=fp64", "runtime.activation_checkpointing=true"),
    ),
}


@pytest.mark.parametrize("steps", shortened([1, 4], [4]))
@pytest.mark.parametrize("name", BUILT_IN)
def test_what_is_predicted_is_what_training_measures(name: str, steps: int) -> None:
    """Within 2 %, of every built-in model, under every kind of step."""
    call = (
        *(*BUILT_IN[name], f"accum.steps={steps}", "runtime.device=cpu"),
        *("train.steps=3", "audit.at_start=false", "train.eval_every_steps=3"),
    )
    _, sink = trained(*call)
    assert peak_of(*call) == pytest.approx(sink.last["memory/peak_bytes"], rel=0.02)


@pytest.mark.parametrize("partial", ["exact", "carry"])
def test_windows_of_an_epoch_smaller_than_the_global_batch_are_predicted(partial: str) -> None:
    """They hold the epoch, not what was asked for; unless the next epochs complete them."""
    call = (
        *(*STRANGER, "data.global_batch_size=100", f"accum.partial_window={partial}"),
        *("train.steps=3", "audit.at_start=false", "accum.steps=2"),
    )
    _, sink = trained(*call)
    assert peak_of(*call) == pytest.approx(sink.last["memory/peak_bytes"], abs=100)
    configured = settings(*call, "task=plan")
    planned = planning.plan(configured, load(configured))
    assert planned.global_batch_size == 100
    said = "Windows of 100 samples ask for more data: data.train holds 24, and so would they."
    assert (said in planned.notes) == (partial == "exact")


def test_a_prediction_leaves_nothing_to_the_training_that_follows() -> None:
    """Where models share a tensor that is made once: it was left on `meta`, and the run failed by it."""
    call = (
        *(*STRANGER, "model._target_=tests.strangers.Sharing", "data.global_batch_size=24"),
        *("train.steps=3", "audit.at_start=false"),
    )
    strangers.ones.cache_clear()
    predicted = peak_of(*call)
    _, sink = trained(*call)
    assert predicted == pytest.approx(sink.last["memory/peak_bytes"], rel=0.02)


def test_a_plan_is_printed_written_and_recorded(program: Program) -> None:
    """A row for every N with its parts; the N that fits, the knee, and the command that trains so."""
    gib = peak_of(*WIDE, "optimizer=adamw", "accum.steps=3") / GIB
    call = (*WIDE, f"runtime.memory_budget_gib={gib:.9f}", "optimizer=adamw")
    ended = program("task=plan", *call)
    assert ended.status == 0, ended.err
    plan = json.loads((program.sweep_folder / "plan.json").read_text())
    assert [row["accum_steps"] for row in plan["rows"]] == [1, 2, 3, *(2**i for i in range(2, 11))]
    for row in plan["rows"]:
        assert row["peak_bytes"] == sum(row[f"{part}_bytes"] for part in CATEGORIES)
        assert row["micro_batch_size"] == split_sizes(1024, row["accum_steps"])[0]
        assert row["peak_phase"] in ("forward/backward", "optimizer step")
    fitting = [r["accum_steps"] for r in plan["rows"] if r["peak_bytes"] <= plan["budget_bytes"]]
    assert plan["chosen_steps"] == min(fitting) == 3
    assert plan["knee_steps"] in [row["accum_steps"] for row in plan["rows"]]
    assert all(a["saved_bytes"] > 0 for a in plan["advice"])
    chosen = plan["chosen_steps"]
    assert f"N = {chosen} is the smallest that fits the budget of" in ended.plain
    command = " ".join(call).replace("model.hidden=[256]", "'model.hidden=[256]'")
    assert f"python -m gaccum_exp {command} " in ended.plain
    assert f"accum.steps={chosen} Written:" in ended.plain
    assert (program.sweep_folder / "plan.png").stat().st_size > 10_000
    (run,) = program.arms()
    assert run.tags["kind"] == "plan"
    assert run.tags["plan.chosen_steps"] == str(chosen)
    recorded = MlflowClient(program.uri).get_metric_history(run.run_id, "plan/peak_bytes")
    by_steps = {metric.step: metric.value for metric in recorded}
    assert by_steps == {row["accum_steps"]: row["peak_bytes"] for row in plan["rows"]}


@pytest.mark.parametrize(
    "splitting",
    [
        ("data.micro_batch_size=8", "data.global_batch_size=null", "accum.steps=4"),
        ("data.micro_batch_size=8", "data.global_batch_size=32", "accum.steps=null"),
        ("accum.schedule={0:1,2:2}", "data.global_batch_size=32"),
    ],
)
def test_the_command_that_is_printed_trains_with_what_was_planned(splitting: tuple[str, ...]) -> None:
    """However else the window was split: N beside that was refused, or multiplied the global batch."""
    call = ("model=mlp", "model.hidden=[8]", "runtime.device=cpu", *splitting)
    configured = settings("task=plan", *call)
    planned = planning.plan(configured, load(configured))
    said = shlex.split(planning.command(planned, ["task=plan", *call]))
    assert said[:3] == ["python", "-m", "gaccum_exp"]
    trains = settings(*said[3:])
    assert trains.task == "train"
    assert trains.data.global_batch_size == planned.global_batch_size == 32
    assert trains.accum_steps == planned.chosen_steps


def test_auto_trains_with_the_smallest_n_that_fits(program: Program) -> None:
    """And says so in the log, the parameters, the tags and the table."""
    budget = peak_of(*WIDE, "accum.steps=3")
    ended = program(*SHORT, "accum.steps=auto", f"runtime.memory_budget_gib={budget / GIB:.9f}", "-m")
    assert ended.status == 0, ended.err
    (run,) = program.arms()
    assert run.params["accum.steps"] == "3"
    assert run.params["data.micro_batch_size"] == "342"
    assert run.name.startswith("N=3 ")
    assert "N = 3 is the smallest whose predicted peak" in run.tags["accum.auto"]
    assert "accum.steps=auto: N = 3 is the smallest" in ended.plain
    assert run.metrics["memory/peak_bytes"] <= budget
    predicted = run.metrics["memory/predicted_peak_bytes"]
    assert abs(predicted - run.metrics["memory/peak_bytes"]) < 64


def test_auto_under_mean_takes_an_n_that_divides_the_batch() -> None:
    """N = 3 would fit as well, and would bias the mean of means."""
    budget = peak_of(*WIDE, "accum.steps=3")
    call = (*WIDE, "accum.steps=auto", f"runtime.memory_budget_gib={budget / GIB:.9f}")
    for reduction, steps in (("global_mean", 3), ("mean", 4)):
        configured = settings(*call, f"accum.reduction={reduction}")
        chosen, _ = planning.with_fitting_accum_steps(configured, load(configured))
        assert chosen.accum_steps == steps
        assert chosen.flat()["accum.steps"] == steps


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("accum.steps=auto", "data.micro_batch_size=8"), "data.micro_batch_size=8 does as well"),
        (("accum.steps=auto", "accum.schedule={0:1,2:4}"), "are both N"),
        (("accum.steps=atuo",), "accum.steps=atuo: not an integer, null or auto, did you mean 'auto'"),
        (("accum.steps=1.5",), "accum.steps=1.5: not an integer"),
        (("accum.steps=true",), "accum.steps=True: not an integer"),
        (("accum.on_oom=retry",), "accum.on_oom=retry: not one of raise, increase_steps"),
        (("runtime.memory_budget_gib=0",), "runtime.memory_budget_gib=0.0: must be above 0"),
    ],
)
def test_what_makes_no_sense_is_refused(overrides: tuple[str, ...], said: str) -> None:
    """In one line, by its key."""
    with pytest.raises(BadInputError, match=said):
        settings(*SHORT, *overrides)


def test_an_arm_that_does_not_fit_says_so_before_it_runs(program: Program) -> None:
    """With both sizes and the N that fits; the arms that fit are run."""
    budget = peak_of(*WIDE, "accum.steps=2")
    ended = program(*SHORT, "accum.steps=1,2", f"runtime.memory_budget_gib={budget / GIB:.9f}", "-m")
    assert ended.status == 1
    one, two = program.arms()
    assert (one.status, two.status) == ("FAILED", "FINISHED")
    assert "accum.steps=1 does not fit: its predicted peak is" in one.tags["failure"]
    assert one.tags["failure"].endswith("accum.steps=2 fits")
    assert not one.curves.get("train/loss")


def test_a_window_out_of_memory_is_repeated_as_if_n_had_been_so_from_the_start() -> None:
    """Bit for bit, with the event recorded; the budget holds from then on."""
    budget = peak_of(*SHORT, "accum.steps=4")
    experiment, sink = within(budget)
    assert experiment.split_factor == 4
    assert torch.equal(weights(experiment), weights(trained(*SHORT, "accum.steps=4")[0]))
    assert sink.last["memory/peak_bytes"] <= budget
    assert sink.curve("memory/oom_events")[-1] == 2
    assert sink.curve("accum/steps")[-1] == 4
    assert sink.tags["oom.1"] == "step 1: out of memory at N = 1, repeated with N = 2"
    assert sink.tags["accum.steps_used"] == "4"
    assert sink.tags["role"] == "candidate"
    assert len(sink.curve("train/loss")) == 4


def test_under_mean_a_finer_split_is_an_even_one() -> None:
    """18 samples: after N = 3 comes 6, and after that not 12 but 18."""
    experiment = build(
        settings(*SHORT, "data.global_batch_size=18", "accum.steps=3", "accum.reduction=mean")
    )
    found = []
    for factor in (1, 2, 4, 8):
        experiment.split_factor = factor
        found.append(experiment.accum_steps(0))
    assert found == [3, 6, 18, 18]


def test_a_later_window_out_of_memory_is_repeated_too() -> None:
    """Optimizer state lies beside the second window's activations, and not beside the first's."""
    call = (*SHORT, "optimizer=adamw", "data.global_batch_size=256", "model.hidden=[512]")
    experiment, sink = within(peak_of(*call) - 200, *call[len(SHORT) :])
    assert sink.tags["oom.1"] == "step 2: out of memory at N = 1, repeated with N = 2"
    once = weights(trained(*call)[0])
    assert torch.allclose(weights(experiment), once, rtol=1e-4, atol=1e-5)


def test_it_gives_up_where_one_sample_does_not_fit() -> None:
    """With the N that it went to, and both sizes."""
    call = ("data.global_batch_size=8",)
    with pytest.raises(BadInputError, match="out of memory at N = 8, with micro-batches of one sample"):
        within(10_000, *call)


def test_running_statistics_are_those_of_one_attempt() -> None:
    """With batch norm: the failed attempt leaves nothing behind."""
    call = (
        *("model=cnn", "model.norm=batch", "data.global_batch_size=256", "runtime.device=cpu"),
        *("train.steps=4", "audit.at_start=false"),
    )
    experiment, sink = build(settings(*call, "accum.on_oom=increase_steps")), Collected()
    with Progress("test", experiment.total_steps) as progress:
        train_to_end(experiment, sink, progress, peak_of(*call, "accum.steps=2"))
    assert sink.tags["accum.steps_used"] == "2"
    plain = trained(*call, "accum.steps=2")[0]
    ours, theirs = (e.model.state_dict().values() for e in (experiment, plain))
    states = zip(ours, theirs, strict=True)
    assert all(torch.equal(one, other) for one, other in states)


class RunsOut(nn.Module):
    """Says that memory has run out wherever a micro-batch holds more than some samples."""

    most = 8

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2, 8), nn.Dropout(0.2), nn.Linear(8, 3)).double()

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.layers(x)
        if self.training and len(x) > self.most and x.device.type == "cpu" and type(x) is Tensor:
            raise torch.OutOfMemoryError(f"no room for {len(x)} samples")
        return result


def test_an_allocators_own_error_is_met_as_the_budgets_is() -> None:
    """As an accelerator raises it; random state included, for the model draws."""
    call = (
        *(*STRANGER, f"model._target_={__name__}.RunsOut", "data.global_batch_size=24"),
        *("train.steps=5", "audit.at_start=false"),
    )
    experiment, sink = trained(*call, "accum.on_oom=increase_steps")
    assert sink.tags["accum.steps_used"] == "4"
    assert torch.equal(weights(experiment), weights(trained(*call, "accum.steps=4")[0]))
    with pytest.raises(torch.OutOfMemoryError, match="no room for 24 samples"):
        trained(*call)


def test_python_running_out_of_memory_is_met_as_well() -> None:
    """By its own error, which is no RuntimeError."""

    class Scarce(RunsOut):
        def forward(self, x: Tensor) -> Tensor:
            try:
                return super().forward(x)
            except torch.OutOfMemoryError:
                raise MemoryError from None

    call = (*STRANGER, "data.global_batch_size=24", "train.steps=2", "audit.at_start=false")
    experiment = build(settings(*call, "accum.on_oom=increase_steps"))
    experiment.model.__class__ = Scarce
    experiment.model.layers = RunsOut().layers
    sink = Collected()
    with Progress("test", 2) as progress:
        train_to_end(experiment, sink, progress)
    assert sink.tags["accum.steps_used"] == "4"


def test_controls_of_an_arm_that_was_split_finer_are_none(program: Program) -> None:
    """They would be of one pass, which the arm no longer is, and run out of memory as it did."""
    model = (*STRANGER, f"model._target_={__name__}.RunsOut", "data.global_batch_size=24")
    ended = program(*model, "train.steps=2", "accum.on_oom=increase_steps", "audit.controls=1")
    assert ended.status == 0, ended.err
    assert [run.tags["role"] for run in program.arms()] == ["candidate"]


def test_a_plan_is_of_every_n_also_where_auto_could_take_none(program: Program) -> None:
    """And says that none fits."""
    ended = program(*WIDE, "task=plan", "accum.steps=auto", "runtime.memory_budget_gib=1e-6")
    assert ended.status == 0, ended.err
    assert "No N fits the budget of" in ended.plain


def test_an_arm_that_runs_out_of_memory_says_what_would_help(program: Program) -> None:
    """As a failure of that arm, with the allocator's own words."""
    model = (*STRANGER, f"model._target_={__name__}.RunsOut", "data.global_batch_size=24")
    ended = program(*model, "train.steps=2", "audit.at_start=false")
    assert ended.status == 1
    (run,) = program.arms()
    assert "out of memory (no room for 24 samples): task=plan says which N fits" in run.tags["failure"]


class Remembering(RunsOut):
    """Sets a buffer and an attribute anew in every pass, and writes to a tensor of its own."""

    level: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("level", torch.zeros((), dtype=torch.float64))
        self.passes = 0
        self.sums = torch.zeros((), dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.level = 0.9 * self.level + x.mean()
            self.passes += 1
            self.sums += self.passes
        result: Tensor = super().forward(x) * (1 + self.level + self.sums + self.passes)
        return result


def test_what_a_model_remembers_is_that_of_one_attempt() -> None:
    """Also where a pass puts a new tensor in the place of a buffer."""
    call = (
        *(*STRANGER, f"model._target_={__name__}.Remembering", "data.global_batch_size=24"),
        *("train.steps=5", "audit.at_start=false", "optimizer.lr=1e-6"),
    )
    experiment, sink = trained(*call, "accum.on_oom=increase_steps")
    assert sink.tags["accum.steps_used"] == "4"
    plain = trained(*call, "accum.steps=4")[0]
    assert torch.equal(weights(experiment), weights(plain))
    assert experiment.model.passes == plain.model.passes == 20


def test_every_repetition_is_finer_and_a_schedules_largest_n_is_told() -> None:
    """From 11 of 22 the next divisor is 22; and a stage to come is split finer as well."""
    call = (*STRANGER, "train.steps=4", "audit.at_start=false", "accum.on_oom=increase_steps")
    model = f"model._target_={__name__}.RunsOut"
    RunsOut.most, most = 1, RunsOut.most
    try:
        sink = trained(*call, model, "data.global_batch_size=22", "accum.reduction=mean")[1]
    finally:
        RunsOut.most = most
    assert sink.curve("accum/steps") == [2, 11, 22]
    by_step = "accum.schedule={0:1,2:2}", "accum.schedule_by=step", "data.global_batch_size=null"
    experiment, sink = trained(*call, model, *by_step, "data.micro_batch_size=10")
    assert [experiment.accum_steps(k) for k in range(4)] == [2, 2, 4, 4]
    assert sink.tags["accum.steps_used"] == "4"
    assert sink.tags["micro_batch_sizes"] == "5, 5, 5, 5"


def test_out_of_memory_in_the_optimizer_step_is_no_matter_of_n(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights may have moved: it ends, and says what needs less."""

    def step(self: object, closure: object = None) -> None:
        raise torch.OutOfMemoryError("no room")

    experiment = build(settings(*SHORT, "accum.on_oom=increase_steps"))
    monkeypatch.setattr(experiment.optimizer, "step", step.__get__(experiment.optimizer))
    with (
        Progress("test", 4) as progress,
        pytest.raises(BadInputError, match=r"optimizer step, which no N makes smaller \(no room\)"),
    ):
        train_to_end(experiment, Collected(), progress)


def test_only_windows_that_could_hold_more_are_followed() -> None:
    """The first without and the first with optimizer state, and any with a larger micro-batch."""
    experiment = build(settings(*SHORT, "accum.on_oom=increase_steps"))
    meters = MemoryMeters(experiment, Collected(), 10**9)
    follows = partial(meters.could_exceed_budget, experiment)
    small, large = [(torch.zeros(4, 3),)], [(torch.zeros(5, 3),)]
    assert [follows(w) for w in (small, small, large, small)] == [True, False, True, False]
    experiment.optimizer.state[experiment.parameters[0]] = {"step": 1}
    assert [follows(w) for w in (small, large, large)] == [True, True, False]
    free = build(settings(*SHORT))
    assert not MemoryMeters(free, Collected(), 10**9).could_exceed_budget(free, small)


def test_a_longer_micro_batch_is_followed_though_it_has_fewer_elements() -> None:
    """Attention grows with the square of the length; and one that shows no tensors is followed once."""
    experiment = build(settings(*SHORT, "accum.on_oom=increase_steps"))
    follows = partial(MemoryMeters(experiment, Collected(), 10**9).could_exceed_budget, experiment)
    wide, long, short = (([(torch.zeros(*shape),)]) for shape in ((16, 100), (4, 350), (4, 100)))
    assert [follows(w) for w in (wide, long, short, long)] == [True, True, False, False]
    assert [follows(w) for w in ([object()], [object()])] == [True, False]
