"""What a comparison adds to the runs that it compared, and where."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gaccum_exp.arms.compared import MOST_COLORS, add_comparison, additions
from gaccum_exp.arms.report import Runs
from gaccum_exp.errors import StoreAwayError
from gaccum_exp.report.compare.comparison import compare
from gaccum_exp.tracking import journal as journals
from gaccum_exp.tracking.journal import Journal, end_of, read_journal
from gaccum_exp.tracking.records import Curve, RunRecord

LOSSES = {1: [2.0, 1.0, 0.5, 0.25], 2: [2.0, 1.25, 0.5, 0.25], 4: [2.0, 1.0, 0.5, 0.25]}


def arm(n: int, losses: list[float], **params: str) -> RunRecord:
    """Return a finished arm whose loss of step k was measured at 1000·N + k ms."""
    steps = tuple(range(1, len(losses) + 1))
    name = f"n{n}" + "".join(params.values())
    curve = Curve(steps, tuple(losses), tuple(1000 * n + step for step in steps))
    costs = {"memory/peak_bytes": 8e6 / n, "time/step_s": 0.01 * n}
    sizes = {"accum.steps": str(n), "data.global_batch_size": "8", "accum.reduction": "mean"}
    return RunRecord(
        run_id=name, experiment_id="1", name=name, status="FINISHED", start_time_ms=n,
        params=sizes | {"data.micro_batch_size": str(8 // n)} | params,
        tags={"memory.source": "tracker", "device": "cpu", "threads": "1"},
        metrics=costs, curves={"train/loss": curve},
    )  # fmt: skip


def added(runs: list[RunRecord]) -> dict[str, Any]:
    """Return what is added to each run by its id."""
    return {of.run.run_id: of for of in additions(runs, [], compare(runs))}


def values(of: Any, metric: str) -> dict[int, tuple[int, float]]:
    """Return the time and the value of a metric that is added, by step."""
    return {step: (time, found[metric]) for step, time, found in of.points if metric in found}


def test_the_gap_at_each_step_bears_the_time_of_the_loss() -> None:
    """So that a report that is made again adds nothing; the reference has no gap to itself."""
    found = added([arm(n, losses) for n, losses in LOSSES.items()])
    assert values(found["n2"], "train/loss_gap") == {
        1: (2001, 0.0), 2: (2002, 0.25), 3: (2003, 0.0), 4: (2004, 0.0),
    }  # fmt: skip
    assert values(found["n1"], "train/loss_gap") == {}


def test_the_gap_in_ulp_is_the_largest_so_far_and_never_zero() -> None:
    """In the spacing of float32 at the reference's largest loss: 2⁻²² from 2 on."""
    found = added([arm(n, losses) for n, losses in LOSSES.items()])
    ulps = {step: value for step, (_, value) in values(found["n2"], "train/loss_gap_ulp").items()}
    assert ulps == {2: 2.0**20, 4: 2.0**20}, "no point inside a level stretch"
    assert values(found["n4"], "train/loss_gap_ulp") == {}


def test_a_thinned_curve_keeps_the_largest_gap(monkeypatch: pytest.MonkeyPatch) -> None:
    """The table's number is among the points, whatever step it falls on; NaN counts as the largest."""
    monkeypatch.setattr("gaccum_exp.arms.compared.MOST_STEPS", 0)
    reference, other = [1.0] * 1000, [1.0] * 1000
    other[333], other[777] = 1.5, math.nan
    gaps = values(added([arm(1, reference), arm(2, other)])["n2"], "train/loss_gap")
    assert len(gaps) == 50
    assert gaps[334] == (2334, 0.5)
    assert math.isnan(gaps[778][1])


def test_costs_are_those_of_the_table() -> None:
    """In units of the reference's, which are 1 for itself, at the step of the last loss."""
    runs = [arm(n, losses) for n, losses in LOSSES.items()]
    found = added(runs)
    for row in compare(runs).rows:
        last = 1000 * int(row.accum_steps or 0) + 4
        assert values(found[row.run_id], "memory/peak_ratio") == {4: (last, row.peak_ratio)}
        assert values(found[row.run_id], "time/step_ms")[4][1] == pytest.approx(1e3 * row.step_s)
    assert values(found["n1"], "memory/peak_ratio")[4][1] == 1.0


def test_no_ratio_of_times_is_stated_where_there_is_no_measurable_difference() -> None:
    """A bar has no room for the table's sign; the reference's own, and a larger one, are there."""

    def timed(n: int, step_s: float) -> RunRecord:
        run = arm(n, LOSSES[n])
        spread = {"time/step_low_s": 0.9 * step_s, "time/step_high_s": 1.1 * step_s}
        return replace(run, metrics={
            **run.metrics, **spread, "time/step_s": step_s, "time/step_windows": 50.0,
        })  # fmt: skip

    found = added([timed(1, 0.01), timed(2, 0.0101), timed(4, 0.02)])
    ratios = {key: values(of, "time/step_ratio") for key, of in found.items()}
    assert [*ratios["n1"].values()] == [(1004, 1.0)]
    assert ratios["n2"] == {}
    assert [*ratios["n4"].values()] == [(4004, 2.0)]


