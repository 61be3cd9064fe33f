"""What a model does to its process ends its arm alone, with a reason; the rest of the sweep goes on."""

import ctypes
import io
import json
import logging
import os
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch.utils.data import get_worker_info

from gaccum_exp import cli
from gaccum_exp.arms import child, serve
from gaccum_exp.arms.context import given_name
from gaccum_exp.arms.outcome import RUNNING, Outcome, is_alive, read_outcome
from gaccum_exp.train.stopping import Stop
from tests.arms.test_context import context
from tests.program import PATIENCE_S, TINY, Ending, Program, environment
from tests.shortened import shortened
from tests.strangers import Net, Points

pytestmark = pytest.mark.usefixtures("undrawn")

STRANGER = ("model=custom", "data=custom", "data.train._target_=tests.strangers.Points",
            "data.global_batch_size=8", "train.steps=5", "runtime.device=cpu")  # fmt: skip


def outcomes(program: Program) -> dict[str, tuple[str, str | None]]:
    """Return how each arm of the last sweep ended, by the model's or the data's class."""
    found = [json.loads(p.read_text()) for p in sorted(program.sweep_folder.glob("*/arm.json"))]
    return {o["name"].partition(" ")[0]: (o["status"], o["reason"]) for o in found}


class Leaves(Ending):
    def happen(self) -> None:
        sys.exit(0)


class Exits(Ending):
    def happen(self) -> None:
        os._exit(0)


class Crashes(Ending):
    def happen(self) -> None:
        ctypes.string_at(0)


class Garbled(Ending):
    def happen(self) -> None:
        raise RuntimeError("half of a pair: \ud800")


class SilentError(Exception):
    def __str__(self) -> str:
        raise ValueError("no words")


class Silent(Ending):
    def happen(self) -> None:
        raise SilentError


class Strange(Ending):
    def happen(self) -> None:
        raise BaseException("no Exception")


@pytest.mark.slow
def test_what_a_model_does_to_its_process_ends_its_arm_alone(program: Program) -> None:
    """Each is FAILED with the reason, in its file and in the store; the others are run and compared."""
    kinds = ("Exits", "Crashes")
    targets = ",".join(f"tests.arms.test_children.{kind}" for kind in kinds)
    ended = program("-m", *STRANGER, f"model._target_={targets},tests.strangers.Net")
    assert ended.status == 1
    assert outcomes(program) == {
        "model=Exits": ("FAILED", "its process ended with status 0"),
        "model=Crashes": ("FAILED", "its process was ended by signal 11 (SIGSEGV)"),
        "model=Net": ("FINISHED", None),
    }
    stored = {
        run.name.partition(" ")[0]: (run.status, run.tags.get("failure")) for run in program.arms()
    }
    assert stored == outcomes(program)
    assert (program.sweep_folder / "comparison.csv").exists()
    line = next(line for line in ended.lines if line.startswith("model=Exits"))
    assert line.endswith(" failed: its process ended with status 0")


