"""The same command again goes on with a run that was killed, and gives what it would have given."""

import json
import os
import platform
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow import MlflowClient
from torch import Tensor

from gaccum_exp import cli
from gaccum_exp.arms import life, plan, resume, run_arm
from gaccum_exp.arms.context import Command, Launch
from gaccum_exp.config.schema import validate
from gaccum_exp.tracking import shipper
from gaccum_exp.tracking import sink as sinks
from gaccum_exp.tracking.delivered import Delivered
from gaccum_exp.tracking.journal import (
    Journal,
    beginning,
    encoded,
    end_if_dead,
    end_of,
    read_journal,
)
from gaccum_exp.tracking.locks import FileLock
from gaccum_exp.tracking.read_back import Journals
from gaccum_exp.train.checkpoint.hook import Writer
from gaccum_exp.train.stopping import NEVER
from tests.arms.test_context import context
from tests.program import Program, sweep_here
from tests.strangers import Net
from tests.support import composed, settings

pytestmark = pytest.mark.forks
ARMS = ("model=custom", "model._target_=tests.arms.test_resume.Killed", "data=custom",
        "data.train._target_=tests.strangers.Points", "data.eval._target_=tests.strangers.Points",
        "+data.eval.seed=1", "data.global_batch_size=8", "train.steps=9", "train.eval_every_steps=2",
        "runtime.device=cpu", "runtime.threads=1", "runtime.precision=fp64")  # fmt: skip
CURVES = ("train/loss", "optim/grad_norm", "optim/lr", "eval/loss", "eval/accuracy")
KILL_AT = "KILLED_AT"
"""The variable that says at which training pass the model ends its process, and by which signal."""


class Killed(Net):
    """Ends its process in a training pass."""

    def __init__(self, hidden: int = 6, dropout: float = 0.0, of: str = "") -> None:
        super().__init__(hidden, dropout)
        self.passes = 0

    def forward(self, x: Tensor) -> Tensor:
        at, number = map(int, os.environ.get(KILL_AT, "0:0").split(":"))
        self.passes += self.training and torch.is_grad_enabled()
        if self.training and self.passes == at:
            os.kill(os.getpid(), number)
        return super().forward(x)


class Steep(Killed):
    """Its gradients overflow in half precision until the loss scale has sunk."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 30


class Undecided(Killed):
    """Another one in each process."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (1 + 1e-9 * os.getpid())


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Write what is recorded at once, and checkpoints too, so that a run that was killed has them."""

    def start(writer: Writer, *given: Any) -> None:
        started(writer, *given)
        writer.wait()

    started = Writer.start
    monkeypatch.setattr(Writer, "start", start)
    monkeypatch.setattr(sinks, "DELIVERY_INTERVAL_S", -1.0)
    monkeypatch.setattr(resume, "PATIENCE_S", 5.0)
    monkeypatch.setattr(shipper, "LEFT_S", 0.1)


def killed(program: Program, *arguments: str, at: int = 6, number: int = signal.SIGKILL) -> None:
    """Run a command in a process of its own that ends at a training pass."""
    helper = shipper.helper_address()
    process = os.fork()
    if process == 0:
        shipper.use_helper(helper)  # starting another one takes longer than all else
        os.environ[KILL_AT] = f"{at}:{number}"
        status = 99
        try:
            status = cli.main([*arguments, f"tracking.uri={program.uri}"])
        finally:
            os._exit(status)
    _, status = os.waitpid(process, 0)
    assert os.waitstatus_to_exitcode(status) == (-number if number == signal.SIGKILL else 143)


def curves(program: Program) -> list[dict[str, Any]]:
    """Return the curves of each run of the last command, by the run's name."""
    runs = program.store().sweep(program.sweep_id, CURVES)
    return [{"status": run.status, **run.curves} for run in sorted(runs, key=lambda run: run.name)]


def recorded(program: Program) -> list[dict[str, Any]]:
    """Return the same as the journals have it."""
    runs = Journals(program.folder).sweep(program.sweep_id, CURVES)
    return [{"status": run.status, **run.curves} for run in sorted(runs, key=lambda run: run.name)]


