"""Are the numbers of two commits the same, bit for bit? Short runs of everything, to be compared.

    python experiments/same_numbers.py write before.json     # about five minutes on two cores
    python experiments/same_numbers.py write after.json      # at another commit, with this same file
    python experiments/same_numbers.py compare before.json after.json     # exit status 1: they differ

`write --checkpoints` takes one after every optimizer step, which is to change no number either.

It goes through the command line and what `from gaccum_exp import ...` offers alone, and reads MLflow's
store with MLflow's own client, so that it stays as it is while modules move. Every process computes on
one thread of the CPU. Both files have to be written on one machine with the same packages. A run whose
loss becomes NaN or infinite is not among these: where it stops is allowed to change.
"""

import argparse
import csv
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PARTS = "experiments.same_numbers_parts"
PROCESSES = 2
PATIENCE_S = 900
"""After so long a process that hangs is given up on; no claim about time."""

MLP = "model=mlp model.hidden=[8] data.global_batch_size=32 train.steps=4 "
SHORT_EPOCHS = (
    "model=mlp model.hidden=[8] data=fake data.size=22 data.eval_size=9 data.image_size=[1,4,4] "
    "data.global_batch_size=8 "
)
POINTS = (
    f"model=custom model._target_={PARTS}.Net data=custom data.train._target_={PARTS}.Points "
    f"data.eval._target_={PARTS}.Points +data.eval.seed=2 data.global_batch_size=11 train.steps=5 "
)
CNN = "model=cnn model.width=4 data.global_batch_size=12 train.steps=3 "
GPT = (
    "model=gpt model.layers=1 model.heads=2 model.width=8 criterion=token_cross_entropy optimizer=adamw "
    "data.global_batch_size=6 train.steps=4 "
)
RAGGED = "data=ragged data.size=22 data.eval_size=9 data.mean_length=6 data.vocab_size=8 "
SPEAKING = f"model=custom model._target_={PARTS}.Speaking criterion=model_loss data.global_batch_size=6 "
TIGHT = (
    "model=mlp model.hidden=[64] data.global_batch_size=256 train.steps=4 "
    "runtime.memory_budget_gib=0.000124 "  # 130 KiB: N = 4 fits with SGD, and not N = 2
)
LOSSES = "accum.reduction=global_mean,mean,sum accum.steps=1,3 "

