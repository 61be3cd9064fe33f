"""Every kind of store: what may be repeated, what is refused, what is away, what a user must mend."""

import base64
import errno
import json
import math
import os
import re
import socket
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from mlflow import MlflowClient

from experiments.postgresql import PostgresServer, postgres_server, why_not
from gaccum_exp.errors import BadInputError, RecordRefusedError, RunGoneError, StoreAwayError
from gaccum_exp.tracking import mlflow_store
from gaccum_exp.tracking.mlflow_store import Store
from gaccum_exp.tracking.records import DatasetRecord, RunRecord
from gaccum_exp.tracking.sink import kept_weights
from gaccum_exp.tracking.store_errors import says_away, says_refused
from tests.program import Program, environment

EXPERIMENT = "stores"
ODD = [0.5, math.nan, math.inf, -math.inf, 3e-320, 1e300, 2.0, math.nan]


def begun(store: Store, **tags: str) -> str:
    """Begin a run and return its id."""
    return store.create_run(uuid4().hex, "run", tags=tags, start_time_ms=1, again=False)


# --- What may be repeated -----------------------------------------------------------------------------


def test_whatever_is_written_may_be_written_again(uri: str, tmp_path: Path) -> None:
    """Parameters, tags, texts, files, data sets, points and the end: nothing is doubled or refused."""
    store, client = Store(uri, EXPERIMENT), MlflowClient(uri)
    run_id = begun(store)
    (tmp_path / "weights.pt").write_text("some")
    odd = [("train/loss", value, 1000 + step, step) for step, value in enumerate(ODD)]
    for _ in range(2):
        store.log_params(run_id, {f"key{i}": i for i in range(130)})
        store.log_texts(run_id, {"config.yaml": "a: 1"})
        store.log_points(run_id, odd + odd)
        store.log_points(run_id, [("eval/loss", k / 7, k, k) for k in range(1200)])
        store.log_tags(run_id, {"device": "cpu"})
        store.log_datasets(run_id, [DatasetRecord("digits", "abcd", 3, "training")])
        store.log_file(run_id, str(tmp_path / "weights.pt"), "weights.pt")
        store.log_file(run_id, str(tmp_path / "weights.pt"), "kept/last.pt")
        store.set_experiment_tags({"view": "arranged"})
        store.end_run(run_id, "FAILED", "a reason", 5000)
    run = client.get_run(run_id)
    assert (run.info.status, run.info.end_time) == ("FAILED", 5000)
    assert run.data.tags["failure"] == "a reason"
    assert len(run.data.params) == 130
    assert len(run.inputs.dataset_inputs) == 1
    assert [file.path for file in client.list_artifacts(run_id)] == ["config.yaml", "kept", "weights.pt"]
    assert [file.path for file in client.list_artifacts(run_id, "kept")] == ["kept/last.pt"]
    assert len(client.get_metric_history(run_id, "eval/loss")) == 1200
    history = sorted(client.get_metric_history(run_id, "train/loss"), key=lambda metric: metric.step)
    largest = 1.7976931348623157e308  # what MLflow makes of infinity
    assert repr([metric.value for metric in history]) == repr(
        [0.5, math.nan, largest, -largest, 3e-320, 1e300, 2.0, math.nan]
    )


def test_a_run_is_created_once_whatever_became_of_the_answer(uri: str) -> None:
    """Found by its token when it is asked for again; runs of lost answers are deleted."""
    store, token = Store(uri, EXPERIMENT), uuid4().hex
    first = store.create_run(token, "run", tags={"sweep_id": token}, start_time_ms=5, again=False)
    assert store.create_run(token, "run", tags={}, start_time_ms=9, again=True) == first
    double = store.create_run(token, "run", tags={"sweep_id": token}, start_time_ms=5, again=False)
    assert double != first
    for _ in range(2):
        store.one_run(token, first)
    assert [run.run_id for run in store.sweep(token)] == [first]


