"""MLflow in a process of its own: nothing of it in the training's, and nothing lost between the two."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from mlflow import MlflowClient

from gaccum_exp.errors import BadInputError
from gaccum_exp.tracking import shipper
from gaccum_exp.tracking.delivered import Delivered
from gaccum_exp.tracking.journal import Journal, end_left
from gaccum_exp.tracking.read_back import Journals
from gaccum_exp.tracking.sink import JournalSink, Point
from tests.program import PATIENCE_S, TINY, Program, environment

WITHOUT_MLFLOW = """
import sys
from gaccum_exp.cli import main
status = main()
heavy = {"mlflow", "pandas", "sklearn", "sqlalchemy", "matplotlib"} & set(sys.modules)
sys.exit(f"imported {heavy}" if heavy else status)
"""
TRAINED_WITHOUT_END = """
import os, sys, time
from pathlib import Path
from gaccum_exp.tracking import shipper
from gaccum_exp.tracking.journal import Journal
journal = Journal.create(Path("run"), sys.argv[1], "gaccum_exp")
journal.begin("run", params={}, tags={}, texts={})
for step in range(1, 1502):
    journal.append("points", points=[[step, step, {"train/loss": step / 7}]])
    shipper.announce(journal.path)
if os.fork() == 0:  # a data worker that outlives it
    print(os.getpid(), shipper._deliveries._client is None, flush=True)
    time.sleep(60)
    os._exit(0)
sys.stdin.read()
"""

SHARING = """
import sys
from pathlib import Path
from gaccum_exp.tracking import shipper
from gaccum_exp.tracking.journal import Journal
from tests.shortened import shortened
shipper.use_helper(sys.argv[2])
journal = Journal.create(Path("run"), sys.argv[1], "gaccum_exp")
journal.begin("run", params={}, tags={}, texts={})
shipper.announce(journal.path)
shipper.wait_for_store(journal.path)
print("begun", flush=True)
sys.stdin.read()
"""


def run_in(folder: Path, uri: str, experiment_name: str = "gaccum_exp") -> JournalSink:
    """Begin a run of the sweep `a` in a folder."""
    journal = Journal.create(folder, uri, experiment_name)
    journal.begin("run", params={}, tags={"sweep_id": "a"}, texts={})
    return JournalSink(journal)


def helpers() -> set[int]:
    """Return the processes that deliver for this one."""
    client = shipper._deliveries._client
    process = None if client is None else client._process
    return set() if process is None else {process.pid}


@pytest.mark.parametrize(
    "arguments", [("-m", "accum.steps=1,2"), pytest.param((), marks=pytest.mark.whole)]
)
def test_the_command_imports_nothing_of_the_store(home: Path, arguments: tuple[str, ...]) -> None:
    """From the first window to the comparison at the end."""
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_MLFLOW, *TINY, *arguments],
        cwd=home, env=environment(), capture_output=True, text=True, timeout=PATIENCE_S,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert ("N = 2" if arguments else "There is only the reference") in done.stdout
    runs = MlflowClient(f"sqlite:///{home / 'mlflow.db'}").search_runs(["1"], "tags.kind = 'arm'")
    assert {run.info.status for run in runs} == {"FINISHED"}


def test_of_a_training_that_is_killed_all_that_was_written_is_delivered(home: Path) -> None:
    """kill -9: the run is ended as KILLED and says why, though a process that it has forked lives on."""
    uri = f"sqlite:///{home / 'mlflow.db'}"
    training = subprocess.Popen(
        [sys.executable, "-c", TRAINED_WITHOUT_END, uri], cwd=home, env=environment(),
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert training.stdout is not None
    worker, forgot = training.stdout.readline().split()
    try:
        assert forgot == "True"
        os.kill(training.pid, signal.SIGKILL)
        training.wait(PATIENCE_S)
        client, until = MlflowClient(uri), time.monotonic() + PATIENCE_S
        while not Delivered.of(home / "run" / "journal.jsonl").settled:
            assert time.monotonic() < until
            time.sleep(0.05)
    finally:
        os.kill(int(worker), signal.SIGKILL)
    (run,) = client.search_runs(["1"])
    assert run.info.status == "KILLED"
    assert run.data.tags["failure"] == "its process has ended"
    history = client.get_metric_history(run.info.run_id, "train/loss")
    assert sorted(m.step for m in history) == list(range(1, 1502))
    training.stdin.close()  # type: ignore[union-attr]
    training.stdout.close()


def test_a_store_that_cannot_be_used_is_said_before_anything_is_trained(tmp_path: Path) -> None:
    """Beginning a run waits for no answer, being ready does."""
    (tmp_path / "no.db").write_text("this is no database, and long enough to be seen as none")
    sink = run_in(tmp_path / "run", f"sqlite:///{tmp_path / 'no.db'}")
    with pytest.raises(BadInputError, match="cannot be used"):
        sink.ready()
    sink.close("FAILED", "there is no such store")
    assert tmp_path / "run" / "journal.jsonl" in shipper.finish()


def test_a_store_that_is_away_is_said_once_and_waited_for_by_nobody(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The runs' folders keep what is recorded, and the end of the command says what is left."""
    monkeypatch.setattr(shipper, "GRACE_S", 0.5)
    for name in ("first", "second"):
        sink = run_in(tmp_path / name, "http://127.0.0.1:9")
        assert not sink.ready(), "it is not said to be recorded there"
        sink.send([Point(1, 1, {"train/loss": 0.5})])
        sink.close("FINISHED")
    left = shipper.finish()
    assert left == [tmp_path / name / "journal.jsonl" for name in ("first", "second")]
    said = capfd.readouterr().err.splitlines()
    assert [line for line in said if "http://127.0.0.1:9" in line] == said
    assert len(said) == 1, said


