"""A sweep from its first arm to its comparison, whoever launches the arms."""

import csv
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import joblib
import pytest
from mlflow import MlflowClient

from gaccum_exp.arms import child
from gaccum_exp.arms.context import ArmContext
from gaccum_exp.arms.outcome import Outcome
from gaccum_exp.arms.settle import settle
from gaccum_exp.tracking.mlflow_store import Store
from gaccum_exp.tracking.records import RunRecord
from gaccum_exp.train.stopping import Stop
from tests.program import PATIENCE_S, TINY, Ended, Program, environment, in_a_process
from tests.shortened import shortened

pytestmark = pytest.mark.usefixtures("undrawn")

CONTRACT = (
    "run_id,role,accum_steps,micro_batch_size,global_batch_size,reduction,train_loss,eval_loss,eval_accuracy,"
    "max_loss_gap,weight_distance,peak_bytes,peak_ratio,step_s,step_ratio"
)
LAUNCHERS = {
    "joblib": ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2"),
    "submitit": ("hydra/launcher=submitit_local", "hydra.launcher.timeout_min=5"),
    "optuna": (
        # Its grid draws an order, and an arm that fails last is an error of the sweeper's own.
        "hydra/sweeper=optuna", "hydra.sweeper.n_trials=3", "hydra.sweeper.n_jobs=1",
        "hydra/sweeper/sampler=random", "hydra.sweeper.sampler.seed=1",
    ),
}  # fmt: skip


def table(folder: Path) -> list[dict[str, str]]:
    """Return the rows of the one comparison below a folder."""
    (path,) = folder.rglob("comparison.csv")
    with path.open() as file:
        return list(csv.DictReader(file))


def losses(run: RunRecord) -> tuple[float, ...]:
    """Return a run's whole loss curve."""
    return run.curves["train/loss"].values


@pytest.mark.figures
def test_a_sweep_ends_with_a_comparison_and_files(program: Program) -> None:
    """The contract's columns first, figures as SVG and PNG, the table, a sentence, the UI's link."""
    ended = program.tiny("-m", "accum.steps=1,2,4")
    assert ended.status == 0
    assert ended.err.startswith(f"sweep {program.sweep_id}: 3 arms over accum.steps\n")
    assert [line.split("  ")[0] for line in ended.lines if ": 4/4" in line] == [
        "N=1 · 1 of 3: 4/4", "N=2 · 2 of 3: 4/4", "N=4 · 3 of 3: 4/4"
    ]  # fmt: skip
    written = {path.name for path in program.sweep_folder.iterdir() if path.is_file()}
    figures = {
        f"{name}.{kind}" for name in ("loss_curves", "memory", "step_time") for kind in ("svg", "png")
    }
    assert {"comparison.csv", "report.html", *figures} <= written
    header = (program.sweep_folder / "comparison.csv").read_text().splitlines()[0]
    assert header.startswith(CONTRACT + ",")
    rows = table(program.sweep_folder)
    assert [(row["role"], row["accum_steps"], row["micro_batch_size"]) for row in rows] == [
        ("reference", "1", "256"), ("candidate", "2", "128"), ("candidate", "4", "64"),
    ]  # fmt: skip
    # A ratio of step times takes more steps.
    assert all(row[column] for row in rows for column in CONTRACT.removesuffix(",step_ratio").split(","))
    for said in ("Every arm against its reference", "train loss of N = 2 and 4 stays within",
                 str(program.sweep_folder / "comparison.csv"), "#/experiments/"):  # fmt: skip
        assert said in " ".join(ended.out.split())


@pytest.mark.figures
def test_the_report_run_holds_the_files_and_stays_out_of_the_sweep(program: Program) -> None:
    """Tagged `kind=report`, without the tag that the link filters on; figures as was asked for."""
    ended = program.tiny("-m", "accum.steps=1,2", "figures.format=[pdf,svg]", "figures.width=single")
    client = MlflowClient(program.uri)
    (report,) = client.search_runs([program.store().experiment_id], "tags.kind = 'report'")
    assert "sweep_id" not in report.data.tags
    assert report.data.tags["report_of"] == program.sweep_id
    kept = {item.path for item in client.list_artifacts(report.info.run_id)}
    names = ("loss_curves", "memory", "step_time")
    figures = {f"{name}.{kind}" for name in names for kind in ("svg", "pdf")}
    assert {"comparison.csv", "report.html", *figures} <= kept
    assert "memory.png" not in kept
    drawn = (program.sweep_folder / "memory.svg").read_text(encoding="utf-8")
    assert f'width="{72 * 3.5:g}pt"' in drawn, "as the arms were configured"
    assert ended.out.count("memory.") == 1, "a figure is named once"
    assert len(program.arms()) == 2