def weights_in(folder: Path) -> dict[str, Tensor]:
    """Return the final weights in a folder."""
    (path,) = folder.rglob("weights.pt")
    found: dict[str, Tensor] = torch.load(path, weights_only=True)
    return found


def folders(program: Program) -> list[str]:
    """Return the folders of runs."""
    return sorted(path.name for path in (program.folder / "outputs").iterdir())


def journal_of(program: Program, folder: str) -> Path:
    """Return the journal of a run by its folder's name."""
    return program.folder / "outputs" / folder / "journal.jsonl"


def ended(program: Program, folder: str, status: str) -> None:
    """End a run as whoever has killed it would, once nobody else has done so."""
    path = journal_of(program, folder)
    while not (end_of(path) or end_if_dead(path, status, "why")):
        time.sleep(0.02)
    journal = Journal.going_on(path, lock_of(path))
    journal.end(status, "why")


def lock_of(path: Path) -> FileLock:
    """Take the lock of a journal, which whoever delivers it may hold for a moment."""
    while (lock := FileLock.take(path.with_suffix(".lock"))) is None:
        time.sleep(0.02)
    return lock


def test_the_same_command_goes_on_with_a_run_that_was_killed(program: Program) -> None:
    """In its folder and as the same run in the store; every point once, and each of the same bits."""
    command = (*ARMS, "accum.steps=2", "+model.dropout=0.3", "checkpoint.every_steps=2")
    assert program(*command, "hydra.run.dir=apart").status == 0
    expected, weights = curves(program), weights_in(program.folder / "apart")
    killed(program, *command, at=12)
    (folder,) = folders(program)
    path = journal_of(program, folder)
    left = list(path.parent.glob("checkpoints/*/manifest.json"))
    assert left
    assert all(beginning(path)[1]["token"] in manifest.read_text() for manifest in left)
    done = program(*command)
    assert (done.status, folders(program)) == (0, [folder])
    assert any(
        f"{folder} (N=2 · micro 4 · global_mean), from step 4 of 9" in line for line in done.lines
    )
    assert any("taken again, and are equal bit for bit" in line for line in done.lines)
    assert curves(program) == expected
    again = weights_in(program.folder / "outputs")
    assert weights.keys() == again.keys()
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    client = MlflowClient(program.uri)
    (run,) = client.search_runs(["1"], f"tags.sweep_id = '{folder}'")
    assert (run.info.status, run.data.tags.get("failure")) == ("FINISHED", None)
    for key in expected[0].keys() - {"status"}:
        history = client.get_metric_history(run.info.run_id, key)
        assert len(history) == len({point.step for point in history})
    assert program(*command).status == 0
    assert len(folders(program)) == 2, "it has finished, so another one is begun"


@pytest.mark.parametrize(
    ("number", "at", "how"),
    [
        # Augmentation in data workers, a window that is carried over the epoch's end, momentum, audits.
        pytest.param(
            *(signal.SIGTERM, 17),
            ("+data.train.noise=0.5", "data.workers=1", "accum.partial_window=carry", "accum.steps=3",
             "data.global_batch_size=7", "optimizer.momentum=0.9", "audit.every_steps=3"),
            id="workers and audits",
        ),
        # A loss scale that sinks until gradients are finite, a schedule, clipping.
        pytest.param(
            *(signal.SIGKILL, 13),
            ("runtime.precision=fp16", "model._target_=tests.arms.test_resume.Steep", "accum.steps=2",
             "scheduler=cosine", "accum.max_grad_norm=0.5", "+criterion.label_smoothing=0.1"),
            id="fp16 and skipped windows",
        ),
        # A batch that grows, windows in which nothing counts, Adam, dropout.
        pytest.param(
            *(signal.SIGTERM, 9),
            ("accum.schedule={0:1,1:2}", "data.micro_batch_size=4", "data.global_batch_size=null",
             "accum.steps=null", "data.train._target_=tests.strangers.Ignored", "optimizer=adamw",
             "+model.dropout=0.5", "accum.reduction=sum"),
            id="a growing batch", marks=pytest.mark.whole,
        ),
        pytest.param(
            *(signal.SIGTERM, 9),
            ("accum.grow=auto", "data.micro_batch_size=2", "data.global_batch_size=null",
             "accum.steps=1", "accum.partial_window=carry", "scheduler=cosine"),
            id="grown for a schedule", marks=pytest.mark.whole,
        ),
    ],
)  # fmt: skip
def test_it_gives_the_bits_of_an_undisturbed_run(
    program: Program, number: int, at: int, how: tuple[str, ...]
) -> None:
    """Whatever a training consists of: killed on the spot, or by a signal inside a window."""
    command = (*ARMS, "checkpoint.every_steps=2", *how)
    assert program(*command, "hydra.run.dir=apart").status == 0
    expected, weights = curves(program), weights_in(program.folder / "apart")
    killed(program, *command, at=at, number=number)
    done = program(*command)
    assert done.status == 0, done
    assert "from step 0 " not in done.err
    assert len(folders(program)) == 1
    assert curves(program) == expected
    again = weights_in(program.folder / "outputs")
    assert all(torch.equal(weights[name], again[name]) for name in weights)


