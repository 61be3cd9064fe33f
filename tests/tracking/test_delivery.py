"""Delivery: everything in a journal reaches its store once, however often either of them fails."""

import os
import random
import sqlite3
import time
import zlib
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, ClassVar

import pytest
from mlflow import MlflowClient

from gaccum_exp.errors import (
    BadInputError,
    RecordRefusedError,
    RunGoneError,
    StoreAwayError,
    TrackingError,
)
from gaccum_exp.tracking import deliver, delivery
from gaccum_exp.tracking.delivered import Delivered
from gaccum_exp.tracking.delivery import Delivery, Stores
from gaccum_exp.tracking.journal import Journal, add_to_ended, encoded
from gaccum_exp.tracking.mlflow_store import Store
from tests.program import Program

STEPS = range(1, 301)


def journal_in(folder: Path, steps: range = STEPS, *, ends: bool = True, each: int = 7) -> Journal:
    """Write a journal of a run with a loss at each of these steps, in records of so many points."""
    journal = Journal.create(folder, f"sqlite:///{folder / 'mlflow.db'}", "gaccum_exp")
    journal.begin("N=2", params={"seed": 0}, tags={"sweep_id": "a"}, texts={"config.yaml": "seed: 0"})
    for first in range(steps.start, steps.stop, each):
        some = range(first, min(first + each, steps.stop))
        journal.append("points", points=[[step, 1000 + step, {"train/loss": step / 7}] for step in some])
    if ends:
        journal.end("FINISHED")
    return journal


def delivered_whole(path: Path) -> None:
    """Deliver a journal as long as anything can be delivered."""
    of = Delivery(path, Stores())
    try:
        while of.step():
            pass
    finally:
        of.close()


class Memory:
    """A store that fails when it is told to, before or after it has taken what it was sent."""

    experiment_id = "7"
    runs: ClassVar[dict[str, dict[str, Any]]] = {}
    log: ClassVar[list[str]] = []
    chance = 0.0
    draw = random.Random(0)

    def __init__(self, uri: str, experiment_name: str) -> None:
        self._fail()

    def _fail(self) -> None:
        if self.draw.random() < self.chance:
            raise StoreAwayError("no answer")

    def create_run(self, token: str, name: str, *, again: bool, **more: Any) -> str:
        self.log.append("create_run")
        self._fail()
        found = [key for key, run in self.runs.items() if run["token"] == token] if again else []
        if not found:
            found = [f"run {len(self.runs)}"]
            self.runs[found[0]] = {"token": token, "points": set()}
        self._fail()
        return found[0]

    def log_points(self, run_id: str, points: list[Any]) -> None:
        self.log.append("log_points")
        self._fail()
        self.runs[run_id]["points"] |= set(points)
        self._fail()

    def end_run(self, run_id: str, status: str, failure: str | None, end_time_ms: int) -> None:
        self.runs[run_id]["status"] = status
        self._fail()

    def __getattr__(self, name: str) -> Any:
        return lambda *args: self._fail()


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Memory]]:
    """Return the store that everything is delivered to."""
    monkeypatch.setattr(delivery, "Store", Memory)
    monkeypatch.setattr(delivery, "RETRY_S", (0.0, 0.0))
    monkeypatch.setattr(Memory, "runs", {})
    monkeypatch.setattr(Memory, "log", [])
    monkeypatch.setattr(Memory, "draw", random.Random(0))
    monkeypatch.setattr(Memory, "chance", 0.0)
    return Memory


@pytest.mark.parametrize("chance", [0.0, 0.3, 0.6])
def test_all_points_arrive_whatever_answers_are_lost(
    tmp_path: Path, memory: type[Memory], monkeypatch: pytest.MonkeyPatch, chance: float
) -> None:
    """Also where the deliverer dies after any request, and another goes on from what it had noted."""
    journal = journal_in(tmp_path)
    monkeypatch.setattr(memory, "chance", chance)
    for _ in range(2000):
        of = Delivery(journal.path, Stores())
        of.step()
        of._file.close()  # as if it were killed: nothing more is noted
        of._lock.release()
        if of.delivered.settled:
            break
    (run,) = memory.runs.values()
    assert run["points"] == {("train/loss", step / 7, 1000 + step, step) for step in STEPS}
    assert run["status"] == "FINISHED"