def test_what_is_refused_takes_nothing_with_it(uri: str) -> None:
    """A metric, a parameter and a tag whose names MLflow does not take, among others; said by name."""
    store = Store(uri, EXPERIMENT)
    token = uuid4().hex
    run_id = begun(store, sweep_id=token)
    points = [("a", 1.0, 1, 1), ("b@d", 1.0, 1, 1), ("c", 1.0, 1, 1), ("w?", 1.0, 1, 1)]
    with pytest.raises(RecordRefusedError, match=r"^b@d, w\?: .*Names may only"):
        store.log_points(run_id, points)
    store.log_params(run_id, {"n": 1})
    with pytest.raises(RecordRefusedError, match=r"^n, m@n: "):
        store.log_params(run_id, {"n": 2, "m@n": 3, "o": 4})
    with pytest.raises(RecordRefusedError, match=r"^t@g: "):
        store.log_tags(run_id, {"t@g": "1", "fine": "2"})
    (run,) = store.sweep(token, ())
    assert run.metrics.keys() == {"a", "c"}
    assert run.params == {"n": "1", "o": "4"}
    assert run.tags["fine"] == "2"


@pytest.mark.parametrize("of", ["unknown", "deleted"])
def test_a_run_that_is_gone_is_told_from_one_that_is_deleted(uri: str, of: str) -> None:
    """The one may be written anew, the other be restored; neither is a record that is refused."""
    store = Store(uri, EXPERIMENT)
    run_id = begun(store) if of == "deleted" else "0" * 32
    if of == "deleted":
        MlflowClient(uri).delete_run(run_id)
    expected = {"deleted": BadInputError, "unknown": RunGoneError}[of]
    with pytest.raises(expected, match=r"restore it|not found"):
        store.log_points(run_id, [("a", 1.0, 1, 1), ("b", 1.0, 1, 1)])


def test_a_file_that_is_gone_is_refused(uri: str, tmp_path: Path) -> None:
    """There is nothing to be tried again."""
    store = Store(uri, EXPERIMENT)
    with pytest.raises(RecordRefusedError, match="no such file any more"):
        store.log_file(begun(store), str(tmp_path / "gone"), "gone")


def test_texts_are_cut_and_mended_so_that_every_store_takes_them(uri: str) -> None:
    """Long ones, zero characters, and what is no Unicode; many in one call."""
    store, token = Store(uri, EXPERIMENT), uuid4().hex
    run_id = store.create_run(
        token, "N=4 · " + "x" * 300, tags={"sweep_id": token, "odd": "a\0b\udc80"}, start_time_ms=1,
        again=False,
    )  # fmt: skip
    store.log_params(run_id, {"long": "ü" * 9000, "odd": "a\0b\udc80"})
    store.log_tags(run_id, {"long": "ü" * 9000, **{f"tag{i}": "" for i in range(150)}})
    store.log_texts(run_id, {"odd.txt": "ü\udc80"})
    store.end_run(run_id, "FAILED", "x" * 9000, 2)
    (run,) = store.sweep(token, ())
    assert (len(run.name), len(run.params["long"]), len(run.tags["long"])) == (250, 6000, 5000)
    assert run.params["odd"] == run.tags["odd"] == "a\ufffdb\\udc80"
    assert (len(run.tags["failure"]), run.tags["tag149"]) == (5000, "")


def test_how_a_sweep_ended_is_read_from_the_store_alone(uri: str) -> None:
    """Status, reason and verdict of each arm, without curves."""
    store, sweep_id = Store(uri, EXPERIMENT), uuid4().hex
    biased, failed = (begun(store, sweep_id=sweep_id) for _ in range(2))
    store.log_tags(biased, {"verdict": "biased"})
    store.end_run(biased, "FINISHED", None, 3)
    store.end_run(failed, "FAILED", "out of memory", 3)
    runs = {run.run_id: run for run in store.sweep(sweep_id, ())}
    assert (runs[biased].status, runs[biased].tags["verdict"]) == ("FINISHED", "biased")
    assert (runs[failed].status, runs[failed].tags["failure"]) == ("FAILED", "out of memory")


