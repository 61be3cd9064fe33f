"""The command line: what bad input is answered with, and how a run or a sweep ends."""

import gc
import logging
import os
import random
import re
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from matplotlib.figure import Figure

from gaccum_exp import cli
from gaccum_exp.tracking import shipper
from tests.program import TINY, Program, environment

pytestmark = pytest.mark.usefixtures("undrawn")

POINTS = ("data=custom", "data.train._target_=tests.strangers.Points", "data.global_batch_size=8",
          "runtime.device=cpu")  # fmt: skip
LAZY = """
import sys
from gaccum_exp.cli import main
for arguments in {calls}:
    status = main(arguments)
    print("ENDED", status, *sorted({{"torch", "mlflow", "numpy"}} & set(sys.modules)))
"""


def one_line(program: Program, *arguments: str) -> str:
    """Run what must fail as bad input and return the one line that it leaves on stderr."""
    ended = program(*arguments)
    assert ended.status == 2
    assert "Traceback" not in ended.plain
    (line,) = ended.lines
    return line


def test_help_and_configuration_errors_do_not_wait_for_torch_or_mlflow(tmp_path: Path) -> None:
    """Help, unknown keys, values and files, in a single run and in a sweep: answered at once."""
    calls = [
        (0, ["--help"]),
        (0, ["--cfg", "job"]),
        (2, ["accum.stepz=2"]),
        (2, ["+accum.stepz=2"]),
        (2, ["accum.steps=0"]),
        (2, ["accum.steps=many"]),
        (2, ["modle=cnn"]),
        (2, ["model=cnnn"]),
        (2, ["data.global_batch_size=8", "accum.steps=9"]),
        (2, ["-m", "accum.stepz=1,2"]),
        (2, ["seed=0", "-m", "model=cnnn,mlp"]),
    ]
    program = LAZY.format(calls=[arguments for _, arguments in calls])
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment(), capture_output=True, text=True
    )
    ended = [line.split() for line in done.stdout.splitlines() if line.startswith("ENDED")]
    assert ended == [["ENDED", str(status)] for status, _ in calls], done.stderr
    assert len(done.stderr.splitlines()) == sum(status == 2 for status, _ in calls)
    assert not (tmp_path / "mlflow.db").exists()