@pytest.mark.slow
def test_a_child_delivers_through_the_helper_of_each_command(
    program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that it has from an earlier command does not know that somebody else will say how it ended."""
    program.tiny("-m", "accum.steps=1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "31")  # to a helper of its own
    end_left = child.end_left
    monkeypatch.setattr(child, "end_left", lambda *given: (time.sleep(2), end_left(*given)))
    program("-m", *STRANGER, "model._target_=tests.arms.test_children.Exits")
    assert [(run.status, run.tags["failure"]) for run in program.arms()] == [
        ("FAILED", "its process ended with status 0")
    ]


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        ("Leaves", "the model called sys.exit(0)"),
        ("Garbled", "RuntimeError: half of a pair: \\ud800"),
        ("Silent", "SilentError: its message cannot be read (ValueError)"),
        ("Strange", "BaseException: no Exception"),
    ],
)
def test_whatever_a_model_raises_fails_its_run(program: Program, model: str, reason: str) -> None:
    """Also what asks for the end of the process: that is not the command's exit status."""
    ended = program(*STRANGER, f"model._target_=tests.arms.test_children.{model}")
    assert ended.status == 1
    assert f"failed: {reason}" in ended.err


class EndsTheComparison(Net):
    """Ends its process once the arms in it are compared."""

    def __init__(self) -> None:
        super().__init__()
        serve._DONE["report"] = lambda launch, stop: os._exit(9)


def test_a_comparison_whose_process_dies_is_made_by_another(program: Program) -> None:
    """Nothing is lost by it; one that dies of the comparison itself is not tried for ever."""
    ended = program("-m", *STRANGER, "model._target_=tests.arms.test_children.EndsTheComparison")
    assert ended.status == 0
    assert (program.sweep_folder / "comparison.csv").exists()


class DeadlyPoints(Points):
    """Ends the data worker that reads it, in its second window."""

    def __getitem__(self, index: int) -> Any:
        if get_worker_info() is not None and self.read > 8:
            os.kill(os.getpid(), 9)
        self.read += 1
        return super().__getitem__(index)

    read = 0


def test_a_data_worker_that_is_killed_ends_its_arm_alone(program: Program) -> None:
    """torch says so inside whatever runs, also where the failure is being reported."""
    data = "data.train._target_=tests.arms.test_children.DeadlyPoints,tests.strangers.Points"
    ended = program("-m", *STRANGER, data, "model._target_=tests.strangers.Net", "data.workers=2")
    assert ended.status == 1
    dead, alive = outcomes(program).values()
    assert (dead[0], alive) == ("FAILED", ("FINISHED", None))
    assert "DataLoader worker" in str(dead[1])


def test_one_child_serves_all_commands_of_a_process_in_their_surroundings(
    program: Program, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Environment, working directory, module path, log and streams are those of each command."""
    (tmp_path / "mine.py").write_text(
        "import os, sys\nfrom tests.strangers import Net\n"
        "def net(): print('OUT', os.environ['MINE'], os.getcwd()); return Net()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    pids = set()
    for value in ("one", "two"):
        monkeypatch.setenv("MINE", value)
        ended = program("-m", *STRANGER, "model._target_=mine.net", "hydra.job.name=arm")
        assert f"OUT {value} {program.folder}" in ended.out
        pids.add(child._children[os.getpid()][-1].process.pid)
    assert len(pids) == 1
    terminal = os.dup(1)
    try:
        with (tmp_path / "elsewhere").open("wb") as file:
            os.dup2(file.fileno(), 1)
        program("-m", *STRANGER, "model._target_=mine.net")
    finally:
        os.dup2(terminal, 1)
        os.close(terminal)
    assert "OUT two" in (tmp_path / "elsewhere").read_text()
    program("-m", *STRANGER, "model._target_=tests.program.Broken", "hydra.job.name=arm")
    assert "[ERROR] " in (program.sweep_folder / "0/arm.log").read_text()


class LeavesAThread(Net):
    """Leaves a thread that never ends."""

    def __init__(self) -> None:
        super().__init__()
        threading.Thread(target=time.sleep, args=(PATIENCE_S,)).start()


def test_what_an_arm_leaves_running_meets_no_other_arm(program: Program) -> None:
    """The next arm has another process; both finish."""
    child.start()
    before = child._children[os.getpid()][-1].process.pid
    assert program("-m", *STRANGER, "model._target_=tests.arms.test_children.LeavesAThread").status == 0
    assert program("-m", *STRANGER, "model._target_=tests.strangers.Net").status == 0
    assert child._children[os.getpid()][-1].process.pid != before


class Leaving(Net):
    """Changes its process in a way that reaches other arms."""

    def __init__(self, way: str = "") -> None:
        super().__init__()
        match way:
            case "settings":
                torch.set_default_dtype(torch.float64)
                torch.backends.cudnn.benchmark = True
                os.umask(0o777)
                warnings.simplefilter("error")
                sys.stdout = sys.stderr = io.StringIO()
            case "hook":
                torch.nn.modules.module.register_module_forward_hook(lambda *given: 2 * given[-1])


@pytest.mark.parametrize(
    ("way", "one"),
    shortened([("settings", True), ("hook", False), ("fails", False)], ["settings", "hook"]),
)
def test_an_arm_after_another_is_the_one_that_it_is_alone(program: Program, way: str, one: bool) -> None:
    """Bit for bit: what can be put back is, else it has another process, as after a fault."""
    model = "model._target_=tests.arms.test_children."
    first = f"{model}Silent" if way == "fails" else f"{model}Leaving"
    how = () if way == "fails" else (f"+model.way={way}",)
    net = ("-m", *STRANGER, "model._target_=tests.strangers.Net")
    curves, children = [], []
    for others in ((), (first, *how)):
        if others:
            program("-m", *STRANGER, *others)
        assert program(*net).status == 0
        curves.append(program.arms()[0].curves["train/loss"])
        children.append(child._children[os.getpid()][-1].process.pid)
    assert curves[0].values == curves[1].values
    assert (children[0] == children[1]) == one


HANGS = """
import atexit, os, sys, threading, time
from tests.strangers import Net
def net():
    atexit.register(time.sleep, 1000)
    threading.Thread(target=time.sleep, args=(1000,)).start()
    return Net()
"""


@pytest.mark.slow
def test_a_sweep_imports_no_torch_and_is_not_held_up_at_its_end(tmp_path: Path) -> None:
    """By a thread, or by what is registered for the end of the process; the arm is FINISHED."""
    (tmp_path / "hangs.py").write_text(HANGS)
    arguments = ["-m", *STRANGER, "model._target_=hangs.net"]
    program = (
        "import sys; from gaccum_exp import cli; "
        f"print('ENDED', cli.main({arguments!r}), 'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment(), capture_output=True, text=True,
        timeout=PATIENCE_S,
    )  # fmt: skip
    assert "ENDED 0 False" in done.stdout, done.stderr


def test_a_sweep_without_an_arm_is_bad_input(program: Program) -> None:
    """A line, and status 2: nothing was run."""
    ended = program("-m", "model=glob(zzz*)")
    assert ended.status == 2
    assert "has no value, so nothing would be run" in ended.lines[-1]


def test_an_arm_whose_process_is_gone_without_a_word_has_failed(tmp_path: Path) -> None:
    """One that runs is left alone; on another host only where the command was interrupted."""
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    one = Outcome("a", "N=1", RUNNING, host=os.uname().nodename, process=gone.pid)
    assert cli._over(tmp_path, one, None).reason == "ended without an outcome"
    written = read_outcome(tmp_path)
    assert written is not None
    assert (written.status, written.host) == ("FAILED", None)
    assert cli._over(tmp_path, one, "interrupted (SIGINT)").status == "KILLED"
    here = Outcome("a", "N=1", RUNNING, host=os.uname().nodename, process=os.getpid())
    assert cli._over(tmp_path, here, None) is here
    elsewhere = Outcome("a", "N=1", RUNNING, host="elsewhere", process=1)
    assert cli._over(tmp_path, elsewhere, "interrupted (SIGINT)") is elsewhere
    assert cli._over(tmp_path, elsewhere, None).status == "FAILED"


def test_an_arm_runs_in_its_file_before_it_is_given_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the host and the process; a child that cannot be started leaves it FAILED."""
    job, seen = context(tmp_path, *TINY), []

    class Dead:
        def __init__(self) -> None:
            self.process, self.connection = subprocess.Popen([sys.executable, "-c", ""]), self
            self.closed = False

        def send(self, *given: Any) -> None:
            seen.append(read_outcome(tmp_path))
            raise child.DiedError("gone")

        def close(self) -> None:
            self.process.wait()

    monkeypatch.setattr(child, "_Child", Dead)
    monkeypatch.setattr(child, "_children", {})
    ended: dict[Path, Outcome] = {}
    child.run_job(job, Stop(), ended, None)
    assert [(o.status, o.host, o.process is not None) for o in seen] == [
        (RUNNING, os.uname().nodename, True)
    ] * 2
    assert ended[tmp_path].status == "FAILED"
    assert "gone" in str(ended[tmp_path].reason)
    assert given_name(job)


def test_whoever_does_not_wait_for_a_child_ends_it() -> None:
    """A second Ctrl-C, when all is done, is no error of the command's."""
    waited = Mock(side_effect=[KeyboardInterrupt, 0])
    process = Mock(wait=waited)
    child._Child.wait(Mock(process=process))
    process.kill.assert_called_once()
    assert waited.call_count == 2


def test_a_fault_beside_the_connection_is_no_death_of_the_child(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No descriptor is left: the arm has failed of that, and the child takes the next request."""
    child.start()
    living = child._children[os.getpid()][-1]

    def full(stream: int) -> int:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(child, "_open", full)
    ended: dict[Path, Outcome] = {}
    child.run_job(context(tmp_path, *TINY), Stop(), ended, None)
    assert "Too many open files" in str(ended[tmp_path].reason)
    assert "process" not in str(ended[tmp_path].reason)
    assert not living.connection.closed
    assert child._children[os.getpid()][-1] is living


class CrashesWhenBuilt(Net):
    """Ends its process where it is built with seed 1, as its weights show."""

    def __init__(self) -> None:
        super().__init__()
        if self.layers[0].weight[0, 0].item() > 0.5:
            os._exit(4)


def test_seeds_that_cannot_be_trained_as_one_end_one_by_one(program: Program) -> None:
    """A job of several seeds: the one that ends its process takes no other with it."""
    model = "model._target_=tests.arms.test_children.CrashesWhenBuilt"
    ended = program("-m", *STRANGER, model, "seed=0,1,2", "sweep.vectorize=seed")
    assert ended.status == 1
    found = [json.loads(p.read_text()) for p in sorted(program.sweep_folder.rglob("arm.json"))]
    assert [(o["status"], o["reason"]) for o in found] == [
        ("FINISHED", None),
        ("FAILED", f"model: _target_={model.partition('=')[2]}: ends the process (status 4)"),
        ("FINISHED", None),
    ]  # fmt: skip


def test_what_is_said_of_every_arm_is_said_once() -> None:
    """In the same words, whatever the arm; other words are kept."""
    heard = serve.SaidOnce()
    said = ["3 seeds at once", "N=1 failed: why", "3 seeds at once", "N=2 failed, as N=1 did"]
    records = [logging.LogRecord("x", logging.WARNING, "", 0, "%s", (text,), None) for text in said]
    assert [heard.filter(record) for record in records] == [True, True, False, True]


@pytest.mark.parametrize("alive", [True, False])
def test_a_worker_whose_command_died_before_it_could_look_is_an_orphan_all_the_same(
    alive: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its parent is then another already; whoever made it is known, and none that lives is mistaken."""
    made_by = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    worker = SimpleNamespace(_parent_pid=made_by.pid)
    monkeypatch.setattr(child.multiprocessing, "current_process", lambda: worker)
    if not alive:
        made_by.kill()  # not waited for: a dead process that nobody has asked how it ended
    while not alive and is_alive(made_by.pid):
        time.sleep(0.01)
    try:
        monkeypatch.setattr(child, "_PARENT", child._parent())
        assert child._is_orphan() is not alive
    finally:
        made_by.kill()
        made_by.communicate()
