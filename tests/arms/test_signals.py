"""Signals: the first ends a training after its micro-batch, the second the process on the spot."""

import csv
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from gaccum_exp.arms import child
from gaccum_exp.arms.serve import _Server
from gaccum_exp.core.strategies import AccumulatorState
from gaccum_exp.tracking.progress import Progress
from gaccum_exp.train.build import build
from gaccum_exp.train.evaluation import evaluate
from gaccum_exp.train.hooks import Hook
from gaccum_exp.train.loop import hooks_of, train
from gaccum_exp.train.stopping import SIGNALS, Stop, StoppedError, listening, of_signal, say_at_once
from tests.program import PATIENCE_S, Ending, Program, environment
from tests.shortened import shortened
from tests.strangers import Net
from tests.support import STRANGER, Collected, settings

pytestmark = pytest.mark.usefixtures("undrawn")

POINTS = ("model=custom", "data=custom", "data.train._target_=tests.strangers.Points",
          "data.global_batch_size=8", "runtime.device=cpu")  # fmt: skip


@pytest.fixture
def stop() -> Iterator[Stop]:
    """Listen to signals."""
    with listening() as listener:
        yield listener


def test_a_request_waits_while_something_is_in_hand(
    stop: Stop, capfd: pytest.CaptureFixture[str]
) -> None:
    """It is said in a line, and raised where somebody looks, or where nothing is in hand again."""
    with stop.held("waiting"):
        signal.raise_signal(signal.SIGTERM)
        assert capfd.readouterr().err == "gaccum_exp: interrupted (SIGTERM): waiting\n"
        with pytest.raises(StoppedError, match=r"interrupted \(SIGTERM\)") as raised:
            stop.look()
        assert raised.value.status == 143
        with pytest.raises(StoppedError), stop.at_once():
            pytest.fail("it had been asked for")
    stop.followed()
    stop.look()


