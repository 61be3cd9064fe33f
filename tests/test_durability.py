"""What is recorded outlives whatever dies: the study of that in short, and its own checks.

The long version is `experiments/durability/build.py`; moments are random, their seeds are not.
"""

import http.client
import random
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag

from experiments.durability import disk, kills, long_run, misbehaviour, network, torn, tries, writers
from experiments.durability.ledger import FILES, STEP, Noted, Stored, compare, noted, stored
from experiments.durability.proxy import Proxy, proxied
from experiments.durability.tries import Options, Result
from gaccum_exp.tracking.metrics import TRAIN_LOSS
from tests.shortened import shortened

SWEEP, ARM = "20250101-000000-abcdef", "1-0"
STEPS = 5
STARTED_S = 1_750_000_000.0


def trained(steps: int = STEPS) -> list[Noted]:
    """Return what a witness would have noted, a step a second."""
    return [
        Noted("step", SWEEP, ARM, 1, k, STARTED_S + k, (1 / k, 0.01 / k, 3.0 / k))
        for k in range(1, steps + 1)
    ]


def kept(lines: list[Noted]) -> Stored:
    """Return the run that records all of it."""
    points = {
        (name, line.global_step): [(value, int(1e3 * line.time_s) + 1)]
        for line in lines
        for name, value in line.points.items()
    }
    return Stored("a", "N=1", "FINISHED", SWEEP, ARM, points)


def without(run: Stored, name: str, step: int) -> Stored:
    return replace(run, points={k: v for k, v in run.points.items() if k != (name, step)})


def with_point(run: Stored, name: str, step: int, *values: tuple[float, int]) -> Stored:
    return replace(run, points=run.points | {(name, step): list(values)})


def test_a_store_that_has_everything_once_is_sound() -> None:
    """The check accuses nobody; of a run that was cut short only what may be lost is not there."""
    lines = trained()
    assert compare(lines, [kept(lines)]).sound
    cut = compare(lines, [kept(lines[:3])], until_s=STARTED_S + 3.5)
    assert (cut.sound, cut.points, cut.younger) == (True, 9, 6)


@pytest.mark.parametrize(
    ("fault", "doctor"),
    [
        ("lost", lambda run, at: [without(run, TRAIN_LOSS, 3)]),
        ("lost", lambda run, at: []),
        ("doubled", lambda run, at: [with_point(run, TRAIN_LOSS, 3, (1 / 3, at), (1 / 3, at + 1))]),
        ("wrong", lambda run, at: [with_point(run, TRAIN_LOSS, 3, (0.1 + 0.2, at))]),
        ("wrong", lambda run, at: [with_point(run, TRAIN_LOSS, STEPS + 1, (0.1, at))]),
        ("untimely", lambda run, at: [with_point(run, TRAIN_LOSS, 3, (1 / 3, at + 1500))]),
        ("lost", lambda run, at: [replace(run, files=frozenset({"config.yaml"}))]),
        ("running", lambda run, at: [replace(run, status="RUNNING")]),
        ("runs_doubled", lambda run, at: [run, replace(run, run_id="b", points={})]),
        ("wrong", lambda run, at: [run, replace(run, run_id="b", arm="2-0")]),
    ],
)
def test_whatever_is_wrong_with_a_store_is_noticed(fault: str, doctor) -> None:  # type: ignore[no-untyped-def]
    """A point missing, twice, another by a bit, never trained, late; a run alive for ever, or twice."""
    lines = trained()
    found = compare(lines, doctor(kept(lines), int(1e3 * (STARTED_S + 3)) + 1))
    assert not found.sound
    assert getattr(found, fault) >= 1
    assert fault in found.examples[0]