def test_what_is_sent_is_on_the_disk_before(
    tmp_path: Path, memory: type[Memory], monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that a store never holds what a machine that dies has forgotten."""
    sync = os.fdatasync
    monkeypatch.setattr(os, "fdatasync", lambda file: (memory.log.append("fdatasync"), sync(file)))
    of = Delivery(journal_in(tmp_path, ends=False).path, Stores())
    while of.step():
        pass
    assert memory.log[0] == "fdatasync"
    assert memory.log[1:3] == ["create_run", "log_points"]
    of.close()


def test_the_offset_is_noted_after_the_answer(tmp_path: Path, memory: type[Memory]) -> None:
    """Not for what the store was sent, but for what it has taken."""
    journal, memory.chance = journal_in(tmp_path), 1.0
    of = Delivery(journal.path, Stores())
    of.step()
    of.close()
    assert (Delivered.of(journal.path).offset, Delivered.of(journal.path).state) == (0, "away")


def test_how_far_it_is_delivered_is_noted_once_there_is_room_again(
    tmp_path: Path, memory: type[Memory], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever waits for it would else wait for ever."""
    of = Delivery(journal_in(tmp_path, ends=False).path, Stores())

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Delivered, "write", full)
        while of.step():
            pass
    assert Delivered.of(of.path).offset == 0
    of.step()
    assert Delivered.of(of.path).offset == of.path.stat().st_size
    of.close()


def test_a_journal_has_one_deliverer(tmp_path: Path, memory: type[Memory]) -> None:
    """Another is told so, and may try again once the first lets go."""
    journal = journal_in(tmp_path)
    of = Delivery(journal.path, Stores())
    with pytest.raises(TrackingError, match="is being delivered by another process"):
        Delivery(journal.path, Stores())
    of.close()
    delivered_whole(journal.path)
    assert Delivered.of(journal.path).settled


def test_a_journal_delivered_again_leaves_the_same_run(home: Path) -> None:
    """From any record on, into a real store: one run, each point once, with the time it was taken at."""
    journal = journal_in(home)
    delivered_whole(journal.path)
    offsets = [0, *(i + 1 for i, byte in enumerate(journal.path.read_bytes()) if byte == 10)]
    for offset in offsets[:-1:9]:
        known = Delivered.of(journal.path)
        known.offset, known.settled = offset, False
        known.run_id = known.run_id if offset else None
        known.write(journal.path)
        delivered_whole(journal.path)
    client = MlflowClient(f"sqlite:///{home / 'mlflow.db'}")
    (run,) = client.search_runs(["1"])
    history = client.get_metric_history(run.info.run_id, "train/loss")
    found = sorted((point.step, point.timestamp, point.value) for point in history)
    assert found == [(step, 1000 + step, step / 7) for step in STEPS]
    assert (run.info.status, run.data.params) == ("FINISHED", {"seed": "0"})


@pytest.mark.parametrize("chance", [0.0, 0.4])
def test_what_is_added_to_a_delivered_run_arrives_and_leaves_it_ended(
    tmp_path: Path, memory: type[Memory], monkeypatch: pytest.MonkeyPatch, chance: float
) -> None:
    """By whoever delivers it later, whatever answers are lost; until then it counts as not delivered."""
    journal = journal_in(tmp_path)
    delivered_whole(journal.path)
    monkeypatch.setattr(memory, "chance", chance)
    assert add_to_ended(journal.path, [[step, 1000 + step, {"gap": 0.5}] for step in STEPS], {"a": "b"})
    assert not Delivered.of(journal.path).settled
    assert journal.path.with_suffix(".lock").exists()
    for _ in range(100):
        delivered_whole(journal.path)
    assert Delivered.of(journal.path).settled
    (run,) = memory.runs.values()
    assert {point for point in run["points"] if point[0] == "gap"} == {
        ("gap", 0.5, 1000 + step, step) for step in STEPS
    }
    assert run["status"] == "FINISHED"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["journal.delivery.json", "journal.jsonl"]
    of = Delivery(journal.path, Stores())
    assert of.end_if_dead()
    of.close()


def test_what_is_added_while_its_deliverer_closes_keeps_the_mark_of_what_is_left(
    tmp_path: Path, memory: type[Memory]
) -> None:
    """A later command finds by its lock file what a deliverer that dies has left."""
    journal = journal_in(tmp_path)
    of = Delivery(journal.path, Stores())
    while of.step():
        pass
    assert add_to_ended(journal.path, [[1, 5, {"gap": 0.5}]], {})
    of.close()
    assert journal.path.with_suffix(".lock").exists()


