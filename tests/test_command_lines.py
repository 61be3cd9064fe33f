"""Whatever a command line holds is answered in a line: kinds of input, streams, and who imports what."""

import io
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from experiments.durability import command_lines as study
from experiments.durability import hostile
from experiments.durability.tries import Options
from gaccum_exp.arms.streams import _Outlet
from gaccum_exp.config.arguments import command_line
from gaccum_exp.errors import BadInputError
from tests.program import TINY, Ended, Program, environment, in_a_process, sweep_here
from tests.shortened import shortened

pytestmark = pytest.mark.usefixtures("undrawn")

OURS = "is the program's own"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        # Blocks: null, a number, another's file, taken away.
        (["model=null"], "model=null: takes the name of a file: cnn, custom, gpt"),
        (["runtime=1"], "runtime=1: takes the name of a file: default"),
        (["++model=5"], "++model=5: takes the name of a file"),
        (["~model"], "model=null: must be a block; choose a file of it (model=cnn)"),
        (["train=null"], "train=null: field 'train' is not Optional"),
        (["model=ResNet18"], "torchvision's is model=torchvision model.name=ResNet18"),
        (["model=../mlp"], "model=../mlp: not one of cnn, custom"),
        # +, ++, ~ and several values.
        (["+seed=1"], "+seed=1: seed exists already, so leave out the + (seed=1)"),
        (["~train.steps"], "~train.steps: train.steps is null already"),
        (["accum.steps=1,2"], "accum.steps=1,2: several values need -m in front"),
        (["seed=range(1,3)"], "seed=range(1,3): several values need -m in front"),
        (["+="], "+=: "),
        ([""], "'': cannot be read as key=value"),
        (["reprot"], "reprot: cannot be read as key=value, did you mean 'report'?"),
        (["outputs"], "outputs: cannot be read as key=value; --help shows what there is"),
        (["optimizer.lr=nan"], "optimizer.lr=nan: is no number"),
        (["seed=[[["], 'seed=[[[: cannot be read as key=value; quote a value'),
        (["seed=\udcff"], "seed=\\udcff: is not text in UTF-8"),
        (["seed=a\nb"], "seed="),
        # Interpolations.
        (["seed=${seed}"], "seed: Recursive interpolation detected"),
        (["seed=${nope}"], "seed: Interpolation key 'nope' not found"),
        (["sweep_id=${oc.env:NOPE}"], "sweep_id=${oc.env:NOPE}: KeyError"),
        # Ids and folders.
        (["sweep_id='../../x'"], "sweep_id=../../x: an id is made of letters, digits, -, _ and dots"),
        (['sweep_id="a\'b"'], "sweep_id=a'b: an id is made of letters"),
        (["hydra.job.name=../x"], "hydra.job.name=../x: leads out of the output folder"),
        (["hydra.output_subdir=/x"], "hydra.output_subdir=/x: leads out of the output folder"),
        (["hydra.run.dir=/dev/null"], "hydra.run.dir=/dev/null: "),
        (["report", "../../x"], "sweep_id=../../x: an id is made of letters"),
        (["report", "--format=odt"], "gaccum_exp report: --format=odt: none of html, md, latex, csv"),
        (["deliver", "x" * 400], "File name too long"),
        # Flags.
        (["--experimental-rerun", "x"], "--experimental-rerun=x: is refused, since it runs whatever"),
        (["--exp", "x"], "--exp: no such flag"),
        (["-m", "--cfg", "job"], "--multirun and --cfg are both what to do"),
        (["--resolve"], "--resolve: goes with --cfg, which is not given"),
        (["--cfg", "jib"], "--cfg=jib: not one of job, hydra, all, did you mean 'job'?"),
        (["--cfg", "job", "--package", "nope"], "package 'nope' not found in config"),
        (["--config-dir", "gone"], "--config-dir=gone: there is no such folder"),
        (["--config-dir"], "--config-dir: takes a folder, which is not given"),
        (["--config-name", "nope"], "--config-name=nope: there is no nope.yaml in "),
        (["--config-name", "model/mlp"], "hydra.callbacks.sweep: is not there"),
        (["--shell-completion"], "--shell-completion: ValueError: Expecting one subcommand"),
        # Hydra's own configuration.
        (["hydra.callbacks.sweep=null"], OURS),
        (["~hydra.callbacks.sweep"], OURS),
        (["hydra.callbacks=null"], OURS),
        (["hydra/launcher=nope"], "hydra/launcher=nope: not one of basic, joblib"),
        (["hydra.searchpath=[file:///gone]"], "hydra.searchpath: there is no folder /gone"),
        (["hydra.verbose=5"], "hydra.verbose=5: AssertionError"),
        (["-m", "hydra.launcher._target_=nope"], "hydra.launcher._target_=nope: RuntimeError"),
        (["-m", "hydra.sweeper.max_batch_size=0"], "hydra.sweeper.max_batch_size=0: must be at least 1"),
        (["-m", "hydra.sweep.dir=/dev/null"], "hydra.sweep.dir=/dev/null: "),
        (["-m", "hydra.sweep.subdir=x", "seed=1,2"], "2 arms would write to one folder"),
        (["-m", "hydra.sweep.subdir=../x"], "hydra.sweep.subdir=../x: leads out of the output folder"),
        # Sweeps of nothing, of too much, of what is one for all.
        (["-m", "model=glob(zzz*)"], "has no value, so nothing would be run; model is one of"),
        (["-m", "seed=range(5,1)"], "seed=range(5,1): has no value"),
        (["-m", "seed=range(0,1,0)"], "seed=range(0,1,0): is no range"),
        (["-m", "seed=range(0,inf)"], "seed=range(0,inf): is no range"),
        (["-m", "seed=range(0,1000000000000)"], "1,000,000,000,000 arms, more than 10,000"),
        (["-m", "sweep_id=a,b"], "sweep_id=a,b: is one for all arms"),
        (["-m", "figures.format=svg,pdf"], "figures.format=svg,pdf: is one for all arms"),
        (["-m", "figures.width=huge", "seed=1,2"], "figures.width=huge: not one of single, double"),
        (["figures.format=[jpg]"], "figures.format=jpg: not one of svg, png, pdf"),
        # Numbers that are no counts.
        (["data.global_batch_size=1000000000000", "accum.steps=1000000000000"], "must be at most 2,14"),
        (["data.global_batch_size=null", "data.micro_batch_size=2000000000", "accum.steps=2"], "=4000"),
        (["data.workers=100000"], "data.workers=100000: must be 0 to 512"),
        (["runtime.threads=1000000"], "runtime.threads=1000000: must be 1 to 4,096"),
        (["runtime.memory_budget_gib=inf"], "runtime.memory_budget_gib=inf: must be above 0"),
        (["runtime.memory_budget_gib=500MiB"], "gib=500MiB: is a number of GiB (500MiB is 0.488)"),
        (["check", "--memory-budget-gib", "8GB", "x.py"], "8GB: is a number of GiB (8GB is 7.45)"),
        (["accum.schedule={0:1,1000000000000:2}"], "accum.schedule: 10000000000"),
        (["sweep.seeds=[1,2]", "sweep.vectorize=seed"], "sweep.seeds=[1, 2]: is written by -m seed"),
    ],
)  # fmt: skip
def test_every_kind_of_wrong_line_is_answered_in_one(
    program: Program, arguments: list[str], said: str
) -> None:
    """Key, value and way out; status 2, no traceback, and no folder of a run."""
    ended = program.as_given(*arguments)
    assert ended.status == 2
    (line,) = [line for line in ended.lines if not line.startswith("recorded in ")]
    assert line.startswith(("gaccum_exp: ", "gaccum_exp report: ", "gaccum_exp check: "))
    assert said in line
    assert not list(program.folder.rglob("arm.json"))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["accum.steps=2000", "data.global_batch_size=2000000000"],
         "accum.steps=2000: data.train holds 1442 samples, so that no window can be split"),
        (["accum.partial_window=carry", "data.global_batch_size=2000000000"],
         "would hold 1,386,962 epochs of data.train (1442 samples), more than 1,000"),
        (["model.hidden=[1000000000000]"], "model: its weights alone hold 273 TiB, of "),
        (["model.hidden=[a]"], "model.hidden=['a']: gaccum_exp.models.mlp.MLP takes "),
        (["optimizer.lr=a"], "optimizer.lr=a: torch.optim.SGD takes "),
        (["data=fake", "data.size=1000000000000"], "data.size=1000000000000 must be at most 16,7"),
        (["data=ragged", "data.mean_length=1e12"], "tokens, more than 268,435,456"),
        (["model=custom", "model._target_=gaccum_exp.cli.main"], "runs in this process already"),
        (["model=custom", "model._target_=os._exit", "+model.status=0"], "ends the process (status 0)"),
        (["model=custom", "model._target_=torch.nn.Linear", "+model._partial_=5"], "_partial_ flag"),
    ],
)  # fmt: skip
def test_what_only_building_shows_is_refused_before_anything_large_is_made(
    program: Program, arguments: list[str], said: str
) -> None:
    """With the numbers; a target cannot end the process with a status of its own."""
    tiny = TINY[2:] if "model=custom" in arguments else TINY
    ended = program(*tiny, *arguments)
    assert ended.status == 2
    (line,) = ended.lines
    assert said in line


