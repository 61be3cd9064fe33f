"""An audit in a run: when a window is judged, what of it is recorded, and how the program ends."""

import json
import logging
import random
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mlflow import MlflowClient
from torch import Tensor, nn

from gaccum_exp.arms.report import Runs
from gaccum_exp.audit.audited_window import WINDOW_FILE, AuditedWindow
from gaccum_exp.audit.result import Audit, Culprit, ParameterError, Verdict
from gaccum_exp.core.seeding import seed_host
from gaccum_exp.report.compare.audited_windows import window_of
from gaccum_exp.tracking.records import RunRecord
from gaccum_exp.tracking.sink import Sink
from gaccum_exp.train.audits import audit
from gaccum_exp.train.build import build
from gaccum_exp.train.clock import StepClock
from gaccum_exp.train.memory_meters import MemoryMeters
from tests.program import Program, sweep_here
from tests.strangers import Net, NumpyNoise
from tests.support import STRANGER, settings, trained

pytestmark = pytest.mark.usefixtures("undrawn")

KEYS = {"verdict", "e64", "e", "floor", "scale", "culprit", "culprit_type", "cause", "remedy",
        "accum_steps", "reduction", "denominator", "parameters", "moves", "besides"}  # fmt: skip
STATUS = {"identical": 0, "equivalent": 0, "biased": 3, "stochastic": 4, "inconclusive": 5}
ENGINE = "gaccum_exp.train.audits.audit_window"
Engine = Callable[..., Audit]


def engine(verdict: Callable[[int], Verdict]) -> Engine:
    """Return an engine that makes its verdict of N, and its numbers up."""

    def audit_window(model: nn.Module, loss_fn: Any, window: list[Any], **how: Any) -> Audit:
        found = verdict(len(window))
        at_fault = found == "biased"
        return Audit(
            verdict=found,
            accum_steps=len(window),
            reduction=how["reduction"].name,
            e64=None if found == "inconclusive" else 0.5,
            e=0.25,
            floor=float("nan"),
            cause="batch statistics" if at_fault else None,
            culprit="layers.1" if at_fault else None,
            culprit_type="BatchNorm1d" if at_fault else None,
            remedy="replace it" if at_fault else None,
            culprits=(Culprit("layers.1", "BatchNorm1d", "batch statistics"),) if at_fault else (),
            parameters=tuple(ParameterError(f"p{i}", float("inf"), 0.1, 0.0) for i in range(13)),
        )

    return audit_window


def in_order(*verdicts: Verdict) -> Engine:
    """Return an engine whose verdicts come in this order, whatever it is asked."""
    remaining = iter(verdicts)
    return engine(lambda steps: next(remaining))


def history(run: RunRecord, program: Program, metric: str) -> dict[int, float]:
    """Return a metric's values by step."""
    points = MlflowClient(program.uri).get_metric_history(run.run_id, metric)
    return {point.step: point.value for point in points}


def strict(text: str) -> Any:
    """Read JSON as its standard has it: without NaN and Infinity."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


class Normed(Net):
    """Everything that an audit could disturb: running statistics and random draws."""

    def __init__(self) -> None:
        super().__init__(dropout=0.4)
        self.norm = nn.BatchNorm1d(2).double()

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 2) -> logits (batch, 3)."""
        return super().forward(self.norm(x))


class Drawing(NumpyNoise):
    """Draws from torch, Python and NumPy."""

    def __init__(self) -> None:
        super().__init__(dropout=0.4)


@pytest.mark.parametrize("verdict", list(STATUS))
def test_the_exit_status_of_an_audit_is_its_verdict(
    program: Program, monkeypatch: pytest.MonkeyPatch, verdict: Verdict
) -> None:
    """Somebody's CI is guarded by it; what the program prints says the same."""
    monkeypatch.setattr(ENGINE, engine(lambda steps: verdict))
    ended = program.tiny("task=audit", "accum.steps=4")
    assert ended.status == STATUS[verdict]
    assert f"verdict {verdict}" in ended.plain
    (run,) = program.arms()
    assert run.tags["verdict"] == verdict
    assert run.status == "FINISHED"


