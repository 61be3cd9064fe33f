"""A sweep that goes on: every arm once, whoever launches them and however the first command ended."""

import csv
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hydra.core.plugins import Plugins
from mlflow import MlflowClient
from omegaconf import OmegaConf
from torch import Tensor

from gaccum_exp import cli
from gaccum_exp.arms import callback, child, continued, run_arm
from gaccum_exp.arms.context import KnownArm, Launch
from gaccum_exp.arms.life import Life
from gaccum_exp.arms.outcome import Outcome
from gaccum_exp.errors import BadInputError, StoreAwayError
from gaccum_exp.tracking import journal as journals
from gaccum_exp.tracking.journal import Journal
from gaccum_exp.tracking.locks import FileLock
from gaccum_exp.train.stopping import NEVER, StoppedError
from tests.arms.test_context import context
from tests.arms.test_sweep import LAUNCHERS
from tests.program import TINY, Ended, Program, in_a_process, sweep_here
from tests.shortened import shortened
from tests.strangers import Net

pytestmark = pytest.mark.usefixtures("undrawn")

POINTS = ("model=custom", "data=custom", "data.train._target_=tests.strangers.Points",
          "data.global_batch_size=8", "runtime.device=cpu", "train.steps=4",
          "audit.at_start=false")  # fmt: skip
HERE = "tests.arms.test_continued"
FIRST = Path("first")
"""A file that is there once something has happened that shall happen once."""


def once() -> bool:
    """Whether this is asked for the first time in the working directory."""
    try:
        FIRST.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


class StopsOnce(Net):
    """At its sixth training pass with micro-batches of four, somebody presses Ctrl-C, once."""

    number = signal.SIGINT

    def __init__(self) -> None:
        super().__init__()
        self.passes = 0

    def forward(self, x: Tensor) -> Tensor:
        self.passes += self.training and len(x) == 4
        if self.passes == 6 and once():
            self.happen()
        return super().forward(x)

    def happen(self) -> None:
        signal.raise_signal(self.number)


class TerminatesOnce(StopsOnce):
    number = signal.SIGTERM