def test_an_override_may_refer_to_other_keys(program: Program) -> None:
    """It is recorded as it was written."""
    assert program.tiny("seed=${accum.steps}", "accum.steps=2").status == 0
    (run,) = program.arms()
    assert run.params["seed"] == "2"
    assert "seed=${accum.steps}" in run.tags["overrides"]


def test_broken_files_of_ones_own_are_named(tmp_path: Path, program: Program) -> None:
    """YAML that is none, bytes that are no text, a list in place of keys."""
    hostile.broken_files(tmp_path)
    for name, said in (
        ("tab", "tab.yaml, line 2: found character"), ("latin", "model/latin.yaml: is not UTF-8"),
        ("list", "model=list: In 'model/list'"), ("folder", "model=folder: not one of"),
        ("interpolated", "model._target_: Interpolation key 'nope' not found"),
    ):  # fmt: skip
        ended = program("--config-dir=mine", f"model={name}")
        assert (ended.status, len(ended.lines)) == (2, 1)
        assert said in ended.err


def test_flags_are_spelt_out_for_hydra() -> None:
    """In any order, with or without =, short or long; a value that looks like an override is a value."""
    line = command_line(["seed=0", "-cd", ".", "model=x", "-c=job", "--", "-y"])
    assert line.overrides == ("seed=0", "model=x", "-y")
    assert line.for_hydra[:2] == [f"--config-dir={os.getcwd()}", "--cfg=job"]
    assert (line.only_shows, line.multirun) == (True, False)
    assert command_line(["-i", "seed=1"]).flags == {"--info": "all"}
    with pytest.raises(BadInputError, match="takes no value"):
        command_line(["-m=1"])


