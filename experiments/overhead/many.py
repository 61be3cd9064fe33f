"""Reports over many runs: what one takes to read, compare, tabulate and draw, by their number.

    python experiments/overhead/many.py 10 100 200 1000

Nothing is trained. One run is written as the program writes it, and the others are copies of its rows in
MLflow's tables, with curves of their own: three million values through MLflow itself take minutes. Each
has a journal too. A report reads journals where they are at hand; that the store alone takes longer is
measured beside it, read as a file and through MLflow's server.
"""

import io
import math
import platform
import random
import sqlite3
import statistics
import sys
import tempfile
import time
import uuid
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice, product
from pathlib import Path
from typing import Any

import torch
from mlflow import MlflowClient
from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from experiments.durability.server import mlflow_server
from experiments.notebook import composed, middle
from gaccum_exp.arms.compared import add_comparison
from gaccum_exp.arms.provenance import environment_tags
from gaccum_exp.arms.report import Runs, read_sweeps
from gaccum_exp.arms.settle import record_report
from gaccum_exp.report.compare.comparison import compare, write_csv
from gaccum_exp.report.figures.save_figures import draw
from gaccum_exp.report.text.summary import summary
from gaccum_exp.report.text.table import render
from gaccum_exp.tracking.delivered import Delivered
from gaccum_exp.tracking.journal import Journal
from gaccum_exp.tracking.shipper import finish
from gaccum_exp.tracking.sink import WEIGHTS, JournalSink, StateDict, kept_weights

EXPERIMENT = "gaccum_exp"
SWEEP = "many"
GLOBAL_BATCH = 256
EVAL_EVERY = 100
START_MS = 1_750_000_000_000
STAGES = ("read", "compare", "CSV and table", "figures", "keep the report")