def test_the_ledger_reads_what_mlflow_holds_and_what_the_witness_wrote(
    tmp_path: Path, empty_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A point sent twice is one, with another timestamp it is two; a torn line was never written."""
    monkeypatch.chdir(tmp_path)  # where the store keeps files
    (tmp_path / "truth").write_text(
        f"step {SWEEP} {ARM} 7 1 {STARTED_S + 1:.6f} {' '.join(v.hex() for v in (0.1, 0.2, 0.3))}\n"
        f"step {SWEEP} {ARM} 7 2 175"
    )
    lines = noted(tmp_path / "truth")
    assert [(line.global_step, line.values) for line in lines] == [(1, (0.1, 0.2, 0.3))]
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    (tmp_path / "mlflow.db").write_bytes(empty_store.read_bytes())
    client = MlflowClient(uri)
    run_id = client.create_run("0", tags={"sweep_id": SWEEP}).info.run_id
    at = int(1e3 * (STARTED_S + 1)) + 1
    points = [Metric(name, v, at, 1) for name, v in zip(STEP, (0.1, 0.2, 0.3), strict=True)]
    arm, tag = Param("optimizer.arm", ARM), RunTag("a", "b")
    for _ in range(2):
        client.log_batch(run_id, metrics=points, params=[arm], tags=[tag])
    assert str(compare(lines, stored(uri))) == "points 3, running 1, statuses RUNNING×1"
    client.set_terminated(run_id)
    assert compare(lines, stored(uri)).lost == 1
    for name in FILES:
        client.log_text(run_id, "", name)
    assert compare(lines, stored(uri)).sound
    client.log_metric(run_id, STEP[1], 0.2, at + 1, 1)
    assert compare(lines, stored(uri)).doubled == 1


class Counting(BaseHTTPRequestHandler):
    """Answers with a hundred bytes, and counts."""

    asked = 0

    def do_GET(self) -> None:
        Counting.asked += 1
        self.send_response_only(200)
        self.send_header("Content-Length", "100")
        self.end_headers()
        self.wfile.write(bytes(100))


@contextmanager
def before_a_server(**faults: float) -> Iterator[Proxy]:
    Counting.asked = 0
    server = ThreadingHTTPServer(("127.0.0.1", 0), Counting)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        with proxied(server.server_port, random.Random(0), faults) as proxy:
            yield proxy
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def fetched(proxy: Proxy) -> tuple[int, int]:
    connection = http.client.HTTPConnection("127.0.0.1", proxy.server_port, timeout=30)
    try:
        connection.request("GET", "/")
        answer = connection.getresponse()
        return answer.status, len(answer.read())
    finally:
        connection.close()


@pytest.mark.parametrize(
    ("fault", "got", "reaches"),
    [
        ("pass", (200, 100), True), ("delay", (200, 100), True),
        ("drop before", http.client.RemoteDisconnected, False),
        ("drop after", http.client.RemoteDisconnected, True), ("cut", http.client.IncompleteRead, True),
        ("429", (429, 2), False), ("500", (500, 2), False), ("503", (503, 2), False),
        ("500 after", (500, 2), True),
    ],
)  # fmt: skip
def test_the_proxy_is_the_bad_network_that_it_says(fault: str, got: object, reaches: bool) -> None:
    """Whether the client hears of it, and whether the server does."""
    with before_a_server(**{fault: 1.0}) as proxy:
        if isinstance(got, type):
            with pytest.raises(got):
                fetched(proxy)
        else:
            assert fetched(proxy) == got
        assert proxy.done == {fault: 1}
    assert Counting.asked == int(reaches)


def test_a_line_through_samples_says_how_far_they_rise() -> None:
    """Flat, with its error; and a leak of a tenth is one."""
    at = [float(s) for s in range(20)]
    flat = long_run.slope(at, [1000.0 + (-1) ** s for s in range(20)])
    assert abs(flat.rise) < 0.002
    assert flat.error > 0
    leak = long_run.slope(at, [1000.0 + 5 * s for s in range(20)])
    assert leak.per_s == pytest.approx(5)
    assert leak.rise > long_run.FLAT


def test_damage_that_is_not_said_and_records_that_never_were_are_noticed(tmp_path: Path) -> None:
    """The judge of damaged journals can accuse."""
    from gaccum_exp.tracking.journal import encoded

    path = tmp_path / "journal.jsonl"
    records = [{"kind": "points", "points": [[k, k, {"a": 0.5}]]} for k in range(3)]
    path.write_bytes(b"".join(map(encoded, records)))
    trial = torn.Trial(None, path)  # type: ignore[arg-type]  # it makes no folders here
    trial.judge("whole", path.read_bytes(), records, said=False)
    trial.judge(
        "cut between two", path.read_bytes()[: len(encoded(records[0]))], records[:1], said=False
    )
    trial.judge("said", path.read_bytes()[:-1] + b"?", records[:2], said=True)
    assert (trial.wrong, trial.unsaid) == (0, 0)
    trial.judge("unsaid", path.read_bytes()[:-1] + b"?", records[:2], said=False)
    trial.judge("other", path.read_bytes(), [*records[:2], {"kind": "points", "points": []}], said=True)
    assert (trial.wrong, trial.unsaid) == (1, 1)


@pytest.fixture
def short(tmp_path: Path, empty_store: Path, monkeypatch: pytest.MonkeyPatch) -> Options:
    """One try, in this test's folder; how long commands take is not measured first."""
    shutil.copyfile(empty_store, tmp_path / "empty.db")
    monkeypatch.setattr(kills, "TOOK_S", {"single": 6.0, "sweep": 8.0})
    monkeypatch.setattr(tries, "SIDE_BY_SIDE", 1)
    return Options(tries=1, keep=tmp_path)


def require_sound(result: Result) -> None:
    assert result.sound, result.details


@pytest.mark.slow
@pytest.mark.parametrize(
    "part", shortened([kills.training, kills.helper, misbehaviour.models], [misbehaviour.models])
)
def test_what_dies_takes_nothing_with_it(part, short: Options) -> None:  # type: ignore[no-untyped-def]
    """kill -9 of a training, of a helper; a model that ends its process: all is stored, none RUNNING."""
    require_sound(part(short))


@pytest.mark.slow
def test_a_bad_network_loses_and_doubles_nothing(
    short: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sweep through the proxy, which spoils four requests of ten."""
    monkeypatch.setattr(network, "SEEDS", (0,))
    require_sound(network.network(replace(short, windows=20)))


@pytest.mark.slow
def test_a_full_disk_loses_nothing_that_was_acknowledged(short: Options) -> None:
    """The run's folder is full from some moment on."""
    result = disk.disk(short)
    if result.tried.startswith("skipped"):
        pytest.skip(result.tried)
    require_sound(result)


@pytest.mark.slow
def test_no_damage_of_a_journal_becomes_a_point(short: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torn at every byte, and some bits flipped; what is dropped is said."""
    monkeypatch.setattr(torn, "DELIVERED", 2)
    require_sound(torn.torn(replace(short, tries=80, windows=200)))


@pytest.mark.slow
def test_writers_side_by_side_make_a_store_and_fill_it(short: Options, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    """Two commands at once where there is no store yet."""
    monkeypatch.setattr(writers, "WRITERS", 2)
    monkeypatch.setattr(writers, "no_postgresql", lambda: "it takes a quarter of a minute to start")
    require_sound(writers.writers(replace(short, tries=600)))


@pytest.mark.slow
def test_a_long_run_is_watched_to_its_end(short: Options, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    """Memory is sampled, silences are measured, every point is found."""
    monkeypatch.setattr(long_run, "EVERY_S", 0.2)
    monkeypatch.setattr(long_run, "FLAT", 10.0)  # the first seconds of a process are no measure
    result = long_run.windows(replace(short, windows=2000))
    require_sound(result)
    assert "| training |" in result.details
