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
from matplotlib.ticker import LogLocator, NullLocator

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from experiments.noise_scale import cost, splits
from experiments.noise_scale.frozen import BATCH, CASES, MICRO_BATCHES, WINDOWS, Found
from experiments.notebook import (
    Cells,
    asked_to_draw,
    keep_cells,
    kept_cells,
    log_bars,
    provenance,
    spread,
    write_results,
)
from gaccum_exp.report.figures import style

HERE = Path(__file__).resolve().parent
DRAWN = HERE / "drawn.csv"
SEEDS = (0, 1, 2)
AT_A_TIME = 2


def main() -> None:
    """Look at all checkpoints, two at a time, and time windows alone; write page and figure."""
    if asked_to_draw(DRAWN):
        draw(kept_cells(DRAWN, str, int))
        return
    start = time.monotonic()
    jobs = [(model, seed) for model in reversed(CASES) for seed in SEEDS]
    with ThreadPoolExecutor(AT_A_TIME) as pool:
        found = [one for of_job in pool.map(lambda job: looked_at(*job), jobs) for one in of_job]
    costs = cost.measured()
    cells = averaged(found)
    keep_cells(DRAWN, ("model", "step"), cells)
    draw(cells)
    of_splits, of_time = splits.table(), provenance(time.monotonic() - start)
    parts = table(found), of_splits, cost.table(costs), of_time
    write_results(HERE / "README.md", "\n\n".join(parts), answer(found))


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


def averaged(found: Sequence[Found]) -> Cells:
    """Return mean and standard deviation over seeds of exact and estimated scales, by model and step."""
    return {
        (model, step): {
            name: spread(
                getattr(one, name) for one in found if (one.model, one.global_step) == (model, step)
            )
            for name in ("exact", "scale")
        }
        for model in CASES
        for step in sorted({one.global_step for one in found if one.model == model})
    }


@style.styled()
def draw(cells: Cells) -> None:
    """Draw exact scales as lines and estimates as marks beside them, a panel for each model."""
    figure = Figure(figsize=(style.width(), 2.9), layout="constrained")
    for axes, model in zip(figure.subplots(1, len(CASES)), CASES, strict=True):
        steps = [step for of, step in cells if of == model]
        for index, (name, label) in enumerate(
            (("exact", "from the gradient of every sample"), ("scale", "estimated from 64 windows"))
        ):
            means, deviations = zip(*(cells[model, step][name] for step in steps), strict=True)
            look = style.look(index, 2) | ({"linestyle": ""} if name == "scale" else {})
            places = [(step + 1) * (1 + 0.12 * index) for step in steps]  # to be seen beside each other
            axes.errorbar(places, means, yerr=log_bars(means, deviations), label=label, **look)
        axes.axhline(BATCH, color="black", linewidth=0.8, linestyle=":", label=f"the batch, {BATCH}")
        axes.set(xscale="log", yscale="log", xlabel="optimizer steps + 1", title=model)
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_locator(NullLocator())
        axes.set_ylabel("noise scale in samples")
        axes.grid(axis="y")
    handles = axes.get_legend_handles_labels()[0]
    figure.legend(handles=handles, loc="outside lower center", ncols=3)
    figure.suptitle("Noise scale over training, mean ± std over 3 seeds")
    style.save(figure, HERE, "noise_scale", ("png",))


if __name__ == "__main__":
    main()
