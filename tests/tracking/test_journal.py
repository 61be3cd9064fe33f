"""A journal: what was appended is read back, whatever has happened to the file or its process."""

import math
import os
import signal
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import pytest

from gaccum_exp.errors import TrackingError
from gaccum_exp.tracking import journal as journals
from gaccum_exp.tracking.journal import (
    Journal,
    add_to_ended,
    encoded,
    end_if_dead,
    end_left,
    end_of,
    has_end,
    read_journal,
    records_in,
    unsettled_below,
)
from gaccum_exp.tracking.locks import FileLock
from gaccum_exp.tracking.read_back import Journals
from tests.program import PATIENCE_S, environment

HOLDS = """
import os, sys, time
from pathlib import Path
from gaccum_exp.tracking.journal import Journal
journal = Journal.create(Path("run"), "sqlite:///mlflow.db", "gaccum_exp")
journal.begin("N=2", params={}, tags={"sweep_id": "a"}, texts={})
journal.append("points", points=[[1, 5, {"train/loss": 0.5}]])
if os.fork() == 0:
    time.sleep(60)
    os._exit(0)
print("holds", flush=True)
sys.stdin.read()
"""


def begun(folder: Path) -> Journal:
    """Begin a journal of the run `N=2` of the sweep `a`."""
    journal = Journal.create(folder, "sqlite:///mlflow.db", "gaccum_exp")
    journal.begin("N=2", params={"seed": 0}, tags={"sweep_id": "a"}, texts={})
    return journal


def points_in(records: list[dict[str, Any]]) -> list[Any]:
    """Return the points of all records."""
    return [point for record in records if record["kind"] == "points" for point in record["points"]]


def test_what_is_appended_is_read_back(tmp_path: Path) -> None:
    """Every bit of every number, what is not finite too, and every letter."""
    journal = begun(tmp_path)
    values = [0.1 + 0.2, 1e-320, math.inf, -math.inf, -0.0]
    for step, value in enumerate(values):
        journal.append("points", points=[[step, 5, {"train/loss": value}]])
    journal.append("tags", tags={"cause": "é 梯度 \udc80\n"})
    journal.end("FINISHED")
    records, notes = read_journal(journal.path)
    assert [value["train/loss"].hex() for _, _, value in points_in(records)] == [v.hex() for v in values]
    assert records[-2]["tags"] == {"cause": "é 梯度 \udc80\n"}
    assert [record["kind"] for record in (records[0], records[1], records[-1])] == [
        "store",
        "begin",
        "end",
    ]
    assert notes == []


def test_a_journal_torn_at_any_byte_of_its_last_record_lacks_that_alone(tmp_path: Path) -> None:
    """And says so."""
    journal = begun(tmp_path)
    for step in range(3):
        journal.append("points", points=[[step, 5, {"train/loss": step / 7}]])
    journal.close()
    whole = journal.path.read_bytes()
    last = whole.rindex(b"\n", 0, -1) + 1
    for end in range(last, len(whole)):
        journal.path.write_bytes(whole[:end])
        records, notes = read_journal(journal.path)
        assert [point[0] for point in points_in(records)] == [0, 1]
        assert len(notes) == (end > last), notes


def test_no_flipped_bit_changes_a_number(tmp_path: Path) -> None:
    """A record with one is left out and spoken of; at a line's end it takes the next with it."""
    journal = begun(tmp_path)
    for step in range(3):
        journal.append("points", points=[[step, 5, {"train/loss": step / 7}]])
    journal.close()
    whole = journal.path.read_bytes()
    sound = [str(point) for point in points_in(records_in(whole, journal.path)[0])]
    for position in range(len(whole)):
        for bit in range(8):
            flipped = bytearray(whole)
            flipped[position] ^= 1 << bit
            records, notes = records_in(bytes(flipped), journal.path)
            found = [str(point) for point in points_in(records)]
            assert [point for point in sound if point in found] == found
            assert len(found) >= 1
            assert notes, (position, bit)