COMMANDS: dict[str, tuple[str, ...]] = {
    "reductions": (f"-m {MLP}{LOSSES} accum.sum_scale=constant,none optimizer.lr=0.003",),
    "partial windows": (
        f"-m {SHORT_EPOCHS} train.steps=7 accum.partial_window=exact,drop,carry accum.steps=1,4 "
        "accum.reduction=global_mean,mean",
        f"-m {SHORT_EPOCHS} train.epochs=2 accum.steps=1,3 accum.reduction=sum",
        f"{SHORT_EPOCHS} train.samples=30 accum.steps=null data.micro_batch_size=3",
    ),
    "precision": (
        f"-m {MLP} runtime.precision=fp32,fp64,bf16,fp16 accum.max_grad_norm=null,0.5 accum.steps=1,3",
        f"-m {MLP} runtime.precision=bf16 runtime.weight_dtype=same accum.buffer_dtype=same,float32 "
        "accum.steps=1,3 accum.reduction=global_mean,mean",
        f"-m {POINTS} model._target_={PARTS}.Loud runtime.precision=fp16 accum.steps=1,3 train.steps=9 "
        "optimizer.lr=1e-4",
    ),
    "schedules": (
        f"-m {MLP} train.steps=8 scheduler=none,cosine,warmup_cosine,multistep accum.steps=1,3",
        f"-m {SHORT_EPOCHS} train.steps=7 'accum.schedule={{0:1,2:2,4:4}}' accum.schedule_by=step "
        "data.global_batch_size=null data.micro_batch_size=2 accum.schedule_lr=none,linear,sqrt",
        f"-m {SHORT_EPOCHS} train.epochs=3 'accum.schedule={{0:1,1:2,2:3}}' scheduler=cosine "
        "accum.reduction=global_mean,mean",
    ),
    "optimizers": (
        f"-m {MLP} optimizer=sgd,adam,adamw,muon accum.steps=1,3",
        f"-m {MLP} optimizer=custom optimizer._target_=torch.optim.LBFGS accum.steps=1,3 "
        "optimizer.lr=0.1",
    ),
    "models": (
        f"-m {CNN} model.norm=none,batch,group,layer accum.steps=3 "
        "runtime.activation_checkpointing=false,true",
        f"-m {MLP} model.dropout=0.3 accum.steps=1,3",
        "-m model=torchvision model.name=resnet18 data=fake data.size=8 data.eval_size=4 train.steps=3 "
        "data.global_batch_size=4 accum.steps=1,2 optimizer.lr=0.001",
    ),
    "losses": (
        f"-m {POINTS}{LOSSES} +data.train.ignored=null,3",
        f"-m {POINTS}{LOSSES} +data.train.ignored=3 criterion=custom +criterion._partial_=true "
        f"criterion._target_={PARTS}.counted_late",
        f"-m {POINTS}{LOSSES} +criterion.weight=[1,2,0.5] +criterion.label_smoothing=0.1",
    ),
    "data": (
        f"-m {MLP} data.workers=0,2 accum.steps=2 train.eval_every_steps=3 data.eval_batch_size=100 "
        "seed=0,1",
    ),
    "tokens": (
        f"-m {GPT} data=text data.layout=paragraphs data.context=16 accum.steps=1,4 "
        "accum.reduction=global_mean,mean",
        f"-m {GPT}{RAGGED} data.sort_by_length=false,true accum.steps=1,4 train.steps=5",
        f"-m {SPEAKING}{RAGGED} +model.takes_count=true,false {LOSSES} train.steps=4",
    ),
    "audits": (
        f"-m task=audit {MLP}{LOSSES}",
        f"-m task=audit {CNN} model.norm=batch,group accum.steps=4 runtime.precision=fp32,bf16",
        f"task=audit {MLP} model.dropout=0.3 accum.steps=4",
        f"{CNN} model.norm=batch accum.steps=2 train.steps=5 audit.every_steps=2",
        f"-m {MLP} accum.steps=1,3 audit.controls=2 runtime.precision=fp32,bf16",
    ),
    "stacked seeds": (
        f"-m {MLP} seed=0,1,2 sweep.vectorize=seed accum.steps=1,3 optimizer=sgd,adamw",
        f"-m {SHORT_EPOCHS} seed=0,1,2 sweep.vectorize=seed accum.steps=3 train.epochs=2 "
        "accum.reduction=global_mean,mean,sum accum.max_grad_norm=0.5 scheduler=cosine",
    ),
    "memory": (
        f"task=plan {TIGHT}",
        f"-m task=plan {CNN} runtime.memory_budget_gib=0.001 optimizer=sgd,adamw",
        f"-m {TIGHT} accum.steps=auto accum.reduction=global_mean,mean",
        f"-m {TIGHT} accum.steps=1,4",  # N = 1 is refused
        f"-m {TIGHT} accum.steps=1,3 accum.on_oom=increase_steps accum.reduction=global_mean,mean,sum",
        f"-m {POINTS} model._target_={PARTS}.Scarce accum.on_oom=increase_steps "
        "data.global_batch_size=22 accum.reduction=global_mean,mean",
    ),
}
"""Arguments of `python -m gaccum_exp` by group; each is run in a folder and a store of its own."""
FUNCTIONS = "functions"
"""The group of what the public functions return."""
COMMON = "runtime.device=cpu runtime.threads=1"
CHECKPOINTS = "checkpoint.every_steps=1"

FILES = ("comparison.csv", "audit.json", "plan.json")
RENAMED = {"steps": "accum_steps"}
"""Keys and columns that were renamed, from old to new: N, in what the program writes and returns."""
LEFT_ASIDE = {
    r"time/.*|throughput/.*|step_(s|ratio|low_s|high_s|differs)|tokens_per_s": "a time, or made of one",
    r"waiting_share": "what other processes took of it",
    r"memory/resident_set_bytes": "the whole process, its libraries and their allocator included",
    r"sweep_id|command_id|run_id|run_token|reference_run_id": "an id, made of the time or at random",
    r"command": "the line, with where it writes and when it keeps",
    r"(choice\.)?checkpoint(\..*)?|resume|weights\.left_out": "when a training is kept",
    r"arm|digest|sweep\.(resume|into|rerun_failed)": "which arm of a sweep it is",
    r"window": "of an audit, what it knows besides its numbers",
    r"host|python|version\..*|git_commit|mlflow\.source\..*|mlflow\.user": "where it was run, by what",
}
"""Names of parameters, tags, metrics and columns that are not compared, and why."""
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
_LEFT_ASIDE = re.compile("|".join(LEFT_ASIDE))
_OUR_NAMES = re.compile(r"\bgaccum_exp(?:\.\w+)+")