def test_a_record_that_the_store_refuses_does_not_hold_the_others_up(
    tmp_path: Path, memory: type[Memory], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is said, once however many there are."""

    def refuse(self: Memory, run_id: str, tags: dict[str, str]) -> None:
        raise RecordRefusedError("no such tag")

    monkeypatch.setattr(memory, "log_tags", refuse, raising=False)
    journal = journal_in(tmp_path, ends=False)
    for _ in range(3):
        journal.append("tags", tags={"cause": "x"})
    journal.end("FINISHED")
    of = Delivery(journal.path, Stores())
    while of.step():
        pass
    of.close()
    assert of.notes == ["N=2: no such tag"]
    assert of.delivered.settled
    assert Delivered.of(journal.path).refused


def test_a_damaged_record_is_said_and_the_rest_delivered(tmp_path: Path, memory: type[Memory]) -> None:
    """No number of it is delivered."""
    journal = journal_in(tmp_path)
    text = bytearray(journal.path.read_bytes())
    lines = bytes(text).split(b"\n")
    text[sum(len(line) + 1 for line in lines[:3]) + 40] ^= 1
    journal.path.write_bytes(text)
    of = Delivery(journal.path, Stores())
    while of.step():
        pass
    of.close()
    (run,) = memory.runs.values()
    assert {point[3] for point in run["points"]} == set(STEPS) - set(range(8, 15))
    assert len(of.notes) == 1
    assert "is damaged and left out" in of.notes[0]


def test_a_settled_journal_leaves_no_lock_and_a_dead_one_is_ended(
    tmp_path: Path, memory: type[Memory]
) -> None:
    """What has a lock file is not settled yet."""
    journal = journal_in(tmp_path, ends=False)
    journal.close()
    of = Delivery(journal.path, Stores())
    while of.step():
        pass
    assert of.caught_up
    assert of.end_if_dead()
    assert of.step()
    of.close()
    assert next(iter(memory.runs.values()))["status"] == "KILLED"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["journal.delivery.json", "journal.jsonl"]


def test_a_store_that_cannot_be_used_is_not_tried_again(
    tmp_path: Path, memory: type[Memory], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its reason stands beside the journal."""

    def refuse(self: Memory, uri: str, experiment_name: str) -> None:
        raise BadInputError("mend it")

    monkeypatch.setattr(memory, "__init__", refuse)
    of = Delivery(journal_in(tmp_path).path, Stores())
    of.step()
    assert not of.step()
    of.close()
    assert (of.delivered.state, of.delivered.reason) == ("refused", "mend it")


def test_deliver_brings_what_was_carried_over_to_another_store(
    program: Program, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A run of another host that has ended; twice makes it no second one; nothing is left to do then."""
    journal = journal_in(tmp_path / "carried" / "run")
    for _ in range(2):
        assert deliver.main([str(tmp_path / "carried"), "--uri", program.uri]) == 0
    assert "N=2: delivered" in capfd.readouterr().out
    (run,) = program.store().sweep("a")
    assert (run.status, run.curves["train/loss"].values) == ("FINISHED", tuple(s / 7 for s in STEPS))
    assert Delivered.of(journal.path).settled


def test_deliver_says_and_waits_once_for_a_store_that_is_away(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many runs go there; each is named as left."""
    monkeypatch.setattr(delivery, "PATIENCE_S", 0.0)
    monkeypatch.setattr(deliver, "PATIENCE_S", 1.0)
    for number in range(4):
        journal_in(tmp_path / str(number), range(1, 3))
    start = time.monotonic()
    assert deliver.main([str(tmp_path), "--uri", "http://127.0.0.1:9"]) == 1
    assert time.monotonic() - start < 4.0
    said = capsys.readouterr()
    assert said.err.count("no tracking server answers there") == len(said.err.splitlines()) == 1
    assert said.out.count("N=2: left\n") == 4


def test_deliver_names_what_it_cannot_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder that is not there, one without journals."""
    assert deliver.main([str(tmp_path / "none")]) == 2
    assert deliver.main([str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert "no such folder" in said
    assert "no journal there" in said


def test_deliver_leaves_what_lives_here_or_elsewhere(
    tmp_path: Path,
    memory: type[Memory],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A run that is being trained, and one of another host unless its end is asked for."""
    living = journal_in(tmp_path / "here", ends=False)
    with monkeypatch.context() as patch:
        patch.setattr("platform.node", lambda: "elsewhere")
        patch.setattr("gaccum_exp.tracking.journal._boot", lambda: "another")
        journal_in(tmp_path / "there", ends=False).close()
    assert deliver.main([str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "it is being trained" in said
    assert "it is of elsewhere" in said
    assert all("status" not in run for run in memory.runs.values())
    assert deliver.main([str(tmp_path), "--end-stale"]) == 0
    assert [run.get("status") for run in memory.runs.values()] == [None, "KILLED"]
    living.close()


def test_a_run_that_its_store_has_lost_is_written_there_anew(
    tmp_path: Path, memory: type[Memory], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of it, from the journal; where it is lost again and again, nothing is skipped."""
    journal = journal_in(tmp_path, ends=False)
    delivered_whole(journal.path)
    memory.runs.clear()

    def log_points(self: Memory, run_id: str, points: list[Any]) -> None:
        if run_id not in self.runs:
            raise RunGoneError(f"Run with id={run_id} not found")
        self.runs[run_id]["points"] |= set(points)

    monkeypatch.setattr(memory, "log_points", log_points)
    journal.append("points", points=[[100, 1, {"train/loss": 0.5}]])
    journal.end("FINISHED")
    delivered_whole(journal.path)
    (run,) = memory.runs.values()
    assert {step for _, _, _, step in run["points"]} == {*STEPS, 100}
    assert run["status"] == "FINISHED"
    again = journal_in(tmp_path / "again")
    monkeypatch.setattr(memory, "log_points", lambda *given: (_ for _ in ()).throw(RunGoneError("gone")))
    of = Delivery(again.path, Stores())
    while of.step():
        pass
    assert (of.delivered.state, of.delivered.settled) == ("refused", False)
    of.close()


def test_what_a_store_refuses_to_begin_is_kept(
    tmp_path: Path, memory: type[Memory], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a run no record has a place; once it can be created, everything is delivered."""
    journal = journal_in(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(
            memory, "create_run", lambda *a, **k: (_ for _ in ()).throw(RecordRefusedError("no"))
        )
        delivered_whole(journal.path)
    assert not Delivered.of(journal.path).settled
    delivered_whole(journal.path)
    (run,) = memory.runs.values()
    assert len(run["points"]) == len(STEPS)


def test_what_is_refused_is_no_success(
    tmp_path: Path, memory: type[Memory], capsys: pytest.CaptureFixture[str]
) -> None:
    """A record of a later version, and a file that lies outside the run's folder; all else arrives."""
    (tmp_path / "key").write_text("secret")
    journal = journal_in(tmp_path / "run", ends=False)
    journal.append("file", path="../key", name="innocent.txt")
    journal.append("of tomorrow", x=1)
    journal.end("FINISHED")
    assert deliver.main([str(tmp_path / "run")]) == 1
    said = capsys.readouterr()
    assert "it lies elsewhere" in said.err
    assert "of tomorrow: a record of a later version" in said.err
    assert "delivered" in said.out
    (run,) = memory.runs.values()
    assert len(run["points"]) == len(STEPS)


def test_one_odd_journal_holds_up_no_other(
    tmp_path: Path, memory: type[Memory], capsys: pytest.CaptureFixture[str]
) -> None:
    """Lines that no program of ours has written, a folder of that name, a file of another's."""
    for name, line in {
        "a": b"00000000 \n",
        "b": encoded({"kind": "store", "uri": "x"}),
        "c": b"%08x [1]\n" % zlib.crc32(b"[1]"),
        "d": encoded({"kind": "begin"}),
    }.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "journal.jsonl").write_bytes(line)
    (tmp_path / "e" / "journal.jsonl").mkdir(parents=True)
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / "journal-of-mine.jsonl").write_text("mine")
    journal_in(tmp_path / "z")
    assert deliver.main([str(tmp_path), "--end-stale"]) == 1
    assert len(memory.runs) == 1
    assert (tmp_path / "f" / "journal-of-mine.jsonl").read_text() == "mine"
    assert (tmp_path / "a" / "journal.jsonl").read_bytes() == b"00000000 \n"
    assert "Traceback" not in capsys.readouterr().err


def test_folders_with_the_same_relative_address_have_stores_of_their_own(
    tmp_path: Path, empty_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each run lands in the database of the folder from which its command was given."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mlflow.db").write_bytes(empty_store.read_bytes())
        with monkeypatch.context() as patch:
            patch.chdir(tmp_path / name)
            journal = Journal.create(tmp_path / name / "run", "sqlite:///mlflow.db", "gaccum_exp")
            journal.begin(name, params={}, tags={}, texts={})
            journal.end("FINISHED")
    monkeypatch.chdir(tmp_path)
    assert deliver.main(["a", "b"]) == 0
    for name in ("a", "b"):
        with closing(sqlite3.connect(tmp_path / name / "mlflow.db")) as database:
            assert database.execute("SELECT name, status FROM runs").fetchall() == [(name, "FINISHED")]


def test_two_copies_of_a_journal_delete_nothing_of_each_other(tmp_path: Path, empty_store: Path) -> None:
    """Only what a request has created whose answer was lost, which nothing was written to."""
    (tmp_path / "mlflow.db").write_bytes(empty_store.read_bytes())
    store = Store(f"sqlite:///{tmp_path / 'mlflow.db'}", "gaccum_exp")
    ours, theirs, lost = (
        store.create_run("token", "N=2", tags={}, start_time_ms=1, again=False) for _ in range(3)
    )
    for run_id in (ours, theirs):
        store.log_params(run_id, {"seed": 0})
    store.one_run("token", ours)
    assert {run.info.run_id for run in store._runs_of("token")} == {ours, theirs}
    assert lost not in (ours, theirs)