@pytest.mark.slow
@pytest.mark.parametrize(
    "kinds",
    [["served"], pytest.param(["postgres_uri", "served_postgres"], marks=pytest.mark.whole)],
)
def test_a_sweep_reads_back_from_every_store_as_from_a_file(
    program: Program, kinds: list[str], request: pytest.FixtureRequest
) -> None:
    """The same curves, parameters and weights."""

    def recorded(uri: str) -> list[RunRecord]:
        ended = program.tiny("-m", "accum.steps=1,2", "audit.at_start=false", f"tracking.uri={uri}")
        assert ended.status == 0, ended.err
        store = Store(uri, "gaccum_exp")
        runs = sorted(store.sweep(program.sweep_id), key=lambda run: run.name)
        assert all(kept_weights(store, run.run_id) for run in runs)
        return runs

    in_file = recorded(program.uri)
    for kind in kinds:
        for one, other in zip(in_file, recorded(request.getfixturevalue(kind)), strict=True):
            assert one.curves == other.curves
            assert (one.name, one.status) == (other.name, other.status)
            differing = {k for k in one.params if one.params[k] != other.params[k]}
            assert differing == {"tracking.uri", "sweep_id"}


# --- Who is quicker -----------------------------------------------------------------------------------


OPENING = """
import os, sys
from gaccum_exp.tracking.mlflow_store import Store
opening = []
for _ in range(int(sys.argv[2])):
    opening.append(os.fork())
    if not opening[-1]:
        store = Store(sys.argv[1], "stores")
        store.set_experiment_tags({f"view {k}": "arranged" for k in range(5)})
        os.write(1, f"{store.experiment_id}\\n".encode())
        os._exit(0)
for process in opening:
    os.waitpid(process, 0)
"""


def opened_at_once(uri: str, processes: int) -> list[str]:
    """Open a store, and tag its experiment, in so many processes at once; return its id in each."""
    command = [sys.executable, "-c", OPENING, uri, str(processes)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment())
    return done.stdout.splitlines()


def test_a_database_takes_the_place_of_no_device(tmp_path: Path) -> None:
    """What is there and is no file stays what it is: `sqlite:////dev/null` is refused."""
    place = tmp_path / "pipe"
    os.mkfifo(place)
    with pytest.raises(BadInputError, match="is no file"):
        Store(f"sqlite:///{place}", EXPERIMENT)
    assert place.is_fifo()


@pytest.mark.slow
def test_processes_that_start_together_make_one_database(tmp_path: Path) -> None:
    """Each of them opens it, and nothing else is left in the folder."""
    assert opened_at_once(f"sqlite:///{tmp_path / 'new' / 'mlflow.db'}", 3) == ["1"] * 3
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["mlflow.db"]


@pytest.mark.slow
def test_processes_that_start_together_make_the_tables_in_postgresql(postgres: PostgresServer) -> None:
    """Of those that do it at the same moment all but one fail, and ask again."""
    assert opened_at_once(postgres.create("at_once"), 2) == ["1"] * 2


def test_a_database_whose_making_was_killed_is_made_again(tmp_path: Path) -> None:
    """What the killed process left under another name is no database, and is not taken for one."""
    for name in (".mlflow.db.making", ".mlflow.db.new", ".mlflow.db.new-journal"):
        (tmp_path / name).write_bytes(b"half of it")
    (tmp_path / "mlflow.db").touch()
    assert Store(f"sqlite:///{tmp_path / 'mlflow.db'}", EXPERIMENT).experiment_id == "1"
    assert [path.name for path in tmp_path.iterdir()] == ["mlflow.db"]


