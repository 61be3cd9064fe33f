"""What checkpoints cost: trainings with one every 50 windows against the same without, in turn."""

import statistics
import time
from pathlib import Path

from experiments.durability.tries import Options, Result, folders_of

EVERY = 50
ROUNDS = 5
LIMIT = 1.05
"""Times the time without, for models whose windows take more than a few milliseconds."""
MODELS = {
    "MLP": ("model=mlp", 1000),
    "CNN": ("model=cnn data.global_batch_size=64", 300),
    "GPT": (
        "model=gpt data=text data.context=64 data.global_batch_size=8 criterion=token_cross_entropy "
        "optimizer=adamw",
        200,
    ),
}
"""Overrides, and how many windows are trained at a time."""
LIMITED = ("CNN", "GPT")


def checkpoint_cost(options: Options) -> Result:
    """Train each model with and without checkpoints, in turn; compare the seconds of a window."""
    rows, beyond = [], []
    with folders_of(options) as places:
        for name, (overrides, windows) in MODELS.items():
            windows = options.windows or windows
            folder = places.new(f"cost {name}", store=False)
            seconds(overrides, 2 * EVERY, folder)  # imports what writes, and warms up
            pairs = []
            for number in range(options.tries or ROUNDS):
                order = [None, folder] if number % 2 else [folder, None]
                took = {place: seconds(overrides, windows, place) for place in order}
                pairs.append((took[folder], took[None]))
            ratios = sorted(with_them / without for with_them, without in pairs)
            ratio = statistics.median(ratios)
            each_s = statistics.median(a - b for a, b in pairs) / (windows // EVERY)
            rows.append(
                f"| {name} | {windows} | {1e3 * statistics.median(b for _, b in pairs) / windows:.2f} | "
                f"{ratio:.3f} | {ratios[0]:.3f} … {ratios[-1]:.3f} | {1e3 * each_s:.1f} |"
            )
            if name in LIMITED and ratio > LIMIT:
                beyond.append(f"{name} {ratio:.3f} ×")
    head = [
        f"A checkpoint every {EVERY} windows, N = 4, {options.tries or ROUNDS} pairs in turn, median.",
        "",
        "| model | windows | ms a window without | with, × | range | ms a checkpoint |",
        "|---|---|---|---|---|---|",
    ]
    return Result(
        f"{len(MODELS)} models",
        f"beyond {LIMIT} ×: {', '.join(beyond) or 'none'}",
        "\n".join([*head, *rows]), not beyond,
    )  # fmt: skip


def seconds(overrides: str, windows: int, folder: Path | None) -> float:
    """Return how long so many windows take, their checkpoints written to the end."""
    from hydra import compose, initialize_config_dir

    from gaccum_exp.config import schema
    from gaccum_exp.tracking.progress import Progress
    from gaccum_exp.tracking.sink import Sink
    from gaccum_exp.train.build import build
    from gaccum_exp.train.checkpoint.hook import Writer
    from gaccum_exp.train.loop import hooks_of, train

    schema.register()
    with initialize_config_dir(schema.conf_dir(), version_base="1.3"):
        of = [*overrides.split(), "accum.steps=4", f"train.steps={windows}", "audit.at_start=false",
              f"checkpoint.every_steps={EVERY}", "runtime.device=cpu", "runtime.threads=1",
              "train.eval_every_steps=1000000"]  # fmt: skip
        state = build(schema.validate(compose("config", of)))
    state.eval_data = None
    with Progress("cost", state.total_steps, alone=False) as progress:
        writer = None if folder is None else Writer(folder)
        hooks, _ = hooks_of(state, Sink(), progress, checkpoints=writer)
        start_s = time.perf_counter()
        train(state, hooks)
        return time.perf_counter() - start_s
