"""`task=advise`: the ways to a global batch, planned, tried and audited."""

import json
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gaccum_exp.arms import advise, trial
from gaccum_exp.report.compare.ways import Way
from gaccum_exp.tracking.records import RunRecord
from gaccum_exp.train.build import load
from gaccum_exp.train.stopping import Stop
from tests.program import Program
from tests.report.conftest import make_arm
from tests.support import settings

SMALL = ("model=mlp", "model.hidden=[32,16]", "data.global_batch_size=32", "train.epochs=2")


@pytest.mark.slow
def test_ways_are_planned_tried_and_weighed_by_what_runs_have_told(program: Program) -> None:
    """First without runs, then with a noise scale and losses of the same batch."""
    assert program("task=advise", *SMALL).status == 0
    (path,) = program.folder.glob("outputs/*/advice.json")
    first = json.loads(path.read_text())
    ways = {tuple(way["overrides"]): way for way in first["ways"]}
    assert first["noise"] is None
    assert ways[()]["exact"]
    assert ways["accum.steps=4",]["verdict"] == "equivalent"
    assert ways["accum.steps=4",]["peak_bytes"] < ways[()]["peak_bytes"]
    assert all(way["sample_s"] > 0 for way in first["ways"] if way["failure"] is None)
    assert not ways["runtime.precision=bf16",]["exact"]
    (half,) = (way for key, way in ways.items() if "data.global_batch_size=16" in key)
    assert "train.lr_rule=linear" in half["overrides"]
    assert "train.base_batch_size=32" in half["overrides"]
    assert "has told its noise scale" in first["why"]

    assert program(*SMALL, "accum.steps=8", "noise.every_steps=1").status == 0
    ended = program("task=advise", *SMALL)
    assert ended.status == 0
    second = json.loads(
        max(program.folder.glob("outputs/*/advice.json"), key=lambda p: p.stat().st_mtime).read_text()
    )
    assert second["noise"]["scale"] > 0
    assert all(way["objective_s"] for way in second["ways"] if way["sample_s"])
    told = {tuple(way["overrides"]): way["runs"] for way in second["ways"]}
    assert told[()] == told["accum.steps=4",] == 1
    assert told["runtime.precision=bf16",] == 0
    assert "Recommended: " in ended.plain


def test_what_cannot_be_taken_is_said_with_its_reason(program: Program) -> None:
    """A model without blocks has nothing to checkpoint; of what does not fit nothing is tried."""
    ended = program("task=advise", *SMALL, "model.hidden=[]", "runtime.memory_budget_gib=1e-7")
    assert ended.status == 0
    assert "has no blocks" in ended.plain
    assert "Nothing is recommended: no way fits the memory that there is." in ended.plain


def test_a_batch_that_changes_has_no_ways_of_its_own(program: Program) -> None:
    """It is refused before anything is loaded."""
    for key in ("accum.grow=auto", "'accum.schedule={0:1,1:2}'"):
        ended = program("task=advise", *SMALL, "scheduler=cosine", key.strip("'"))
        assert ended.status == 2
        assert "shows the ways to one global batch" in ended.plain