def test_every_arm_holds_in_the_store_how_far_it_is_from_its_reference(program: Program) -> None:
    """The table's numbers, at the time of the loss; again by a report it is the same."""
    program.tiny("-m", "accum.steps=1,2")
    client, stored = MlflowClient(program.uri), []
    for _ in range(2):
        rows = {row["run_id"]: row for row in table(program.sweep_folder)}
        for run_id, row in rows.items():
            run = client.get_run(run_id)
            assert run.info.status == "FINISHED"
            assert run.data.metrics["memory/peak_ratio"] == float(row["peak_ratio"])
            gaps, losses = (
                client.get_metric_history(run_id, key) for key in ("train/loss_gap", "train/loss")
            )
            stored.append((run_id, sorted((of.step, of.timestamp, of.value) for of in gaps)))
            if row["role"] == "reference":
                assert gaps == []
            else:
                assert max(of.value for of in gaps) == float(row["max_loss_gap"])
                assert {(of.step, of.timestamp) for of in gaps} == {
                    (of.step, of.timestamp) for of in losses
                }
        assert program.report(program.sweep_id).status == 0
    assert stored[:2] == stored[2:]
    assert not list(program.sweep_folder.rglob("*.lock"))


def test_run_names_say_what_the_sweep_varies(program: Program) -> None:
    """First, since lists cut names: then N, micro-batch and reduction; a swapped block by its file."""
    program("-m", "model=mlp,cnn", "optimizer.lr=0.1", "seed=0,1", "train.steps=1", "runtime.device=cpu")
    assert {run.name for run in program.arms()} == {
        f"model={model} · seed={seed} · N=1 · micro 256 · global_mean"
        for model in ("mlp", "cnn")
        for seed in (0, 1)
    }


@pytest.mark.slow
@pytest.mark.parametrize("launcher", shortened(LAUNCHERS, ["joblib"]))
def test_every_launcher_ends_in_a_comparison_of_all_arms(home: Path, launcher: str) -> None:
    """Side by side in processes, through submitit, or one by one at a sweeper's wish; one arm fails."""
    steps = "accum.steps=choice(1,0,2)" if launcher == "optuna" else "accum.steps=1,0,2"
    ended = in_a_process(home, "-m", *LAUNCHERS[launcher], *TINY, steps)
    assert ended.status == 1, ended.err
    assert "Traceback" not in ended.err
    rows = table(home / "multirun")
    finished = [(row["accum_steps"], row["role"]) for row in rows if row["status"] == "FINISHED"]
    assert finished == [("1", "reference"), ("2", "candidate")]
    assert [row["failure"] for row in rows if row["status"] == "FAILED"] == [
        "accum.steps=0: must be at least 1"
    ]
    (sweep,) = (home / "multirun").iterdir()
    runs = Store(f"sqlite:///{home / 'mlflow.db'}", "gaccum_exp").sweep(sweep.name)
    assert sorted(run.name for run in runs)[:2] == [
        "N=1 · micro 256 · global_mean", "N=2 · micro 128 · global_mean"
    ]  # fmt: skip
    words = [run.overrides for run in runs if run.params]
    assert sorted(map(sorted, words)) == [sorted([*TINY, f"accum.steps={n}"]) for n in (1, 2)]
    ended_as = [json.loads(path.read_text()) for path in home.rglob("arm.json")]
    assert [o["name"] for o in ended_as if o["status"] == "FAILED"] == ["accum.steps=0"]


def elsewhere(monkeypatch: pytest.MonkeyPatch, *here: str) -> None:
    """Let the jobs of a sweep, but for those of these folders, share none with the command."""
    run_job = child.run_job

    def run(context: ArmContext, stop: Stop, outcomes: dict[Path, Outcome], helper: str | None) -> None:
        if context.place in here:
            run_job(context, stop, outcomes, helper)
            return
        run_job(context, stop, {}, helper)
        settle([context.folder])
        while context.folder.exists():  # the helper may remove a lock's file at this moment
            shutil.rmtree(context.folder, ignore_errors=True)

    monkeypatch.setattr(child, "run_job", run)


