"""The engines that sweeps run on beside Hydra's own: Ray, Slurm, Optuna with a database."""

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from torch import Tensor

from gaccum_exp.tracking.journal import beginning, read_journal
from tests.arms.test_continued import POINTS, once, rows
from tests.arms.test_sweep import table
from tests.program import PATIENCE_S, TINY, Ended, environment, in_a_process
from tests.slurm import slurm, why_not
from tests.strangers import Net

RAY = (
    "hydra/launcher=ray", "+hydra.launcher.ray.init.address=local",
    "+hydra.launcher.ray.init.num_cpus=2", "+hydra.launcher.ray.init.include_dashboard=false",
)  # fmt: skip
HERE = "tests.arms.test_engines"


class Requeued(Net):
    """Once, the batch system says that time is up: to the process that waits for the arm's."""

    def __init__(self) -> None:
        super().__init__()
        self.passes = 0

    def forward(self, x: Tensor) -> Tensor:
        self.passes += self.training and len(x) == 4
        if self.passes == 6 and once():
            os.kill(os.getppid(), signal.SIGUSR2)
            time.sleep(1)
        return super().forward(x)


def ends_of(folder: Path) -> list[tuple[str, str | None]]:
    """Return status and failure of the runs of an arm, in the order in which they were begun."""
    journals = sorted(folder.glob("journal*.jsonl"), key=lambda p: beginning(p)[1]["time_ms"])
    records = [read_journal(path)[0] for path in journals]  # behind the end is what was compared
    ends = [next(record for record in reversed(of) if "status" in record) for of in records]
    return [(end["status"], end["failure"]) for end in ends]


@pytest.mark.engines
def test_a_job_that_the_batch_system_ends_is_requeued_and_goes_on(tmp_path: Path) -> None:
    """Its arm ends first, KILLED; only then submitit's own handler gives the job back to the queue."""
    ended = in_a_process(
        tmp_path, "-m", "hydra/launcher=submitit_local", "hydra.launcher.timeout_min=60", *POINTS,
        f"model._target_={HERE}.Requeued", "accum.steps=1,2",
    )  # fmt: skip
    assert ended.status == 0, ended.err
    (sweep,) = (tmp_path / "multirun").iterdir()
    assert rows(sweep) == {"1": "FINISHED", "2": "FINISHED"}
    assert ends_of(sweep / "1")[-1] == ("FINISHED", None)
    logs = "".join(path.read_text() for path in sweep.glob(".submitit/*/*log.*"))
    assert "gaccum_exp: interrupted (SIGUSR2): waiting up to" in logs
    assert "this job is preempted" in logs