def test_help_names_the_blocks_and_the_seven_keys(program: Program) -> None:
    """What a newcomer needs stands on the first page."""
    ended = program.as_given("--help")
    assert ended.status == 0
    models = "model: cnn, custom, gpt, mlp, timm, torchvision, transformers"
    for word in (models, "accum.reduction", "data.global_batch_size"):
        assert word in ended.plain


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["accum.stepz=3"], "accum.stepz: no such key, did you mean 'accum.steps'?"),
        (["+accum.stepz=3"], "accum.stepz: no such key, did you mean 'steps'?"),
        (["~accum.stepz"], "accum.stepz: no such key, did you mean 'accum.steps'?"),
        (["model=mlp", "model.hiden=[8]"], "model.hiden: no such key, did you mean 'model.hidden'?"),
        (["model=mlp", "+model.hiden=[8]"], "takes no 'hiden' (it takes hidden, "),
        (["+optimizer.momentun=0.9"], "did you mean 'momentum'?"),
        (["+criterion.label_smothing=0.1"], "did you mean 'label_smoothing'?"),
        (["modle=cnn"], "modle: no such key, did you mean 'model'?"),
        (["model=cnnn"], "model=cnnn: not one of cnn, custom, gpt, mlp, timm, torchvision, tr"),
        (["optimizer=adm"], "optimizer=adm: not one of adam, adamw, custom, muon, sgd, did you"),
        (["experiment=equivalense"], "did you mean 'equivalence'?"),
        (["accum.reduction=men"], "accum.reduction=men: not one of global_mean, mean, sum, did you"),
        (["accum.steps=0"], "accum.steps=0: must be at least 1"),
        (["accum.steps=-3"], "accum.steps=-3: must be at least 1"),
        (["accum.steps=2.5"], "accum.steps=2.5: not an integer, null or auto"),
        (["accum.steps=two"], "accum.steps=two: not an integer, null or auto"),
        (
            ["data.global_batch_size=33", "accum.steps=64"],
            "data.global_batch_size=33 cannot be split into accum.steps=64 micro-batches",
        ),
        (
            ["data.global_batch_size=256", "data.micro_batch_size=32", "accum.steps=4"],
            "data.global_batch_size=256, data.micro_batch_size=32 and accum.steps=4 do not fit",
        ),
        (["runtime.device=gpu"], "runtime.device=gpu: no such device"),
        (["runtime.device=cuda:99"], "runtime.device=cuda:99: not on this machine"),
        (["model.width"], "model.width: cannot be read as key=value"),
        (["data=custom", "data.train._target_=tests.strangers.Points", "+data.train.samples=0"],
         "data.train is empty: it holds 0 samples"),
        (["data.global_batch_size=2000", "accum.partial_window=drop"],
         "data.train holds 1442 samples, fewer than data.global_batch_size=2000"),
        (["data.global_batch_size=2000", "accum.partial_window=error"],
         "accum.partial_window=error: data.train holds 1442 samples, which data.global_batch_size=2000"),
        (["data=imagefolder", "data.root=photos"], "image folder photos/train does not exist"),
        (["data=cifar10", "data.download=false"], "data set CIFAR10 is missing or damaged in "),
        (["criterion=custom", "criterion._target_=torch.nn.Softmax"],
         "criterion Softmax has no attribute `reduction`"),
        (["criterion=custom", "criterion._target_=torch.nn.CTCLoss"],
         "accum.reduction=global_mean is refused for criterion CTCLoss"),
        (["model=custom", "model._target_=collections.Counter"],
         "model._target_=collections.Counter: gives Counter, not a torch.nn.modules.module.Module"),
        (["optimizer=custom", "optimizer._target_=collections.Counter", "~optimizer.lr"],
         "optimizer._target_=collections.Counter: gives Counter, not a torch.optim.optimizer.Optimizer"),
        (["data=custom", "data.train._target_=tests.strangers.Net"],
         "data.train._target_=tests.strangers.Net: gives Net, not a map-style dataset"),
        (["criterion=custom", "criterion._target_=collections.Counter"],
         "criterion._target_=collections.Counter: gives Counter, neither a torch.nn module nor"),
        (["scheduler._target_=builtins.id"],
         "scheduler._target_=builtins.id: gives int, not a torch.optim.lr_scheduler.LRScheduler"),
        (["model=custom", "model._target_=no_such_package.Net"], "no_such_package"),
        (["tracking.uri=ftp://127.0.0.1"], "tracking.uri=ftp://127.0.0.1: cannot be used"),
    ],
)  # fmt: skip
def test_bad_input_is_answered_in_one_line(program: Program, arguments: list[str], said: str) -> None:
    """The line names the key, with the nearest valid one or the numbers; the exit status is 2."""
    tiny = [] if any(a.startswith("model") for a in arguments) else list(TINY[:2])
    assert said in one_line(program, *tiny, "train.steps=2", *arguments)


def test_a_store_that_cannot_be_used_refuses_a_whole_sweep_once(program: Program) -> None:
    """Not once for every arm, and nothing is trained that could not be recorded."""
    line = one_line(program, "-m", *TINY, "accum.steps=1,2,4", "tracking.uri=ftp://127.0.0.1")
    assert line.startswith("gaccum_exp: tracking.uri=ftp://127.0.0.1: cannot be used")
    assert not list(program.folder.rglob("arm.json"))


