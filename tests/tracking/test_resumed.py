"""A run that goes on: its journal is understood by all who read it, and what comes again is compared."""

import json
import math
import os
import platform
from pathlib import Path

import pytest
from mlflow import MlflowClient

from gaccum_exp.errors import TrackingError
from gaccum_exp.tracking import delivery as deliveries
from gaccum_exp.tracking.delivered import Delivered
from gaccum_exp.tracking.delivery import Delivery, Stores
from gaccum_exp.tracking.journal import (
    Journal,
    end_if_dead,
    has_end,
    last_owner,
    read_journal,
    unsettled_below,
    whole_size,
)
from gaccum_exp.tracking.locks import FileLock
from gaccum_exp.tracking.read_back import Journals
from gaccum_exp.tracking.resumed import ROUNDING, TELLING, Recorded, ResumedSink, UnequalError
from gaccum_exp.tracking.sink import Point

SWEEP = "resumed"
"""No test that shares the store has runs of it."""
CURVE = {step: 1 / step for step in range(1, 6)}


def interrupted(folder: Path, uri: str = "sqlite:///mlflow.db") -> Path:
    """Write the journal of a run that was killed after five steps; return its path."""
    journal = Journal.create(folder, uri, "gaccum_exp")
    journal.begin("N=2", params={"seed": 0}, tags={"sweep_id": SWEEP}, texts={})
    journal.append("points", points=[(k, 7, {"train/loss": v, "time/x": 2.0}) for k, v in CURVE.items()])
    journal.end("KILLED", "interrupted (SIGTERM)")
    return journal.path


def gone_on(path: Path) -> Journal:
    """Go on with the run of a journal."""
    lock = FileLock.take(path.with_suffix(".lock"))
    assert lock is not None
    return Journal.going_on(path, lock)


def delivered(path: Path) -> Delivered:
    """Deliver all that there is of a journal, as another process would."""
    delivery = Delivery(path, Stores())
    while delivery.step():
        pass
    delivery.close()
    return Delivered.of(path)


def test_a_run_that_goes_on_has_no_end_until_it_ends_anew(tmp_path: Path) -> None:
    """It is RUNNING without a failure, and alive while its process holds the lock."""
    path = interrupted(tmp_path)
    assert has_end(path)
    journal = gone_on(path)
    assert not has_end(path)
    (run,) = Journals(tmp_path).sweep(SWEEP, ["train/loss"])
    assert (run.status, run.tags.get("failure")) == ("RUNNING", None)
    assert FileLock.take(path.with_suffix(".lock")) is None
    assert not end_if_dead(path, "KILLED", "gone")
    journal.end("FINISHED")
    (run,) = Journals(tmp_path).sweep(SWEEP, ["train/loss"])
    assert (run.status, run.curves["train/loss"].values) == ("FINISHED", tuple(CURVE.values()))


def test_a_record_that_was_torn_is_dropped(tmp_path: Path) -> None:
    """What follows it is read, and nothing is said of a line that was never recorded."""
    path = interrupted(tmp_path)
    path.write_bytes(path.read_bytes()[:-5])
    gone_on(path).end("FINISHED")
    records, notes = read_journal(path)
    assert [record["kind"] for record in records[-3:]] == ["points", "resume", "end"]
    assert notes == []