def test_the_version_is_the_programs(program: Program) -> None:
    """With those of what its numbers depend on; nothing of it is imported."""
    ended = program.as_given("--version")
    assert ended.status == 0
    assert ended.out.startswith("gaccum_exp 0.")
    assert "torch 2." in ended.out
    assert "MLflow 3." in ended.out


SHADOWS = ("random", "socket", "selectors", "json", "logging", "queue", "uuid", "signal")
OWN = """
import random
from torch import full, nn
from torch.utils.data import Dataset
from gaccum_exp.errors import BadInputError

class Net(nn.Linear):
    def __init__(self):
        super().__init__(4, 3)

class Data(Dataset):
    def __len__(self):
        return 16
    def __getitem__(self, index):
        if index == 13 and self.damaged:
            raise self.damaged("13.png is damaged\\nin its middle")
        return full((4,), float(index)), index % 3
    damaged = None

class Damaged(Data):
    damaged = BadInputError

class Faulty(Data):
    damaged = KeyError
"""


def of_ones_own(folder: Path, data: str = "Data") -> list[str]:
    """Write a package into a folder, and files that could stand for modules of the standard library."""
    (folder / "mynet").mkdir()
    (folder / "mynet" / "__init__.py").write_text(OWN)
    for name in SHADOWS:
        (folder / f"{name}.py").write_text(f"open('executed', 'a').write('{name} ')\n")
    return [
        "model=custom", "model._target_=mynet.Net", "data=custom", f"data.train._target_=mynet.{data}",
        "data.global_batch_size=4", "data.workers=1", "runtime.device=cpu", "train.epochs=1",
        "audit.at_start=false",
    ]  # fmt: skip


