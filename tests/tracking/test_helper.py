"""The helper from within, and what those do that it works for where it cannot do it."""

import errno
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from gaccum_exp.tracking import delivery, helper, shipper
from gaccum_exp.tracking.delivered import Delivered
from gaccum_exp.tracking.helper import Helper
from gaccum_exp.tracking.journal import Journal, unsettled_below
from tests.program import PATIENCE_S, Program, environment

HOLDER = """
import sys
from pathlib import Path
from gaccum_exp.tracking.locks import FileLock
held = FileLock.take(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def listener(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """Return a socket for a helper in this process; it goes to the folders of stores."""
    monkeypatch.chdir(tmp_path)
    with socket.socket(socket.AF_UNIX) as one:
        one.bind("helper")
        one.listen()
        yield one


def journal(folder: Path, uri: str, *, ended: bool = True) -> Path:
    """Write the journal of a run, which has ended or whose process is dead."""
    one = Journal.create(folder, uri, "gaccum_exp")
    one.begin(folder.name, params={}, tags={"sweep_id": "a"}, texts={})
    if ended:
        one.end("FINISHED")
    return one.path


def come_true(condition: Callable[[], bool]) -> None:
    """Wait until something is so."""
    until = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


def run(of: Helper) -> threading.Thread:
    """Run a helper in a thread."""
    thread = threading.Thread(target=of.run, daemon=True)
    thread.start()
    return thread


def look_below(of: Helper, folder: Path) -> None:
    """Have it look for what was left, as if somebody had asked and gone."""
    of._left.append((folder, unsettled_below(folder)))


def test_a_helper_ends_though_more_was_left_than_it_opens_at_once(
    tmp_path: Path, listener: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their store is away for good and nobody waits: the rest is left for a later one."""
    monkeypatch.setattr(helper, "AT_ONCE", 2)
    monkeypatch.setattr(helper, "GRACE_S", 0.3)
    paths = [journal(tmp_path / "outputs" / name, "http://127.0.0.1:9") for name in "abc"]
    one = Helper(listener)
    look_below(one, tmp_path / "outputs")
    thread = run(one)
    thread.join(30)
    assert not thread.is_alive()
    assert [Delivered.of(path).state for path in paths] == ["away", "away", "unknown"]