@pytest.mark.engines
def test_ray_runs_a_sweep_and_goes_on_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Started here, for this sweep: one comparison over all, one arm fails; then one is added."""
    if importlib.util.find_spec("ray") is None:
        pytest.skip("ray is not installed (it is in the extra `launchers`)")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    ended = in_a_process(tmp_path, "-m", *RAY, *TINY, "accum.steps=1,0,2")
    assert ended.status == 1, ended.err
    assert "Traceback" not in ended.err
    (sweep,) = (tmp_path / "multirun").iterdir()
    assert sorted(row["status"] for row in table(sweep)) == ["FAILED", "FINISHED", "FINISHED"]
    again = in_a_process(tmp_path, "-m", *RAY, *TINY, "accum.steps=1,2,4", f"sweep.into={sweep.name}")
    assert again.status == 1, again.err  # for the one that failed
    assert [row["accum_steps"] for row in table(sweep) if row["status"] == "FINISHED"] == ["1", "2", "4"]
    begun = [path for path in sweep.rglob("journal*.jsonl") if path.parent != sweep]
    assert len(begun) == 4


def of_study(folder: Path, statement: str) -> str:
    """Make the study, or open it, and return what a statement prints of it: Optuna's imports warn."""
    program = (
        "import optuna; storage = optuna.storages.RDBStorage('sqlite:///study.db', "
        "engine_kwargs={'isolation_level': 'AUTOCOMMIT'}); study = optuna.create_study("
        f"study_name='shared', storage=storage, load_if_exists=True); {statement}"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
    return done.stdout


@pytest.mark.engines
def test_workers_of_one_optuna_study_share_its_database(tmp_path: Path) -> None:
    """Two commands at once, each with trials of its own; one report over both."""
    storage = (
        "hydra.sweeper.storage={_target_: optuna.storages.RDBStorage, url: 'sqlite:///study.db', "
        "engine_kwargs: {isolation_level: AUTOCOMMIT}}"
    )
    line = [
        sys.executable, "-m", "gaccum_exp", "-m", *TINY, "hydra/sweeper=optuna", storage,
        "hydra.sweeper.study_name=shared", "hydra.sweeper.n_trials=2", "hydra.sweeper.n_jobs=1",
        "hydra/sweeper/sampler=random", "accum.steps=choice(1,2,4)", "optimizer.lr=interval(0.05,0.2)",
    ]  # fmt: skip
    of_study(tmp_path, "")
    pair = [
        subprocess.Popen(
            line, cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]  # fmt: skip
    said = [process.communicate(timeout=PATIENCE_S) for process in pair]
    assert [process.returncode for process in pair] == [0, 0], said
    numbers = of_study(tmp_path, "print(sorted(t.number for t in study.trials if t.value is not None))")
    assert numbers == "[0, 1, 2, 3]\n"
    sweeps = sorted(path.name for path in (tmp_path / "multirun").iterdir())
    report = in_a_process(tmp_path, "report", *sweeps)
    assert report.status == 0, report.err
    assert len(table(tmp_path / "reports")) == 4


@pytest.fixture
def cluster(tmp_path_factory: pytest.TempPathFactory) -> object:
    """Give the variables of a Slurm of one node."""
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)
    with slurm(tmp_path_factory.mktemp("slurm")) as variables:
        yield variables


def _of_slurm(cluster: dict[str, str], *command: str) -> str:
    done = subprocess.run(
        command, env=os.environ | cluster, capture_output=True, text=True, timeout=30, check=True
    )
    return done.stdout


@pytest.mark.engines
def test_slurm_runs_a_sweep_and_requeues_an_arm(tmp_path: Path, cluster: dict[str, str]) -> None:
    """SIGTERM ends the arm of the job that is requeued: KILLED; then it runs to its end, compared."""
    command = [
        sys.executable, "-m", "gaccum_exp", "-m", "hydra/launcher=submitit_slurm",
        "hydra.launcher.partition=test", "hydra.launcher.timeout_min=240",
        "hydra.launcher.max_num_timeout=20", *POINTS, "accum.steps=1,2",
        "train.steps=60", "model._target_=tests.arms.test_signals.Paced",
    ]  # fmt: skip
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment() | cluster, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    deadline = time.monotonic() + PATIENCE_S
    while not any('"points"' in p.read_text() for p in tmp_path.glob("multirun/*/1/journal.jsonl")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    jobs = _of_slurm(cluster, "squeue", "-h", "-r", "-o", "%i").split()
    (job,) = (job for job in jobs if job.endswith("_1"))
    _of_slurm(cluster, "scontrol", "requeue", job)
    (sweep,) = (tmp_path / "multirun").iterdir()
    while "RUNNING" in (text := (sweep / "1" / "arm.json").read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert (json.loads(text)["status"], json.loads(text)["reason"]) == (
        "KILLED",
        "interrupted (SIGTERM)",
    )
    while "PENDING" not in _of_slurm(cluster, "squeue", "-h", "-j", job, "-o", "%T"):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    _of_slurm(cluster, "scontrol", "update", f"jobid={job}", "starttime=now")  # not in two minutes
    out, err = process.communicate(timeout=PATIENCE_S)
    ended = Ended(process.returncode, out, err)
    assert ended.status == 0, ended.err
    assert rows(sweep) == {"1": "FINISHED", "2": "FINISHED"}
    assert len(ends_of(sweep / "0")) == 1
    assert ends_of(sweep / "1")[-1] == ("FINISHED", None)
    assert re.search(r"train loss of N = 2 .+ that of the one-pass arm", ended.plain)