def test_one_that_a_signal_has_ended_goes_on_too_and_it_is_said_how(
    program: Program, capfd: pytest.CaptureFixture[str]
) -> None:
    """The command is named that goes on; with resume=never the same one would not."""
    killed(program, *ARMS, "resume=never", number=signal.SIGTERM)
    (folder,) = folders(program)
    said = f"gaccum_exp: the same command goes on: python -m gaccum_exp {' '.join(ARMS)}"
    assert said in " ".join(capfd.readouterr().err.split())
    assert program(*ARMS).status == 0
    assert folders(program) == [folder]
    (run,) = program.arms()
    assert (run.status, run.tags.get("failure")) == ("FINISHED", None)


@pytest.mark.parametrize(
    ("controls", "status", "control", "goes_on"),
    [(0, "KILLED", None, True), (0, "FINISHED", None, False), (1, "FINISHED", None, True),
     (1, "FINISHED", "KILLED", True), (1, "FINISHED", "FINISHED", False)],
)  # fmt: skip
def test_the_command_that_goes_on_is_named_where_there_is_something_to_go_on_with(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], controls: int, status: str, control: str | None,
    goes_on: bool,
) -> None:  # fmt: skip
    """Also where a control was interrupted, or not begun yet; without what would begin anew."""
    asked = f"audit.controls={controls}"
    left_in(tmp_path, asked, status=status)
    if control is not None:
        left_in(tmp_path, asked, "audit.control_seed=1", status=control, control_of="N=1")
    line = ["seed=1", "resume=never", "++resume=never", "+resume='never'", 'resume="never"', "seed=2"]
    launch = Launch(tmp_path, "old", "sqlite:///mlflow.db", "x", False)
    own = settings(*ARMS, "sweep_id=old", asked)
    cli._say_what_goes_on(Command(NEVER, line, launch=launch, settings=own))
    said = capfd.readouterr().err
    assert said.endswith("gaccum_exp seed=1 seed=2\n") if goes_on else not said


def test_an_arm_of_a_sweep_goes_on_where_it_is_given_its_folder_again(
    program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that has finished is not trained again, seeds that were trained as one go on one by one; a
    run that is named is no sweep's."""
    sweep_here(monkeypatch)
    again = ("-m", *ARMS, "seed=0,1", "sweep.vectorize=seed", "sweep_id=s", "hydra.sweep.dir=swept")
    assert program(*again).status == 0
    expected = [run.keys() for run in recorded(program)]
    assert len(expected) == 2
    path = next(program.folder.glob("swept/0/seed=1/journal.jsonl"))
    lock = lock_of(path)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[: next(i for i, line in enumerate(lines) if b"[[4," in line)]))
    lock.release()
    (path.parent / "arm.json").unlink()  # it was killed
    done = program(*again)
    assert done.status == 0, done
    assert any("are equal to rounding" in line for line in done.lines)
    assert [run.keys() for run in recorded(program)] == expected
    named = program(*again, "resume=s")
    assert (named.status, named.err) == (
        2,
        "gaccum_exp: resume=s: names one run, and not the arms of a sweep\n",
    )