@dataclass(frozen=True)
class Arm:
    """What the runs differ in."""

    steps: int
    reduction: str = "global_mean"
    seed: int = 0
    rate: str = "0.1"

    @property
    def name(self) -> str:
        """As the program names it."""
        return f"N={self.steps} · micro {self.micro} · {self.reduction} · seed={self.seed}"

    @property
    def micro(self) -> int:
        """The largest micro-batch."""
        return -(-GLOBAL_BATCH // self.steps)


def seeds() -> Iterator[Arm]:
    """Four N under two reductions, for as many seeds as it takes."""
    for seed in range(10**6):
        for reduction, steps in product(("global_mean", "sum"), (1, 2, 4, 8)):
            yield Arm(steps, reduction, seed)


def settings() -> Iterator[Arm]:
    """Four N at as many learning rates as it takes."""
    for number, steps in product(range(1, 10**6), (1, 2, 4, 8)):
        yield Arm(steps, rate=f"{number / 1000:.3f}")


def splits() -> Iterator[Arm]:
    """As many N as it takes."""
    for steps in range(1, 10**6):
        yield Arm(steps)


SHAPES: Mapping[str, Callable[[], Iterator[Arm]]] = {
    "seeds": seeds,
    "settings": settings,
    "splits": splits,
}


def generate(
    folder: Path,
    runs: int,
    points: int,
    shape: str = "seeds",
    sweep_id: str = SWEEP,
    weights: bool = False,
) -> str:
    """Store a sweep of so many runs, each with so many windows; return the store's address."""
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    client = MlflowClient(uri)
    if client.get_experiment_by_name(EXPERIMENT) is None:
        client.create_experiment(EXPERIMENT, (folder / "artifacts").as_uri())
    arms = list(islice(SHAPES[shape](), runs))
    first = written(uri, folder / "first", arms[0], points, sweep_id, weights)
    with sqlite3.connect(folder / "mlflow.db") as database:
        database.execute("PRAGMA synchronous = OFF")
        for number, arm in enumerate(arms[1:], 1):
            run_id = copied(database, first, arm, points, START_MS + number, weights)
            write_journal(folder / run_id, uri, run_id, arm, points, sweep_id)
    database.close()
    return uri


def written(uri: str, folder: Path, arm: Arm, points: int, sweep_id: str, weights: bool) -> str:
    """Write the first run with the program's own means; return its id."""
    journal = begun(folder, uri, arm, points, sweep_id)
    sink = JournalSink(journal)
    for step, values in enumerate(zip(*curves(arm, points).values(), strict=True), 1):
        known = zip(curves(arm, 0), values, strict=True)
        sink.record(step, {key: value for key, value in known if value is not None})
    sink.record(points, once(arm))
    sink.describe(
        {"device": "cpu", "threads": "1", "data_digest": "4a63347a", "memory.source": "tracker"}
    )
    if weights:
        weights = OrderedDict(w=torch.full((64, 64), 1.0))
        sink.keep_weights(StateDict(weights, ["w"], []))
    sink.close("FINISHED")
    finish()
    return str(Delivered.of(journal.path).run_id)


def begun(folder: Path, uri: str, arm: Arm, points: int, sweep_id: str) -> Journal:
    """Begin the journal of a run."""
    overrides = ["model=mlp", "runtime.device=cpu", f"accum.steps={arm.steps}", f"train.steps={points}"]
    params = composed(*overrides).flat()
    choices = {f"choice.{key}": "default" for key in ("model", "data", "accum", "optimizer", "runtime")}
    tags = {"sweep_id": sweep_id, "kind": "arm", **choices, **environment_tags(), **own_tags(arm)}
    journal = Journal.create(folder, uri, EXPERIMENT)
    journal.begin(arm.name, params=params | own_params(arm), tags=tags, texts={"config.yaml": "{}"})
    return journal


def write_journal(
    folder: Path, uri: str, run_id: str, arm: Arm, points: int, sweep_id: str, at_once: int = 500
) -> None:
    """Write the journal of a run that is in the store."""
    journal = begun(folder, uri, arm, points, sweep_id)
    columns = curves(arm, points)
    rows = [
        [step, START_MS + step, {k: v for k, v in zip(columns, values, strict=True) if v is not None}]
        for step, values in enumerate(zip(*columns.values(), strict=True), 1)
    ]
    for start in range(0, points, at_once):
        journal.append("points", points=rows[start : start + at_once])
    journal.append("points", points=[[points, START_MS + points, once(arm)]])
    journal.end("FINISHED")
    size = journal.path.stat().st_size
    Delivered(uri, EXPERIMENT, size, "ready", host=platform.node(), run_id=run_id, settled=True).write(
        journal.path
    )


def copied(
    database: sqlite3.Connection, first: str, arm: Arm, points: int, start_ms: int, weights: bool
) -> str:
    """Write another run as a copy of the first one's rows, but for what is its own; return its id."""
    run_id = uuid.uuid4().hex
    columns = [row[1] for row in database.execute("PRAGMA table_info(runs)")]
    row = dict(
        zip(
            columns,
            database.execute("SELECT * FROM runs WHERE run_uuid = ?", (first,)).fetchone(),
            strict=True,
        )
    )
    artifacts = str(row["artifact_uri"])
    row |= {"run_uuid": run_id, "name": arm.name, "start_time": start_ms, "end_time": start_ms + 1}
    row["artifact_uri"] = artifacts.replace(first, run_id)
    database.execute(f"INSERT INTO runs VALUES ({', '.join('?' * len(row))})", list(row.values()))
    for table, own in (
        ("params", own_params(arm)),
        ("tags", own_tags(arm) | {"mlflow.runName": arm.name}),
    ):
        found = dict(database.execute(f"SELECT key, value FROM {table} WHERE run_uuid = ?", (first,)))
        pairs = [(run_id, key, str(value)) for key, value in (found | own).items()]
        database.executemany(f"INSERT INTO {table} (run_uuid, key, value) VALUES (?, ?, ?)", pairs)
    history = {
        key: [(step, value) for step, value in enumerate(values, 1) if value is not None]
        for key, values in curves(arm, points).items()
    } | {key: [(points, value)] for key, value in once(arm).items()}
    into = "(key, value, timestamp, run_uuid, step, is_nan) VALUES (?, ?, ?, ?, ?, 0)"
    for table, since in (("metrics", 0), ("latest_metrics", -1)):
        database.executemany(
            f"INSERT INTO {table} {into}",
            (
                (key, value, start_ms + step, run_id, step)
                for key, line in history.items()
                for step, value in line[since:]
            ),
        )
    if weights:
        path = Path(artifacts.removeprefix("file://").replace(first, run_id)) / WEIGHTS
        path.parent.mkdir(parents=True)
        torch.save({"w": torch.full((64, 64), 1.0 + 1e-7 * arm.steps)}, path)
    return run_id


def own_params(arm: Arm) -> dict[str, Any]:
    """Return the parameters that tell this run from the others."""
    micro = {"data.global_batch_size": GLOBAL_BATCH, "data.micro_batch_size": arm.micro}
    varied = {"accum.steps": arm.steps, "accum.reduction": arm.reduction, "seed": arm.seed}
    return micro | varied | {"optimizer.lr": arm.rate}


def own_tags(arm: Arm) -> dict[str, str]:
    """Return the tags that do."""
    small, larger = divmod(GLOBAL_BATCH, arm.steps)
    sizes = [small + 1] * larger + [small] * (arm.steps - larger)
    return {
        "role": "reference" if arm.steps == 1 else "candidate",
        "micro_batch_sizes": ", ".join(map(str, sizes))
        if len(sizes) <= 64
        else f"{sizes[0]} … {sizes[-1]}",
        "verdict": "identical" if arm.steps == 1 else "equivalent",
        "memory.peak_phase": "forward/backward" if arm.micro > 64 else "optimizer step",
    }


def curves(arm: Arm, points: int) -> dict[str, list[float | None]]:
    """Return the metrics of every window, and the evaluations: runs that differ in N lie close."""
    noise = random.Random(f"{arm.seed} {arm.rate}")
    drift = random.Random(f"{arm.seed} {arm.rate} {arm.reduction} {arm.steps}")
    loss: list[float | None] = []
    for step in range(1, points + 1):
        apart = drift.gauss(0, 1e-7) * (arm.steps > 1) * math.exp(6 * step / points)
        loss.append(2.3 / math.sqrt(step) + 0.2 * noise.random() / math.sqrt(step) + apart)
    evaluations = [v if step % EVAL_EVERY == 0 else None for step, v in enumerate(loss, 1)]
    norm: list[float | None] = [1.0 / math.sqrt(step) for step in range(1, points + 1)]
    rate: list[float | None] = [float(arm.rate)] * points
    every_step = {"train/loss": loss, "optim/lr": rate, "optim/grad_norm": norm}
    return every_step | {"eval/loss": evaluations, "eval/accuracy": evaluations}


def once(arm: Arm) -> dict[str, float]:
    """Return the metrics that a run has one value of."""
    activations, chance = 4096.0 * arm.micro, random.Random(f"{arm}")
    peak = 700_000 + activations
    split = {"parameters": 340_000.0, "gradients": 10_000.0, "optimizer_state": 340_000.0}
    split |= {"activations": activations, "temporaries": 10_000.0, "inputs": 0.0}
    return {
        **{f"memory/{name}_bytes": size for name, size in split.items()},
        "memory/peak_bytes": peak,
        "memory/tracked_peak_bytes": peak,
        "memory/predicted_peak_bytes": peak,
        "memory/resident_set_bytes": 7e8,
        "time/step_s": 1e-3 * (3 + 0.1 * arm.steps + 0.5 * chance.random()),
        "throughput/samples_per_s": 7e4,
        "audit/e64": 1e-16 * arm.steps,
        "audit/e": 1e-8 * arm.steps,
        "audit/floor": 1e-7,
    }


def report(uri: str, folder: Path, sweep_id: str = SWEEP) -> dict[str, float]:
    """Report on a sweep as the program does at its end; return the seconds of each stage."""
    store = Runs(uri, EXPERIMENT, folder)
    marks = [time.perf_counter()]
    runs, stored = read_sweeps(store, [sweep_id])
    marks.append(time.perf_counter())
    comparison = compare(runs, stored, partial(kept_weights, store))
    add_comparison(store, runs, stored, comparison)
    marks.append(time.perf_counter())
    files = [write_csv(comparison, folder / "comparison.csv")]
    console = Console(file=io.StringIO(), width=100)
    console.print(render(comparison))
    console.print(summary(comparison))
    marks.append(time.perf_counter())
    files += draw(comparison, runs, folder)
    marks.append(time.perf_counter())
    record_report(Journal.create(folder, uri, EXPERIMENT), sweep_id, files, store.view(sweep_id))
    finish()
    marks.append(time.perf_counter())
    return {stage: b - a for stage, a, b in zip(STAGES, marks, marks[1:], strict=False)}


def read_from_store(uri: str) -> float:
    """Return the seconds that reading the sweep takes where no journal is at hand."""
    runs = Runs(uri, EXPERIMENT)
    assert runs.store
    start = time.perf_counter()
    read_sweeps(runs, [SWEEP])
    return time.perf_counter() - start


def main(sizes: Sequence[int] = (10, 100, 200, 1000), points: int = 1000, repeats: int = 3) -> str:
    """Measure; return a Markdown table: milliseconds per run of each stage, medians of repeats."""
    alone = ("the store alone: SQLite, ms a run", "the store alone: MLflow's server, ms a run")
    heads = [*(f"{stage}, ms a run" for stage in STAGES), "all, ms a run", *alone]
    lines = [f"| runs | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    for size in sizes:
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            uri = generate(folder, size, points)
            times = [report(uri, folder) for _ in range(repeats)]
            again = repeats if size <= 200 else 1  # more would take minutes
            stored_s = [read_from_store(uri) for _ in range(again)]
            with mlflow_server(folder, uri) as server:
                served_s = [read_from_store(server.uri) for _ in range(again)]
        medians = [statistics.median(t[stage] for t in times) for stage in STAGES]
        said = [f"{1e3 * seconds / size:.2f}" for seconds in medians]
        for seconds in ([sum(t.values()) for t in times], stored_s, served_s):
            said.append(middle(1e3 * s / size for s in seconds))
        lines.append(f"| {size} | {' | '.join(said)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(main([int(size) for size in sys.argv[1:]] or (10, 100, 200, 1000)))