def test_a_sweep_whose_store_is_away_ends_with_its_table_and_how_to_deliver_it(
    program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Status 0 and one line about it; delivered later, the store holds what it would have held."""
    monkeypatch.setattr(shipper, "GRACE_S", 0.5)
    away = "http://127.0.0.1:9"
    ended = program.tiny("-m", "accum.steps=1,2", f"tracking.uri={away}")
    assert ended.status == 0
    assert len([line for line in ended.lines if away in line and "keep what is recorded" in line]) == 1
    assert "N = 2 is equivalent" in ended.plain
    folder = program.sweep_folder
    command = f"python -m gaccum_exp deliver multirun/{folder.name}"
    assert ended.out.endswith(f"Not in the store yet; once it is back: {command}\n")
    assert cli.main(["deliver", f"multirun/{folder.name}", "--uri", program.uri]) == 0
    assert [run.status for run in program.arms()] == ["FINISHED", "FINISHED"]
    folder.rename(program.folder / "gone")
    assert program.report(folder.name, "--out", "later").status == 0
    made = (program.folder / where / "comparison.csv" for where in ("gone", "later"))
    # Till then a run was known by its journal's own id.
    first, again = (re.sub("[0-9a-f]{32}", "id", path.read_text()) for path in made)
    assert first == again


def test_a_sweep_goes_on_after_an_arm_that_cannot_run(program: Program) -> None:
    """Refused before it starts or while it is built: named with its reason, FAILED, and status 1."""
    ended = program.tiny("-m", "accum.steps=1,0,2", "data.global_batch_size=100")
    assert ended.status == 1
    assert "accum.steps=0: must be at least 1" in ended.lines
    refused, *others = sorted(program.arms(), key=lambda run: run.status)
    assert (refused.status, refused.tags["failure"]) == ("FAILED", "accum.steps=0: must be at least 1")
    assert [(run.status, run.params["accum.steps"]) for run in others] == [
        ("FINISHED", "1"),
        ("FINISHED", "2"),
    ]
    assert "Run 'accum.steps=0' failed (must be at least 1)." in " ".join(ended.out.split())

    ended = program.tiny("-m", "model.activation=relu,rellu,tanh")
    assert ended.status == 1
    (line,) = [line for line in ended.lines if "failed" in line]
    assert (
        "activation=rellu · N=1 · micro 256 · global_mean failed: model.activation=rellu is none of "
        in line
    )
    assert sorted(run.status for run in program.arms()) == ["FAILED", "FINISHED", "FINISHED"]


def test_a_loss_that_is_no_number_fails_its_run_with_the_step_and_keeps_the_curve(
    program: Program,
) -> None:
    """The other arm of the sweep finishes, and the sweep ends with status 1."""
    models = "model._target_=tests.strangers.Diverging,tests.strangers.Net"
    ended = program("-m", "model=custom", models, *POINTS, "train.steps=6")
    assert ended.status == 1
    failed, finished = sorted(program.arms(), key=lambda run: run.status)
    assert (failed.status, finished.status) == ("FAILED", "FINISHED")
    assert failed.tags["failure"] == "train/loss is nan at step 4"
    steps, values = failed.curves["train/loss"].global_steps, failed.curves["train/loss"].values
    assert steps == (1, 2, 3, 4)
    assert values[:3] == finished.curves["train/loss"].values[:3]
    assert values[3] != values[3]


def test_a_program_error_is_a_failed_run_whose_traceback_is_kept(program: Program) -> None:
    """The terminal has a line with the reason, the run's folder the whole story; status 1."""
    ended = program("model=custom", "model._target_=tests.program.Broken", *POINTS)
    assert ended.status == 1
    assert f"recorded in {program.uri}, experiment gaccum_exp" in ended.lines
    assert ended.err.startswith(f"run {program.sweep_id}: N=1 · micro 8 · global_mean\n")
    assert any(line.endswith("failed: RuntimeError: a fault of its own") for line in ended.lines)
    assert len(ended.lines) == 3
    assert "with details" in (program.sweep_folder / "traceback.txt").read_text()
    (run,) = program.arms()
    assert (run.status, run.tags["failure"]) == ("FAILED", "RuntimeError: a fault of its own")
    assert run.curves["train/loss"].global_steps == (1, 2, 3)


def test_an_interrupted_run_is_killed(program: Program) -> None:
    """Exit status 130, and the losses up to there are kept."""
    ended = program("model=custom", "model._target_=tests.program.Interrupted", *POINTS)
    assert ended.status == 130
    assert "Traceback" not in ended.plain
    (run,) = program.arms()
    assert run.status == "KILLED"
    assert run.curves["train/loss"].global_steps == (1, 2, 3)


def test_a_single_run_is_recorded_and_not_compared(program: Program) -> None:
    """There is nothing to compare it with; status 0."""
    ended = program.tiny("accum.steps=2")
    assert ended.status == 0
    assert not list(program.folder.rglob("comparison.csv"))
    assert [run.status for run in program.arms()] == ["FINISHED"]


def test_output_folders_are_hydras(program: Program) -> None:
    """`hydra.run.dir` for a run, `hydra.sweep.dir` for a sweep and its comparison."""
    assert program.tiny("hydra.run.dir=here/one").status == 0
    assert (program.folder / "here/one/arm.json").exists()
    assert program.tiny("-m", "accum.steps=1,2", "hydra.sweep.dir=here/many").status == 0
    assert (program.folder / "here/many/1/arm.json").exists()
    assert (program.folder / "here/many/comparison.csv").exists()
    assert not (program.folder / "outputs").exists()
    assert not (program.folder / "multirun").exists()


def test_a_sweep_is_not_judged_by_what_another_left_in_its_folder(program: Program) -> None:
    """The same `hydra.sweep.dir` again, after a sweep of more arms of which one failed."""
    assert program.tiny("-m", "accum.steps=1,0", "hydra.sweep.dir=here").status == 1
    assert program.tiny("-m", "accum.steps=1", "hydra.sweep.dir=here").status == 0


@pytest.mark.figures
def test_the_report_command_rebuilds_the_same_comparison(
    program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From journals or the store alone, byte for byte; in `reports/<sweep_id>` unless told otherwise.

    Ctrl-C while a figure is written is one line and status 130, and leaves no part of a file.
    """
    program.tiny("-m", "accum.steps=1,2,4")
    made = (program.sweep_folder / "comparison.csv").read_bytes()
    page = (program.sweep_folder / "report.html").read_bytes()
    ended = program.report(program.sweep_id)
    assert ended.status == 0
    assert "Every arm against its reference" in ended.out
    folder = program.folder / "reports" / program.sweep_id
    assert (folder / "comparison.csv").read_bytes() == made
    assert (folder / "report.html").read_bytes() == page
    assert (folder / "loss_curves.svg").exists()
    sweep_id, folder = program.sweep_id, program.sweep_folder
    ended = program.report(sweep_id, "--out", "chosen", "--format", "md,pdf", "--format=latex")
    written = {path.name for path in (program.folder / "chosen").glob("[!j]*")}
    figures = {f"{name}.pdf" for name in ("loss_curves", "memory", "step_time")}
    assert {"comparison.md", "comparison.tex"} < written <= {"comparison.md", "comparison.tex", *figures}
    assert f"Sweep {sweep_id}:\n  " in ended.out
    listed = program.as_given("report").out
    folder.rename(program.folder / "away")
    assert program.report(sweep_id, "--out", "elsewhere").status == 0
    assert (program.folder / "elsewhere/comparison.csv").read_bytes() == made
    assert (program.folder / "elsewhere/report.html").read_bytes() == page
    for out in (listed, program.report().out):  # from the journals, and from the store
        (line,) = [line for line in out.splitlines() if line.startswith(sweep_id)]
        assert line.split()[-4:] == ["mlp", "N=1,2,4", "2", "equivalent"]
    monkeypatch.setattr(Figure, "savefig", _half_of_it)
    ended = program.report(sweep_id, "--out", "broken", "--format", "csv,svg")
    assert (ended.status, ended.lines) == (130, ["gaccum_exp report: interrupted"])
    assert [path.name for path in (program.folder / "broken").iterdir()] == ["comparison.csv"]


def _half_of_it(figure: Figure, path: Path, **options: Any) -> None:
    path.write_text("<svg")
    raise KeyboardInterrupt


def test_the_report_of_an_unknown_sweep_is_one_line(program: Program) -> None:
    """With the name and the store that was searched; nothing is written."""
    program.tiny()
    ended = program.report("20990101-000000-abcdef")
    assert ended.status == 2
    said = f"no such sweep in multirun/, outputs/ or {program.uri}"
    assert ended.lines == [f"gaccum_exp report: 20990101-000000-abcdef: {said}"]
    assert not (program.folder / "reports").exists()
    ended = program.report("20990101-000000-abcdef", "--format=html,odt")
    assert (ended.status, ended.lines) == (
        2, ["gaccum_exp report: --format=odt: none of html, md, latex, csv, pdf, svg, png"]
    )  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--format=html",), "--format: of no sweep; give its id (gaccum_exp report lists them)"),
        (("--out=x",), "--out: of no sweep; give its id (gaccum_exp report lists them)"),
        (("a", "--format=HTML", "--out=f"), "--out=f: is a file, not a folder"),
        (("a", "--out=f/g/h"), "--out=f/g/h: f is a file, not a folder"),
    ],
)
def test_what_a_report_cannot_use_is_refused_before_a_store_is_opened(
    program: Program, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], said: str
) -> None:
    """In a line that names it; the case of a format does not matter."""
    monkeypatch.chdir(program.folder)
    Path("f").touch()
    ended = program.as_given("report", *arguments)
    assert (ended.status, ended.lines) == (2, [f"gaccum_exp report: {said}"])


def test_a_sweeper_that_gives_up_does_not_take_the_comparison_with_it(
    program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its arms are compared, and its error is a line; raw, it is raised after that."""

    def give_up(*args: object, **kwargs: object) -> None:
        raise RuntimeError("the sweeper is tired")

    monkeypatch.setattr("hydra._internal.callbacks.Callbacks.on_multirun_end", give_up)
    ended = program.tiny("-m", "accum.steps=1,2")
    assert ended.status == 1
    (line,) = [line for line in ended.lines if line.startswith("gaccum_exp: ")]
    assert "RuntimeError: the sweeper is tired; HYDRA_FULL_ERROR=1" in line
    assert (program.sweep_folder / "comparison.csv").exists()
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(RuntimeError, match="the sweeper is tired"):
        program.tiny("-m", "accum.steps=1,2")
    assert (program.sweep_folder / "comparison.csv").exists()


def process_state() -> list[object]:
    """Return what a command might leave behind in its process."""
    loggers = [logging.root, *(logging.getLogger(name) for name in ("gaccum_exp", "hydra"))]
    return [
        list(sys.argv),
        dict(os.environ),
        gc.isenabled(),
        [(list(logger.handlers), logger.level) for logger in loggers],
        (GlobalHydra.instance().hydra, HydraConfig.instance().cfg),
        (torch.get_num_threads(), torch.get_float32_matmul_precision()),
        torch.are_deterministic_algorithms_enabled(),
    ]


def test_commands_follow_one_another_in_a_process_and_leave_it_as_it_was(
    program: Program, capfd: pytest.CaptureFixture[str]
) -> None:
    """A sweep, a bad command, help, a report and a run: each with the result of a new process."""
    place = f"tracking.uri={program.uri}"
    set_for_all = ("runtime.threads=2", "runtime.deterministic=true", "runtime.matmul_precision=high")
    before = process_state()
    assert cli.main(["-m", *TINY, *set_for_all, "accum.steps=1,2", place, "hydra.verbose=hydra"]) == 0
    assert process_state() == before
    sweep_id, folder = program.sweep_id, program.sweep_folder
    assert "Every arm against its reference" in capfd.readouterr().out
    assert cli.main(["accum.stepz=1"]) == 2
    assert process_state() == before
    assert "accum.stepz: no such key" in capfd.readouterr().err
    assert cli.main(["--help"]) == 0
    assert cli.main(["report", sweep_id, "--uri", program.uri]) == 0
    assert process_state() == before
    assert cli.main([*TINY, "accum.steps=2", place]) == 0
    assert process_state() == before
    assert (program.sweep_id == sweep_id, program.sweep_folder == folder) == (False, False)
    (run,) = program.arms()
    of_sweep = {arm.params["accum.steps"]: arm for arm in program.store().sweep(sweep_id)}
    assert run.curves["train/loss"] == of_sweep["2"].curves["train/loss"]
    assert run.name == of_sweep["2"].name


def test_a_command_leaves_another_hydra_in_peace_and_takes_arguments_from_the_process(
    program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The caller's is there afterwards; without arguments those of the process are taken."""
    from hydra import compose, initialize_config_dir

    from gaccum_exp.config import schema as config

    gc.disable()
    try:
        with initialize_config_dir(config.conf_dir(), version_base="1.3"):
            monkeypatch.setattr(sys, "argv", ["program", *TINY, f"tracking.uri={program.uri}"])
            assert cli.main() == 0
            assert compose("config", ["seed=3"]).seed == 3
        assert not gc.isenabled()
    finally:
        gc.enable()
    assert [run.status for run in program.arms()] == ["FINISHED"]


def test_fingerprinting_data_leaves_the_generators_alone(program: Program) -> None:
    """Provenance seeds what random augmentation draws from, and puts it back."""
    from gaccum_exp.arms.provenance import dataset_records
    from gaccum_exp.train.build import build
    from tests.support import STRANGER, settings

    experiment = build(settings(*STRANGER))
    torch.manual_seed(5)
    random.seed(5)
    states = torch.get_rng_state(), random.getstate()
    first = dataset_records(experiment.settings, experiment)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert dataset_records(experiment.settings, experiment) == first


class Stepped(torch.optim.SGD):
    """Notes by which functions of the package its step has been called."""

    routes: ClassVar[list[list[str]]] = []

    def step(self, closure: Any = None) -> Any:
        package = str(Path(cli.__file__).parent)
        frames = [f.name for f in traceback.extract_stack() if f.filename.startswith(package)]
        Stepped.routes.append([*frames[frames.index("task") :], "step"])
        return super().step(closure)


def test_an_optimizer_step_is_five_calls_from_the_command(program: Program) -> None:
    """From the job to the optimizer: whoever reads the code follows one straight route."""
    ended = program.tiny("optimizer=custom", "optimizer._target_=tests.test_cli.Stepped")
    assert ended.status == 0
    from tests.test_cli import Stepped as Used  # as the `_target_` has imported it

    trained = [route for route in Used.routes if "predicted_peak" not in route]
    assert trained == [["task", "run_arm", "_train", "train", "take_step", "step"]] * 4