def test_an_entry_that_another_process_makes_meanwhile_is_tried_again(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when two arms record the same data at once; and not for ever."""
    store, attempts = Store(f"sqlite:///{home / 'mlflow.db'}", EXPERIMENT), 0
    run_id, accept = begun(store), store._client.log_inputs
    monkeypatch.setattr(mlflow_store.time, "sleep", lambda _: None)

    def refuse(times: int) -> None:
        def log_inputs(*given: Any) -> None:
            nonlocal attempts
            attempts += 1
            if attempts <= times:
                raise RuntimeError("(sqlite3.IntegrityError) UNIQUE constraint failed: datasets.name")
            accept(*given)

        monkeypatch.setattr(store._client, "log_inputs", log_inputs)

    refuse(2)
    store.log_datasets(run_id, [DatasetRecord("digits", "abcd", 3, "training")])
    assert attempts == 3
    refuse(100)
    with pytest.raises(StoreAwayError, match="UNIQUE"):
        store.log_datasets(run_id, [])


# --- What is away, and what has to be mended ----------------------------------------------------------


class Fake(BaseHTTPRequestHandler):
    """Answers as an MLflow server with one experiment would, as far as `answer` lets it."""

    answer: Callable[["Fake"], tuple[int, str] | None]
    posts: list[str]

    def do_GET(self) -> None:
        self._answer({"experiment": {"experiment_id": "7", "name": "x", "lifecycle_stage": "active"}})

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.posts.append(self.path)
        self._answer({"run": {"info": {"run_id": "r"}, "data": {}}})

    def _answer(self, fine: object) -> None:
        status, text = type(self).answer(self) or (200, json.dumps(fine))
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@contextmanager
def fake_server(answer: Callable[[Fake], tuple[int, str] | None]) -> Iterator[tuple[str, list[str]]]:
    """Serve; yield the address, and the paths of what is posted there."""
    posts: list[str] = []
    handler = type("Answering", (Fake,), {"answer": staticmethod(answer), "posts": posts})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,)).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", posts
        finally:
            server.shutdown()


@pytest.mark.parametrize("status", [429, 500, 502, 503])
def test_a_server_that_has_no_time_is_away_and_asked_once(status: int) -> None:
    """MLflow would ask again by itself, and so create a second run."""
    busy = False
    with fake_server(lambda _: (status, "busy") if busy else None) as (address, posts):
        store = Store(address, "x")
        busy = True
        for call in (begun, lambda store: store.log_points("r", [("a", 1.0, 1, 1)])):
            with pytest.raises(StoreAwayError):
                call(store)
        assert len(posts) == 2
        with pytest.raises(StoreAwayError, match=f"tracking.uri={address}: no tracking server answers"):
            Store(address, "x")


def test_what_is_read_is_asked_for_again_where_a_server_has_no_time() -> None:
    """A report does not end with the first 503; reading changes nothing, so it may be repeated."""
    answers = iter([None, (503, "busy"), (503, "busy"), (200, "{}")])
    with fake_server(lambda _: next(answers)) as (address, posts):
        assert Store(address, "x").sweep("a") == []
        assert len(posts) == 3


@pytest.mark.parametrize(
    "answer",
    [
        (404, "<html>Not Found</html>"),
        (200, "<html>Welcome</html>"),
        (404, '{"detail": "Not Found"}'),
        (401, "You are not authenticated"),
        (403, '{"error_code": "PERMISSION_DENIED", "message": "Permission denied"}'),
    ],
)
def test_a_server_that_is_none_of_mlflow_or_wants_another_user_has_to_be_mended(
    answer: tuple[int, str],
) -> None:
    """That will not pass by itself."""
    with (
        fake_server(lambda _: answer) as (address, _),
        pytest.raises(BadInputError, match=f"tracking.uri={address}: cannot be used"),
    ):
        Store(address, "x")


def test_mlflows_own_variables_say_who_one_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """User and password, or a token, as the server wants it."""
    basic = base64.b64encode(b"alice:secret").decode()
    for wanted, variables in (
        (f"Basic {basic}", {"MLFLOW_TRACKING_USERNAME": "alice", "MLFLOW_TRACKING_PASSWORD": "secret"}),
        ("Bearer abc", {"MLFLOW_TRACKING_TOKEN": "abc"}),
    ):
        with monkeypatch.context() as patch:
            for key, value in variables.items():
                patch.setenv(key, value)

            def answer(asked: Fake, wanted: str = wanted) -> tuple[int, str] | None:
                return None if asked.headers["Authorization"] == wanted else (401, "who?")

            with fake_server(answer) as (address, _):
                assert begun(Store(address, "x")) == "r"
                for key in variables:
                    patch.delenv(key)
                with pytest.raises(BadInputError, match="401"):
                    Store(address, "x")


@pytest.mark.parametrize("scheme", ["http", "postgresql"])
@pytest.mark.parametrize("how", ["refuses", "is silent"])
def test_a_server_that_does_not_answer_is_away_after_one_attempt(
    scheme: str, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MLflow would go on for a minute."""
    monkeypatch.setattr(mlflow_store, "OPENING_S", 0.3)
    monkeypatch.setenv("PGCONNECT_TIMEOUT", "2")  # the least there is
    with socket.socket() as there:
        there.bind(("127.0.0.1", 0))
        if how == "is silent":
            there.listen()
        address = f"{scheme}://127.0.0.1:{there.getsockname()[1]}"
        with pytest.raises(StoreAwayError, match=f"^tracking.uri={address}: "):
            Store(address, "x")


def test_a_database_that_another_process_has_locked_is_away(
    tmp_path: Path, empty_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until it is let go of."""
    monkeypatch.setattr(mlflow_store, "OPENING_S", 0.1)
    path = tmp_path / "mlflow.db"
    path.write_bytes(empty_store.read_bytes())
    with closing(sqlite3.connect(path)) as holder:
        holder.execute("BEGIN EXCLUSIVE")
        with pytest.raises(StoreAwayError, match="database is locked"):
            Store(f"sqlite:///{path}", "x")
        holder.rollback()
    assert Store(f"sqlite:///{path}", "x").experiment_id


def test_an_address_that_cannot_work_has_to_be_mended(tmp_path: Path, empty_store: Path) -> None:
    """Another file, no folder, an older schema, an unknown scheme, no driver; in one line each."""
    (tmp_path / "text").write_text("no database, but long enough to be looked at" * 100)
    old = tmp_path / "old.db"
    old.write_bytes(empty_store.read_bytes())
    with closing(sqlite3.connect(old)) as database:
        database.execute("UPDATE alembic_version SET version_num = '451aebb31d03'")
        database.commit()
    for uri, said in {
        f"sqlite:///{tmp_path / 'text'}": "not a database",
        f"sqlite:///{tmp_path / 'text' / 'mlflow.db'}": "File exists",
        f"sqlite:///{tmp_path}": "",
        f"sqlite:///{old}": "out-of-date",
        "ftp://127.0.0.1": "",
        "mysql+nosuchdriver://127.0.0.1/db": "",
        "http://127.0.0.1:port": "",
    }.items():
        with pytest.raises(BadInputError) as raised:
            Store(uri, "x")
        assert re.fullmatch(
            rf"tracking\.uri={re.escape(uri)}: cannot be used \(.*{said}.*\)", str(raised.value)
        )


def test_a_postgresql_server_that_wants_a_password_takes_it_from_its_own_variable(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without it, with a wrong one, or without such a database the user has to mend something."""
    if reason := why_not():
        pytest.skip(reason)
    with postgres_server(password="secret") as server:
        for password, database, said in (
            (None, "postgres", "password"),
            ("wrong", "postgres", "password authentication failed"),
            ("secret", "none_such", "does not exist"),
        ):
            if password is not None:
                monkeypatch.setenv("PGPASSWORD", password)
            with pytest.raises(BadInputError, match=said):
                Store(server.uri(database), "x")
        mlflow_store._ask_once(server.uri())


def test_a_full_disk_of_the_store_is_waited_for(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that does not fit now is no file that is refused."""
    store = Store(f"sqlite:///{home / 'mlflow.db'}", EXPERIMENT)
    (tmp_path / "file").touch()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(store._client, "log_artifact", full)
    with pytest.raises(StoreAwayError, match="No space left"):
        store.log_file(begun(store), str(tmp_path / "file"), "file")


@pytest.mark.parametrize(
    ("text", "away"),
    [
        ("failed with exception Max retries exceeded (Caused by NameResolutionError('h'))", True),
        ("API request to http://h/a failed with timeout exception Read timed out.", True),
        ("failed with exception ('Connection aborted.', RemoteDisconnected('closed'))", True),
        ("failed with exception ('Connection broken: IncompleteRead(3 bytes read, 9 expected)')", True),
        ("API request to endpoint /api failed with error code 521 != 200", True),
        ("(sqlite3.OperationalError) database or disk is full", True),
        ("FATAL:  the database system is starting up", True),
        ("FATAL:  sorry, too many clients already", True),
        ("Max retries exceeded (Caused by SSLError(SSLCertVerificationError('self-signed')))", False),
        ("(sqlite3.OperationalError) attempt to write a readonly database", False),
        ("(sqlite3.OperationalError) unable to open database file", False),
        ("No module named 'pymysql'", False),
    ],
)  # fmt: skip
def test_what_may_pass_is_told_from_what_must_be_mended(text: str, away: bool) -> None:
    """By the texts that connections and databases leave, also of the error behind an error."""
    outer = RuntimeError("could not be opened")
    outer.__cause__ = OSError(text)
    assert says_away(outer) == says_away(RuntimeError(text)) == away


class CodedError(Exception):
    """An error as MLflow raises it."""

    def __init__(self, error_code: str, text: str) -> None:
        super().__init__(text)
        self.error_code = error_code


class UploadError(OSError):
    """An error as an upload raises it."""

    def __init__(self, status: int) -> None:
        super().__init__(f"{status} for url")
        self.response = type("Response", (), {"status_code": status})


@pytest.mark.parametrize(
    ("error", "refused"),
    [
        (CodedError("INVALID_PARAMETER_VALUE", "INVALID_PARAMETER_VALUE: Names may only contain"), True),
        (CodedError("RESOURCE_DOES_NOT_EXIST", "Run with id=0 not found"), True),
        (
            CodedError("BAD_REQUEST", "failed with error code 400 != 200. Response body: 'x'"),
            False,
        ),
        (CodedError("BAD_REQUEST", "(sqlite3.DatabaseError) database disk image is malformed"), False),
        (CodedError("BAD_REQUEST", "(psycopg.errors.StringDataRightTruncation) value too long"), True),
        (CodedError("INTERNAL_ERROR", "failed with error code 413 != 200"), True),
        (CodedError("INTERNAL_ERROR", "Python int too large to convert to SQLite INTEGER"), True),
        (CodedError("UNAUTHENTICATED", "failed with error code 401 != 200"), False),
        (CodedError("INTERNAL_ERROR", "API request to http://h failed with exception x"), False),
        (UploadError(413), True),
        (UploadError(507), False),
        (UploadError(403), False),
        (ValueError("Value out of range: 1180591620717411303424"), True),
        (OSError(errno.ENOSPC, "No space left on device"), False),
        (RuntimeError("of a driver"), False),
    ],
)
def test_what_is_refused_is_told_from_what_may_be_taken_later(error: Exception, refused: bool) -> None:
    """In doubt it is kept: only what a store says of the very record is given up."""
    assert says_refused(error) == refused


def test_a_password_in_an_address_is_refused_and_not_repeated() -> None:
    """Also by who opens a store without the command line."""
    with pytest.raises(BadInputError, match="PGPASSWORD") as raised:
        Store("postgresql://alice:hunter2@127.0.0.1/db", "x")
    assert "hunter2" not in str(raised.value)