class DiesOnce(StopsOnce):
    """Its process is killed."""

    def happen(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


class Fails(Net):
    """It has a fault of its own with micro-batches of four, until that is mended."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training and len(x) == 4 and not FIRST.exists():
            raise RuntimeError("a fault of its own")
        return super().forward(x)


def sweep(program: Program, model: str, *arguments: str) -> Ended:
    return program("-m", *POINTS, f"model._target_={HERE}.{model}", *arguments)


def rows(folder: Path) -> dict[str, str]:
    """Return the status of each arm in the comparison, by N; an arm that is there twice is an error."""
    (path,) = folder.rglob("comparison.csv")
    with path.open() as file:
        found = list(csv.DictReader(file))
    assert len({row["name"] for row in found}) == len(found)
    return {row["accum_steps"]: row["status"] for row in found}


def runs_of(program: Program) -> list[tuple[str, str]]:
    return sorted((run.name.split(" ")[0], run.status) for run in program.arms())


def said_command(ended: Ended) -> list[str]:
    """Return the words of the command that goes on, as a shell would read them."""
    (line,) = re.findall(r"; to go on:\n  (.+)\n", ended.err)
    return shlex.split(line)


@pytest.mark.parametrize(
    ("model", "status"), shortened([("StopsOnce", 130), ("TerminatesOnce", 143)], ["StopsOnce"])
)
def test_an_interrupted_sweep_prints_the_command_that_goes_on(
    program: Program, model: str, status: int
) -> None:
    """As it stands, it runs what is missing, in the same folder, under the same id; then it is whole."""
    ended = sweep(program, model, "accum.steps=1,2,4,8")
    assert ended.status == status
    assert "1 arm did not finish, 2 of 4 never started; to go on:" in ended.err
    words = said_command(ended)
    assert words[:4] == ["python", "-m", "gaccum_exp", "-m"]
    folder, before = program.sweep_folder, program.sweep_id
    first = {path: path.stat().st_mtime_ns for path in folder.glob("0/journal*")}
    again = program.as_given(*words[3:])
    assert again.status == 0, again.err
    assert (program.sweep_folder, program.sweep_id) == (folder, before)
    assert rows(folder) == dict.fromkeys("1248", "FINISHED")
    assert runs_of(program) == [(f"N={n}", "FINISHED") for n in (1, 2, 4, 8)]
    commands = [run.tags["command_id"].split() for run in program.arms()]
    assert [len(of) for of in commands] == [1, 2, 1, 1]  # N = 2 has times of both
    assert {path: path.stat().st_mtime_ns for path in folder.glob("0/journal*")} == first
    assert not (folder / "1" / "journal-2.jsonl").exists()  # it went on with what it had
    assert "of sweep" in again.err
    assert program("-m", *POINTS, "sweep.resume=last").err.endswith(
        "sweep.resume=last: no sweep is unfinished (1 there)\n"
    )


def test_a_command_that_is_interrupted_before_it_is_noted_says_how_to_go_on(
    program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once more: the sweep that it goes on with is there, and as unfinished as before."""
    stopping = [*POINTS, f"model._target_={HERE}.TerminatesOnce"]
    sweep_here(monkeypatch)
    assert program("-m", *stopping, "accum.steps=2,1").status == 143

    def ended(*_: object) -> None:
        raise StoppedError("interrupted (SIGTERM)", 143)

    with monkeypatch.context() as patched:
        patched.setattr(callback, "wait_for_store", ended)
        again = program("-m", *stopping, "accum.steps=2,1", "sweep.resume=last")
        fresh = program("-m", *stopping, "accum.steps=2,1")
    assert (again.status, fresh.status) == (143, 143)
    assert "nothing more was begun; to go on:" in again.plain
    assert "sweep.resume=" in again.plain
    assert "to go on" not in fresh.plain
    assert program("-m", *stopping, "accum.steps=2,1", "sweep.resume=last").status == 0


def test_arms_are_added_and_compared_with_those_that_are_there(program: Program) -> None:
    """Whatever the command line swept then: nothing runs twice, and a new report is recorded."""
    program.tiny("-m", "accum.steps=1,2")
    sweep_id, folder = program.sweep_id, program.sweep_folder
    ended = program.tiny("-m", "accum.steps=4,2,8", f"sweep.into={sweep_id}")
    assert ended.status == 0, ended.err
    assert rows(folder) == dict.fromkeys("1248", "FINISHED")
    assert [name for name, _ in runs_of(program)] == ["N=1", "N=2", "N=4", "N=8"]
    commands = {run.tags["arm"]: run.tags["command_id"] for run in program.arms()}
    (second,) = {command for command in commands.values() if command != sweep_id}
    assert commands == {"0": sweep_id, "1": sweep_id, f"{second}/0": second, f"{second}/2": second}
    assert sorted(path.name for path in (folder / second).iterdir()) == ["0", "2"]
    assert "N = 4, as another" not in ended.plain
    assert "~ run by another command than its reference" in ended.plain
    client = MlflowClient(program.uri)
    reports = client.search_runs([program.store().experiment_id], "tags.kind = 'report'")
    assert [run.data.tags["report_of"] for run in reports] == [sweep_id] * 2
    assert all(run.params["sweep.into"] == "None" for run in program.arms())


@pytest.mark.slow
def test_what_failed_by_its_own_fault_is_not_run_again_unless_asked(program: Program) -> None:
    """A model that raises."""
    ended = sweep(program, "Fails", "accum.steps=1,2")
    assert (ended.status, "sweep.resume=" in ended.err) == (1, False)
    FIRST.touch()
    line = ("accum.steps=1,2", f"sweep.resume={program.sweep_id}")
    again = sweep(program, "Fails", *line)
    assert (again.status, rows(program.sweep_folder)["2"]) == (1, "FAILED")
    assert "1 by a fault of their own" in again.err
    last = sweep(program, "Fails", "accum.steps=1,2", "sweep.resume=last")
    assert (last.status, "sweep.rerun_failed=true runs the arms again" in last.err) == (2, True)
    line = ("accum.steps=1,2", "sweep.resume=last", "sweep.rerun_failed=true")
    asked = sweep(program, "Fails", *line)
    assert (asked.status, rows(program.sweep_folder)["2"]) == (0, "FINISHED")
    assert "by a fault of their own" not in asked.err
    assert len(program.arms()) == 2


@pytest.mark.slow
def test_an_arm_whose_process_was_killed_is_run_again(program: Program) -> None:
    """It says nothing of the arm."""
    ended = sweep(program, "DiesOnce", "accum.steps=1,2")
    assert (ended.status, "sweep.resume=" in ended.err) == (1, True)
    again = sweep(program, "DiesOnce", "accum.steps=1,2", f"sweep.resume={program.sweep_id}")
    assert (again.status, rows(program.sweep_folder)["2"]) == (0, "FINISHED")
    assert len(program.arms()) == 2


def test_seeds_that_are_trained_as_one_are_run_where_they_are_missing(program: Program) -> None:
    """A seed that the sweep has is left out of the job; one that is left alone is trained alone."""
    program.tiny("-m", "seed=1", "accum.steps=2")
    into = f"sweep.into={program.sweep_id}"
    ended = program.tiny("-m", "seed=0,1,2", "accum.steps=2", "sweep.vectorize=seed", into)
    assert ended.status == 0, ended.err
    seeds = {run.params["seed"]: run.tags.get("vectorized") for run in program.arms()}
    assert seeds == {"1": None, "0": "2 seeds", "2": "2 seeds"}
    program.tiny("-m", "seed=0,1,2,3", "accum.steps=2", "sweep.vectorize=seed", into)
    seeds = {run.params["seed"]: run.tags.get("vectorized") for run in program.arms()}
    assert seeds == {"1": None, "0": "2 seeds", "2": "2 seeds", "3": None}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("-m", "sweep.resume=last"), "sweep.resume=last: no sweep is unfinished (0 there)"),
        (("-m", "sweep.into=nowhere"), "sweep.into=nowhere: no such sweep in multirun"),
        (("-m", "sweep.resume=../x"), "sweep.resume=../x: no such sweep in multirun"),
        (("-m", "sweep.resume=a", "sweep.into=b"), "sweep.resume=a and sweep.into=b both name a sweep"),
        (("-m", "sweep.resume=a,b"), "sweep.resume=a,b: one value"),
        (("-m", "sweep.rerun_failed=true"), "sweep.rerun_failed=true: of no sweep; sweep.resume=last"),
        (("sweep.rerun_failed=true",), "sweep.rerun_failed=true: a single run is no sweep; add -m"),
        (("sweep.resume=last",), "sweep.resume=last: a single run is no sweep; add -m"),
        (("sweep.into=a",), "sweep.into=a: a single run is no sweep; add -m"),
    ],
)
def test_a_sweep_that_is_not_there_is_refused_in_a_line(
    program: Program, arguments: tuple[str, ...], said: str
) -> None:
    """Status 2, and nothing is written."""
    ended = program.tiny(*arguments)
    assert (ended.status, len(ended.lines)) == (2, 1), ended.err
    assert said in ended.err
    assert not list(program.folder.glob("multirun/*"))