@pytest.mark.parametrize(("number", "status"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGUSR1", 143)])
def test_a_request_is_raised_at_once_where_nothing_is_in_hand(
    stop: Stop, number: str, status: int
) -> None:
    """As an interruption by the keyboard, with the signal's name and its exit status."""
    before = list[int]()
    stop.before_raising = before.append
    with pytest.raises(KeyboardInterrupt) as raised:
        signal.raise_signal(getattr(signal, number))
    assert isinstance(raised.value, StoppedError)
    assert (raised.value.reason, raised.value.status) == (f"interrupted ({number})", status)
    assert before == [getattr(signal, number)]


def test_signals_that_come_together_are_one(stop: Stop) -> None:
    """`timeout` signals a process, and then its group; a parent's word and a signal are one as well."""
    with stop.held(""):
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        stop.tell(StoppedError("interrupted (SIGTERM)", 143))
    assert str(stop.asked) == "interrupted (SIGTERM)"


def test_a_signal_is_followed_where_nobody_reads_what_is_said(stop: Stop) -> None:
    """Ctrl-C ends the `tee` behind a command too: what is said breaks the pipe, and nothing else."""
    said, ours = os.pipe()
    terminal = os.dup(2)
    os.close(said)
    os.dup2(ours, 2)
    try:
        with stop.held("waiting"):
            signal.raise_signal(signal.SIGTERM)
            say_at_once(of_signal(signal.SIGTERM), "passed on")
    finally:
        os.dup2(terminal, 2)
        os.close(terminal)
        os.close(ours)
    assert str(stop.asked) == "interrupted (SIGTERM)"


def test_a_signal_that_comes_while_one_begins_to_listen_is_a_request(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Right after its handler is there; the handlers are put back all the same."""
    install, before = signal.signal, [signal.getsignal(number) for number in SIGNALS]

    def install_late(number: int, handler: Any) -> Any:
        replaced = install(number, handler)
        if number == signal.SIGTERM and getattr(handler, "__name__", "") == "_handle":
            signal.raise_signal(number)
        return replaced

    monkeypatch.setattr(signal, "signal", install_late)
    with pytest.raises(StoppedError, match="SIGTERM"), listening():
        pytest.fail("it had been asked for")
    assert [signal.getsignal(number) for number in SIGNALS] == before


SECOND = """
import os, signal, time
from gaccum_exp.train.stopping import listening
with listening() as stop, stop.held():
    stop.before_end = lambda: os.write(1, b"last")
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.raise_signal(number)
        time.sleep(0.2)
"""


def test_the_second_signal_ends_the_process_on_the_spot() -> None:
    """With its own status, after what has to be done then."""
    done = subprocess.run([sys.executable, "-c", SECOND], env=environment(), capture_output=True)
    assert (done.returncode, done.stdout) == (130, b"last")


def test_handlers_that_were_there_are_called_and_put_back() -> None:
    """Whoever installed one, as submitit does, is still told; what is ignored stays ignored."""
    seen = list[int]()
    before = signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
    ignored = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    installed = [signal.getsignal(number) for number in SIGNALS]
    try:
        with listening() as stop, stop.held(""):
            signal.raise_signal(signal.SIGUSR1)
            assert stop.asked is None
            signal.raise_signal(signal.SIGTERM)
            assert stop.asked is not None
        assert seen == [signal.SIGTERM]
        assert [signal.getsignal(number) for number in SIGNALS] == installed
    finally:
        signal.signal(signal.SIGTERM, before)
        signal.signal(signal.SIGUSR1, ignored)


def test_a_forked_workers_signal_is_its_own(stop: Stop) -> None:
    """It ends by it, as if nobody listened."""
    with stop.held(""):
        worker = os.fork()
        if worker == 0:
            signal.raise_signal(signal.SIGTERM)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1]) == -signal.SIGTERM
    assert stop.asked is None


def test_a_forked_worker_holds_no_connection_of_the_child() -> None:
    """Or the command would wait for the worker where its child is dead."""
    ours, theirs = socket.socketpair()
    server = _Server(Connection(theirs.detach()))
    worker = os.fork()
    if worker == 0:
        os._exit(7 if server.connection.closed else 8)
    assert os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1]) == 7
    ours.close()
    server.connection.close()


class Counted(Net):
    """Counts its passes."""

    def __init__(self) -> None:
        super().__init__()
        self.passes = 0

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 2) -> logits (batch, 3)."""
        self.passes += 1
        return super().forward(x)


class Signal(Hook):
    """Comes in the second micro-batch of the second window."""

    def after_micro_batch(self, state: Any, accumulator: AccumulatorState) -> None:
        if (state.global_step, accumulator.passes_done) == (1, 2):
            self.passes = state.model.passes
            signal.raise_signal(signal.SIGTERM)


@pytest.mark.parametrize("strategy", ["in_place", "cached"])
def test_a_training_ends_after_the_micro_batch_in_hand(stop: Stop, strategy: str) -> None:
    """In the middle of a window: no other pass is begun, and no step is taken."""
    stranger = (*STRANGER, "model._target_=tests.arms.test_signals.Counted", "accum.steps=4",
                "data.global_batch_size=8", "audit.at_start=false", f"strategy={strategy}")  # fmt: skip
    state = build(settings(*stranger))
    with stop.held(""), Progress("test", state.total_steps) as progress:
        hooks, _ = hooks_of(state, Collected(), progress, stop=stop)
        hooks.append(Signal())
        with pytest.raises(StoppedError):
            train(state, hooks)
    assert state.global_step == 1
    assert state.model.passes == hooks[-1].passes


def test_an_evaluation_ends_after_the_batch_in_hand(stop: Stop) -> None:
    """And does not wait for the whole set."""
    data = ("data.eval._target_=tests.strangers.Points", "data.eval_batch_size=4")
    state = build(settings(*STRANGER, *data))
    with stop.held(""):
        seen = list[int]()

        def over(of_model: Callable[[Any], Any]) -> Any:
            seen.append(1)
            signal.raise_signal(signal.SIGTERM)
            return of_model(state.model)

        with pytest.raises(StoppedError):
            evaluate(state, over, stop.look)
    assert len(seen) == 1


class Terminated(Ending):
    """A batch system ends its process."""

    def happen(self) -> None:
        signal.raise_signal(signal.SIGTERM)


class Announced(Ending):
    """A batch system announces the end, to the command and to its child, in both orders."""

    def happen(self) -> None:
        os.kill(os.getppid(), signal.SIGUSR1)
        signal.raise_signal(signal.SIGUSR1)


def ended(program: Program) -> list[tuple[str, str]]:
    found = [json.loads(p.read_text()) for p in sorted(program.sweep_folder.rglob("arm.json"))]
    return [(o["status"], o["reason"]) for o in found]


def test_a_run_that_is_terminated_is_killed_with_the_signals_name(program: Program) -> None:
    """Exit status 143; the curve up to the window in hand is kept."""
    done = program(*POINTS, "model._target_=tests.arms.test_signals.Terminated", "accum.steps=2")
    assert done.status == 143
    assert ended(program) == [("KILLED", "interrupted (SIGTERM)")]
    (run,) = program.arms()
    assert (run.status, run.tags["failure"]) == ("KILLED", "interrupted (SIGTERM)")
    assert run.curves["train/loss"].global_steps == (1,)
    assert "the run ends after the micro-batch in hand" in done.err


@pytest.mark.parametrize(
    ("model", "reason"),
    [("Terminated", "interrupted (SIGTERM)"), ("Announced", "interrupted (SIGUSR1)")],
)
def test_a_sweep_that_is_ended_compares_what_there_is(program: Program, model: str, reason: str) -> None:
    """By a signal to the child alone, or to both: once; the arm in hand is KILLED, no other is begun."""
    targets = f"model._target_=tests.strangers.Net,tests.arms.test_signals.{model},tests.strangers.Net"
    done = program("-m", *POINTS, targets, "train.steps=6")
    assert done.status == 143
    assert [how for how, _ in ended(program)] == ["FINISHED", "KILLED"]
    assert ended(program)[1] == ("KILLED", reason)
    assert (program.sweep_folder / "comparison.csv").exists()
    assert program("-m", *POINTS, "model._target_=tests.strangers.Net").status == 0


def test_a_signal_that_comes_while_the_child_begins_ends_its_arm_in_order(
    program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It waits until it can be followed, and does not break into Python's own beginning."""

    class Signalled(child._Child):
        def __init__(self) -> None:
            super().__init__()
            os.kill(self.process.pid, signal.SIGINT)

    child.end()
    monkeypatch.setattr(child, "_Child", Signalled)
    done = program("-m", *POINTS, "model._target_=tests.strangers.Net", "accum.steps=1,2")
    assert done.status == 130, done.err
    assert ended(program) == [("KILLED", "interrupted (SIGINT)")]
    assert "KeyboardInterrupt" not in done.err


class Paced(Net):
    """Takes its time for a micro-batch of less than a global batch."""

    def __init__(self, pause_s: float = 0.05) -> None:
        super().__init__()
        self.pause_s = pause_s

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 2) -> logits (batch, 3)."""
        if self.training and len(x) < 8 and type(x) is Tensor:  # not where its memory is planned
            time.sleep(self.pause_s)
        return super().forward(x)


def started(folder: Path, *arguments: str, until: str = "points") -> subprocess.Popen[str]:
    """Start a sweep of four arms in a process; wait until the first has ended and the second records."""
    command = [sys.executable, "-m", "gaccum_exp", "-m", *POINTS, "accum.steps=1,2,4,8",
               "train.steps=200", "accum.partial_window=drop", "audit.at_start=false",
               "model._target_=tests.arms.test_signals.Paced",
               *arguments]  # fmt: skip
    process = subprocess.Popen(
        command, cwd=folder, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + PATIENCE_S

    def waits() -> bool:
        (first,) = [*folder.glob("multirun/*/0/arm.json")] or [None]
        second = folder.glob("multirun/*/1/journal.jsonl")
        finished = first is not None and "FINISHED" in first.read_text()
        return not finished or not any(until in path.read_text() for path in second)

    while waits():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return process


def outcomes(folder: Path) -> dict[int, tuple[str, str | None]]:
    """Return how the arms of the one sweep ended, by number."""
    found = {int(p.parent.name): json.loads(p.read_text()) for p in folder.rglob("arm.json")}
    return {n: (o["status"], o["reason"]) for n, o in sorted(found.items())}


def child_of(folder: Path) -> int:
    """Return the process that runs the second arm."""
    (path,) = folder.glob("multirun/*/1/arm.json")
    return int(json.loads(path.read_text())["process"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "status", "launcher"),
    [
        pytest.param(signal.SIGINT, 130, (), id="Ctrl-C", marks=pytest.mark.whole),
        pytest.param(
            *(signal.SIGTERM, 143, ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2")),
            id="SIGTERM under joblib",
        ),
    ],
)
def test_a_command_that_is_ended_passes_it_on_and_compares(
    home: Path, number: signal.Signals, status: int, launcher: tuple[str, ...]
) -> None:
    """Whoever launches the arms: those in hand are KILLED, with their curves; no other is begun."""
    process = started(home, *launcher)
    process.send_signal(number)
    out, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == status, err
    assert "Traceback" not in err
    assert "waiting up to 30 s" in err
    reason = f"interrupted ({number.name})"
    ended = outcomes(home)
    if launcher:  # the worker that had the first arm takes the third at once
        assert ended.pop(2, ("KILLED", reason)) == ("KILLED", reason)
    assert ended == {0: ("FINISHED", None), 1: ("KILLED", reason)}
    (table,) = home.glob("multirun/*/comparison.csv")
    with table.open() as file:
        rows = {row["accum_steps"]: row for row in csv.DictReader(file)}
    assert [rows[steps]["status"] for steps in "12"] == ["FINISHED", "KILLED"]
    assert int(rows["2"]["common_steps"]) > 0
    # and so may the third arm be, which had a worker to itself
    assert re.search(r"N = 2 (was|and 4 were) interrupted", " ".join(out.split())), out


@pytest.mark.slow
def test_a_second_signal_ends_command_and_child_on_the_spot(home: Path) -> None:
    """What was flushed is on disk; the arm has no outcome of its own."""
    process = started(home, "+model.pause_s=100", until="begin")
    child = child_of(home)
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    assert process.wait(PATIENCE_S) == 143
    deadline = time.monotonic() + PATIENCE_S
    while Path(f"/proc/{child}").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.communicate()


@pytest.mark.slow
@pytest.mark.parametrize("launcher", shortened(["basic", "joblib"], ["basic"]))
def test_the_arms_of_a_command_that_is_killed_end_in_order(home: Path, launcher: str) -> None:
    """Child and worker see that nobody is there any more: the micro-batch in hand is the last."""
    process = started(
        home, f"hydra/launcher={launcher}", *["hydra.launcher.n_jobs=2"] * (launcher != "basic")
    )
    process.kill()
    process.communicate(timeout=PATIENCE_S)  # its streams are closed once nobody is left
    deadline = time.monotonic() + PATIENCE_S
    while "RUNNING" in {status for status, _ in outcomes(home).values()}:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    ended = outcomes(home)
    assert ended.pop(0) == ("FINISHED", None)
    assert set(ended.values()) == {("KILLED", "its command has ended")}
    assert 3 not in ended
