"""Users compare arms in the MLflow UI, so the printed link is opened there, in a real browser."""

import importlib.util
import json
import math
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Metric

from experiments.mlflow_browser import (
    CHROMIUM,
    chart,
    chromium_page,
    drawn_curves,
    mlflow_server,
)
from gaccum_exp.tracking.mlflow_ui import experiment_tags, ui_lines, ui_link

STEPS = 30
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
    client.log_batch(run_id, metrics=metrics)
    client.set_terminated(run_id)


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
            log_run(client, experiment_id, level=n / 10, **tags)
        for key, value in experiment_tags(sweep_id).items():
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
@pytest.mark.parametrize("sweep_id", list(SWEEPS))
def test_link_draws_as_many_loss_curves_as_the_sweep_has_arms(
    store: tuple[str, str], address: str, sweep_id: str
) -> None:
    """The chart of train/loss holds every arm of the sweep, and no other run of the experiment."""
    with chromium_page() as page:
        page.goto(ui_link(address, store[1], sweep_id))
        card = chart(page, "train/loss")
        assert drawn_curves(card, SWEEPS[sweep_id]) == SWEEPS[sweep_id]
        names = card.locator(".js-plotly-plot").evaluate("plot => plot.data.map(t => t.name)")
        assert set(names) == {arm_name(n + 1) for n in range(SWEEPS[sweep_id])}


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
    state = json.loads(experiment_tags("abc")[f"mlflow.sharedViewState.{key}"])
    assert state["searchFilter"] == "tags.sweep_id='abc'"
    assert state["runsHiddenMode"] == "SHOW_ALL"
    assert not any(other.endswith(key) for other in experiment_tags("abcd"))


def test_tags_fit_what_mlflow_stores() -> None:
    """Keys keep to MLflow's 250 characters and values to its 5,000, whatever the sweep's id."""
    for key, value in experiment_tags("ä/ %" * 30).items():
        assert len(key) <= 250
        assert len(value) <= 5000
        assert key.isascii()


def test_local_store_is_served_by_a_command_that_survives_the_shell() -> None:
    """A URI with a blank reaches `mlflow ui` as one word, and the link asks for the same port."""
    uri = "sqlite:////home/some one/mlflow.db"
    command, link = ui_lines(uri, "7", "abc")
    words = shlex.split(command)
    assert words[words.index("ui") + 1 :] == ["--backend-store-uri", uri, "--port", "5000"]
    assert link == ui_link("http://127.0.0.1:5000", "7", "abc")


def test_command_names_this_environments_mlflow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where `mlflow` on the path is absent, the command runs the module with this Python."""
    monkeypatch.setenv("PATH", "")
    command = ui_lines("sqlite:///mlflow.db", "7", "abc")[0]
    assert shlex.split(command)[:4] == [sys.executable, "-m", "mlflow", "ui"]
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent))
    assert ui_lines("sqlite:///mlflow.db", "7", "abc")[0].startswith("mlflow ui ")


def test_remote_store_is_named_by_its_address_without_credentials() -> None:
    """A tracking server needs no command, and its password is not printed."""
    first, link = ui_lines("https://me:secret@track.example.org:8080/mlflow/", "7", "abc")
    assert first == "https://track.example.org:8080/mlflow"
    assert link == ui_link(first, "7", "abc")
    assert link.startswith("https://track.example.org:8080/mlflow/#/experiments/7/runs?")