def left_in(folder: Path, *overrides: str, status: str | None = "KILLED", **tags: str) -> Path:
    """Leave a run of this configuration in a folder, as a command would; return its journal."""
    own = settings(*ARMS, "sweep_id=old", *overrides)
    journal = Journal.create(folder, "sqlite:///mlflow.db", "gaccum_exp")
    tags = {"sweep_id": "old", "version.gaccum_exp": resume.version_of("gaccum_exp"), **tags}
    journal.begin("N=1", params=own.flat(), tags=tags, texts={})
    if status is None:
        journal.close()
    else:
        journal.end(status)
    return journal.path


def found_in(folder: Path, *overrides: str) -> Path | None:
    """Return the journal of the run that a command would go on with, and let go of it."""
    config = composed(*ARMS, "sweep_id=new", *overrides)
    resumed = resume._taken(folder, resume.Wanted(validate(config), config))
    if resumed is None:
        return None
    resumed.lock.release()
    return resumed.left.path


@pytest.mark.parametrize(
    "other",
    ["optimizer.lr=0.02", "seed=1", "accum.steps=4", "+model.dropout=0.1", "audit.at_start=false",
     "runtime.threads=2", "train.steps=10", "+data.train.noise=0.1", "accum.steps=auto"],
)  # fmt: skip
def test_another_configuration_begins_another_run(tmp_path: Path, other: str) -> None:
    """Whatever moves a number."""
    path = left_in(tmp_path)
    assert found_in(tmp_path) == path
    assert found_in(tmp_path, other) is None


@pytest.mark.parametrize(
    "other", ["data.workers=2", "tracking.log_weights=false", "resume=old", "checkpoint.keep=1"]
)
def test_where_it_records_and_how_fast_it_is_makes_no_other_configuration(
    tmp_path: Path, other: str
) -> None:
    """Nor the id that the command itself has, wherever it stands in the configuration."""
    of = "+model.of=${sweep_id}"
    path = left_in(tmp_path, of)
    assert found_in(tmp_path, of, other) == path


@pytest.mark.parametrize(("theirs", "ours"), [("mean", "sum"), ("global_mean", "mean")])
def test_an_id_that_is_a_value_too_makes_no_two_configurations_alike(
    tmp_path: Path, theirs: str, ours: str
) -> None:
    """Runs that the user names after what is varied."""
    own = settings(*ARMS, f"sweep_id={theirs}", f"accum.reduction={theirs}")
    journal = Journal.create(tmp_path, "sqlite:///mlflow.db", "gaccum_exp")
    tags = {"sweep_id": theirs, "version.gaccum_exp": resume.version_of("gaccum_exp")}
    journal.begin(theirs, params=own.flat(), tags=tags, texts={})
    journal.end("KILLED")
    config = composed(*ARMS, f"sweep_id={ours}", f"accum.reduction={ours}")
    differing = resume.Wanted(validate(config), config).differing(resume.runs_in(tmp_path)[0])
    assert differing == {"accum.reduction": (theirs, ours)}


def test_the_newest_unfinished_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that was killed or has no end; not one that has finished or failed, nor of another version."""
    times = iter(range(10))
    monkeypatch.setattr("gaccum_exp.tracking.journal.now_ms", lambda: next(times))
    for status in ("FINISHED", "FAILED"):
        left_in(tmp_path, status=status)
    left_in(tmp_path, **{"version.gaccum_exp": "0.0"})
    assert found_in(tmp_path) is None
    assert found_in(tmp_path / "nowhere") is None
    assert found_in(tmp_path) is None
    of_sweep = resume.in_folder(tmp_path, settings(*ARMS, "sweep_id=old"))
    assert of_sweep is not None, "whatever has become of an arm, its sweep goes on with it"
    assert of_sweep.left.status == "FAILED"
    of_sweep.lock.release()
    killed_first = left_in(tmp_path)
    assert found_in(tmp_path) == killed_first
    without_end = left_in(tmp_path, status=None)
    assert found_in(tmp_path) == without_end
    without_end.write_bytes(b"")
    assert found_in(tmp_path) == killed_first


def test_under_resume_never_an_arm_of_a_sweep_is_begun_anew(tmp_path: Path) -> None:
    """Unless the run is of the same command, whose job was put back into a queue."""
    path = left_in(tmp_path, status="FAILED", command_id="first")
    for asked, command_id, expected in (
        ("auto", "second", path), ("never", "second", None), ("never", "first", path)
    ):  # fmt: skip
        arm = context(tmp_path, *ARMS, "sweep_id=old", f"resume={asked}")
        arm = replace(arm, command_id=command_id)
        resumed = run_arm.left_by_sweep(arm, validate(arm.config))
        assert (None if resumed is None else resumed.left.path) == expected
        if resumed is not None:
            resumed.lock.release()


def test_why_an_arm_of_a_sweep_is_begun_anew_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As by another version of the package, whose numbers may be others."""
    caplog.set_level("INFO", "gaccum_exp")
    arm = context(tmp_path, *ARMS, "sweep_id=old")
    assert run_arm.left_by_sweep(arm, validate(arm.config)) is None
    assert not caplog.messages
    left_in(tmp_path, **{"version.gaccum_exp": "0.0"})
    assert run_arm.left_by_sweep(arm, validate(arm.config)) is None
    (said,) = caplog.messages
    assert "the arm begun anew: version.gaccum_exp (0.0 there, " in said