def main(arguments: Sequence[str] | None = None) -> int:
    """Write or compare; return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    writing = commands.add_parser("write", help="run everything and write one JSON file")
    writing.add_argument("file", type=Path)
    writing.add_argument("--only", nargs="+", metavar="GROUP", choices=[*COMMANDS, FUNCTIONS])
    writing.add_argument("--checkpoints", action="store_true", help="one after every optimizer step")
    comparing = commands.add_parser("compare", help="print each difference between two such files")
    comparing.add_argument("before", type=Path)
    comparing.add_argument("after", type=Path)
    given = parser.parse_args(arguments)
    if given.command == "write":
        also = CHECKPOINTS if given.checkpoints else ""
        found = measured(given.only or [*COMMANDS, FUNCTIONS], also)
        given.file.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
        return 0
    before, after = (json.loads(path.read_text()) for path in (given.before, given.after))
    lines = list(differences(comparable(before), comparable(after)))
    print("\n".join(lines) if lines else f"The same, bit for bit: {leaves(after)} values.")
    return 1 if lines else 0


def measured(groups: Sequence[str], also: str = "") -> dict[str, Any]:
    """Run these groups, with one more override; return what was found, as `exact` writes numbers."""
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(PROCESSES) as pool:
        named = [(g, " ".join(command.split())) for g in groups for command in COMMANDS.get(g, ())]
        folders = [Path(scratch) / str(number) for number in range(len(named))]
        store = new_store(Path(scratch)) if named else None
        for folder in folders:
            folder.mkdir()
            shutil.copy(str(store), folder)
        functions = pool.submit(ran, ("-m", PARTS), scratch) if FUNCTIONS in groups else None
        statuses = pool.map(run_command, (f"{command} {also}" for _, command in named), folders)
        found: dict[str, Any] = {group: {} for group in groups}
        for (group, command), status, folder in zip(named, statuses, folders, strict=True):
            found[group][command] = {"status": status, **written(folder), "runs": recorded(folder)}
            print(f"{group}: {command} ({len(found[group][command]['runs'])} runs)", file=sys.stderr)
        if functions is not None:
            found[FUNCTIONS] = json.loads(functions.result().stdout)
    return exact(found)  # type: ignore[no-any-return]  # of a dictionary it is one


def run_command(command: str, folder: Path) -> int:
    """Run the program in a folder and return its exit status; what it says stays there."""
    done = ran(("-m", "gaccum_exp", *shlex.split(command), *COMMON.split()), folder)
    (folder / "said.txt").write_text(done.stdout + done.stderr)
    if done.returncode not in (0, 1, 3, 4, 5):  # it never came to run anything
        raise RuntimeError(f"{command}: exit status {done.returncode}\n{done.stderr}")
    return done.returncode


def ran(arguments: Sequence[str], folder: str | Path) -> subprocess.CompletedProcess[str]:
    """Run Python with this checkout on one thread, in a folder."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("GACCUM_EXP", "MLFLOW"))}
    fixed = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder, env=inherited | fixed, capture_output=True, text=True, timeout=PATIENCE_S,
    )  # fmt: skip


def new_store(folder: Path) -> Path:
    """Create an empty store: to copy one takes less time than to make one."""
    from mlflow import MlflowClient  # seconds, which comparing need not wait for

    MlflowClient(f"sqlite:///{folder / 'mlflow.db'}").search_experiments()
    return folder / "mlflow.db"


def written(folder: Path) -> dict[str, Any]:
    """Return the files of a command that are results, by name, and by arm where each has one."""
    found: dict[str, Any] = {}
    for path in sorted(path for name in FILES for path in folder.glob(f"*/*/**/{name}")):
        if path.is_relative_to(folder / "mlruns"):  # the same once more
            continue
        name = "/".join(path.relative_to(folder).parts[2:])
        if path.suffix == ".json":
            found[name] = json.loads(path.read_text())
        else:
            with path.open(newline="", encoding="utf-8") as file:
                found[name] = unique((row["name"], row) for row in csv.DictReader(file))
    return found


