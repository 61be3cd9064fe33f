"""What an arm's file says of the process that runs it, and of an end that it could not write."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from gaccum_exp.arms import child
from gaccum_exp.arms.context import Launch
from gaccum_exp.arms.outcome import RUNNING, Outcome, process_started
from gaccum_exp.tracking import shipper
from gaccum_exp.tracking.journal import Journal, read_journal

HERE = os.uname().nodename


@pytest.mark.parametrize("process", [0, 1, -1, 2**70, "7", True, None])
def test_what_is_no_process_of_an_arm_is_never_signalled(
    process: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """0 and negative ids mean groups, 1 all of a container; whatever a file has been made to say."""
    signalled = list[object]()
    Outcome("a", "N=1", RUNNING, host=HERE, process=process).write(tmp_path / "0")  # type: ignore[arg-type]

    def kill(to: object, number: int) -> None:
        signalled.append(to)
        if to == 2**70:
            raise OverflowError

    monkeypatch.setattr(os, "kill", kill)
    child.pass_on(Launch(tmp_path, "a", "sqlite:///x.db", "x", True), 15)
    assert signalled in ([], [2**70])


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_a_process_that_got_the_id_of_an_arms_later_is_not_taken_for_it() -> None:
    """Told by when it has started; without that, as from an older version, the id has to do."""
    other = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        started = process_started(other.pid)
        assert started is not None
        for when, runs in ((started, True), (started - 1, False), (None, True)):
            arm = Outcome("a", "N=1", RUNNING, host=HERE, process=other.pid, process_started=when)
            assert arm.runs_here == runs
    finally:
        other.communicate(b"\n")
    assert not Outcome("a", "N=1", RUNNING, host=HERE, process=other.pid).runs_here


def test_an_arm_that_died_after_its_last_record_has_ended_as_its_journal_says(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With verdict and objective; a control of it that had not ended has failed with its process."""
    monkeypatch.setattr(shipper, "announce", lambda path: None)
    arm = Journal.create(tmp_path, "http://127.0.0.1:9", "x")
    arm.begin("N=1", params={}, tags={"sweep_id": "a"}, texts={})
    arm.append("points", points=[[1, 1, {"train/loss": 0.5}], [2, 2, {"train/loss": 0.25}]])
    arm.append("tags", tags={"verdict": "equivalent"})
    arm.end("FINISHED")
    control = Journal.create(tmp_path, "http://127.0.0.1:9", "x")
    control.begin("N=1 again", params={}, tags={"sweep_id": "a", "role": "control"}, texts={})
    control.close()
    over = child.ended(tmp_path, Outcome("a", "N=1", RUNNING, host=HERE, process=2), None, "gone")
    assert over == Outcome("a", "N=1", "FINISHED", verdict="equivalent", objective=0.25)
    assert not caplog.records
    end = read_journal(control.path)[0][-1]
    assert (end["status"], end["failure"]) == ("FAILED", "gone")
    stopped = child.ended(tmp_path, Outcome("a", "N=1", RUNNING), "interrupted (SIGTERM)")
    assert stopped.status == "FINISHED"
    other = Outcome("another", "N=1", RUNNING)
    assert child.ended(tmp_path, other, None, "gone").status == "FAILED"