def test_a_run_belongs_to_the_host_that_has_gone_on_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who has begun it cannot end it any more, whatever stands in the names of what is recorded."""
    path = interrupted(tmp_path)
    here = platform.node()
    assert last_owner(path)["host"] == here
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(platform, "node", lambda: "elsewhere")
        elsewhere.setattr("gaccum_exp.tracking.journal._boot", lambda: "another")
        journal = gone_on(path)
    journal.append("tags", tags={"x": ' {"kind":"resume","host":"nowhere"}'})
    journal.close()
    assert last_owner(path)["host"] == "elsewhere"
    assert not end_if_dead(path, "KILLED", "gone")
    gone_on(path).close()
    assert last_owner(path)["host"] == here
    assert end_if_dead(path, "KILLED", "gone")


def test_it_is_the_same_run_in_the_store_and_its_points_are_there_once(
    tmp_path: Path, uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """RUNNING again and without a failure, then ended anew; delivered piece by piece, or at once."""
    monkeypatch.chdir(tmp_path)
    client = MlflowClient(uri)
    for pieces in (True, False):
        monkeypatch.setattr(deliveries, "CHUNK", 1 << 18 if pieces else 64)  # so a record at a time
        path = interrupted(tmp_path / str(pieces), uri)
        if pieces:
            assert delivered(path).settled
            assert client.get_run(str(Delivered.of(path).run_id)).data.tags["failure"]
        journal = gone_on(path)
        assert not Delivered.of(path).settled
        assert list(unsettled_below(path.parent)) == [path]
        journal.append("points", points=[(6, 9, {"train/loss": 1 / 6})])
        if pieces:
            run = client.get_run(str(delivered(path).run_id))
            assert (run.info.status, run.data.tags.get("failure")) == ("RUNNING", None)
        journal.end("FINISHED")
        assert delivered(path).settled
        assert list(unsettled_below(path.parent)) == []
        run_id = str(Delivered.of(path).run_id)
        assert client.get_run(run_id).info.status == "FINISHED"
        points = client.get_metric_history(run_id, "train/loss")
        assert sorted((p.step, p.value) for p in points) == [*CURVE.items(), (6, 1 / 6)]


def test_an_end_that_is_delivered_while_the_run_goes_on_takes_no_lock_away(
    tmp_path: Path, home: Path
) -> None:
    """Whoever delivers the end of a run may do so when another process has gone on with it already."""
    path = interrupted(tmp_path, f"sqlite:///{home / 'mlflow.db'}")
    delivery = Delivery(path, Stores())
    while delivery.step():
        pass
    assert delivery.delivered.settled
    lock = FileLock.take(path.with_suffix(".lock"))
    assert lock is not None
    delivery.close()
    assert FileLock.take(path.with_suffix(".lock")) is None
    assert path.with_suffix(".lock").exists()
    journal = Journal.going_on(path, lock)
    assert not delivered(path).settled
    journal.end("FINISHED")
    assert delivered(path).settled
    assert not path.with_suffix(".lock").exists()


def test_a_torn_word_after_the_end_is_no_run_that_goes_on(tmp_path: Path, home: Path) -> None:
    """A process that died before it could say that it goes on leaves the run as it was."""
    path = interrupted(tmp_path, f"sqlite:///{home / 'mlflow.db'}")
    assert delivered(path).settled
    with path.open("ab") as file:
        file.write(b'0123abcd {"kind":"resu')
    assert Delivered.of(path).settled
    assert has_end(path)


def test_a_store_that_was_refused_is_tried_again(tmp_path: Path, home: Path) -> None:
    """Somebody may have mended what was wrong since."""
    path = interrupted(tmp_path, "nonsense://")
    assert delivered(path).state == "refused"
    known = Delivered.of(path)
    known.uri = f"sqlite:///{home / 'mlflow.db'}"
    text = path.read_text().splitlines(keepends=True)
    other = Journal.create(tmp_path / "other", known.uri, "gaccum_exp")
    other.close()
    path.write_text(other.path.read_text() + "".join(text[1:]))
    known.write(path)
    assert delivered(path).settled


def test_a_lock_whose_file_was_removed_is_not_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who was waiting for it gets that of the file that is there."""
    path = tmp_path / "a.lock"
    opened, removed = os.open, []

    def open_then_remove(name: Path, *given: int) -> int:
        descriptor = opened(name, *given)
        if name == path and not removed:
            removed.append(os.unlink(name))
        return descriptor

    for make in (FileLock.take, FileLock.create):
        removed.clear()
        path.unlink(missing_ok=True)
        monkeypatch.setattr(os, "open", open_then_remove)
        lock = make(path)
        monkeypatch.setattr(os, "open", opened)
        assert lock is not None
        assert path.exists()
        assert FileLock.take(path) is None
        lock.release()


def sink_from(path: Path, since: int) -> ResumedSink:
    """Go on with the run of a journal from a step."""
    recorded = Recorded(path)
    return ResumedSink(gone_on(path), recorded, since)


def points_after(path: Path) -> list[tuple[int, dict[str, float]]]:
    """Return what was recorded once the run went on."""
    records, _ = read_journal(path)
    resumed = max(i for i, record in enumerate(records) if record["kind"] == "resume")
    points = [p for r in records[resumed:] if r["kind"] == "points" for p in r["points"]]
    return [(step, values) for step, _, values in points]


def test_what_comes_again_is_compared_and_not_recorded_again(tmp_path: Path) -> None:
    """Times are neither; what is new of a step that was known is recorded."""
    path = interrupted(tmp_path)
    sink = sink_from(path, 2)
    assert sink.last == {"train/loss": 1 / 5, "time/x": 2.0}
    assert sink.has(3, "train/loss")
    assert not sink.has(3, "eval/loss")
    for step in range(3, 8):
        sink.record(step, {"train/loss": 1 / step, "time/x": 9.0, "eval/loss": 0.5})
    sink.close("FINISHED")
    assert points_after(path) == [
        *((step, {"eval/loss": 0.5}) for step in range(3, 6)),
        *((step, {"train/loss": 1 / step, "time/x": 9.0, "eval/loss": 0.5}) for step in (6, 7)),
    ]
    assert (sorted(sink.compared), sink.how_equal) == ([3, 4, 5], "bit for bit")