@pytest.mark.parametrize(
    ("given", "batch"),
    [
        (("data.micro_batch_size=32", "data.global_batch_size=null", "accum.steps=8"), 256),
        (("data.micro_batch_size=32", "data.global_batch_size=256", "accum.steps=null"), 256),
        (("data.global_batch_size=64", "accum.steps=4"), 64),
    ],
)
def test_what_a_way_adds_gives_its_batch_and_its_n(given: tuple[str, ...], batch: int) -> None:
    """Added to the user's own command, whichever two of the three sizes that has set."""
    asked = settings("model=mlp", *given)
    for own in (asked.with_accum_steps(1), asked.with_accum_steps(2), asked):
        way = advise._way(asked, own, ())
        then = settings("model=mlp", *given, *way.overrides)
        assert (then.largest_batch, then.accum_steps) == (batch, own.accum_steps)
    half = advise._with_batch(asked, batch // 2)
    then = settings("model=mlp", *given, *advise._way(asked, half, ()).overrides)
    assert (then.largest_batch, then.accum_steps) == (batch // 2, 1)


def test_only_full_windows_are_timed_each_for_the_samples_it_holds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The last window of an epoch is shorter; a batch that the data have not is all that they have."""
    clock = [0.0]

    def take(state: Any, window: list[Any]) -> None:
        clock[0] += sum(len(x) for x, _ in window) * (
            1.0 if state.plan.is_largest(state.global_step) else 9
        )

    monkeypatch.setattr(trial, "take_step", take)
    monkeypatch.setattr(trial, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    monkeypatch.setattr(trial, "LONGEST_ROUND_S", 1e9)
    for batch, every, held in ((512, 3, 512), (2048, 1, 1442)):
        own = settings("model=mlp", f"data.global_batch_size={batch}", f"train.steps={6 * every}")
        loaded = load(own)
        assert loaded.plan.full_window == held
        way, seconds = advise._with_held(own, advise._way(own, own, ()), loaded), list[float]()
        trial._timed(own, way, lambda _, data=loaded: data, Stop(), seconds)
        assert seconds == [1.0] * 4
        assert way.held == (None if held == batch else held)


def test_a_way_that_runs_out_of_memory_is_left_and_the_others_are_tried(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Any other error of the program's own goes on; ways are tried in turn."""
    order = []

    def timed(own: Any, way: Way, data_of: Any, stop: Any, seconds: list[float]) -> Way:
        order.append(own.global_batch_size)
        if own.global_batch_size == 2:
            raise torch.OutOfMemoryError("out of memory")
        seconds += [1.0, 3.0]
        return way

    monkeypatch.setattr(trial, "_timed", timed)
    monkeypatch.setattr(trial, "_audited", lambda own, way, *of: way)
    made = [Way((), (), b, 1, b, True) for b in (1, 2, 3)]
    ways: Any = [(way, way) for way in made]
    found = trial.tried(ways, lambda own: own, Stop())
    assert order == [1, 2, 3, 1, 3, 1, 3]
    assert found[1].failure == "it ran out of memory when it was tried"
    assert found[0].sample == found[2].sample == (2.0, 1.0, 3.0, 6)
    monkeypatch.setattr(trial, "_timed", lambda *of: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trial.tried(ways, lambda own: own, Stop())


def test_the_loss_of_a_way_is_the_mean_over_seeds_at_the_best_rate() -> None:
    """Not the lowest of all runs, which is the lower the more there are."""
    own = settings("model=mlp", "data.global_batch_size=64")

    def run(rate: float, loss: float) -> RunRecord:
        params = {"optimizer.lr": str(rate), "runtime.precision": "fp32"}
        arm = make_arm(1, global_batch=64, params=params)
        return replace(arm, metrics={**arm.metrics, "eval/loss": loss})

    way = advise._way(own, own, ())
    runs = [run(0.1, 0.2), run(0.1, 0.7), run(0.2, 0.3), run(0.2, 0.4), run(0.2, 0.5), run(0.4, 1e308)]
    found = advise._with_runs(way, own, runs)
    assert (found.loss, found.runs) == (pytest.approx(0.4), 3)


def test_runs_count_that_had_as_many_samples_at_one_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """One window is not two, a batch that changed in training is none, nor is a control."""
    own = settings("model=mlp", "data.global_batch_size=64", "train.steps=2")
    params = {k: str(v) for k, v in own.flat().items()}
    told = {"training_samples": "1442"}

    def run(steps: int, **tags: str) -> RunRecord:
        arm = make_arm(1, run_id=f"{steps} {tags}", n_losses=steps, tags=told | tags)
        return replace(arm, params=params)

    class Store:
        def __init__(self, *of: str) -> None:
            """Open nothing."""

        def finished(self, like: Any) -> list[RunRecord]:
            return [run(2), run(1), run(3), run(2, global_batches="16, 64"), run(2, role="control")]

        def with_curves(self, runs: list[RunRecord], curves: Any) -> list[RunRecord]:
            return runs

    monkeypatch.setattr("gaccum_exp.tracking.mlflow_store.Store", Store)
    assert [found.run_id for found in advise._runs_like(own, load(own))] == ["2 {}"]
