"""Rebuild this study: `python experiments/noise_scale/build.py` (about 9 minutes on two cores)."""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from experiments.noise_scale import cost, splits
from experiments.noise_scale.frozen import BATCH, CASES, MICRO_BATCHES, WINDOWS, Found
from experiments.notebook import provenance, spread, write_results

HERE = Path(__file__).resolve().parent
SEEDS = (0, 1, 2)
AT_A_TIME = 2


def main() -> None:
    """Look at all checkpoints, two at a time, and time windows alone; write page and figure."""
    start = time.monotonic()
    jobs = [(model, seed) for model in reversed(CASES) for seed in SEEDS]
    with ThreadPoolExecutor(AT_A_TIME) as pool:
        found = [one for of_job in pool.map(lambda job: looked_at(*job), jobs) for one in of_job]
    costs = cost.measured()
    draw(found, HERE / "noise_scale.png")
    figure = "![Noise scale against optimizer steps](noise_scale.png)"
    of_splits, of_time = splits.table(), provenance(time.monotonic() - start)
    parts = answer(found), table(found), figure, of_splits, cost.table(costs), of_time
    write_results(HERE / "README.md", "\n\n".join(parts))


def looked_at(model: str, seed: int) -> list[Found]:
    """Run `frozen.py` for a model and a seed."""
    command = [sys.executable, str(HERE / "frozen.py"), model, str(seed)]
    lines = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()
    return [Found(**json.loads(line)) for line in lines]


def answer(found: Sequence[Found]) -> str:
    """Say how far estimates and exact values lie apart, and what the scale does in training."""
    apart = [abs(one.scale / one.exact - 1) for one in found]
    covered = sum(one.covered for one in found)
    unresolved = sum(one.high is None for one in found)
    said = []
    for model in CASES:
        of_model = [one for one in found if one.model == model]
        ends = [
            statistics.fmean(one.exact for one in of_model if one.global_step == step)
            for step in (of_model[0].global_step, of_model[-1].global_step)
        ]
        said.append(f"{model} {ends[0]:.3g} to {ends[1]:.3g}")
    return (
        f"**Answer.** What {WINDOWS} windows of {BATCH} samples in {MICRO_BATCHES} micro-batches tell "
        f"is within {100 * statistics.median(apart):.0f} % of what all samples tell one by one (median "
        f"of {len(found)} checkpoints, at most {100 * max(apart):.0f} %); {covered} of {len(found)} "
        f"95 % intervals hold it, {unresolved} of them without an upper end. Over the training it goes "
        f"from {', '.join(said)} samples."
    )


def table(found: Sequence[Found]) -> str:
    """Return a row per checkpoint, means ± standard deviations over seeds."""
    lines = [
        "| model | step | loss | exact tr(Σ) | estimate | exact ‖G‖² | estimate "
        "| exact scale | estimate | intervals that hold it |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for model, case in CASES.items():
        for step in case.global_steps:
            of = [one for one in found if (one.model, one.global_step) == (model, step)]
            columns = [
                "loss",
                "exact_trace",
                "trace",
                "exact_squared_norm",
                "squared_norm",
                "exact",
                "scale",
            ]
            cells = [_plus_minus([getattr(one, column) for one in of]) for column in columns]
            lines.append(
                f"| {model} | {step} | {' | '.join(cells)} | {sum(o.covered for o in of)} of {len(of)} |"
            )
    return "\n".join(lines)


def _plus_minus(values: Sequence[float]) -> str:
    mean, std = spread(values)
    return f"{mean:.3g} ± {std:.2g}"


def draw(found: Sequence[Found], path: Path) -> None:
    """Draw exact scales as lines and estimates with their intervals, a panel for each model."""
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    for axes, model in zip(figure.subplots(1, len(CASES)), CASES, strict=True):
        for seed, marker in zip(SEEDS, ("o", "s", "^"), strict=True):
            of = [one for one in found if (one.model, one.seed) == (model, seed)]
            x = [one.global_step + 1 for one in of]
            shade = str(0.25 * seed)
            axes.plot(x, [one.exact for one in of], color=shade, linewidth=0.8)
            highs = [one.high or 10 * one.scale for one in of]
            axes.errorbar(
                [k * (1 + 0.06 * (seed - 1)) for k in x],
                [one.scale for one in of],
                yerr=[
                    [one.scale - one.low for one in of],
                    [high - one.scale for one, high in zip(of, highs, strict=True)],
                ],
                fmt=marker, color=shade, markerfacecolor="white", capsize=3, linestyle="none",
                label=f"seed {seed}",
            )  # fmt: skip
        axes.axhline(BATCH, color="0.7", linewidth=0.8, linestyle=":")
        axes.set(xscale="log", yscale="log", xlabel="optimizer steps + 1", title=model)
        axes.set_ylabel("noise scale, samples")
        axes.grid(axis="y", linewidth=0.3)
    axes.legend(frameon=False)
    figure.suptitle(
        "Lines: from the gradient of every sample. Marks: estimates with 95 % intervals. "
        f"Dotted: the batch of {BATCH}",
        fontsize=9,
    )
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
