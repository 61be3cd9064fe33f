"""What a window costs: every contender in shuffled blocks within one process."""

import random
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir
from mlflow import MlflowClient
from torch import Tensor

from experiments.overhead.contenders import CONTENDERS, PIECES, Block, Contender
from gaccum_exp import config
from gaccum_exp.config import Settings
from gaccum_exp.sink import MlflowSink
from gaccum_exp.tracking_process import connect

COMMON = (
    "accum.steps=4",
    "accum.partial_window=drop",
    "data.eval=null",
    "audit.at_start=false",
    "runtime.device=cpu",
)
MODELS: dict[str, tuple[tuple[str, ...], int]] = {
    "MLP 64-256-256-10": (("model=mlp",), 60),
    "CNN": (("model=cnn",), 40),
    "GPT, 0.8 million parameters": (
        ("model=gpt", "data=text", "criterion=token_cross_entropy", "data.global_batch_size=16"), 24,
    ),
}  # fmt: skip
"""Overrides, and the windows of a block. Digits in global batches of 256; the GPT on packed text."""
WARM_UP = 10
"""Windows of a block that are not counted; memory is measured in the third."""
LIMIT = next(iter(CONTENDERS))


@dataclass(frozen=True)
class Measured:
    """One model: for each contender, a value for each repetition."""

    window_s: Mapping[str, Sequence[float]]
    """The median window of a block."""
    wall_s: Mapping[str, Sequence[float]]
    """A block from beginning to end, by its windows."""


def settings(*overrides: str) -> Settings:
    """Compose and validate as the command line does."""
    config.register()
    with initialize_config_dir(config.conf_dir(), version_base="1.3"):
        return config.validate(compose("config", list(overrides)))


def measure(
    overrides: Sequence[str],
    windows: int,
    repeats: int,
    folder: str,
    contenders: Mapping[str, Contender] = CONTENDERS,
) -> Measured:
    """Run all contenders `repeats` times, in another order each time."""
    configured = settings(*COMMON, *overrides, f"train.steps={windows}")
    window_s, wall_s = defaultdict(list), defaultdict(list)
    order = list(contenders)
    for repetition in range(-1, repeats):  # the first is a warm-up: imports, kernels, stores
        random.Random(repetition).shuffle(order)
        for name in order:
            block = Block(configured, stores(folder).get(name, ""))
            run = contenders[name](block)
            start = time.perf_counter()
            run()
            wall = time.perf_counter() - start
            if len(block.stamps) != windows:
                raise RuntimeError(f"{name} took {len(block.stamps)} steps, not {windows}")
            if repetition >= 0:
                times = torch.tensor(block.stamps[WARM_UP:], dtype=torch.float64).diff()
                window_s[name].append(float(times.median()))
                wall_s[name].append(wall / windows)
    named = [name for name in contenders if name in window_s]
    return Measured({k: window_s[k] for k in named}, {k: wall_s[k] for k in named})


def stores(folder: str) -> dict[str, str]:
    """Return a store of its own for every contender, made if it is not there."""
    found = {}
    for number, name in enumerate(dict.fromkeys((*CONTENDERS, *PIECES))):
        path = Path(folder) / f"{number}.db"
        found[name] = f"sqlite:///{path}"
        if not path.exists():
            MlflowClient(found[name]).search_experiments()
    return found


def check(folder: str) -> None:
    """Every contender trains to the weights of the bare loop, in float64.

    Raises:
        RuntimeError: one does not, so it is another training that would be timed.
    """
    configured = settings(*COMMON, "model=mlp", "train.steps=6", "runtime.precision=fp64")
    ended: dict[str, Tensor] = {}
    for name, contender in CONTENDERS.items():
        block = Block(configured, stores(folder)[name])
        contender(block)()
        ended[name] = torch.cat([p.detach().flatten() for p in block.parameters])
        error = float((ended[name] - ended[LIMIT]).norm() / ended[LIMIT].norm())
        if not error < 1e-10:
            raise RuntimeError(f"{name} trains to other weights than {LIMIT}: {error:.1e}")


def delivery(windows: int, repeats: int, folder: str) -> dict[str, list[float]]:
    """Return milliseconds a window of three metrics: what training waits, and until it is stored."""
    waits, stored, each = [], [], []
    uri = stores(folder)["gaccum_exp, MLflow"]
    for _ in range(repeats):
        sink = MlflowSink(connect(uri, "delivery").start_run("run", params={}, tags={}, texts={}))
        sink.ready()
        for step in range(windows):
            sink.record(
                step, {"train/loss": torch.rand(()), "optim/lr": 0.1, "optim/grad_norm": torch.rand(())}
            )
        start = time.perf_counter()
        sink.deliver()
        handed = time.perf_counter()
        sink.ready()
        end = time.perf_counter()
        sink.close("FINISHED")
        waits.append(1e3 * (handed - start) / windows)
        stored.append(1e3 * (end - start) / windows)
        each.append(one_by_one(uri))
    return {
        "gaccum_exp: what the training waits": waits,
        "gaccum_exp: until it is in SQLite": stored,
        "`mlflow.log_metrics` at every window": each,
    }


def one_by_one(uri: str, windows: int = 50) -> float:
    """Return milliseconds a window where each calls MLflow."""
    client = MlflowClient(uri)
    found = client.get_experiment_by_name("delivery")
    import mlflow

    mlflow.set_tracking_uri(uri)
    with mlflow.start_run(experiment_id=found.experiment_id):
        start = time.perf_counter()
        for step in range(windows):
            mlflow.log_metrics({"train/loss": 0.5, "optim/lr": 0.1, "optim/grad_norm": 1.0}, step=step)
        return 1e3 * (time.perf_counter() - start) / windows


def table(measured: Measured) -> str:
    """Return the Markdown table of a model."""
    limit = measured.window_s[LIMIT]
    lines = [
        "| contender | window, ms | × the bare loop | whole block, ms a window |",
        "|---|---|---|---|",
    ]
    for name in measured.window_s:
        ratios = [a / b for a, b in zip(measured.window_s[name], limit, strict=True)]
        spread = f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"
        window = 1e3 * statistics.median(measured.window_s[name])
        wall = 1e3 * statistics.median(measured.wall_s[name])
        lines.append(f"| {name} | {window:.2f} | {spread} | {wall:.2f} |")
    return "\n".join(lines)


def windows(repeats: int) -> str:
    """Return the tables of all models."""
    parts = []
    with tempfile.TemporaryDirectory() as folder:
        check(folder)
        for name, (overrides, count) in MODELS.items():
            parts.append(f"**{name}**\n\n{table(measure(overrides, count, repeats, folder))}")
            print(f"{parts[-1]}\n", flush=True)
    return "\n\n".join(parts)


def deliveries(repeats: int) -> str:
    """Return the table of what it takes to record a window's metrics."""
    lines = ["| three metrics a window | ms a window |", "|---|---|"]
    with tempfile.TemporaryDirectory() as folder:
        found = delivery(3000, repeats, folder)
    for name, values in found.items():
        lines.append(f"| {name} | {say(values)} |")
    return "\n".join(lines)


def pieces(repeats: int) -> str:
    """Return the table of the MLP's window between the bare loop and the whole training."""
    overrides, count = next(iter(MODELS.values()))
    with tempfile.TemporaryDirectory() as folder:
        measured = measure(overrides, count, repeats, folder, PIECES)
    return table(measured)


def say(values: Sequence[float]) -> str:
    """Return the median and the spread."""
    return f"{statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f})"
