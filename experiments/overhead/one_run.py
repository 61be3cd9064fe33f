"""What a window costs: every contender in shuffled blocks within one process."""

import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import mlflow
import torch
from mlflow import MlflowClient
from torch import Tensor

from experiments.notebook import composed, middle
from experiments.overhead.contenders import CONTENDERS, PIECES, Block, Contender, journal_sink
from gaccum_exp.tracking import shipper
from gaccum_exp.tracking.delivered import Delivered
from gaccum_exp.tracking.sink import JournalSink

COMMON = (
    "accum.steps=4",
    "accum.partial_window=drop",
    "data.eval=null",
    "audit.at_start=false",
    "runtime.device=cpu",
)
MODELS: dict[str, tuple[tuple[str, ...], int, int]] = {
    "MLP 64-256-256-10": (("model=mlp",), 60, 15),
    "CNN": (("model=cnn",), 40, 9),
    "GPT, 0.8 million parameters": (
        ("model=gpt", "data=text", "criterion=token_cross_entropy", "data.global_batch_size=16"), 20, 5,
    ),
}  # fmt: skip
"""Overrides, windows of a block, repeats. Digits in global batches of 256; the GPT on packed text."""
PEERS = ("accelerate", "lightning", "transformers")
WARM_UP = 10
"""Windows of a block that are not counted; memory is measured in the third."""
LIMIT = next(iter(CONTENDERS))
Times = tuple[float, float]
"""Of a block, in seconds: its median window, and its whole by its windows."""


@dataclass
class Measured:
    """One contender, a value for each repetition."""

    window_s: list[float] = field(default_factory=list)
    """The median window of a block."""
    wall_s: list[float] = field(default_factory=list)
    """A block from beginning to end, by its windows."""
    ratio: list[float] = field(default_factory=list)
    """The window to that of the bare loop's blocks right before and right after."""

    def add(self, own: Times, before: Times, after: Times) -> None:
        """Take a block, and those of the bare loop around it."""
        self.window_s.append(own[0])
        self.wall_s.append(own[1])
        self.ratio.append(2 * own[0] / (before[0] + after[0]))


def measure(
    overrides: Sequence[str],
    windows: int,
    repeats: int,
    folder: str,
    contenders: Mapping[str, Contender] = CONTENDERS,
) -> dict[str, Measured]:
    """Run all contenders `repeats` times, in another order each time, with the bare loop in between.

    A machine that is shared or cools itself has fast and slow seconds: neighbours share them.
    """
    configured = composed(*COMMON, *overrides, f"train.steps={windows}")
    found = {name: Measured() for name in contenders}
    order = [name for name in contenders if name != LIMIT]

    def block_of(name: str) -> Times:
        block = Block(configured, stores(folder).get(name, ""))
        run = contenders[name](block)
        start = time.perf_counter()
        run()
        wall = time.perf_counter() - start
        if len(block.stamps) != windows:
            raise RuntimeError(f"{name} took {len(block.stamps)} steps, not {windows}")
        times = torch.tensor(block.stamps[WARM_UP:], dtype=torch.float64).diff()
        return float(times.median()), wall / windows

    for repetition in range(-1, repeats):  # the first is a warm-up: imports, kernels, stores
        random.Random(repetition).shuffle(order)
        before = block_of(LIMIT)
        for name in order:
            own, after = block_of(name), block_of(LIMIT)
            if repetition >= 0:
                found[name].add(own, before, after)
                found[LIMIT].add(after, after, after)
            before = after
    return found


def stores(folder: str) -> dict[str, str]:
    """Return a store of its own for every contender, made if it is not there."""
    empty, found = Path(folder) / "empty.db", {}
    if not empty.exists():
        MlflowClient(f"sqlite:///{empty}").search_experiments()
    for number, name in enumerate(dict.fromkeys((*CONTENDERS, *PIECES))):
        path = Path(folder) / f"{number}.db"
        found[name] = f"sqlite:///{path}"
        if not path.exists():
            shutil.copyfile(empty, path)
    return found


def check(folder: str) -> None:
    """Every contender trains to the weights of the bare loop, in float64.

    Raises:
        RuntimeError: one does not, so it is another training that would be timed.
    """
    configured = composed(*COMMON, "model=mlp", "train.steps=6", "runtime.precision=fp64")
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
        sink = journal_sink(uri, "delivery")
        sink.ready()
        for step in range(windows):
            sink.record(
                step, {"train/loss": torch.rand(()), "optim/lr": 0.1, "optim/grad_norm": torch.rand(())}
            )
        start = time.perf_counter()
        sink.deliver()
        handed = time.perf_counter()
        wait_until_stored(sink)
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


def wait_until_stored(sink: JournalSink) -> None:
    """Wait until the store has taken all that is in a run's journal."""
    path = sink.journal.path
    size = path.stat().st_size
    shipper.wait(lambda: Delivered.of(path).offset >= size)


def one_by_one(uri: str, windows: int = 50) -> float:
    """Return milliseconds a window where each calls MLflow."""
    client = MlflowClient(uri)
    found = client.get_experiment_by_name("delivery")
    mlflow.set_tracking_uri(uri)
    with mlflow.start_run(experiment_id=found.experiment_id):
        start = time.perf_counter()
        for step in range(windows):
            mlflow.log_metrics({"train/loss": 0.5, "optim/lr": 0.1, "optim/grad_norm": 1.0}, step=step)
        return 1e3 * (time.perf_counter() - start) / windows


def table(measured: Mapping[str, Measured]) -> str:
    """Return the Markdown table of a model."""
    lines = [
        "| contender | window, ms | × the bare loop | whole block, ms a window |",
        "|---|---|---|---|",
    ]
    for name, of in measured.items():
        window, wall = 1e3 * statistics.median(of.window_s), 1e3 * statistics.median(of.wall_s)
        lines.append(f"| {name} | {window:.2f} | {middle(of.ratio, digits=3)} | {wall:.2f} |")
    return "\n".join(lines)


def windows() -> str:
    """Return the tables of all models."""
    parts = []
    with tempfile.TemporaryDirectory() as folder:
        check(folder)
        for name, (overrides, count, repeats) in MODELS.items():
            parts.append(f"**{name}**\n\n{table(measure(overrides, count, repeats, folder))}")
            print(f"{parts[-1]}\n", flush=True)
    return "\n\n".join([*parts, f"Peers: {', '.join(f'{name} {version(name)}' for name in PEERS)}."])


def deliveries(repeats: int) -> str:
    """Return the table of what it takes to record a window's metrics."""
    lines = ["| three metrics a window | ms a window |", "|---|---|"]
    with tempfile.TemporaryDirectory() as folder:
        found = delivery(3000, repeats, folder)
    for name, values in found.items():
        lines.append(f"| {name} | {middle(values, digits=3)} |")
    return "\n".join(lines)


def pieces(repeats: int) -> str:
    """Return the table of the MLP's window between the bare loop and the whole training."""
    overrides, count, _ = next(iter(MODELS.values()))
    with tempfile.TemporaryDirectory() as folder:
        measured = measure(overrides, count, repeats, folder, PIECES)
    return table(measured)