@pytest.mark.slow
def test_arms_that_leave_no_folder_are_judged_and_compared_from_the_store(
    program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a launcher runs them on hosts that share none with the command."""
    elsewhere(monkeypatch)
    ended = program.tiny("-m", "accum.steps=1,2,0")
    assert ended.status == 1
    assert "N = 2 is equivalent" in ended.plain
    assert [row["status"] for row in table(program.folder / "multirun")].count("FINISHED") == 2
    assert program.tiny("-m", "accum.steps=1,2").status == 0


@pytest.mark.slow
def test_arms_of_which_some_leave_no_folder_are_all_judged_and_none_runs_again(
    program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a queue's head node takes jobs, too; the one that fails does so elsewhere."""
    elsewhere(monkeypatch, "0")
    ended = program.tiny("-m", "accum.steps=1,2,0")
    assert (ended.status, "N = 2 is equivalent" in ended.plain) == (1, True)
    assert [row["status"] for row in table(program.folder / "multirun")].count("FINISHED") == 2
    again = program.tiny("-m", "accum.steps=1,2", f"sweep.resume={program.sweep_id}")
    assert "3 of 3 arms begun have ended, 1 by a fault of their own" in again.err
    assert (again.status, len(table(program.sweep_folder))) == (1, 3)
    assert len(program.arms()) == 3


@pytest.mark.slow
def test_arms_side_by_side_share_the_threads(home: Path) -> None:
    """Two at a time have half of the cores each; their names know what the sweep varies all the same."""
    free = {key: value for key, value in environment().items() if key != "OMP_NUM_THREADS"}
    rates = "optimizer.lr=0.1,0.2"
    command = [sys.executable, "-m", "gaccum_exp", "-m", *TINY, rates, *LAUNCHERS["joblib"]]
    subprocess.run(command, cwd=home, env=free, check=True, timeout=PATIENCE_S)
    client = MlflowClient(f"sqlite:///{home / 'mlflow.db'}")
    (experiment,) = client.search_experiments(filter_string="name = 'gaccum_exp'")
    runs = client.search_runs([experiment.experiment_id], "tags.kind = 'arm'")
    assert [run.data.tags["threads"] for run in runs] == [str(max(1, joblib.cpu_count() // 2))] * 2
    assert sorted(run.info.run_name.partition(" · ")[0] for run in runs) == ["lr=0.1", "lr=0.2"]
    (sweep_id,) = {run.data.tags["sweep_id"] for run in runs}
    assert (home / "multirun" / sweep_id / "comparison.csv").exists()
    overrides = sorted(run.data.tags["overrides"] for run in runs)
    assert overrides == [shlex.join([*TINY, f"optimizer.lr={rate}"]) for rate in ("0.1", "0.2")]


@pytest.mark.slow
def test_sweeps_begun_at_the_same_time_do_not_mix(tmp_path: Path, empty_store: Path) -> None:
    """Two processes, one working directory and one store: each compares its own arms."""
    shutil.copyfile(empty_store, tmp_path / "mlflow.db")
    pair = [
        subprocess.Popen(
            [sys.executable, "-m", "gaccum_exp", "-m", *TINY, f"accum.steps=1,{n}"],
            cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for n in (2, 4)
    ]  # fmt: skip
    streams = [process.communicate(timeout=PATIENCE_S) for process in pair]
    ended = [Ended(process.returncode, *said) for process, said in zip(pair, streams, strict=True)]
    assert [e.status for e in ended] == [0, 0], [e.err for e in ended]
    folders = [path for path in (tmp_path / "multirun").iterdir() if path.is_dir()]
    compared = sorted([row["accum_steps"] for row in table(folder)] for folder in folders)
    assert compared == [["1", "2"], ["1", "4"]]


def test_an_arm_has_the_same_curve_alone_and_last_in_a_sweep(program: Program) -> None:
    """Bit for bit on a CPU: nothing of the arms before it is left in the process."""
    program.tiny("accum.steps=4", "model.dropout=0.2")
    (alone,) = program.arms()
    program.tiny("-m", "seed=3,0", "optimizer=adamw,sgd", "accum.steps=4", "model.dropout=0.2")
    last = max(program.arms(), key=lambda run: run.start_time_ms)
    assert (last.params["optimizer._target_"], last.params["seed"]) == ("torch.optim.SGD", "0")
    assert losses(last) == losses(alone)
    assert last.curves["eval/loss"] == alone.curves["eval/loss"]
    memory = [k for k in alone.metrics if k.startswith("memory/") and "resident" not in k]
    assert [last.metrics[k] for k in memory] == [alone.metrics[k] for k in memory] != []


def test_the_threads_of_one_arm_are_not_left_to_the_next(program: Program) -> None:
    """Each arm runs on what its configuration says, and records it."""
    program.tiny("-m", "runtime.threads=1,2,null", "train.steps=1")
    threads = [run.tags["threads"] for run in sorted(program.arms(), key=lambda r: r.start_time_ms)]
    assert threads[:2] == ["1", "2"]
    assert threads[2] == os.environ.get("OMP_NUM_THREADS", threads[2])


def test_a_sweep_without_one_pass_is_compared_with_a_finished_one_of_the_store(program: Program) -> None:
    """The earlier run's curve is read back too: the gap is measured over all steps."""
    program.tiny("accum.steps=1")
    (reference,) = program.arms()
    program.tiny("accum.steps=1", "seed=1")  # a later one that is not the same experiment
    ended = program.tiny("-m", "accum.steps=2,4")
    rows = table(program.sweep_folder)
    assert {row["reference_run_id"] for row in rows} == {reference.run_id}
    assert {row["reference_source"] for row in rows} == {"stored"}
    assert {row["common_steps"] for row in rows} == {"4"}
    arms = {run.run_id: run for run in program.arms()}
    for row in rows:
        pairs = zip(losses(arms[row["run_id"]]), losses(reference), strict=True)
        assert float(row["max_loss_gap"]) == max(abs(a - b) for a, b in pairs)
        assert float(row["weight_distance"]) < 1e-3
    assert "the stored run" in " ".join(ended.out.split())


def test_where_nothing_ran_in_one_pass_the_largest_micro_batch_stands_in(program: Program) -> None:
    """And table and note say so."""
    ended = program.tiny("-m", "accum.steps=2,4,8")
    rows = table(program.sweep_folder)
    assert [(row["accum_steps"], row["role"]) for row in rows] == [
        ("2", "stand-in"), ("4", "candidate"), ("8", "candidate"),
    ]  # fmt: skip
    assert "stands in for the one-pass reference" in " ".join(ended.out.split())


def test_a_stored_run_that_failed_is_no_reference(program: Program) -> None:
    """Only what trained to its end is compared with."""
    stranger = ("data=custom", "data.train._target_=tests.strangers.Points", "data.global_batch_size=8",
                "model=custom", "model._target_=tests.strangers.Diverging", "train.steps=6",
                "runtime.device=cpu")  # fmt: skip
    assert program(*stranger).status == 1
    program("-m", *stranger, "accum.steps=2,4")
    assert {row["reference_source"] for row in table(program.sweep_folder)} == {"none"}


@pytest.mark.figures
def test_a_sweep_over_global_batches_compares_them_too(program: Program) -> None:
    """A table of their own, a file and a figure, at equal samples although windows are partial."""
    ended = program.tiny(
        "-m", "data.global_batch_size=100,1000", "data.micro_batch_size=100", "accum.steps=null",
        "train.steps=null", "train.epochs=2", "audit.at_start=false",
    )  # fmt: skip
    assert ended.status == 0
    with (program.sweep_folder / "batches.csv").open() as file:
        small, large = csv.DictReader(file)
    runs = program.store().sweep(program.sweep_id, ("eval/loss",))
    (samples,) = {run.training_samples for run in runs}
    assert float(small["equal_samples"]) == 2 * (samples or 0)
    last = [run.curves["eval/loss"].values[-1] for run in runs]
    assert [float(row["loss_at_equal_samples"]) for row in (small, large)] == last
    assert "Global batches, each at its best learning rate" in ended.out
    assert (program.sweep_folder / "batches.png").exists()