def as_a_script(folder: Path, *arguments: str) -> Ended:
    """Run the console script as pip writes it."""
    script = folder / "bin" / "gaccum-exp"
    script.parent.mkdir()
    script.write_text("import sys\nfrom gaccum_exp.cli import main\nsys.exit(main())\n")
    done = subprocess.run(
        [sys.executable, str(script), *arguments],
        cwd=folder, env=environment(), capture_output=True, text=True,
    )  # fmt: skip
    return Ended(done.returncode, done.stdout, done.stderr)


@pytest.mark.slow
@pytest.mark.parametrize("start", shortened([in_a_process, as_a_script], [as_a_script]))
def test_files_beside_are_no_modules_of_the_standard_library(start, home: Path) -> None:  # type: ignore[no-untyped-def]
    """Neither in the command, the sweep's child, the helper nor data workers; a package is found."""
    sweep = ["-m", "accum.steps=1,2"] if start is in_a_process else []
    ended = start(home, *sweep, *of_ones_own(home))
    assert ended.status == 0, ended.err
    assert not (home / "executed").exists()


@pytest.mark.parametrize(("data", "status", "said"), [
    ("Damaged", 2, "failed: 13.png is damaged"), ("Faulty", 1, "failed: KeyError: '13.png is damaged"),
])  # fmt: skip
def test_an_error_in_a_data_worker_is_said_with_its_own_reason(
    data: str, status: int, said: str, program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not that a worker has caught one."""
    line = of_ones_own(program.folder, data)
    for name in SHADOWS:
        (program.folder / f"{name}.py").unlink()
    monkeypatch.delitem(sys.modules, "mynet", raising=False)
    ended = program(*line)
    assert ended.status == status
    assert said in ended.err
    assert "Caught" not in ended.err
    (run,) = program.arms()
    assert "13.png is damaged" in run.tags["failure"]
    monkeypatch.delitem(sys.modules, "mynet", raising=False)


def in_a_shell(folder: Path, words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a sweep in a shell, which redirects."""
    sweep = " ".join([f"{sys.executable} -m gaccum_exp -m", *TINY, "accum.steps=1,2"])
    return subprocess.run(
        ["bash", "-c", f"set -o pipefail; {sweep} {words}"], cwd=folder, env=environment() | variables,
        capture_output=True, text=True,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "said"),
    shortened(
        [
            (">&- 2>&-", None),
            (">/dev/full", "stdout cannot be written (No space left on device)"),
            ("2>/dev/full | head -1", None),
        ],
        [">/dev/full"],
    ),
)
def test_a_sweep_ends_as_it_should_whoever_listens(words: str, said: str | None, home: Path) -> None:
    """Streams closed, full or left: status 0, the comparison, no traceback, and no word in a record."""
    done = in_a_shell(home, words)
    assert done.returncode == 0
    assert "Traceback" not in done.stderr
    assert said is None or len([line for line in done.stderr.splitlines() if said in line]) == 1
    (folder,) = home.glob("multirun/*")
    assert (folder / "comparison.csv").exists()
    outcomes = [json.loads(path.read_text())["status"] for path in folder.glob("*/arm.json")]
    assert outcomes == ["FINISHED", "FINISHED"]
    for journal in folder.rglob("journal*.jsonl"):
        assert all(line[8:10] == b" {" for line in journal.read_bytes().splitlines())