def test_an_audit_leaves_audit_json_metrics_and_tags_and_trains_nothing(
    program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file holds every key in strict JSON; what could not be had is null there and no metric."""
    monkeypatch.setattr(ENGINE, engine(lambda steps: "biased"))
    ended = program.tiny("task=audit", "accum.steps=4")
    told = strict((program.sweep_folder / "audit.json").read_text())
    assert told.keys() >= KEYS
    assert (told["verdict"], told["accum_steps"], told["floor"]) == ("biased", 4, None)
    assert told["parameters"][0] == {"name": "p0", "error": None, "share": 0.1, "norm": 0.0}
    (run,) = program.arms()
    assert dict(run.metrics) == {"audit/e64": 0.5, "audit/e": 0.25}
    told_tags = {key: run.tags[key] for key in ("verdict", "culprit", "cause", "remedy", "kind")}
    assert told_tags == {
        "verdict": "biased", "culprit": "layers.1", "cause": "batch statistics",
        "remedy": "replace it", "kind": "audit",
    }  # fmt: skip
    kept = {item.path for item in MlflowClient(program.uri).list_artifacts(run.run_id)}
    assert kept == {"config.yaml", "audit.json"}
    for said in ("layers.1 (BatchNorm1d)", "batch statistics", "replace it", "p9", "and 3 more"):
        assert said in ended.plain
    assert "p10" not in ended.plain
    assert "Every arm" not in ended.plain


@pytest.mark.parametrize(
    ("norm", "status", "verdict", "culprit"),
    [("group", 0, "equivalent", None), ("batch", 3, "biased", "features.1")],
)
def test_the_built_in_model_is_judged_by_its_normalisation(
    program: Program, norm: str, status: int, verdict: str, culprit: str | None
) -> None:
    """GroupNorm keeps samples apart; BatchNorm does not, and its first layer is named."""
    size = ("model.width=4", "data.global_batch_size=32", "accum.steps=4", "runtime.device=cpu")
    ended = program("task=audit", f"model.norm={norm}", *size)
    told = strict((program.sweep_folder / "audit.json").read_text())
    assert (ended.status, told["verdict"], told["culprit"]) == (status, verdict, culprit)


def test_a_detector_on_lists_of_boxes_is_judged(program: Program) -> None:
    """A stranger's data set, model and loss; by boxes it is the large batch, whatever their number."""
    names = {"model": "Detector", "data.train": "Scenes", "criterion": "BoxLoss"}
    targets = [f"{key}._target_=tests.boxes.{name}" for key, name in names.items()]
    groups = ("model=custom", "data=custom", "criterion=custom", "runtime.device=cpu")
    size = ("accum.steps=3", "data.global_batch_size=7")
    ended = program("task=audit", *groups, *targets, *size)
    told = strict((program.sweep_folder / "audit.json").read_text())
    assert (ended.status, told["verdict"], told["accum_steps"]) == (0, "equivalent", 3)


@pytest.mark.slow
def test_a_resnet_is_biased_by_its_first_batch_normalisation(program: Program) -> None:
    """The first recipe of the README."""
    resnet = ("model=torchvision", "model.name=resnet18", "runtime.device=cpu")
    ended = program("task=audit", *resnet, "accum.steps=4", "data.global_batch_size=32")
    told = strict((program.sweep_folder / "audit.json").read_text())
    assert (ended.status, told["verdict"], told["culprit"]) == (3, "biased", "net.bn1")
    assert (told["cause"], told["culprit_type"]) == ("batch statistics", "BatchNorm2d")


@pytest.mark.parametrize(
    ("verdicts", "status"),
    [
        (("identical", "equivalent", "equivalent"), 0),
        (("identical", "stochastic", "equivalent"), 4),
        (("identical", "stochastic", "inconclusive"), 5),
        (("stochastic", "biased", "inconclusive"), 3),
    ],
)
def test_a_sweep_of_audits_ends_with_a_table_and_the_worst_status(
    program: Program, monkeypatch: pytest.MonkeyPatch, verdicts: tuple[Verdict, ...], status: int
) -> None:
    """A line for each arm, `audit.json` in each arm's folder, the first of 3, 5, 4 that any earned."""
    by_steps = dict(zip((1, 2, 4), verdicts, strict=True))
    sweep_here(monkeypatch)
    monkeypatch.setattr(ENGINE, engine(by_steps.__getitem__))
    ended = program.tiny("-m", "task=audit", "accum.steps=1,2,4")
    assert ended.status == status
    told = [strict(p.read_text()) for p in sorted(program.sweep_folder.glob("*/audit.json"))]
    assert [(audit["accum_steps"], audit["verdict"]) for audit in told] == list(by_steps.items())
    table = ended.out.partition("The gradient against that of one pass")[2]
    for steps, verdict in by_steps.items():
        assert re.search(rf"^ *{steps} +{verdict} ", table, re.MULTILINE)
    assert "reference" not in ended.out
    written = {path.name for path in program.sweep_folder.iterdir() if path.is_file()}
    assert {"report.html", "comparison.csv"} <= written
    assert not [name for name in written if name.endswith(".svg")]


def test_an_arm_that_cannot_be_audited_outranks_every_verdict(
    program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Status 1, its reason below the table, and the other arm is audited."""
    sweep_here(monkeypatch)
    monkeypatch.setattr(ENGINE, engine(lambda steps: "biased"))
    ended = program.tiny("-m", "task=audit", "accum.steps=0,2")
    assert ended.status == 1
    assert "'accum.steps=0' failed (must be at least 1)" in " ".join(ended.out.split())
    assert "no figure" not in ended.plain
    assert program.tiny("task=audit", "accum.steps=0").status == 2


def test_a_training_is_audited_at_its_start_and_at_its_interval(
    program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Metrics stand beside the train/loss of the same window; tags and status are the worst one's."""
    monkeypatch.setattr(ENGINE, in_order("equivalent", "biased", "stochastic"))
    ended = program.tiny("accum.steps=2", "train.steps=6", "audit.every_steps=2")
    assert ended.status == 3
    (run,) = program.arms()
    assert list(history(run, program, "audit/e64")) == [1, 3, 5]
    assert list(history(run, program, "audit/floor")) == []
    assert (run.tags["verdict"], run.tags["culprit"]) == ("biased", "layers.1")
    assert list(history(run, program, "train/loss")) == [1, 2, 3, 4, 5, 6]
    outcome = json.loads((program.sweep_folder / "arm.json").read_text())
    assert (outcome["status"], outcome["verdict"]) == ("FINISHED", "biased")


@pytest.mark.parametrize(
    ("overrides", "verdict"),
    [
        (("accum.reduction=mean",), "biased"),  # 40 samples: 15, 15, and a rest of 10 in 4, 3, 3
        (("accum.reduction=mean", "task=audit"), "biased"),
        (("accum.reduction=global_mean",), "equivalent"),
        (("accum.reduction=mean", "accum.partial_window=drop"), "equivalent"),
        (("accum.reduction=mean", "train.steps=2"), "equivalent"),  # which never gets there
    ],
)
def test_the_partial_window_is_judged_where_it_may_be_biased_and_full_ones_are_not(
    program: Program, overrides: tuple[str, ...], verdict: str
) -> None:
    """A full window is cut into equal parts, the rest of an epoch is not: neither stands for both."""
    whole = (*STRANGER, "+data.train.samples=40", "data.global_batch_size=15", "train.steps=4")
    program(*whole, "accum.steps=3", *overrides)
    (run,) = program.arms()
    assert run.tags["verdict"] == verdict
    assert ("partial window" in run.tags.get("detail", "")) == (verdict == "biased")


@pytest.mark.parametrize("task", ["train", "audit"])
@pytest.mark.parametrize("reduction", ["mean", "global_mean"])
def test_a_later_window_that_counts_unequally_is_judged(
    program: Program, reduction: str, task: str
) -> None:
    """One label of the epoch is ignored, in a window behind the first: that one is audited, too."""
    data = (*STRANGER, "data.train._target_=tests.strangers.OnceIgnored", "+data.train.samples=40")
    program(*data, "data.global_batch_size=8", "train.steps=5", "accum.steps=4", f"task={task}",
            f"accum.reduction={reduction}")  # fmt: skip
    (run,) = program.arms()
    biased = reduction == "mean"
    assert run.tags["verdict"] == ("biased" if biased else "equivalent")
    assert ("micro-batches count unequally" in run.tags.get("detail", "")) == biased
    assert not biased or run.tags["cause"] == "unequal denominators"


def test_a_worse_verdict_takes_the_earlier_ones_words_away(
    program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No culprit of another window is left beside it."""
    monkeypatch.setattr(ENGINE, in_order("biased", "biased", "identical"))
    monkeypatch.setattr("gaccum_exp.audit.result.SEVERITY", ("biased", "identical"))
    program.tiny("accum.steps=2", "train.steps=3", "audit.every_steps=1")
    (run,) = program.arms()
    assert (run.tags["verdict"], run.tags.get("culprit", "")) == ("identical", "")


def test_the_audit_that_comes_unasked_changes_no_exit_status(
    program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One at the start by default, one more arm without it by its key."""
    sweep_here(monkeypatch)
    monkeypatch.setattr(ENGINE, engine(lambda steps: "biased"))
    assert program.tiny("-m", "accum.steps=2", "audit.at_start=true,false").status == 0
    verdicts = {run.params["audit.at_start"]: run.tags.get("verdict") for run in program.arms()}
    assert verdicts == {"True": "biased", "False": None}
    (audited,) = [run for run in program.arms() if "verdict" in run.tags]
    assert list(history(audited, program, "audit/e")) == [1]


def test_an_audit_that_breaks_takes_no_run_down(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A warning with the reason, an inconclusive verdict, and the training goes to its end."""

    def broken(*args: Any, **kwargs: Any) -> Audit:
        raise RuntimeError("a fault of the audit's")

    monkeypatch.setattr(ENGINE, broken)
    with caplog.at_level(logging.WARNING):
        _, sink = trained(*STRANGER, "data.global_batch_size=8", "accum.steps=2", "train.steps=4")
    assert "RuntimeError: a fault of the audit's" in caplog.text
    assert sink.tags["verdict"] == "inconclusive"
    assert len(sink.curve("train/loss")) == 4


def state(overrides: tuple[str, ...]) -> dict[str, Any]:
    """Train, and return everything that an audit must not touch."""
    experiment, sink = trained(*overrides)
    return {
        "model": experiment.model.state_dict(),
        "gradients": [p.grad for p in experiment.parameters],
        "optimizer": experiment.optimizer.state_dict(),
        "losses": sink.curve("train/loss"),
        "norms": sink.curve("optim/grad_norm"),
        "generator": torch.get_rng_state(),
    }


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_training_is_bit_identical_with_and_without_audits(optimizer: str) -> None:
    """Weights, running statistics, gradients, optimizer state, curves, the generator's state."""
    common = (*STRANGER, "model._target_=tests.arms.test_audit_task.Normed", f"optimizer={optimizer}",
              "+data.train.noise=0.1", "data.global_batch_size=8", "accum.steps=3", "train.steps=7",
              "data.workers=0")  # fmt: skip
    bare, audited = (
        state((*common, *how))
        for how in (("audit.at_start=false",), ("audit.at_start=true", "audit.every_steps=1"))
    )
    torch.testing.assert_close(audited, bare, rtol=0, atol=0, equal_nan=True)


def test_an_audit_leaves_every_generator_where_it_was() -> None:
    """torch's, Python's and NumPy's, with a model that draws from all three."""
    experiment = build(
        settings(*STRANGER, "model._target_=tests.arms.test_audit_task.Drawing", "accum.steps=3")
    )
    window = next(experiment.windows_from(0))
    seed_host(7)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    audit(experiment, window, 0)
    after = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    assert after == before


def test_an_audit_is_no_part_of_step_time_or_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """No window is on the clock or at the meter while it is judged, nor on the clock afterwards."""
    metered: list[str] = []
    timed: list[tuple[int, int]] = []
    judged: list[list[str]] = []

    class Clock(StepClock):
        def _now(self) -> Any:
            return len(judged)  # a window in which nothing is judged ends when it began

        def _seconds(self, start: Any, end: Any) -> float:
            return 1.0

        def count(self, start: Any, end: Any, tokens: int = 0) -> None:
            super().count(start, end, tokens)
            timed.append((start, end))

    plain = MemoryMeters._metered

    @contextmanager
    def noted(*args: Any) -> Iterator[None]:
        metered.append("meter")
        with plain(*args):
            yield
        metered.pop()

    def audit_window(*args: Any, **kwargs: Any) -> Audit:
        judged.append(list(metered))
        return Audit("equivalent", 2, "global_mean")

    monkeypatch.setattr("gaccum_exp.train.loop.StepClock", Clock)
    monkeypatch.setattr(MemoryMeters, "_metered", noted)
    monkeypatch.setattr(ENGINE, audit_window)
    _, sink = trained(*STRANGER, "data.global_batch_size=8", "accum.steps=2", "train.steps=9",
                      "audit.every_steps=2")  # fmt: skip
    assert judged == [[]] * 5  # at 0, 2, 4, 6 and 8; the memory of 2 is measured
    assert timed == [(1, 1), (2, 2), (3, 3), (4, 4)]  # the windows 1, 3, 5 and 7
    assert sink.last["memory/peak_bytes"] > 0


def test_the_reference_trains_controls_that_are_runs_of_their_own(program: Program) -> None:
    """Same samples, same start, another order: curves a rounding apart; no other arm has any."""
    ended = program.tiny("-m", "accum.steps=1,2", "audit.controls=2", "data=digits", "train.steps=6")
    assert ended.status == 0
    runs = {run.name: run for run in program.arms()}
    reference = next(run for run in runs.values() if run.tags["role"] == "reference")
    controls = [run for run in runs.values() if run.tags["role"] == "control"]
    assert len(runs) == 4
    assert [run.params["audit.control_seed"] for run in controls] == ["1", "2"]
    curve = torch.tensor(reference.curves["train/loss"].values)
    for control in controls:
        assert control.tags["control_of"] == reference.name
        assert (control.tags["kind"], control.status) == ("arm", "FINISHED")
        other = torch.tensor(control.curves["train/loss"].values)
        assert 0 < float((curve - other).abs().max()) < 1e-5
        assert "memory/peak_bytes" not in control.metrics
        assert "verdict" not in control.tags
    names = [json.loads(p.read_text())["name"] for p in program.sweep_folder.glob("*/arm.json")]
    assert sorted(names) == sorted(run.name for run in runs.values() if run not in controls)


def test_a_control_starts_from_the_references_weights() -> None:
    """Only the order differs: the initial weights are the same bit for bit."""
    plain = settings(*STRANGER, "data.global_batch_size=8")
    first, control = (build(s).model.state_dict() for s in (plain, plain.as_control(1)))
    torch.testing.assert_close(control, first, rtol=0, atol=0)


def test_a_control_that_fails_is_a_warning_and_no_failure_of_the_arm(
    program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reference stays FINISHED, the next control is trained, the status is 0."""
    import gaccum_exp.arms.run_arm

    train = gaccum_exp.arms.run_arm.train

    def failing(experiment: Any, *args: Any) -> Any:
        if experiment.settings.audit.control_seed == 1:
            raise RuntimeError("a fault of the control's")
        return train(experiment, *args)

    monkeypatch.setattr("gaccum_exp.arms.run_arm.train", failing)
    ended = program.tiny("audit.controls=2")
    assert ended.status == 0
    assert any(
        "control 1 failed: RuntimeError: a fault of the control's" in line for line in ended.lines
    )
    status = {run.params["audit.control_seed"]: run.status for run in program.arms()}
    assert status == {"None": "FINISHED", "1": "FAILED", "2": "FINISHED"}
    assert json.loads((program.sweep_folder / "arm.json").read_text())["status"] == "FINISHED"


def test_a_control_keeps_the_configuration_that_it_ran(program: Program) -> None:
    """Its own number is a parameter and stands in its YAML."""
    program.tiny("audit.controls=1", "train.steps=1")
    (control,) = [run for run in program.arms() if run.tags["role"] == "control"]
    path = MlflowClient(program.uri).download_artifacts(
        control.run_id, "config.yaml", str(program.folder)
    )
    assert "control_seed: 1" in Path(path).read_text()


def test_a_run_keeps_the_window_that_was_judged(program: Program) -> None:
    """Of a training and of an audit; in its folder, in the store, and as a report reads it."""
    size = ("accum.steps=4", "accum.reduction=mean", "data.global_batch_size=10")
    for task in ((), ("task=audit",)):
        program.tiny(*size, *task)
        (run,) = program.arms()
        text = (program.sweep_folder / WINDOW_FILE).read_text()
        told = strict(text)
        assert [m["samples"] for m in told["micro_batches"]] == [3, 3, 2, 2]
        assert (told["verdict"], told["global_step"]) == ("biased", 0)
        assert {layer["name"] for layer in told["layers"]} > {"layers.1.weight", "layers.1.bias"}
        runs = Runs(program.uri, "gaccum_exp", program.sweep_folder)
        runs.sweep(run.tags["sweep_id"])
        of_store = window_of(program.store().fetch, run.run_id)
        assert of_store is not None
        assert of_store.as_json() == text
        assert window_of(runs.fetch, run.run_id) == of_store
    assert window_of(runs.fetch, "another") is None


def test_of_a_batch_that_counts_tokens_they_are_the_unit(program: Program) -> None:
    """Not where each sample counts once."""
    data = ("data=ragged", "data.size=12", "data.eval_size=4", "data.mean_length=6", "data.vocab_size=8")
    gpt = ("model=gpt", "model.layers=1", "model.heads=2", "model.width=8")
    loss = ("criterion=token_cross_entropy", "data.global_batch_size=5", "runtime.device=cpu")
    program("task=audit", *gpt, *data, *loss, "accum.steps=2")
    told = strict((program.sweep_folder / WINDOW_FILE).read_text())
    assert told["unit"] == "tokens"
    assert sum(m["counted"] for m in told["micro_batches"]) > 5


def test_the_window_kept_is_that_of_the_worst_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the run's tags are; a better one later does not take its place."""
    kept: dict[str, str] = {}
    monkeypatch.setattr(Sink, "keep_text", lambda self, name, text: kept.update({name: text}))
    of_window = AuditedWindow("mean", 2, 8)
    verdicts = in_order("equivalent", "biased", "stochastic")
    monkeypatch.setattr(ENGINE, lambda *a, **k: replace(verdicts(*a, **k), window=of_window))
    _, sink = trained(
        *STRANGER, "data.global_batch_size=8", "accum.steps=2", "train.steps=6", "audit.every_steps=2"
    )
    told = strict(kept[WINDOW_FILE])
    assert (told["verdict"], told["global_step"], sink.tags["verdict"]) == ("biased", 2, "biased")


def test_a_window_that_cannot_be_written_takes_no_run_down(
    program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A warning, and the training goes to its end."""

    def full(path: Any, text: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("gaccum_exp.tracking.sink.write_text", full)
    ended = program.tiny("accum.steps=2")
    assert ended.status == 0
    assert "window.json cannot be written (No space left on device)" in ended.plain