def test_a_run_whose_process_was_killed_is_dead_and_one_that_lives_is_not(tmp_path: Path) -> None:
    """Also while a process that it has forked goes on; and it is ended once."""
    training = subprocess.Popen(
        [sys.executable, "-c", HOLDS], cwd=tmp_path, env=environment(),
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    assert training.stdout is not None
    assert training.stdout.readline() == "holds\n"
    path = tmp_path / "run" / "journal.jsonl"
    try:
        assert not end_if_dead(path, "KILLED", "gone")
        assert list(unsettled_below(tmp_path)) == [path]
        os.kill(training.pid, signal.SIGKILL)
        training.wait(PATIENCE_S)
        assert end_left(tmp_path, "KILLED", "gone") == ["N=2"]
        assert end_left(tmp_path, "KILLED", "gone") == []
    finally:
        os.killpg(training.pid, signal.SIGKILL)
        training.communicate()
    (run,) = Journals(tmp_path).sweep("a", ["train/loss"])
    assert (run.status, run.tags["failure"], run.curves["train/loss"].values) == (
        "KILLED",
        "gone",
        (0.5,),
    )


def test_a_run_of_this_process_is_alive_until_it_is_closed(tmp_path: Path) -> None:
    """Asking does not give the lock up, as opening the file a second time would."""
    journal = begun(tmp_path)
    lock = journal.path.with_suffix(".lock")
    for _ in range(2):
        assert FileLock.take(lock) is None
        assert not end_if_dead(journal.path, "KILLED", "gone")
    journal.close()
    taken = FileLock.take(lock)
    assert taken is not None
    taken.release()


def test_a_run_of_another_host_is_left_unless_it_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing here knows whether it lives."""
    with monkeypatch.context() as patch:
        patch.setattr(journals.platform, "node", lambda: "elsewhere")
        patch.setattr(journals, "_boot", lambda: "another")
        journal = begun(tmp_path)
    journal.close()
    assert not end_if_dead(journal.path, "KILLED", "gone")
    assert end_if_dead(journal.path, "KILLED", "gone", stale=True)
    assert read_journal(journal.path)[0][-1]["status"] == "KILLED"


def test_an_end_after_a_torn_record_is_read(tmp_path: Path) -> None:
    """What is appended after it begins a line of its own."""
    journal = begun(tmp_path)
    journal.close()
    with open(journal.path, "ab") as file:
        file.write(encoded({"kind": "points", "points": []})[:9])
    assert end_left(tmp_path, "KILLED", "gone") == ["N=2"]
    records, notes = read_journal(journal.path)
    assert records[-1]["status"] == "KILLED"
    assert len(notes) == 1


def test_a_folder_used_again_keeps_every_journal(tmp_path: Path) -> None:
    """A control's, or that of a second run."""
    first, second = begun(tmp_path), begun(tmp_path)
    assert [path.name for path in (first.path, second.path)] == ["journal.jsonl", "journal-2.jsonl"]
    assert first.file_path("weights.pt") != second.file_path("weights.pt")
    first.close()
    second.close()
    assert len(Journals(tmp_path).sweep("a", [])) == 2


def test_what_a_full_disk_does_not_take_is_written_when_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Half a record that was written is gone on with; the shortage is said once, and its end."""
    journal, write, room = begun(tmp_path), os.write, [3]

    def full(descriptor: int, text: bytes) -> int:
        if not room[0]:
            raise OSError(28, "No space left on device")
        taken = write(descriptor, bytes(text[: room[0]]))
        room[0] -= taken
        return taken

    monkeypatch.setattr(os, "write", full)
    for step in range(3):
        journal.append("points", points=[[step, 5, {"train/loss": 0.5}]])
    assert caplog.text.count("No space left on device") == 1
    room[0] = 10**9
    journal.end("FINISHED")
    records, notes = read_journal(journal.path)
    assert [point[0] for point in points_in(records)] == [0, 1, 2]
    assert records[-1]["kind"] == "end"
    assert notes == []
    assert "nothing of it is lost" in caplog.text


def test_a_journal_that_could_not_be_written_to_its_end_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run is not called finished."""
    journal = begun(tmp_path)

    def full(descriptor: int, text: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(TrackingError, match="No space left on device"):
        journal.end("FINISHED")


def test_a_journal_whose_folder_was_removed_is_written_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Whole, with its lock."""
    journal = begun(tmp_path / "run")
    journal.append("points", points=[[0, 5, {"train/loss": 0.5}]])
    for path in (tmp_path / "run").iterdir():
        path.unlink()
    (tmp_path / "run").rmdir()
    journal.append("points", points=[[1, 5, {"train/loss": 0.25}]])
    assert "was removed: written again" in caplog.text
    assert not end_if_dead(journal.path, "KILLED", "gone")
    journal.end("FINISHED")
    (run,) = Journals(tmp_path).sweep("a", ["train/loss"])
    assert (run.status, run.curves["train/loss"].values) == ("FINISHED", (0.5, 0.25))


@pytest.mark.parametrize("text", [b"", b"[1]", b"{}", b'{"kind":1}', b"[" * 100_000])
def test_a_line_with_a_good_checksum_that_is_no_record_is_damaged(text: bytes) -> None:
    """Whoever has written it: no reader is to stumble over it."""
    assert journals.decoded(b"%08x %b" % (zlib.crc32(text), text)) is None


GAPS = [[1, 5, {"train/loss_gap": 0.25}]]


def test_what_a_comparison_adds_leaves_a_run_ended(tmp_path: Path) -> None:
    """Its end is its end, whatever is added how often; the same is added once; a reader has it all."""
    journal = begun(tmp_path)
    journal.append("points", points=[[1, 5, {"train/loss": 0.5}]])
    journal.end("FAILED", "a reason")
    assert add_to_ended(journal.path, GAPS, {"mlflow.runColor": "#000000"})
    before = journal.path.read_bytes()
    assert not add_to_ended(journal.path, GAPS, {"mlflow.runColor": "#000000"})
    assert journal.path.read_bytes() == before
    assert add_to_ended(journal.path, GAPS, {"mlflow.runColor": "#ffffff"})
    assert end_of(journal.path)["failure"] == "a reason"
    assert end_left(tmp_path, "KILLED", "gone") == []
    (run,) = Journals(tmp_path).sweep("a", ["train/loss"])
    assert (run.status, run.tags["failure"], run.tags["mlflow.runColor"]) == (
        "FAILED", "a reason", "#ffffff",
    )  # fmt: skip
    assert run.metrics == {"train/loss": 0.5, "train/loss_gap": 0.25}
    assert run.curves["train/loss"].times_ms == (5,)


def test_an_addition_torn_at_any_byte_leaves_the_run_as_it_ended(tmp_path: Path) -> None:
    """Whoever comes next finds the end, and adds in its place."""
    journal = begun(tmp_path)
    journal.end("FINISHED")
    ended = journal.path.read_bytes()
    assert add_to_ended(journal.path, GAPS, {})
    whole = journal.path.read_bytes()
    for size in range(len(ended), len(whole), 7):
        journal.path.write_bytes(whole[:size])
        assert end_of(journal.path)["status"] == "FINISHED"
        assert add_to_ended(journal.path, GAPS, {})
        assert journal.path.read_bytes() == whole


def test_nothing_is_added_to_a_run_that_lives_or_goes_on(tmp_path: Path) -> None:
    """One that has no end yet, whose process may be dead, or one whose journal a process holds."""
    journal = begun(tmp_path)
    assert not add_to_ended(journal.path, GAPS, {})
    journal.close()
    assert not add_to_ended(journal.path, GAPS, {})
    assert end_if_dead(journal.path, "KILLED", "gone")
    lock = FileLock.take(journal.path.with_suffix(".lock"))
    assert lock is not None
    assert not add_to_ended(journal.path, GAPS, {})
    lock.release()
    assert add_to_ended(journal.path, GAPS, {})
    lock = FileLock.take(journal.path.with_suffix(".lock"))
    assert lock is not None
    again = Journal.going_on(journal.path, lock)
    assert not has_end(journal.path)
    again.end("FINISHED")
    assert end_of(journal.path)["status"] == "FINISHED"