@pytest.mark.slow
def test_what_an_encoding_lacks_is_written_in_another_way(home: Path) -> None:
    """The table and its sentences, with x for × where there is none; what it has stays."""
    sweep = ["-m", *TINY, "accum.steps=1,2"]
    done = subprocess.run(
        [sys.executable, "-m", "gaccum_exp", *sweep], cwd=home, capture_output=True,
        env=environment() | {"PYTHONIOENCODING": "ascii"},
    )  # fmt: skip
    assert done.returncode == 0
    out, err = done.stdout.decode("ascii"), done.stderr.decode("ascii")
    assert "Traceback" not in err
    assert "x at N = 2" in " ".join(out.split())
    assert "N=2 - 2 of 2" in err
    assert "1 × 2 · √3".encode("latin-1", "gaccum_exp.plain").decode("latin-1") == "1 × 2 · sqrt3"


def test_a_pipe_that_is_full_and_does_not_block_is_waited_for() -> None:
    """As the one that a shell of Node's gives: nothing of what is said is lost."""
    read, write = os.pipe()
    os.set_blocking(write, False)
    got: list[bytes] = []
    reader = threading.Timer(0.1, lambda: got.extend(iter(lambda: os.read(read, 1 << 16), b"")))
    reader.start()
    with io.BufferedWriter(_Outlet(write, "wb")) as stream:
        stream.write(bytes(1 << 20))
    reader.join()
    os.close(read)
    assert sum(map(len, got)) == 1 << 20


def test_lines_that_are_generated_are_all_answered(
    program: Program, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """A short version of the study's part: some of each kind, in this process."""
    folder = tmp_path_factory.mktemp("lines")
    work = folder / "a" / "b" / "c"
    hostile.broken_files(work)
    (work / "mlflow.db").write_bytes((program.folder / "mlflow.db").read_bytes())
    judged = study.Judged()
    study.in_this_process(judged, folder, work, 2 * len(hostile.KINDS), Options(seed=7))
    assert judged.problems == []
    assert set(judged.tried.values()) == {2}


@pytest.mark.parametrize(
    ("status", "said", "fault"),
    [
        (None, "", "hangs"),
        (2, "Traceback (most recent call last):", "a traceback"),
        (2, "one\ntwo", "2 lines, not one"),
        (2, "oh no", "not the program's words"),
        (0, "", "0, and nothing has run"),
        ("RuntimeError: x", "", "ends with RuntimeError: x"),
    ],
)
def test_the_judge_of_lines_can_accuse(status: object, said: str, fault: str, tmp_path: Path) -> None:
    """Each of what it is there to find; and what is written where nothing should be."""
    work = tmp_path / "a" / "b" / "c"
    work.mkdir(parents=True)
    assert fault in study.faults_of(["seed=1"], status, said, work, tmp_path, 0.0)
    assert study.faults_of(["seed=x"], 2, "gaccum_exp: seed=x: no", work, tmp_path, 0.0) == []
    (tmp_path / "a" / "stray").touch()
    assert study.faults_of(["seed=x"], 2, "gaccum_exp: seed=x: no", work, tmp_path, 0.0)


def test_arms_that_never_started_are_counted(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in the first of three arms."""
    sweep_here(monkeypatch)
    points = ["data=custom", "data.train._target_=tests.strangers.Points", "data.global_batch_size=8"]
    model = ["model=custom", "model._target_=tests.program.Interrupted"]
    ended = program("-m", *model, *points, "runtime.device=cpu", "accum.steps=1,2,4")
    assert ended.status == 130
    assert "1 arm did not finish, 2 of 3 never started; to go on:" in ended.plain


@pytest.mark.figures
def test_nothing_is_drawn_of_no_numbers(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where every arm is refused: no figure of axes alone, no unit over no number, its reason once."""
    sweep_here(monkeypatch)
    refused = ["criterion=custom", "criterion._target_=torch.nn.CTCLoss"]
    ended = program.tiny("-m", *refused, "accum.steps=1,2,4")
    assert ended.status == 1
    assert not list(program.sweep_folder.rglob("*.png"))
    assert "µs" not in ended.out
    said = "is refused for criterion CTCLoss"
    assert (ended.err.count(said), " ".join(ended.out.split()).count(said)) == (1, 1)