def test_a_journal_that_another_process_delivers_is_taken_over(
    program: Program, listener: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may let go of it without having seen its end; who has named it is answered all the same."""
    monkeypatch.setattr(helper, "HELD_S", 0.05)
    path = journal(program.folder / "run", program.uri)
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, path.with_suffix(".delivery.lock")], env=environment(),
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    one = Helper(listener)
    with socket.socket(socket.AF_UNIX) as client:
        client.connect("helper")
        client.sendall(shipper.line_of(path))
        thread = run(one)
        come_true(lambda: path in one._put_off)
        holder.communicate()
        client.settimeout(PATIENCE_S)
        come_true(lambda: bool(client.recv(1 << 16)) and Delivered.of(path).settled)
    thread.join(PATIENCE_S)
    assert not thread.is_alive()


def test_what_is_wrong_with_one_journal_is_said_once_and_the_others_are_delivered(
    program: Program,
    listener: socket.socket,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One with records that nobody has expected, and one that is a folder."""
    outputs = program.folder / "outputs"
    odd = journal(outputs / "a", program.uri)
    (outputs / "b" / "journal.jsonl").mkdir(parents=True)
    (outputs / "b" / "journal.lock").touch()
    good = journal(outputs / "c", program.uri)

    def begin(path: Path, stores: delivery.Stores) -> delivery.Delivery:
        if path == odd:
            raise KeyError("host")
        return of_package(path, stores)

    of_package = delivery.Delivery
    monkeypatch.setattr(delivery, "Delivery", begin)
    one = Helper(listener)
    look_below(one, outputs)
    thread = run(one)
    come_true(lambda: Delivered.of(good).settled)
    thread.join(PATIENCE_S)
    assert not thread.is_alive()
    said = [line.split(":")[1].strip() for line in capfd.readouterr().err.splitlines()]
    assert said == [str(outputs / name / "journal.jsonl") for name in "ab"]


def test_a_helper_ends_though_a_full_disk_has_it_send_the_same_again(
    program: Program, listener: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the run's end nor how far it is delivered can be written, and nobody waits any more."""

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(helper, "GRACE_S", 1.0)
    monkeypatch.setattr(helper, "FAULT_S", 0.1)
    monkeypatch.setattr(helper, "ORPHAN_S", 0.1)
    path = journal(program.folder / "run", program.uri, ended=False)
    tries: list[Path] = []

    def end(path: Path, *_: Any, **__: Any) -> None:
        tries.append(path)
        full()

    monkeypatch.setattr(delivery, "end_if_dead", end)
    monkeypatch.setattr(Delivered, "write", full)
    one = Helper(listener)
    with socket.socket(socket.AF_UNIX) as client:
        client.connect("helper")
        client.sendall(shipper.line_of(path))
        thread = run(one)
        come_true(lambda: path in one._deliveries)
    thread.join(PATIENCE_S)
    assert not thread.is_alive()
    assert len(tries) > 1  # for a while: there may be room again


def test_a_lasting_fault_is_said_once_whatever_name_it_holds(
    program: Program, listener: socket.socket, capfd: pytest.CaptureFixture[str]
) -> None:
    """As of a temporary file, which is drawn anew at each attempt."""
    one = Helper(listener)
    for name in ("tmp1", "tmp2"):
        one._say_once(program.folder, OSError(28, "No space left on device", name))
    one._say_once(program.folder, ValueError("another"))
    assert len(capfd.readouterr().err.splitlines()) == 2


def test_what_another_user_has_left_is_left_alone(
    program: Program, listener: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who may write below this folder could have anything sent in this user's name."""
    path = journal(program.folder / "outputs" / "run", program.uri)
    silent = program.folder / "outputs" / "silent" / "journal.lock"
    silent.parent.mkdir()
    silent.touch()
    me = os.getuid()
    for others in (True, False):
        one = Helper(listener)
        look_below(one, program.folder / "outputs")
        with monkeypatch.context() as patch:
            patch.setattr(os, "getuid", lambda others=others: me + others)
            one.run()
        assert Delivered.of(path).settled != others
        assert silent.exists() == others


class Deaf:
    """A helper that takes every word and does nothing."""

    def __init__(self) -> None:
        self.pid, self.surroundings = os.getpid(), shipper._surroundings()
        self.address = "nowhere"
        self.told = list[Path]()

    def tell(self, path: Path) -> None:
        self.told.append(path)

    def changed(self, timeout_s: float) -> set[Path]:
        time.sleep(0.01)
        return set()


def test_a_command_gives_up_a_journal_with_which_nothing_happens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After it has named it again several times; it is among what is left."""
    monkeypatch.setattr(shipper, "STORE_S", 0.2)
    monkeypatch.setattr(shipper, "AGAIN_S", 0.05)
    deaf: Any = Deaf()
    deliveries = shipper._Deliveries()
    deliveries._client = deaf
    path = journal(tmp_path / "run", "sqlite:///mlflow.db")
    deliveries.announce(path)
    left = list[list[Path]]()
    thread = threading.Thread(target=lambda: left.append(deliveries.finish()), daemon=True)
    thread.start()
    thread.join(30)
    assert left == [[path]]
    assert len(deaf.told) > 3
    assert set(deaf.told) == {path}


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Have a process that only listens started instead of a helper; return those started."""
    started, popen = list[subprocess.Popen[bytes]](), subprocess.Popen

    def start(command: list[str], **how: Any) -> subprocess.Popen[bytes]:
        started.append(popen([sys.executable, "-S", "-c", "input()"], pass_fds=how["pass_fds"],
                             stdin=subprocess.PIPE))  # fmt: skip
        return started[-1]

    monkeypatch.setattr(subprocess, "Popen", start)
    yield started
    for process in started:
        process.communicate(b"\n")


def test_a_helper_is_reached_where_temporary_folders_have_long_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stand_in: list[subprocess.Popen[bytes]]
) -> None:
    """Longer than the name of a socket may be; nothing is left of it where it has been killed."""
    deep = tmp_path / ("x" * 100)
    deep.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(deep))
    deliveries = shipper._Deliveries()
    folder = Path(deliveries.helper().address).parent
    assert folder.exists()
    assert folder.parent != deep
    stand_in[0].send_signal(signal.SIGKILL)
    stand_in[0].wait()
    deliveries.tell(tmp_path)
    assert not folder.exists()
    deliveries._bury()


def test_what_a_killed_helper_leaves_is_removed_though_nobody_spoke_to_it_any_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stand_in: list[subprocess.Popen[bytes]]
) -> None:
    """Where the next one is started; not by a forked process, which cannot tell whether it lives."""
    monkeypatch.setattr(shipper, "_let_go_of", [])
    deliveries = shipper._Deliveries()
    client = deliveries.helper()
    folder = Path(client.address).parent
    client.close()
    forked = os.fork()
    if forked == 0:
        os._exit(client.ended)
    assert os.waitstatus_to_exitcode(os.waitpid(forked, 0)[1]) == 0
    stand_in[0].send_signal(signal.SIGKILL)
    stand_in[0].wait()
    assert folder.exists()
    other = shipper._Client()
    assert not folder.exists()
    stand_in[1].send_signal(signal.SIGKILL)
    other.bury()
    assert not Path(other.address).parent.exists()


def test_a_helper_that_cannot_be_started_leaves_nothing_and_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """As one that dies: it is not tried at every word, and said once."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    tried = list[int]()

    def fail(command: list[str], **how: Any) -> None:
        tried.append(1)
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(subprocess, "Popen", fail)
    deliveries = shipper._Deliveries()
    for _ in range(20):
        deliveries.announce(tmp_path / "journal.jsonl")
    assert len(tried) == shipper.DEATHS
    assert not list((tmp_path / "temporary").iterdir())
    assert len(capfd.readouterr().err.splitlines()) == 1
