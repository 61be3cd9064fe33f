"""16 seeds of the MLP as one training against one after the other.

    python experiments/overhead/seeds.py

Both loops fetch windows, take steps, record metrics and evaluate every epoch, in turn in one process.
Neither audits, measures memory or writes to a store. Beside them stand the matrix products alone, of
all seeds in one call: what no training of so many seeds can be faster than.
"""

import statistics
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from experiments.notebook import Quiet, composed, middle
from gaccum_exp.config.schema import Settings
from gaccum_exp.core.window import split_sizes
from gaccum_exp.tracking.sink import Sink
from gaccum_exp.train.build import TrainingData, build, load
from gaccum_exp.train.evaluation import evaluate
from gaccum_exp.train.stackable_seeds import stackable
from gaccum_exp.train.stacked_seeds import StackedState, train_stacked
from gaccum_exp.train.step import take_step

SEEDS = 16
THREADS = 2
EPOCHS = 10
WIDTHS = ([256, 256], [128, 128], [64, 64], [32, 32])
STEPS = (1, 4)


def main(repeats: int = 5) -> str:
    """Measure, and return the table as Markdown; ratios are medians over repeats, with their range."""
    rows = [
        "| hidden layers | N | one after the other, ms | as one, ms | ratio | products alone, ms |",
        "|---|---|---|---|---|---|",
    ]
    for hidden in WIDTHS:
        for steps in STEPS:
            rows.append(row(hidden, steps, repeats))
    return "\n".join(rows)


def row(hidden: list[int], steps: int, repeats: int) -> str:
    """Time both ways in turn; all times are per window and seed."""
    settings = [settings_of(hidden, steps, seed) for seed in range(SEEDS)]
    loaded = load(settings[0])
    apart, together, products = [], [], []
    one_after_the_other(settings[:2], loaded)  # kernels are chosen, caches filled
    for _ in range(repeats):
        apart.append(one_after_the_other(settings, loaded))
        together.append(as_one(settings, loaded))
        products.append(products_alone(hidden, steps))
    ratios = [a / b for a, b in zip(apart, together, strict=True)]
    per_seed = [1e3 * statistics.median(times) / SEEDS for times in (apart, together, products)]
    return (
        f"| {', '.join(map(str, hidden))} | {steps} | {per_seed[0]:.3f} | {per_seed[1]:.3f} | "
        f"{middle(ratios, digits=1)} | {per_seed[2]:.3f} |"
    )


def settings_of(hidden: list[int], steps: int, seed: int) -> Settings:
    """Return the settings of one seed."""
    return composed(
        "model=mlp", f"model.hidden={hidden}", f"accum.steps={steps}", f"seed={seed}",
        f"train.epochs={EPOCHS}", "audit.at_start=false",
        "runtime.device=cpu", f"runtime.threads={THREADS}",
    )  # fmt: skip


def one_after_the_other(settings: list[Settings], loaded: TrainingData) -> float:
    """Return the seconds that a window of all seeds takes in the ordinary loop."""
    experiments = [build(one, loaded.of_seed(one.seed)) for one in settings]
    total = loaded.total_steps

    def run() -> None:
        for experiment in experiments:
            sink = Sink()
            for step, window in enumerate(experiment.windows_from(0), 1):
                experiment.global_step = step - 1
                sink.record(step, take_step(experiment, window))
                if experiment.plan.ends_epoch(step - 1):
                    sink.record(step, evaluate(experiment))
            sink.deliver()

    return seconds(run) / total


def as_one(settings: list[Settings], loaded: TrainingData) -> float:
    """Return the seconds that a window of all seeds takes in the stacked loop."""
    training = StackedState(stackable(settings, loaded))
    sinks = [Sink() for _ in settings]
    return seconds(lambda: train_stacked(training, sinks, Quiet())) / loaded.total_steps


def products_alone(hidden: list[int], steps: int) -> float:
    """Return the seconds of a full window's matrix products, forward and backward, of all seeds."""
    widths = [64, *hidden, 10]

    def layer(rows: int, inputs: int, outputs: int) -> tuple[Tensor, Tensor, Tensor]:
        shapes = (rows, inputs), (inputs, outputs), (rows, outputs)
        return tuple(torch.randn(SEEDS, *shape) for shape in shapes)

    layers = [layer(rows, *pair) for rows in split_sizes(256, steps) for pair in pairwise(widths)]

    def run() -> None:
        for number, (inputs, weights, gradients) in enumerate(layers):
            inputs @ weights
            inputs.mT @ gradients
            if number % (len(widths) - 1):  # nobody asks for the gradient of the samples
                gradients @ weights.mT

    return statistics.median(seconds(run) for _ in range(20))


def seconds(run: Callable[[], object]) -> float:
    """Time one call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


if __name__ == "__main__":
    torch.set_num_threads(THREADS)
    print(main(int(sys.argv[1]) if len(sys.argv) > 1 else 5))
