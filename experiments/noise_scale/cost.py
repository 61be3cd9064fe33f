"""What measuring the noise costs: trainings with and without it, in turn."""

import statistics
import time
from collections.abc import Mapping, Sequence

from experiments.notebook import composed, middle
from gaccum_exp.tracking.progress import Progress
from gaccum_exp.tracking.sink import Sink
from gaccum_exp.train.build import build
from gaccum_exp.train.loop import hooks_of, train

ROUNDS = 7
MODELS = {
    "MLP": ("model=mlp", 400),
    "CNN": ("model=cnn data.global_batch_size=64", 150),
    "GPT": (
        "model=gpt data=text data.context=64 data.global_batch_size=8 criterion=token_cross_entropy",
        24,
    ),
}
"""Overrides, and how many windows are trained at a time, of N = 4."""
OPTIMIZERS = {"SGD": "optimizer=sgd optimizer.lr=0.01", "AdamW": "optimizer=adamw"}
EVERY = (1, 8)
"""Optimizer steps between two measured windows."""
Ratios = Mapping[tuple[str, str, int], list[float]]


def measured(rounds: int = ROUNDS, windows: int | None = None) -> Ratios:
    """Return seconds with over seconds without, by model, optimizer and interval, one for each round."""
    found: dict[tuple[str, str, int], list[float]] = {}
    for model, (overrides, own) in MODELS.items():
        for optimizer, chosen in OPTIMIZERS.items():
            for _ in range(rounds):
                took = {}
                for every in (None, *EVERY):
                    took[every] = seconds(f"{overrides} {chosen}", windows or own, every)
                for every in EVERY:
                    ratio = took[every] / took[None]
                    found.setdefault((model, optimizer, every), []).append(ratio)
    return found


def seconds(overrides: str, windows: int, every: int | None) -> float:
    """Return how long so many windows take, with the noise of every so many measured."""
    state = build(
        composed(
            *overrides.split(), "accum.steps=4", f"train.steps={windows}", "audit.at_start=false",
            f"noise.every_steps={every or 'null'}", "runtime.device=cpu", "runtime.threads=1",
            "checkpoint.every_minutes=null",
        )
    )  # fmt: skip
    state.eval_data = None
    with Progress("cost", state.total_steps, alone=False) as progress:
        hooks, _ = hooks_of(state, Sink(), progress)
        start_s = time.perf_counter()
        train(state, hooks)
        return time.perf_counter() - start_s


def table(ratios: Ratios) -> str:
    """Return a row per model and optimizer: median and range of the ratios."""
    head = "".join(f" every {k} steps |" if k > 1 else " every step |" for k in EVERY)
    lines = [f"| time with / without, N = 4 | optimizer |{head}", f"|---|---|{'---|' * len(EVERY)}"]
    for model in MODELS:
        for optimizer in OPTIMIZERS:
            cells = [_cell(ratios[model, optimizer, every]) for every in EVERY]
            lines.append(f"| {model} | {optimizer} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(values: Sequence[float]) -> str:
    assert statistics.median(values) > 0
    return middle(values, "×", 3)
