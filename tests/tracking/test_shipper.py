"""MLflow in a process of its own: nothing of it in the training's, and nothing lost between the two."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from mlflow import MlflowClient

from gaccum_exp.errors import BadInputError, TrackingError
from gaccum_exp.tracking import shipper
from gaccum_exp.tracking.shipper import connect
from gaccum_exp.tracking.sink import MlflowSink, Point
from tests.program import PATIENCE_S, TINY, Program, environment, new_store

WITHOUT_MLFLOW = """
import sys
from gaccum_exp.cli import main
status = main()
heavy = {"mlflow", "pandas", "sklearn", "sqlalchemy"} & set(sys.modules)
if "-m" not in sys.argv:
    heavy |= {"matplotlib"} & set(sys.modules)
sys.exit(f"imported {heavy}" if heavy else status)
"""
TRAINED_WITHOUT_END = """
import sys
from gaccum_exp.tracking.shipper import connect
run = connect(sys.argv[1], "gaccum_exp").start_run("run", params={}, tags={}, texts={})
run.log([("train/loss", step / 7, step, step) for step in range(1, 1501)])
print(run.ready(), flush=True)
run.log([("train/loss", 0.5, 1501, 1501)])
print("posted", flush=True)
sys.stdin.read()
"""


def test_the_process_that_trains_imports_nothing_of_the_store(tmp_path: Path) -> None:
    """From the first window to the comparison at the end."""
    new_store(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_MLFLOW, *TINY, "-m", "accum.steps=1,2"],
        cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=PATIENCE_S,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "N = 2" in done.stdout
    runs = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}").search_runs(["1"], "tags.kind = 'arm'")
    assert [run.info.status for run in runs] == ["FINISHED", "FINISHED"]


def test_a_single_run_imports_nothing_that_draws(tmp_path: Path) -> None:
    """Neither before it trains nor for the table at its end."""
    new_store(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_MLFLOW, *TINY],
        cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=PATIENCE_S,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Every arm against its reference" in done.stdout


def test_of_a_training_that_is_killed_all_that_was_handed_over_is_written(tmp_path: Path) -> None:
    """kill -9: the run is ended as KILLED, and says why."""
    uri = f"sqlite:///{new_store(tmp_path)}"
    training = subprocess.Popen(
        [sys.executable, "-c", TRAINED_WITHOUT_END, uri], cwd=tmp_path, env=environment(),
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert training.stdout is not None
    assert [training.stdout.readline() for _ in range(2)] == ["None\n", "posted\n"]
    os.kill(training.pid, signal.SIGKILL)
    training.wait(PATIENCE_S)
    client, until = MlflowClient(uri), time.monotonic() + PATIENCE_S
    while time.monotonic() < until:
        (run,) = client.search_runs(["1"])
        if run.info.status != "RUNNING":
            break
        time.sleep(0.1)
    assert run.info.status == "KILLED"
    assert run.data.tags["failure"] == "its process has ended"
    history = client.get_metric_history(run.info.run_id, "train/loss")
    assert sorted(m.step for m in history) == list(range(1, 1502))
    training.stdin.close()  # type: ignore[union-attr]
    training.stdout.close()


def test_a_store_that_cannot_be_used_is_said_before_anything_is_trained() -> None:
    """Beginning a run waits for no answer, being ready does; it is said once, and not at every call."""
    store = connect("http://127.0.0.1:9", "gaccum_exp")
    with pytest.raises(BadInputError, match=r"http://127\.0\.0\.1:9: no tracking server answers"):
        MlflowSink(store.start_run("run", params={}, tags={}, texts={})).ready()
    sink = MlflowSink(store.start_run("run", params={}, tags={}, texts={}))
    sink.record(1, {"train/loss": 1.0})
    sink.close("FAILED", "there is no such store")


def test_what_the_store_refuses_is_raised_at_the_next_call(program: Program) -> None:
    """With its own words, though that call is not at fault; and the next run is none the worse."""
    store = connect(program.uri, "gaccum_exp")
    sink = MlflowSink(store.start_run("run", params={"a@b": 1}, tags={}, texts={}))
    with pytest.raises(TrackingError, match=r"MlflowException: .*Names may only contain"):
        sink.ready()
    other = MlflowSink(store.start_run("run", params={}, tags={"sweep_id": "a"}, texts={}))
    other.send([Point(1, 1, {"train/loss": 0.5})])
    other.close("FINISHED")
    (run,) = program.store().sweep("a")
    assert (run.status, run.curves["train/loss"].values) == ("FINISHED", (0.5,))


def test_a_delivery_that_fails_is_a_warning_and_comes_with_the_next(
    program: Program, caplog: pytest.LogCaptureFixture
) -> None:
    """A metric whose name the store refuses is said, and ends the run that insists on it."""
    store = connect(program.uri, "gaccum_exp")
    sink = MlflowSink(store.start_run("run", params={}, tags={"sweep_id": "a"}, texts={}))
    sink.send([Point(1, 1, {"a@b": 0.5})])
    sink.ready()
    assert "1 values not delivered yet" in caplog.text
    with pytest.raises(TrackingError, match="MlflowException"):
        sink.close("FINISHED")


def test_a_helper_that_is_gone_ends_the_run_and_is_replaced_for_the_next(program: Program) -> None:
    """In a sentence, and not by waiting for ever."""
    store = connect(program.uri, "gaccum_exp")
    sink = MlflowSink(store.start_run("run", params={}, tags={}, texts={}))
    sink.ready()
    helper = shipper._helpers[os.getpid()]
    helper._process.kill()
    helper._process.wait(PATIENCE_S)
    with pytest.raises(TrackingError, match=r"the process that writes to MLflow has ended \(-9\)"):
        sink.ready()
    connect(program.uri, "gaccum_exp").ready()