def test_few_arms_have_a_colour_each_and_many_one_for_each_n() -> None:
    """As far as colours can be told apart; controls are grey."""
    runs = [arm(n, [1.0], seed=str(seed)) for n in (1, 2, 4) for seed in range(2)]
    alike = arm(1, [1.0], seed="0")
    control = replace(alike, run_id="control", tags={**alike.tags, "role": "control"})
    colors = {key: of.tags["mlflow.runColor"] for key, of in added([*runs, control]).items()}
    assert len(set(colors.values())) == 7
    assert colors["control"] == "#8a8f98"
    runs = [arm(n, [1.0], seed=str(seed)) for n in (1, 2, 4) for seed in range(MOST_COLORS)]
    of_n = {(of.run.accum_steps, of.tags["mlflow.runColor"]) for of in added(runs).values()}
    assert len(of_n) == 3


def journal_of(folder: Path, n: int) -> Path:
    """Write the journal of an arm that has ended."""
    run = arm(n, LOSSES[n])
    journal = Journal.create(folder / str(n), "sqlite:///mlflow.db", "gaccum_exp")
    journal.begin(run.name, params=run.params, tags={**run.tags, "sweep_id": "a"}, texts={})
    curve = run.curves["train/loss"]
    journal.append("points", points=[
        [step, at, {"train/loss": value}]
        for step, at, value in zip(curve.global_steps, curve.times_ms, curve.values, strict=True)
    ])  # fmt: skip
    journal.end("FINISHED")
    return journal.path


def compared(runs: Runs) -> float:
    """Compare a sweep and record what that says of its arms."""
    arms = runs.sweep("a")
    return add_comparison(runs, arms, [], compare(arms))


@pytest.fixture
def announced(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Return the journals that are given to be delivered, without a helper."""
    paths: list[Path] = []
    monkeypatch.setattr("gaccum_exp.arms.compared.shipper.announce", paths.append)
    return paths


def test_arms_get_it_into_their_journals_once(tmp_path: Path, announced: list[Path]) -> None:
    """Behind their ends; a comparison that is made again adds nothing and has nothing delivered."""
    paths = [journal_of(tmp_path, n) for n in LOSSES]
    assert compared(Runs("sqlite:///mlflow.db", "gaccum_exp", tmp_path)) == 2.0**20
    before = [path.read_bytes() for path in paths]
    assert announced == paths
    assert [read_journal(path)[0][-1]["kind"] for path in paths] == ["compared"] * 3
    assert all(end_of(path)["status"] == "FINISHED" for path in paths)
    compared(Runs("sqlite:///mlflow.db", "gaccum_exp", tmp_path))
    assert [path.read_bytes() for path in paths] == before
    assert announced == paths


class Elsewhere:
    """A store that has the arms, and takes what it is sent unless it is away."""

    def __init__(self, runs: list[RunRecord], *, away: bool = False) -> None:
        self.runs, self.away, self.taken = runs, away, dict[str, Any]()

    def sweep(self, sweep_id: str, curves: Any) -> list[RunRecord]:
        return self.runs

    def log_points(self, run_id: str, points: Any) -> None:
        if self.away:
            raise StoreAwayError("no answer")
        self.taken[run_id] = points

    def log_tags(self, run_id: str, tags: Any) -> None:
        self.taken[run_id, "tags"] = tags


def test_arms_whose_journals_are_elsewhere_get_it_through_the_store(
    tmp_path: Path, announced: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    """Also where a journal is at hand that another host delivers; the user's own colour stays."""
    runs = [arm(n, losses) for n, losses in LOSSES.items()]
    runs[1] = replace(runs[1], tags={**runs[1].tags, "mlflow.runColor": "#123456"})
    store = Elsewhere(runs)
    read = Runs("http://127.0.0.1:1", "gaccum_exp")
    vars(read)["store"] = store
    compared(read)
    assert ("train/loss_gap", 0.25, 2002, 2) in store.taken["n2"]
    assert store.taken["n2", "tags"] == {}
    assert store.taken["n1", "tags"] == {"mlflow.runColor": "#2b0a4f"}
    assert announced == []
    store.away = True
    compared(read)
    assert caplog.text.count("no answer") == 1


def test_the_journal_of_another_host_is_left(
    tmp_path: Path, announced: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would be delivered from here, to a file that is another one there."""
    with monkeypatch.context() as patch:
        patch.setattr(journals.platform, "node", lambda: "elsewhere")
        patch.setattr(journals, "_boot", lambda: "another")
        paths = [journal_of(tmp_path, n) for n in LOSSES]
    before = [path.read_bytes() for path in paths]
    compared(Runs("sqlite:///mlflow.db", "gaccum_exp", tmp_path))
    assert [path.read_bytes() for path in paths] == before
    assert announced == []