def test_a_run_that_failed_is_not_gone_on_with_unless_it_is_named(program: Program) -> None:
    """What it met is there to be met again."""
    killed(program, *ARMS)
    (folder,) = folders(program)
    ended(program, folder, "FAILED")
    assert program(*ARMS).status == 0
    assert len(folders(program)) == 2
    assert program(*ARMS, f"resume={folder}").status == 0
    assert len(folders(program)) == 2


def test_what_was_recorded_and_is_gone_is_trained_again(program: Program) -> None:
    """As where a machine is switched off, with the checkpoint on its disk and not yet the journal."""
    command = (*ARMS, "checkpoint.every_steps=2", "checkpoint.keep=3")
    assert program(*command, "hydra.run.dir=apart").status == 0
    expected = curves(program)
    killed(program, *command, at=8)
    (folder,) = folders(program)
    path = journal_of(program, folder)
    lock = lock_of(path)
    lines = path.read_bytes().splitlines(keepends=True)
    third = next(i for i, line in enumerate(lines) if b"[[3," in line)
    path.write_bytes(b"".join(lines[: third + 1]))
    lock.release()
    done = program(*command)
    assert done.status == 0
    assert "from step 2 of 9" in done.err
    assert "step-00000006 is passed over: what was recorded ends with step 3" in done.err
    assert recorded(program) == expected


