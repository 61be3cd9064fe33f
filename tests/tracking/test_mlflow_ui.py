"""Users compare arms in the MLflow UI, so the printed link is opened there, in a real browser."""

import base64
import importlib.util
import json
import math
import os
import shlex
import shutil
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from mlflow import MlflowClient
from mlflow.entities import Metric

from experiments.mlflow_browser import (
    CHROMIUM,
    chart,
    chromium_page,
    drawn_bars,
    drawn_curves,
    mlflow_server,
)
from gaccum_exp.tracking.mlflow_ui import experiment_tags, ui_lines, ui_link
from gaccum_exp.tracking.records import Curve, RunRecord
from tests.shortened import shortened

STEPS = 30
RECORDED = {
    "train/loss": 0.5, "train/loss/box": 0.1, "eval/loss": 0.5, "eval/accuracy": 0.9, "optim/lr": 0.1,
    "memory/peak_bytes": 7e6, "memory/activations_bytes": 6e6, "memory/allocator_reserved_bytes": 9e6,
    "memory/resident_set_bytes": 7e8, "time/step_s": 0.01, "throughput/samples_per_s": 7e4,
    "audit/e64": 1e-16, "audit/e": 1e-8, "audit/floor": 1e-7, "accum/steps": 4.0,
}  # fmt: skip
"""What a run may have."""
SWEEPS = {"sweep-of-four": 4, "sweep-of-twelve": 12}

if importlib.util.find_spec("playwright") is None:
    MISSING: str | None = "playwright is not installed"
else:
    MISSING = None if CHROMIUM else "chromium is not installed"

# MLflow 3.17 asks SQLAlchemy for a strategy that SQLAlchemy 2.1 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader:DeprecationWarning")
in_browser = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))


def arm_name(accum_steps: int) -> str:
    """Return a run's name as the program gives it: the interpunct must reach the page too."""
    return f"N={accum_steps} · micro {64 // accum_steps} · mean"


def log_run(client: MlflowClient, experiment_id: str, level: float, **tags: str) -> None:
    """Store a run whose loss curve lies `level` above the others', so that it is seen apart."""
    run_id = client.create_run(experiment_id, tags=tags).info.run_id
    metrics = []
    for step in range(1, STEPS + 1):
        loss = 2.0 * math.exp(-step / 10) + level
        metrics += [
            Metric("train/loss", loss, 0, step),
            Metric("optim/lr", 0.1 * (1 - step / STEPS), 0, step),
        ]
        if step % 10 == 0:
            metrics.append(Metric("eval/loss", loss + 0.1, 0, step))
    metrics += [Metric(key, level, 0, STEPS) for key in ("memory/peak_ratio",)]
    client.log_batch(run_id, metrics=metrics)
    client.set_terminated(run_id)


def run_with(metrics: dict[str, float], points: dict[str, int], **tags: str) -> RunRecord:
    """Return a run with these last values, and so many points of some metrics."""
    curves = {key: Curve(tuple(range(1, n + 1)), (1.0,) * n) for key, n in points.items()}
    return RunRecord("1", "1", "N=1", "FINISHED", 0, {}, tags, metrics, curves)


def state_of(sweep_id: str, *runs: RunRecord, largest_ulp: float = 0.0) -> dict[str, Any]:
    """Return the state that a sweep's tag holds, as MLflow unpacks it."""
    (text,) = (v for k, v in experiment_tags(sweep_id, runs, largest_ulp).items() if "View" in k)
    assert text.startswith("deflate;")
    state: dict[str, Any] = json.loads(zlib.decompress(base64.b64decode(text.removeprefix("deflate;"))))
    return state


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, empty_store: Path) -> tuple[str, str]:
    """Return the URI and the experiment id of a store of two sweeps and a report run."""
    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    shutil.copyfile(empty_store, path)
    uri = f"sqlite:///{path}"
    client = MlflowClient(uri)
    experiment_id = client.create_experiment("gaccum_exp")
    for sweep_id, arms in SWEEPS.items():
        for n in range(1, arms + 1):
            tags = {"mlflow.runName": arm_name(n), "sweep_id": sweep_id}
            tags["verdict"] = "identical" if n == 1 else "equivalent"
            log_run(client, experiment_id, level=n / 10, **tags)
        metrics = {"train/loss": 1.0, "eval/loss": 1.0, "optim/lr": 1.0, "memory/peak_ratio": 1.0}
        shown = run_with(metrics, {"train/loss": STEPS, "eval/loss": 3}, verdict="identical")
        for key, value in experiment_tags(sweep_id, [shown]).items():
            client.set_experiment_tag(experiment_id, key, value)
    log_run(client, experiment_id, level=3.0, kind="report")
    return uri, experiment_id


