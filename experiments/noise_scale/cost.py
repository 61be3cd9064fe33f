"""What a measured window costs: trainings in which every second window is measured.

So both kinds are timed side by side, whatever else the machine does meanwhile.
"""

import statistics
import time
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from experiments.notebook import composed, middle
from gaccum_exp.tracking.progress import Progress
from gaccum_exp.tracking.sink import Sink
from gaccum_exp.train.build import build
from gaccum_exp.train.hooks import Hook, Values
from gaccum_exp.train.loop import hooks_of, train
from gaccum_exp.train.noise_scale import NoiseScale

ROUNDS = 7
MODELS = {
    "MLP": ("model=mlp", 400),
    "CNN": ("model=cnn data.global_batch_size=64", 150),
    "GPT": (
        "model=gpt data=text data.context=64 data.global_batch_size=8 criterion=token_cross_entropy",
        48,
    ),
}
"""Overrides, and how many windows are trained at a time, of N = 4."""
WARMUP_WINDOWS, EIGHTH = 8, 8
OPTIMIZERS = {"SGD": "optimizer=sgd optimizer.lr=0.01", "AdamW": "optimizer=adamw"}


class Cost(NamedTuple):
    """What one training shows."""

    window: float
    """The median time of a measured window over that of one that is not."""
    check: float
    """What is done once, before the first window, in windows that are not measured."""


class Ends(Hook):
    """Notes when windows end, all that is done between them included."""

    def __init__(self) -> None:
        self.at_s = [time.perf_counter()]

    def after(self, state: Any, window: Any, values: Values) -> None:
        """Note it: called last of the hooks."""
        self.at_s.append(time.perf_counter())


def measured(rounds: int = ROUNDS, windows: int | None = None) -> Mapping[tuple[str, str], list[Cost]]:
    """Return what trainings show by model and optimizer, one after the other in each round."""
    found: dict[tuple[str, str], list[Cost]] = {}
    for _ in range(rounds):
        for model, (overrides, own) in MODELS.items():
            for optimizer, chosen in OPTIMIZERS.items():
                cost = cost_of(f"{overrides} {chosen}", windows or own)
                found.setdefault((model, optimizer), []).append(cost)
    return found


def cost_of(overrides: str, windows: int) -> Cost:
    """Train so many windows, of which every second one is measured."""
    state = build(
        composed(
            *overrides.split(), "accum.steps=4", f"train.steps={windows}", "audit.at_start=false",
            "noise.every_steps=2", "runtime.device=cpu", "runtime.threads=1",
            "checkpoint.every_minutes=null",
        )
    )  # fmt: skip
    state.eval_data = None
    with Progress("cost", state.total_steps, alone=False) as progress:
        hooks, _ = hooks_of(state, Sink(), progress)
        start_s = time.perf_counter()
        next(hook for hook in hooks if isinstance(hook, NoiseScale)).begin(state)
        check_s = time.perf_counter() - start_s
        ends = Ends()
        hooks.insert(0, ends)
        train(state, hooks)
    took = [end - begin for begin, end in pairwise(ends.at_s)]
    seen = statistics.median(took[WARMUP_WINDOWS::2])
    plain = statistics.median(took[WARMUP_WINDOWS + 1 :: 2])
    return Cost(seen / plain, check_s / plain)


def table(costs: Mapping[tuple[str, str], Sequence[Cost]]) -> str:
    """Return a row per model and optimizer: medians and ranges."""
    lines = [
        "| N = 4 | optimizer | a measured window, in others | on average at every eighth "
        "| the check at the start, in windows |",
        "|---|---|---|---|---|",
    ]
    for (model, optimizer), of in costs.items():
        eighth = [1 + (cost.window - 1) / EIGHTH for cost in of]
        cells = (
            middle([cost.window for cost in of], "×", 3), middle(eighth, "×", 3),
            middle([cost.check for cost in of], digits=1),
        )  # fmt: skip
        lines.append(f"| {model} | {optimizer} | {' | '.join(cells)} |")
    return "\n".join(lines)