def test_a_sweep_that_is_running_is_refused(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its journal's lock; by an arm's process that lives; and what another host may still run."""
    monkeypatch.setattr(continued, "HELPER_S", 0.0)
    monkeypatch.setattr(continued, "ENDING_S", 0.0)
    program.tiny("-m", "accum.steps=1,2")
    into, folder = f"sweep.into={program.sweep_id}", program.sweep_folder
    script = (
        "import sys, pathlib; from gaccum_exp.tracking.journal import Journal;"
        "j = Journal.create(pathlib.Path(sys.argv[1]), 'sqlite://', 'x'); print(flush=True); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None
        other.stdout.readline()
        ended = program.tiny("-m", "accum.steps=1,2", into)
        assert other.stdin is not None
        other.stdin.write(b"\n")
    assert ended.status == 2
    assert ended.err.endswith(f"{into}: it is running; wait for its end, or end it\n")
    path = folder / "1" / "arm.json"
    outcome = json.loads(path.read_text())
    with subprocess.Popen([sys.executable, "-c", "gaccum_exp=input()"], stdin=subprocess.PIPE) as child:
        path.write_text(json.dumps(outcome | {
            "status": "RUNNING", "host": os.uname().nodename, "process": child.pid
        }))  # fmt: skip
        ended = program.tiny("-m", "accum.steps=1,2", into)
        assert child.stdin is not None
        child.stdin.write(b"\n")
    assert (ended.status, "its arm in 1 is running" in ended.err) == (2, True)


def test_a_job_that_begins_after_another_command_took_over_runs_nothing(program: Program) -> None:
    """As one that waited in a queue: the other command has its arm."""
    program.tiny("-m", "accum.steps=1")
    note = continued.SweepNote.of(program.sweep_folder)
    assert note is not None
    continued.look(program.sweep_folder, note.command_id)
    with pytest.raises(StoppedError, match="goes on in another command"):
        continued.look(program.sweep_folder, "20260101-000000-abcdef")


def test_a_job_that_begins_after_its_command_was_asked_to_end_runs_nothing(
    program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A launcher's worker may take it from its queue when the arms in hand have ended already."""
    program.tiny("-m", "accum.steps=1")
    note = continued.SweepNote.of(program.sweep_folder)
    assert note is not None
    monkeypatch.setattr(child, "say_at_once", lambda *_: None)
    child.pass_on(Launch(program.sweep_folder, note.sweep_id, "", "", multirun=True), signal.SIGTERM)
    with pytest.raises(StoppedError, match="SIGTERM") as stopped:
        continued.look(program.sweep_folder, note.command_id)
    assert stopped.value.status == 143
    into = f"sweep.resume={note.sweep_id}"
    assert program.tiny("-m", "accum.steps=1,2", into).status == 0  # another command may go on


def test_a_sweep_whose_arms_have_all_ended_is_whole_whatever_its_launcher_says(
    program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that is killed after its last arm takes nothing along; before that, an arm is missing."""
    instantiate = Plugins.instantiate_launcher

    def instantiated(*args: Any, **kwargs: Any) -> Any:
        launcher = instantiate(*args, **kwargs)
        launch = launcher.launch

        def launches(jobs: Any, **kwargs: Any) -> Any:
            launch(jobs[:launched], **kwargs)
            raise error("a worker process was terminated")

        monkeypatch.setattr(launcher, "launch", launches)
        return launcher

    monkeypatch.setattr(Plugins, "instantiate_launcher", instantiated)
    line, launched = ("-m", *POINTS, "model._target_=tests.strangers.Net", "accum.steps=1,4"), 1
    error: type[Exception] = BrokenProcessPool
    ended = program(*line)
    assert ended.status == 1
    assert "1 of 2 never started; to go on:" in ended.err
    launched = 2
    ended = program(*line)
    assert ended.status == 0
    assert "a worker process was terminated" in ended.err
    assert "to go on:" not in ended.err
    assert rows(program.sweep_folder) == {"1": "FINISHED", "4": "FINISHED"}
    note = continued.SweepNote.of(program.sweep_folder)
    assert note is not None
    assert note.whole
    error = RuntimeError  # a fault of the launcher's own
    assert program(*line, "resume=never").status == 1


def test_an_arm_is_known_by_its_configuration(tmp_path: Path) -> None:
    """Whatever order its overrides came in, wherever it is recorded; another value is another arm."""
    one = context(tmp_path, "optimizer.lr=0.5", "accum.steps=2")
    assert context(tmp_path, "accum.steps=2", "optimizer.lr=0.5").digest == one.digest
    for same in ("tracking.uri=sqlite:///other.db", "sweep.resume=last", "sweep.vectorize=seed"):
        assert context(tmp_path, "optimizer.lr=0.5", "accum.steps=2", same).digest == one.digest
    for other in ("seed=1", "accum.steps=4", "train.steps=3", "model=mlp", "runtime.threads=1"):
        assert context(tmp_path, "optimizer.lr=0.5", "accum.steps=2", other).digest != one.digest


def test_how_many_arms_a_command_line_names_is_counted(program: Program) -> None:
    """Products of lists, choices and ranges; of a key that comes twice, the last one counts."""
    line = ["-m", *POINTS, f"model._target_={HERE}.StopsOnce", "seed=0,1", "accum.steps=2,1",
            "optimizer.lr=0.1,0.2,0.3", "seed=range(3)"]  # fmt: skip
    ended = program(*line)
    assert "1 arm did not finish, 17 of 18 never started" in ended.err


def test_what_a_command_line_refers_to_is_each_arms_own(program: Program) -> None:
    """Also where the sweep goes on, and where seeds are trained as one: no arm has the first one's."""
    line = ("-m", "runtime.threads=${seed}", "seed=1,2,3")
    program.tiny(*line[:2], "seed=1")
    ended = program.tiny(*line, f"sweep.into={program.sweep_id}", "sweep.vectorize=seed")
    assert ended.status == 0, ended.err
    assert sorted(run.params["runtime.threads"] for run in program.arms()) == ["1", "2", "3"]


def test_another_store_than_the_sweeps_is_refused(program: Program) -> None:
    """Its arms are found under one filter."""
    program.tiny("-m", "accum.steps=1,2")
    into = f"sweep.into={program.sweep_id}"
    ended = program.as_given(*TINY, "-m", "accum.steps=4", into, "tracking.uri=sqlite:///other.db")
    assert (ended.status, len(ended.lines)) == (2, 1)
    assert f"tracking.uri=sqlite:///other.db: {into} is recorded in {program.uri}" in ended.err
    assert program.as_given(*TINY, "-m", "accum.steps=4", into).status == 0
    assert len(program.arms()) == 3


@pytest.mark.engines
@pytest.mark.parametrize("launcher", ["joblib", "submitit"])
def test_a_sweep_goes_on_under_every_launcher(home: Path, launcher: str) -> None:
    """An arm whose process was killed goes on, one is added, those that have ended are not run."""
    line = ("-m", *LAUNCHERS[launcher], *POINTS, f"model._target_={HERE}.DiesOnce")
    first = in_a_process(home, *line, "accum.steps=1,2")
    assert first.status == 1, first.err
    (folder,) = (home / "multirun").iterdir()
    assert rows(folder) == {"1": "FINISHED", "2": "FAILED"}
    again = in_a_process(home, *line, "accum.steps=1,2,4", "sweep.resume=last")
    assert again.status == 0, again.err
    assert rows(folder) == dict.fromkeys("124", "FINISHED")
    journals = [str(path.relative_to(folder)) for path in folder.rglob("journal*.jsonl")]
    assert len(journals) == 2 + 3  # of two reports, of three arms


def test_a_resumed_arm_counts_with_its_last_run(tmp_path: Path) -> None:
    """Of an arm that was begun again the last run is compared; without the tag, every run is."""
    from gaccum_exp.tracking.read_back import Journals
    from gaccum_exp.tracking.records import last_of_each_arm

    for number, arm in enumerate(("0", "0", "1", None, None)):
        journal = Journal.create(tmp_path, "sqlite://", "x")
        tags = {"sweep_id": "a"} | ({} if arm is None else {"arm": arm})
        journal.begin(str(number), params={}, tags=tags, texts={})
        journal.end("FINISHED")
        time.sleep(0.002)
    runs = Journals(tmp_path).sweep("a", ())
    assert [run.name for run in last_of_each_arm(runs)] == ["1", "2", "3", "4"]


class Left:
    """A sweep as its commands have left it in `multirun/a`, with a store of any content."""

    def __init__(self, folder: Path, *arms: Outcome, **note: object) -> None:
        self.folder = folder / "multirun" / "a"
        for number, arm in enumerate(arms):
            (self.folder / str(number)).mkdir(parents=True)
            arm.write(self.folder / str(number))
        uri = f"sqlite:///{folder / 'mlflow.db'}"
        Journal.create(self.folder, uri, "gaccum_exp").end("FINISHED")
        note = {"whole": True, "arms": ["0", "1"], **note}
        continued.SweepNote("a", "a", 0.0, **note).write(self.folder)  # type: ignore[arg-type]

    def taken_up(self) -> continued.Continued:
        """Take it up, as `sweep.resume=a` does."""
        sweep = {"resume": "a", "into": None}
        config = OmegaConf.create(
            {"sweep": sweep, "hydra": {"sweep": {"dir": f"{self.folder.parent}/b"}}}
        )
        found = continued.asked_for(config, [], "b")
        assert found is not None
        assert found.lock is not None
        found.lock.release()
        return found


def stores(monkeypatch: pytest.MonkeyPatch, **arms: Outcome) -> None:
    """Let any store have these arms, by place."""
    of_store = {Path(place): outcome for place, outcome in arms.items()}
    monkeypatch.setattr(continued, "outcomes_in_store", lambda *_: of_store)


HERE_ALONE = Outcome("a", "here", "FINISHED", digest="d0", command_id="a")
ELSEWHERE = Outcome("a", "elsewhere", "FAILED", "a fault", digest="d1", command_id="a")


@pytest.mark.parametrize(
    "note",
    [{"arms": ["0", "1", "b/1"]}, {"uncounted": True}],
    ids=["one is missing", "its launcher shares no folder"],
)
def test_arms_that_ran_elsewhere_are_among_those_of_a_sweep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, note: dict[str, object]
) -> None:
    """Beside those that are here; what is of the same place or configuration is the same arm."""
    killed = replace(ELSEWHERE, name="killed", status="KILLED", digest="d2", again=True)
    finished = replace(killed, status="FINISHED", again=False)
    same = replace(HERE_ALONE, status="FAILED")
    stores(monkeypatch, **{"0": HERE_ALONE, "1": finished, "b/1": ELSEWHERE, "b/2": same})
    arms = Left(tmp_path, HERE_ALONE, killed, **note).taken_up().known(rerun_failed=False)
    assert {digest: arm.status for digest, arm in arms.items()} == {
        "d0": "FINISHED", "d1": "FAILED", "d2": "FINISHED"
    }  # fmt: skip


def test_the_store_is_not_asked_where_every_arm_is_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That takes seconds, and it may be away."""
    monkeypatch.delattr(continued, "outcomes_in_store")
    assert len(Left(tmp_path, HERE_ALONE, ELSEWHERE).taken_up().outcomes) == 2


def test_what_may_run_elsewhere_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether it lives cannot be known here; nor what became of it, where the store is away."""
    left = Left(tmp_path, HERE_ALONE)
    stores(monkeypatch, **{"0": HERE_ALONE, "1": replace(ELSEWHERE, status="RUNNING", host="other")})
    with pytest.raises(
        BadInputError, match=r"elsewhere left no folder here and is RUNNING .* --end-stale"
    ):
        left.taken_up()

    def away(*_: object) -> None:
        raise StoreAwayError("it does not answer")

    monkeypatch.setattr(continued, "outcomes_in_store", away)
    with pytest.raises(BadInputError, match="arms of it may have run elsewhere, and it does"):
        left.taken_up()


def test_an_arm_that_has_ended_elsewhere_answers_with_all_that_it_earned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its verdict and its reason, by which the exit status is decided."""
    arm = replace(context(tmp_path / "b" / "0", "task=audit"), sweep_folder=tmp_path, command_id="b")
    monkeypatch.setattr(child, "_given", None)  # nothing is run
    for ended in (
        Outcome(
            "a", "arm", "FINISHED", None, "audit", "biased", True, digest=arm.digest, command_id="a"
        ),
        Outcome("a", "arm", "FAILED", "a fault", "audit", digest=arm.digest, command_id="a"),
    ):
        before = continued.Continued("a", tmp_path, "", [], None, None, {tmp_path / "0": ended})
        known = json.loads(json.dumps(before.known(rerun_failed=False)))  # as jobs are told
        knowing = replace(arm, known={digest: KnownArm(*one) for digest, one in known.items()})
        outcomes: dict[Path, Outcome] = {}
        child.run_job(knowing, NEVER, outcomes, None)
        expected = replace(ended, sweep_id=arm.sweep_id, command_id="b")
        assert outcomes == {tmp_path / "0": expected}


def test_one_command_at_a_time_goes_on_with_a_sweep(
    program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the moment that it asks for it until it has compared; another one is refused in a line."""
    monkeypatch.setattr(continued, "HELPER_S", 0.0)
    left, others = Left(program.folder, HERE_ALONE, arms=["0"]), list[str]()

    def another(*_: object) -> int:
        with pytest.raises(BadInputError) as refused:
            left.taken_up()
        others.append(str(refused.value))
        return 0

    monkeypatch.setattr(callback, "start_helper", another)  # when nothing is written yet
    monkeypatch.setattr(cli, "_compare", another)
    assert program.tiny("-m", "accum.steps=0", "sweep.resume=a").status == 0
    said = "sweep.resume=a: another command goes on with it; wait for its end, or end it"
    assert others == [said, said]
    lock = FileLock.take(left.folder / continued.COMMAND_LOCK)
    assert lock is not None
    lock.release()


def test_what_another_host_may_still_run_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is of the host that went on with it last; a container that is started again is the same."""
    monkeypatch.chdir(tmp_path)
    left = Left(tmp_path, HERE_ALONE, arms=["0"])

    def of(host: str, boot: str) -> None:
        monkeypatch.setattr(journals, "owner", lambda: {"host": host, "boot": boot})

    of("container", "boot")
    journal = Journal.create(left.folder / "0", "sqlite:///none.db", "x")
    journal.begin("arm", params={}, tags={"sweep_id": "a"}, texts={})
    journal.close()
    of("container started again", "boot")
    left.taken_up()
    of("elsewhere", "another boot")
    with pytest.raises(BadInputError, match=r"arm is of container, which .* multirun/a$"):
        left.taken_up()
    lock = FileLock.take(journal.path.with_suffix(".lock"))
    assert lock is not None
    Journal.going_on(journal.path, lock).close()
    left.taken_up()
    of("container", "boot")
    with pytest.raises(BadInputError, match="arm is of elsewhere"):
        left.taken_up()


def test_an_arm_without_an_outcome_has_the_end_of_its_commands_run(tmp_path: Path) -> None:
    """Not that of an earlier one, which lies in its folder too where it was begun anew."""
    for command, status in (("a", "FAILED"), ("b", "FINISHED")):
        journal = Journal.create(tmp_path, "sqlite:///none.db", "x")
        tags = {"sweep_id": "a", "command_id": command}
        journal.begin("arm", params={}, tags=tags, texts={})
        journal.end(status, "a fault" if status == "FAILED" else None)
    for command, status in (("b", "FINISHED"), ("c", "FAILED")):
        running = Outcome("a", "arm", "RUNNING", command_id=command)
        ended = child.ended(tmp_path, running, None)
        assert (ended.status, ended.again) == (status, command == "c")


def test_controls_that_were_interrupted_are_trained_where_the_sweep_goes_on(
    program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their arm has finished, and is not trained again."""
    sweep_here(monkeypatch)

    def interrupted(control: Life, controls_left: int) -> None:
        raise StoppedError("interrupted (SIGINT)", 130)

    with monkeypatch.context() as first:
        first.setattr(run_arm, "_train_control", interrupted)
        ended = program.tiny("-m", "accum.steps=1", "audit.controls=1")
    assert (ended.status, "1 arm did not finish; to go on:" in ended.err) == (130, True)
    again = program.tiny("-m", "accum.steps=1", "audit.controls=1", "sweep.resume=last")
    assert (again.status, "to go on" in again.err) == (0, False)
    assert [run.control_seed for run in program.arms()] == [None, 1]


def test_a_sweep_records_the_line_that_was_typed(
    program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever was refused or is Hydra's; without the sweep that it went on with, or passwords."""
    sweep_here(monkeypatch)
    given = ("-m", "accum.steps=1,2,1000", "hydra.run.dir='a b=${now:%d}'")
    program.tiny(*given)
    (typed,) = {run.tags["command"] for run in program.arms()}
    assert shlex.split(typed) == [
        "python",
        "-m",
        "gaccum_exp",
        *TINY,
        *given,
        f"tracking.uri={program.uri}",
    ]
    assert len(program.arms()) == 3
    assert continued.as_typed(["-m", "a=1", "sweep.into=x"]) == "python -m gaccum_exp -m a=1"
    hidden = continued.as_typed(["b='http://me:secret@host/x'"])
    assert "secret" not in hidden
    assert "host/x" in hidden
    assert continued.as_typed(["a=" + 5000 * "x"]) == ""