def recorded(folder: Path) -> dict[str, Any]:
    """Return every run in a folder's store by its name, as MLflow's client reads it."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    runs = client.search_runs(experiments, "tags.kind != 'report'", max_results=1000)
    return unique(sorted(((run.info.run_name, _run(client, run, folder)) for run in runs), key=repr))


def _run(client: Any, run: Any, folder: Path) -> dict[str, Any]:
    """Return a run's status, parameters, tags, curves and a digest of its weights."""
    curves: dict[str, dict[str, Any]] = {}
    for key in sorted(run.data.metrics):
        history = client.get_metric_history(run.info.run_id, key)
        points = sorted((point.step, point.timestamp, point.value) for point in history)
        curves[key] = unique((str(step), value) for step, _, value in points)
    kept = {file.path for file in client.list_artifacts(run.info.run_id)}
    weights = None
    if "weights.pt" in kept:
        place = tempfile.mkdtemp(dir=folder)
        files = [name for name in ("weights.pt", "criterion_weights.pt") if name in kept]
        paths = [client.download_artifacts(run.info.run_id, name, place) for name in files]
        weights = digest(*map(parameters_in, paths))
    of = {"status": run.info.status, "params": dict(run.data.params), "tags": dict(run.data.tags)}
    return {**of, "metrics": curves, "weights": weights}


def unique(named: Any) -> dict[str, Any]:
    """Return a dictionary of (name, value); a name that comes again is numbered."""
    found: dict[str, Any] = {}
    for name, value in named:
        again = sum(key == name or key.startswith(f"{name} #") for key in found)
        found[f"{name} #{again + 1}" if again else name] = value
    return found


def parameters_in(path: str) -> dict[str, Any]:
    """Return the trained parameters in a file, named as before it was a state dict."""
    import torch

    weights = torch.load(path, weights_only=True)
    about = getattr(weights, "_gaccum_exp", None)
    if about is None:
        return dict(weights)
    of = 1 if Path(path).name.startswith("criterion") else 0
    return {f"{of}.{name}": weights[name] for name in about["trained"]}


def digest(*files: Mapping[str, Any]) -> str:
    """Return a digest of all bits of these tensors, with their names, types and shapes."""
    import torch

    found = hashlib.sha256()
    for name, tensor in sorted((name, tensor) for of in files for name, tensor in of.items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def exact(value: Any) -> Any:
    """Return the same with every float as the text of its bits."""
    if isinstance(value, float):
        return value.hex()
    if isinstance(value, Mapping):
        return {str(key): exact(item) for key, item in value.items()}
    return [exact(item) for item in value] if isinstance(value, (list, tuple)) else value


def comparable(value: Any) -> Any:
    """Return the same without what is left aside, under the new keys, whatever room a name is from."""
    if isinstance(value, Mapping):
        kept = {k: v for k, v in value.items() if not _LEFT_ASIDE.fullmatch(k)}
        return {RENAMED.get(key, key): comparable(item) for key, item in kept.items()}
    if isinstance(value, list):
        return [comparable(item) for item in value]
    if isinstance(value, str):
        value = value.replace(f" {CHECKPOINTS}", "")
        return _OUR_NAMES.sub(lambda found: found[0].rpartition(".")[2], value)
    return value


def differences(before: Any, after: Any, where: tuple[str, ...] = ()) -> Iterator[str]:
    """Yield a line for each value that is not the same, and for each that only one side has."""
    if isinstance(before, list) and isinstance(after, list):
        before, after = (dict(zip(map(str, range(len(x))), x, strict=True)) for x in (before, after))
    if isinstance(before, dict) and isinstance(after, dict):
        for key in dict.fromkeys([*before, *after]):
            at = (*where, key)
            if key not in after or key not in before:
                yield f"{' / '.join(at)}: only {'before' if key in before else 'after'}"
            else:
                yield from differences(before[key], after[key], at)
    elif repr(before) != repr(after):  # True is not 1
        yield f"{' / '.join(where)}: {_said(before)} before, {_said(after)} after"


def _said(value: Any) -> str:
    """Return a value as it is to be read: a float as a number, and its bits."""
    if isinstance(value, str) and re.fullmatch(r"-?0x[0-9a-f.]+p[-+]\d+", value):
        return f"{float.fromhex(value)!r} ({value})"
    return repr(value)


def leaves(value: Any) -> int:
    """Count what is compared."""
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return 1 if items is None else sum(map(leaves, items))


if __name__ == "__main__":
    sys.exit(main())