@pytest.fixture(scope="module")
def address(store: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Serve the store for the module's tests."""
    with mlflow_server(store[0], tmp_path_factory.mktemp("server") / "log") as address:
        yield address


@pytest.mark.browser
@pytest.mark.slow
@in_browser
@pytest.mark.parametrize("sweep_id", shortened(SWEEPS, ["sweep-of-twelve"]))
def test_link_draws_a_curve_and_a_bar_for_each_arm_under_its_verdict(
    store: tuple[str, str], address: str, sweep_id: str
) -> None:
    """The charts hold every arm of the sweep, and no other run of the experiment."""
    with chromium_page() as page:
        page.goto(ui_link(address, store[1], sweep_id))
        card = chart(page, "train/loss")
        assert drawn_curves(card, SWEEPS[sweep_id]) == SWEEPS[sweep_id]
        names = card.locator(".js-plotly-plot").evaluate("plot => plot.data.map(t => t.name)")
        assert set(names) == {arm_name(n + 1) for n in range(SWEEPS[sweep_id])}
        assert drawn_bars(chart(page, "memory/peak_ratio")) == SWEEPS[sweep_id]
        for heading in ("Group: identical", "Group: equivalent"):
            page.get_by_text(heading).first.wait_for()


@pytest.mark.browser
@pytest.mark.slow
@in_browser
def test_two_arms_chosen_in_the_chart_view_can_be_compared(store: tuple[str, str], address: str) -> None:
    """Ticking two arms beside the charts and pressing Compare opens a page that names both."""
    with chromium_page() as page:
        page.goto(ui_link(address, store[1], "sweep-of-four"))
        for n in (1, 4):
            row = page.get_by_role("row").filter(has=page.get_by_text(arm_name(n), exact=True))
            row.get_by_role("checkbox").first.check()
        page.get_by_role("button", name="Compare", exact=True).click()
        page.wait_for_url("**/compare-runs?**")
        for n, chosen in ((1, True), (2, False), (4, True)):
            name = page.get_by_text(arm_name(n), exact=True)
            if chosen:
                name.first.wait_for()
            else:
                assert name.count() == 0


def test_tags_hold_the_state_that_the_link_names() -> None:
    """The link's key leads to one tag, whose state filters on the sweep and shows all its runs."""
    key = ui_link("http://127.0.0.1:5000", "1", "abc").partition("viewStateShareKey=")[2]
    assert f"mlflow.sharedViewState.{key}" in experiment_tags("abc")
    state = state_of("abc")
    assert state["searchFilter"] == "tags.sweep_id='abc'"
    assert state["runsHiddenMode"] == "SHOW_ALL"
    assert not any(other.endswith(key) for other in experiment_tags("abcd"))


def test_tags_fit_what_mlflow_stores() -> None:
    """Keys keep to MLflow's 250 characters and values to its 5,000, whatever the sweep's id."""
    metrics = {f"train/loss/term {n}": 0.5 for n in range(60)} | RECORDED
    for key, value in experiment_tags("ä/ %" * 30, [run_with(metrics, {"train/loss": 9})]).items():
        assert len(key) <= 250
        assert len(value) <= 5000
        assert key.isascii()


def test_local_store_is_served_by_a_command_that_survives_the_shell() -> None:
    """A URI with a blank reaches `mlflow ui` as one word, and the link asks for the same port."""
    uri = "sqlite:////home/some one/mlflow.db"
    command, link = ui_lines(uri, "7", "abc")
    words = shlex.split(command)
    assert words[words.index("server") + 1 :] == [
        "--backend-store-uri", uri, "--host", "127.0.0.1", "--port", "5000", "--workers", "1",
    ]  # fmt: skip
    assert link == ui_link("http://127.0.0.1:5000", "7", "abc")


def test_the_command_serves_the_same_store_from_every_folder() -> None:
    """A relative address is made absolute; that of a database is what it was."""
    words = shlex.split(ui_lines("sqlite:///mlflow.db", "7", "abc")[0])
    assert f"sqlite:///{os.getcwd()}/mlflow.db" in words
    assert "postgresql://me@db/mlflow" in shlex.split(
        ui_lines("postgresql://me@db/mlflow", "7", "abc")[0]
    )


def test_command_names_this_environments_mlflow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where `mlflow` on the path is absent, the command runs the module with this Python."""
    monkeypatch.setenv("PATH", "")
    command = ui_lines("sqlite:///mlflow.db", "7", "abc")[0]
    assert shlex.split(command)[:4] == [sys.executable, "-m", "mlflow", "server"]
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent))
    assert ui_lines("sqlite:///mlflow.db", "7", "abc")[0].startswith("mlflow server ")


def test_remote_store_is_named_by_its_address_without_credentials() -> None:
    """A tracking server needs no command, and its password is not printed."""
    first, link = ui_lines("https://me:secret@track.example.org:8080/mlflow/", "7", "abc")
    assert first == "https://track.example.org:8080/mlflow"
    assert link == ui_link(first, "7", "abc")
    assert link.startswith("https://track.example.org:8080/mlflow/#/experiments/7/runs?")


def test_every_metric_of_the_runs_has_one_chart_and_only_curves_are_lines() -> None:
    """Without one MLflow would draw a line, through one point too; what nothing has is not there."""
    state = state_of("abc", run_with(RECORDED, {"train/loss": 9, "eval/loss": 1}, verdict="equivalent"))
    charts = {chart["metricKey"]: chart for chart in state["compareRunCharts"]}
    assert len(charts) == len(state["compareRunCharts"])
    assert charts.keys() >= RECORDED.keys()
    assert "noise/scale" not in charts
    lines = {key for key, chart in charts.items() if chart["type"] == "LINE"}
    assert lines == {
        "train/loss", "train/loss/box", "train/loss_gap", "train/loss_gap_ulp", "optim/lr",
    }  # fmt: skip
    assert {chart["metricSectionId"] for chart in charts.values()} == {
        section["uuid"] for section in state["compareRunSections"]
    }


def test_the_view_answers_the_question_first() -> None:
    """Loss and gap on logarithmic axes, costs as bars, memory by category; the rest is folded up."""
    state = state_of("abc", run_with(RECORDED, {"train/loss": 9, "eval/loss": 2}, verdict="biased"))
    shown = {section["name"]: section["display"] for section in state["compareRunSections"]}
    assert [*shown] == [
        "Loss", "Memory and time", "Memory by category", "Evaluation", "Other metrics",
    ]  # fmt: skip
    assert [name for name, display in shown.items() if not display] == ["Other metrics"]
    charts = {chart["metricKey"]: chart for chart in state["compareRunCharts"]}
    assert charts["train/loss"]["scaleType"] == charts["train/loss_gap_ulp"]["scaleType"] == "log"
    assert charts["train/loss_gap"]["scaleType"] == charts["optim/lr"]["scaleType"] == "linear"
    for metric, section in (
        ("memory/peak_ratio", "Memory and time"), ("time/step_ms", "Memory and time"),
        ("memory/activations_bytes", "Memory by category"), ("audit/e64", "Other metrics"),
    ):  # fmt: skip
        assert (charts[metric]["type"], charts[metric]["metricSectionId"]) == ("BAR", section)


def test_the_axis_of_gaps_shows_rounding_low_and_a_bias_whole() -> None:
    """From a tenth of a unit to a thousand, or to beyond the largest gap."""
    run = run_with(RECORDED, {"train/loss": 9})
    for largest, top in ((0.0, 3.0), (1.03, 3.0), (1e6, 6.301)):
        charts = state_of("abc", run, largest_ulp=largest)["compareRunCharts"]
        (chart,) = (chart for chart in charts if chart["metricKey"] == "train/loss_gap_ulp")
        assert chart["range"] == {"yMin": -1, "yMax": top}


def test_the_verdict_is_a_column_and_what_the_list_is_grouped_by() -> None:
    """Grouped only where there are verdicts, each run drawn by itself."""
    judged = state_of("abc", run_with(RECORDED, {}, verdict="biased"))
    assert judged["selectedColumns"][0] == "tags.`verdict`"
    assert judged["groupBy"]["groupByKeys"] == [{"mode": "tag", "groupByData": "verdict"}]
    assert not judged["useGroupedValuesInCharts"]
    assert state_of("abc", run_with(RECORDED, {}))["groupBy"] is None


def test_a_view_that_could_not_be_written_is_not_named_by_the_link() -> None:
    """MLflow would say that it does not exist; the filter is in the address instead."""
    link = ui_link("http://127.0.0.1:5000", "7", "abc", arranged=False)
    assert "viewStateShareKey" not in link
    assert unquote(link).endswith("searchFilter=tags.sweep_id='abc'")
    assert ui_lines("sqlite:///mlflow.db", "7", "abc", arranged=False)[1] == link