def test_a_window_in_which_nothing_counted_is_over_too(tmp_path: Path) -> None:
    """It has no values, and is written where it was not: a checkpoint after it counts."""
    path = interrupted(tmp_path)
    recorded = Recorded(path)
    sink = ResumedSink(gone_on(path), recorded, 3)
    sink.send([Point(4, 7, {}), Point(6, 7, {}), Point(7, 7, {})])
    sink.close("KILLED")
    assert Recorded(path).last_step == 7
    points = [p for r in read_journal(path)[0] if r["kind"] == "points" for p in r["points"]]
    assert [p[0] for p in points if not p[2]] == [6, 7]


def test_another_bit_ends_the_run_with_the_step(tmp_path: Path) -> None:
    """Said once; the curve up to it is kept, and nothing after it."""
    path = interrupted(tmp_path)
    sink = sink_from(path, 2)
    sink.record(3, {"train/loss": 1 / 3, "eval/loss": 0.5})
    sink.record(4, {"train/loss": math.nextafter(1 / 4, 1), "eval/loss": 0.5})
    sink.record(6, {"train/loss": 1 / 6})
    with pytest.raises(UnequalError, match=r"step 4: train/loss is 0\.2500\d+, and was 0\.25 before"):
        sink.flush()
    sink.record(7, {"train/loss": 1 / 7})
    sink.close("FAILED", "unequal")
    assert points_after(path) == [(3, {"eval/loss": 0.5})]


def test_what_was_not_finite_is_compared_too(tmp_path: Path) -> None:
    """NaN is what NaN was, and infinity no number."""
    journal = Journal.create(tmp_path, "sqlite:///mlflow.db", "gaccum_exp")
    values = {"optim/grad_norm": math.nan, "optim/loss_scale": math.inf}
    journal.append("points", points=[(1, 7, values)])
    journal.close()
    sink = sink_from(journal.path, 0)
    sink.record(1, values)
    sink.flush()
    assert sink.compared == {1}
    sink.record(1, {"optim/loss_scale": 65536.0})
    with pytest.raises(UnequalError, match=r"optim/loss_scale is 65536\.0, and was inf"):
        sink.flush()


@pytest.mark.parametrize("precision", ROUNDING)
def test_another_order_of_the_sums_is_allowed_its_rounding(tmp_path: Path, precision: str) -> None:
    """Twice as much with every step, of the largest value; no accuracy is compared, as one sample moves
    it."""
    path = interrupted(tmp_path)
    allowed = ROUNDING[precision] * CURVE[1]
    sink = sink_from(path, 2)
    sink.expect_rounding(precision)
    for step in (3, 4, 5):
        grown = allowed * 2 ** (step - 3)
        within = 0.9 * grown if grown <= TELLING else 1.0
        sink.record(step, {"train/loss": CURVE[step] + within, "eval/accuracy": 0.1})
    sink.flush()
    sink.record(3, {"train/loss": CURVE[3] + 1.1 * allowed})
    with pytest.raises(UnequalError, match="step 3"):
        sink.flush()
    assert sink.how_equal == "to rounding"


def test_where_nothing_can_be_compared_any_more_a_run_goes_on(tmp_path: Path) -> None:
    """However many steps after its checkpoint."""
    sink = ResumedSink(gone_on(interrupted(tmp_path)), Recorded(tmp_path / "journal.jsonl"), 0)
    sink.expect_rounding("fp32")
    sink.send([Point(10**6, 7, {"train/loss": 1.0})])
    sink.close("FINISHED")
    assert Recorded(tmp_path / "journal.jsonl").last_step == 10**6


def test_all_values_of_a_tag_are_seen(tmp_path: Path) -> None:
    """By them it is known whether every process of the run has computed alike."""
    path = interrupted(tmp_path)
    journal = gone_on(path)
    journal.append("tags", tags={"sweep_id": "b"})
    journal.close()
    recorded = Recorded(path)
    assert recorded.seen["sweep_id"] == {SWEEP, "b"}
    assert recorded.tags["sweep_id"] == "b"
    assert recorded.last_step == 5


def test_a_journal_that_is_being_delivered_can_go_on(tmp_path: Path, home: Path) -> None:
    """The process that delivers reads on, and keeps others from doing the same."""
    path = interrupted(tmp_path, f"sqlite:///{home / 'mlflow.db'}")
    delivery = Delivery(path, Stores())
    while delivery.step():
        pass
    assert delivery.has_end
    journal = gone_on(path)
    with pytest.raises(TrackingError, match="another process"):
        Delivery(path, Stores())
    delivery.delivered = Delivered.of(path)
    assert delivery.step()
    assert not delivery.has_end
    journal.end("FINISHED")
    assert delivery.step()
    assert delivery.delivered.settled
    assert delivery.left_bytes == 0
    assert json.loads(path.with_suffix(".delivery.json").read_text())["offset"] == whole_size(path)
    delivery.close()