def test_a_helper_that_is_killed_is_replaced_and_nothing_is_lost(program: Program) -> None:
    """At any moment: the next word to it starts another, which goes on where the first was."""
    sink = run_in(program.folder / "run", program.uri)
    sink.ready()
    killed: set[int] = set()
    for step in range(1, 7):
        (pid,) = helpers()
        os.kill(pid, signal.SIGKILL)
        killed.add(pid)
        sink.send([Point(step, step, {"train/loss": step / 7})])
    sink.close("FINISHED")
    assert shipper.finish() == []
    assert not killed & helpers()
    (run,) = program.store().sweep("a")
    assert run.status == "FINISHED"
    assert run.curves["train/loss"].values == tuple(step / 7 for step in range(1, 7))


def test_another_process_may_share_the_helper(program: Program) -> None:
    """So that many arms side by side have one; where it cannot be reached they have their own."""
    shipper.start_helper()
    text = (
        "import sys; from gaccum_exp.tracking import shipper; shipper.use_helper(sys.argv[1]);"
        "shipper.start_helper(); print(shipper.helper_address() == sys.argv[1])"
    )
    for address, shared in ((shipper.helper_address(), "True"), ("nowhere", "False")):
        done = subprocess.run(
            [sys.executable, "-c", text, address],
            env=environment(), capture_output=True, text=True, timeout=PATIENCE_S, check=True,
        )  # fmt: skip
        assert done.stdout.strip() == shared


def test_what_earlier_commands_have_left_is_delivered_and_ended(program: Program) -> None:
    """A killed run of another command, and one whose store was away then; a living one is left alone."""
    for name, ends in (("killed", False), ("away", True)):
        journal = Journal.create(program.folder / "outputs" / name, program.uri, "gaccum_exp")
        journal.begin(name, params={}, tags={"sweep_id": "a"}, texts={})
        journal.append("points", points=[[1, 5, {"train/loss": 0.5}]])
        if ends:
            journal.end("FINISHED")
        else:
            journal.close()
    living = Journal.create(program.folder / "outputs" / "living", program.uri, "gaccum_exp")
    living.begin("living", params={}, tags={"sweep_id": "a"}, texts={})
    shipper.announce(program.folder / "outputs")
    shipper.finish()
    found = {run.name: run.status for run in program.store().sweep("a")}
    assert {"killed": "KILLED", "away": "FINISHED"}.items() <= found.items()
    assert found.get("living", "RUNNING") == "RUNNING"
    living.close()


@pytest.mark.parametrize("program_of", ["no/such/python", "dies"])
def test_a_training_goes_on_without_a_helper(
    program: Program,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    program_of: str,
) -> None:
    """None can be started, or each dies at once: it is said once, and the journal has everything."""
    if program_of == "dies":
        program_of = str(program.folder / "dies")
        Path(program_of).write_text("#!/bin/sh\nexit 7\n")
        Path(program_of).chmod(0o755)
    monkeypatch.setattr(shipper, "_deliveries", shipper._Deliveries())
    monkeypatch.setattr(sys, "executable", program_of)
    sink = run_in(program.folder / "run", program.uri)
    sink.ready()
    for step in range(1, 4):
        sink.send([Point(step, step, {"train/loss": step / 7})])
    sink.close("FINISHED")
    assert shipper.finish() == [program.folder / "run" / "journal.jsonl"]
    said = capfd.readouterr().err.splitlines()
    assert len(said) == 1, said
    assert "no process that writes to MLflow" in said[0]
    (run,) = Journals(program.folder / "run").sweep("a", ["train/loss"])
    assert run.curves["train/loss"].values == tuple(step / 7 for step in range(1, 4))


def test_a_helper_that_dies_again_and_again_is_given_up(
    program: Program, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """For a while; what a training waits for at its end, it does not wait for without end."""
    monkeypatch.setattr(shipper, "_deliveries", shipper._Deliveries())
    monkeypatch.setattr(shipper, "DEATHS", 2)
    sink = run_in(program.folder / "run", program.uri)
    for _ in range(50):
        for pid in helpers():
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
        sink.describe({"cause": "x"})
    sink.close("FINISHED")
    assert shipper.finish() == [program.folder / "run" / "journal.jsonl"]
    said = capfd.readouterr().err.splitlines()
    assert said == [
        "tracking: no process that writes to MLflow (it dies again and again); the runs' folders keep "
        "what is recorded"
    ]


def test_why_a_run_has_ended_is_said_by_whoever_started_its_process(home: Path) -> None:
    """The helper, which notices first, leaves it to that for a while, and ends it only if it must."""
    uri = f"sqlite:///{home / 'mlflow.db'}"
    shipper.start_helper()
    training = subprocess.Popen(
        [sys.executable, "-c", SHARING, uri, shipper.helper_address()], cwd=home,
        env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert training.stdout is not None
    assert training.stdout.readline() == "begun\n"
    training.kill()
    training.communicate()
    time.sleep(1.5)
    assert end_left(home, "FAILED", "its process was ended by signal 9 (SIGKILL)") == ["run"]
    shipper.announce(home / "run" / "journal.jsonl")
    assert shipper.finish() == []
    (run,) = MlflowClient(uri).search_runs(["1"])
    assert (run.info.status, "signal 9" in run.data.tags["failure"]) == ("FAILED", True)