def test_two_commands_at_once_do_not_go_on_with_one_run(
    program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lock decides: whoever has not got it begins a run of its own; one that names it is refused."""
    monkeypatch.setattr(resume, "PATIENCE_S", 0.05)
    killed(program, *ARMS)
    (folder,) = folders(program)
    lock = lock_of(journal_of(program, folder))
    try:
        named = program(*ARMS, f"resume={folder}")
        assert named.status == 2
        assert named.lines == [
            f"gaccum_exp: resume={folder}: outputs/{folder} (N=1 · micro 8 · global_mean) is being "
            "trained by another process"
        ]
        assert program(*ARMS).status == 0
    finally:
        lock.release()
    assert len(folders(program)) == 2


def test_a_run_of_another_host_is_left_and_named(
    program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether it lives cannot be known here."""
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(platform, "node", lambda: "elsewhere")
        elsewhere.setattr("gaccum_exp.tracking.journal._boot", lambda: "another")
        killed(program, *ARMS)
    (folder,) = folders(program)
    done = program(*ARMS)
    assert (done.status, len(folders(program))) == (0, 2)
    assert f"outputs/{folder} (N=1 · micro 8 · global_mean) is of elsewhere" in done.err
    assert program(*ARMS, f"resume=outputs/{folder}").status == 0
    assert len(folders(program)) == 2


def test_what_cannot_be_gone_on_with_is_refused_in_a_line(program: Program) -> None:
    """Nothing of that name, another configuration with both values, one that has finished."""
    killed(program, *ARMS)
    (folder,) = folders(program)

    def said(*arguments: str) -> str:
        done = program(*ARMS, *arguments)
        assert (done.status, done.out, len(done.lines)) == (2, "", 1), done
        assert folders(program) == [folder]
        return done.err

    assert "resume=nevr: no such run: give the folder of one, or its id, did you" in said("resume=nevr")
    assert "resume=tests" in said("resume=tests")
    unlike = said(f"resume=outputs/{folder}", "optimizer.lr=0.02", "seed=3")
    assert "another configuration: optimizer.lr (0.1 there, 0.02 here), seed (0 there, 3 here)" in unlike
    assert "must be auto, never" in said("resume=")
    assert "no such run" in said(f"resume={'x' * 5000}")
    control = said(f"resume=outputs/{folder}", "audit.control_seed=3")
    assert "another configuration: audit.control_seed (None there, 3 here)" in control
    assert "goes on with a training, and task=audit is none" in said(f"resume={folder}", "task=audit")
    assert program(*ARMS, f"resume=outputs/{folder}").status == 0
    assert "has finished: nothing is left" in said(f"resume={folder}")


def test_another_n_is_the_same_run_where_it_is_named(program: Program) -> None:
    """The same samples in every step, equal to rounding, and no reference any more."""
    killed(program, *ARMS, "accum.steps=1")
    (folder,) = folders(program)
    while (run_id := Delivered.of(journal_of(program, folder)).run_id) is None:
        time.sleep(0.02)
    done = program(*ARMS, "accum.steps=4", f"resume={run_id}")
    assert f"outputs/{folder} (N=1 · micro 8 · global_mean), at N = 4, from step" in done.err
    assert (done.status, folders(program)) == (0, [folder]), done
    assert any("are equal to rounding" in line for line in done.lines)
    (run,) = program.store().sweep(folder, ("train/loss",))
    assert (run.accum_steps, run.tags["role"], run.micro_batch_sizes) == (4, "candidate", (2, 2, 2, 2))
    assert len(run.curves["train/loss"].values) == 9


def test_a_verdict_that_was_recorded_after_the_last_checkpoint_counts(program: Program) -> None:
    """The worst of both is the run's: an audit that is in the journal is not made again."""
    command = (*ARMS, "checkpoint.every_steps=2", "audit.every_steps=8", "accum.steps=2")
    killed(program, *command, at=13)
    (folder,) = folders(program)
    path = journal_of(program, folder)
    lock = lock_of(path)
    with path.open("ab") as journal:
        journal.write(encoded({"kind": "tags", "tags": {"verdict": "biased", "cause": "batch mixing"}}))
    lock.release()
    done = program(*command)
    assert done.status == 3, done
    assert (
        json.loads((program.folder / "outputs" / folder / "arm.json").read_text())["verdict"] == "biased"
    )


def test_where_a_run_is_recorded_that_goes_on_from_elsewhere(
    program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the store that it was begun in, and that is said."""
    killed(program, *ARMS)
    (folder,) = folders(program)
    (program.folder / "elsewhere").mkdir()
    monkeypatch.chdir(program.folder / "elsewhere")
    named = f"resume={program.folder / 'outputs' / folder}"
    done = program.as_given(*ARMS, named, "tracking.uri=sqlite:///other.db")
    assert done.status == 0, done
    assert f"recorded in {program.uri}, experiment gaccum_exp" in done.err


def test_runs_of_another_user_are_left(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a folder that several users share."""
    killed(program, *ARMS)
    monkeypatch.setattr(os, "getuid", lambda: 4242)
    assert program(*ARMS).status == 0
    assert len(folders(program)) == 2


def test_two_commands_at_once_do_not_train_the_same_controls(
    program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While another process trains those of a reference, a command begins a run of its own."""
    monkeypatch.setattr(resume, "PATIENCE_S", 0.05)
    command = (*ARMS, "accum.steps=1", "audit.controls=1", "audit.at_start=false")
    assert program(*command).status == 0
    (folder,) = folders(program)
    for path in (program.folder / "outputs" / folder).glob("journal-2.*"):
        path.unlink()  # as if the control had not begun
    lock = FileLock.take(program.folder / "outputs" / folder / resume.CONTROLS_LOCK)
    assert lock is not None
    named = program(*command, f"resume={folder}")
    assert (named.status, "are being trained" in named.err) == (2, True)
    assert program(*command).status == 0
    assert len(folders(program)) == 2
    lock.release()
    assert program(*command).status == 0
    assert len(folders(program)) == 2


def test_n_that_was_chosen_stays(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever would fit today."""
    monkeypatch.setattr(
        plan, "with_fitting_accum_steps", lambda own, loaded: (own.with_accum_steps(2), "2 fits")
    )
    killed(program, *ARMS, "accum.steps=auto", at=12)
    monkeypatch.setattr(plan, "with_fitting_accum_steps", None)
    done = program(*ARMS, "accum.steps=auto")
    assert done.status == 0
    assert any("are equal bit for bit" in line for line in done.lines)
    (run,) = program.arms()
    assert (len(folders(program)), run.accum_steps) == (1, 2)
    assert "accum.steps_used" not in run.tags


def test_other_data_are_refused_and_leave_the_run_as_it_was(
    program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once they are what they were, it goes on."""
    killed(program, *ARMS)
    (folder,) = folders(program)
    path = journal_of(program, folder)
    with monkeypatch.context() as changed:
        changed.setattr(life, "digest_of", lambda records: "12345678")
        done = program(*ARMS)
    assert done.status == 2
    assert "its data were" in done.err
    assert "and are 12345678; resume=never" in done.err
    assert "resume" not in {record["kind"] for record in read_journal(path)[0]}
    assert program(*ARMS).status == 0
    assert folders(program) == [folder]


def test_a_run_that_does_not_give_what_it_gave_fails_with_the_step(program: Program) -> None:
    """So every run that goes on shows that it is the one that was interrupted; the next begins anew."""
    command = [line.replace("Killed", "Undecided") for line in ARMS]
    killed(program, *command)
    done = program(*command)
    assert done.status == 1
    assert "failed: step 1: train/loss is" in done.err
    assert "Traceback" not in done.err
    (run,) = program.arms()
    assert run.status == "FAILED"
    assert run.tags["failure"].startswith("step 1: train/loss is")


def test_controls_are_trained_that_were_not_and_none_twice(program: Program) -> None:
    """One that was killed in the middle goes on; a run whose controls are all there has finished."""
    command = (*ARMS, "audit.controls=3", "audit.at_start=false")
    whole = program(*command, "hydra.run.dir=apart")
    assert whole.status == 0
    expected = curves(program)
    helper = shipper.helper_address()
    process = os.fork()
    if process == 0:
        shipper.use_helper(helper)
        seen = []
        begin = Journal.begin

        def begin_or_die(journal: Journal, name: str, **given: Any) -> None:
            seen.append(name)
            begin(journal, name, **given)
            if len(seen) == 3:  # the second control
                os.environ[KILL_AT] = f"5:{int(signal.SIGKILL)}"

        Journal.begin = begin_or_die  # type: ignore[method-assign]
        cli.main([*command, f"tracking.uri={program.uri}"])
        os._exit(0)
    os.waitpid(process, 0)
    (folder,) = folders(program)
    assert program(*command).status == 0
    assert folders(program) == [folder]
    assert curves(program) == expected
    assert [run["status"] for run in expected] == ["FINISHED"] * 4
    went_on = {
        path.stem: sum(record["kind"] == "resume" for record in read_journal(path)[0])
        for path in (program.folder / "outputs" / folder).glob("journal*.jsonl")
    }
    assert went_on == {"journal": 0, "journal-2": 0, "journal-3": 1, "journal-4": 0}
    assert program(*command).status == 0
    assert len(folders(program)) == 2


def test_looking_for_a_run_reads_few_journals(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of runs that have finished nothing but their last record, and of many only the newest."""
    for number in range(5):
        journal = Journal.create(program.folder / "outputs" / str(number), program.uri, "gaccum_exp")
        journal.begin("N=1", params={"seed": 0}, tags={"sweep_id": str(number)}, texts={})
        journal.end("FINISHED")
    looked = []
    monkeypatch.setattr(resume, "LOOKED_THROUGH", 3)
    monkeypatch.setattr(resume, "beginning", lambda path: looked.append(path))
    monkeypatch.setattr(resume, "_may_go_on", lambda *given: looked.append(given[0]))
    assert program(*ARMS).status == 0
    assert len(looked) == 3
