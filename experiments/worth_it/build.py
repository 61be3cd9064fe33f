"""Rebuild this study: `python experiments/worth_it/build.py` (about 14 minutes on two cores).

First every global batch with its rates, extended until the best lies between others; then the best three
of each batch with two more seeds; then, at three batches, the same with β₂ of the same half-life.
"""

import csv
import math
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from experiments.notebook import (
    append_row,
    asked_to_draw,
    provenance,
    read_rows,
    spread,
    write_results,
)
from gaccum_exp.report.figures import style

HERE = Path(__file__).resolve().parent
ROOT, DRAWN = HERE.parents[1], HERE / "drawn.csv"
SIDE_BY_SIDE = ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "runtime.threads=1")
SEEDS = (0, 1, 2)
HALF_LIFE_AT = (16, 128, 512)
DRAWS = 2000
"""Of the bootstrap over seeds."""


@dataclass(frozen=True)
class Arm:
    """What one training came to."""

    beta2: str
    batch: int
    rate: float
    seed: int
    loss: float
    """On held-out sequences, at the end."""
    noise: tuple[float | None, float | None, float | None]
    """Scale in Adam's metric and its interval, in the last windows."""


def main() -> None:
    """Run the sweep and what is added to it; write page and figures."""
    if asked_to_draw(DRAWN):
        draw(kept())
        return
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        sweep(place, "sweep.extend=optimizer.lr")
        sweep_id = next(place.glob("multirun/*")).name
        first = arms_of(place)
        more = f"seed={','.join(map(str, SEEDS[1:]))}"
        for batch in sorted({arm.batch for arm in first}):
            rates = ",".join(f"{rate:g}" for rate in best_three(first, batch))
            chosen = f"data.global_batch_size={batch}", f"optimizer.lr={rates}"
            sweep(place, *chosen, more, f"sweep.into={sweep_id}")
            if batch in HALF_LIFE_AT:
                every = f"seed={','.join(map(str, SEEDS))}"
                sweep(place, *chosen, every, "train.beta2_rule=half_life", f"sweep.into={sweep_id}")
        arms = arms_of(place)
        shutil.copyfile(next(place.glob("multirun/*/batches.png")), HERE / "batches.png")
    keep(arms)
    draw(arms)
    results = f"{table(arms)}\n\n{provenance(time.monotonic() - start)}"
    write_results(HERE / "README.md", results, answer(arms))


def sweep(place: Path, *overrides: str) -> None:
    """Run the experiment with these overrides, two trainings at a time."""
    command = [
        sys.executable,
        "-m",
        "gaccum_exp",
        "-m",
        "experiment=worth_it",
        *SIDE_BY_SIDE,
        *overrides,
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run(command, cwd=place, check=True, env=environment)


def arms_of(place: Path) -> list[Arm]:
    """Read the sweep's comparison.csv; a training that diverged has an infinite loss."""
    (path,) = place.glob("multirun/*/comparison.csv")
    arms = []
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            varied = dict(part.split("=") for part in row["differs"].split(", ") if "=" in part)
            loss = float(row["eval_loss"]) if row["status"] == "FINISHED" else math.inf
            noise = [row[f"adam_noise_scale{end}"] for end in ("", "_low", "_high")]
            batch, rate = int(row["global_batch_size"]), float(varied["lr"])
            seed, beta2 = int(varied.get("seed", 0)), varied.get("beta2_rule", "fixed")
            scale, low, high = (float(n) if n else None for n in noise)
            arms.append(Arm(beta2, batch, rate, seed, loss, (scale, low, high)))
    return arms


def keep(arms: Sequence[Arm]) -> None:
    """Write what the figure of rates shows."""
    DRAWN.unlink(missing_ok=True)
    for arm in arms:
        row = {"beta2": arm.beta2, "batch": arm.batch, "rate": arm.rate, "seed": arm.seed}
        append_row(DRAWN, (*row, "loss"), row | {"loss": arm.loss})


def kept() -> list[Arm]:
    """Read it, without the noise."""
    unknown = (None, None, None)
    return [
        Arm(row["beta2"], int(row["batch"]), float(row["rate"]), int(row["seed"]), float(row["loss"]),
            unknown)
        for row in read_rows(DRAWN)
    ]  # fmt: skip


def best_three(arms: Sequence[Arm], batch: int) -> list[float]:
    """Return a batch's best rate of the first seed, and its neighbours."""
    losses = {arm.rate: arm.loss for arm in arms if arm.batch == batch}
    rates = sorted(losses)
    best = rates.index(min(rates, key=lambda rate: losses[rate]))
    middle = min(max(best, 1), len(rates) - 2)
    return rates[middle - 1 : middle + 2]


Losses = Mapping[tuple[str, int], Mapping[float, Mapping[int, float]]]
"""By β₂'s rule and batch, rate and seed."""


def losses_of(arms: Sequence[Arm]) -> Losses:
    """Return the losses of rates that all seeds have had."""
    found: dict[tuple[str, int], dict[float, dict[int, float]]] = {}
    for arm in arms:
        by_rate = found.setdefault((arm.beta2, arm.batch), {})
        by_rate.setdefault(arm.rate, {})[arm.seed] = arm.loss
    return {
        key: {rate: of for rate, of in sorted(by_rate.items()) if len(of) == len(SEEDS)}
        for key, by_rate in found.items()
    }


def best_rate(losses: Mapping[float, float]) -> float:
    """Return where the parabola through the best rate and its neighbours has its minimum, in log rate.

    Of a best one at an end, or next to a training that diverged, that rate itself.
    """
    rates = sorted(losses)
    best = rates.index(min(rates, key=lambda rate: losses[rate]))
    if not 0 < best < len(rates) - 1:
        return rates[best]
    below, at, above = (losses[rates[best + k]] for k in (-1, 0, 1))
    curvature = below - 2 * at + above
    if not (math.isfinite(curvature) and curvature > 0):
        return rates[best]
    step = math.log(rates[best + 1] / rates[best])
    return rates[best] * math.exp(step * (below - above) / (2 * curvature))


def exponent(losses: Losses, seeds: Sequence[int]) -> float:
    """Return the slope of log best rate over log batch, of mean losses over these seeds."""
    points = [
        (
            math.log(batch),
            math.log(
                best_rate({r: statistics.fmean(of[s] for s in seeds) for r, of in by_rate.items()})
            ),
        )
        for (beta2, batch), by_rate in losses.items()
        if beta2 == "fixed"
    ]
    return statistics.linear_regression(*zip(*points, strict=True)).slope


def bootstrapped(losses: Losses) -> tuple[float, float, float]:
    """Return the exponent, and the 95 % interval of it over seeds drawn again with replacement."""
    draw_seeds = random.Random(0)
    drawn = sorted(exponent(losses, draw_seeds.choices(SEEDS, k=len(SEEDS))) for _ in range(DRAWS))
    return exponent(losses, SEEDS), drawn[int(0.025 * DRAWS)], drawn[int(0.975 * DRAWS)]


def at_best(losses: Losses, beta2: str, batch: int) -> tuple[float, float, float]:
    """Return the best of the rates by its mean over seeds: the rate, that mean and the spread."""
    rate, of = min(losses[beta2, batch].items(), key=lambda pair: statistics.fmean(pair[1].values()))
    return rate, *spread(of.values())


def critical(losses: Losses) -> tuple[int, bool]:
    """Return the largest batch within twice the spread of the best, and whether none is larger."""
    batches = sorted(batch for beta2, batch in losses if beta2 == "fixed")
    found = {batch: at_best(losses, "fixed", batch) for batch in batches}
    _, least, std = min(found.values(), key=lambda of: of[1])
    largest = max(batch for batch in batches if found[batch][1] <= least + 2 * std)
    return largest, largest == batches[-1]


def answer(arms: Sequence[Arm]) -> str:
    """Say the critical batch, how the best rate goes with the batch, and what β₂'s half-life changes."""
    losses = losses_of(arms)
    batch, is_largest = critical(losses)
    slope, low, high = bootstrapped(losses)
    gains = [
        f"{at_best(losses, 'half_life', b)[1] - at_best(losses, 'fixed', b)[1]:+.3f} at {b}"
        for b in HALF_LIFE_AT
    ]
    largest = max(b for _, b in losses)
    _, loss, std = at_best(losses, "fixed", largest)
    _, best, _ = min((at_best(losses, "fixed", b) for b in {b for _, b in losses}), key=lambda of: of[1])
    return (
        f"**Answer.** At equal samples the largest batch that is as good as the best, within twice the "
        f"spread over seeds, is {'at least ' * is_largest}{batch}; a batch of {largest} ends "
        f"{loss - best:.3f} ± {std:.3f} above it. The best rate goes with the batch to the power "
        f"{slope:.2f} ({low:.2f} to {high:.2f}, seeds drawn again): the square-root rule says 0.5, the "
        f"linear one 1. β₂ of the same half-life in samples changes the loss by {', '.join(gains)}."
    )


def table(arms: Sequence[Arm]) -> str:
    """Return a row per batch."""
    losses = losses_of(arms)
    lines = [
        "| global batch | N | optimizer steps | best rate tried | parabola's | held-out loss "
        "| with β₂'s half-life | noise scale at the end, samples |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for batch in sorted(b for beta2, b in losses if beta2 == "fixed"):
        rate, mean, std = at_best(losses, "fixed", batch)
        means = {r: statistics.fmean(of.values()) for r, of in losses["fixed", batch].items()}
        half = "–"
        if ("half_life", batch) in losses:
            _, *of_half = at_best(losses, "half_life", batch)
            half = f"{of_half[0]:.4f} ± {of_half[1]:.4f}"
        noise = next(
            a.noise for a in arms if (a.beta2, a.batch, a.rate, a.seed) == ("fixed", batch, rate, 0)
        )
        lines.append(
            f"| {batch} | {batch // 16} | {15872 // batch} | {rate:g} | {best_rate(means):.4f} "
            f"| {mean:.4f} ± {std:.4f} | {half} | {_said(noise)} |"
        )
    return "\n".join(lines)


def _said(noise: tuple[float | None, float | None, float | None]) -> str:
    scale, low, high = noise
    if scale is None or high is None:
        return "not measured" if low is None else f"above {low:.3g}"
    return f"{scale:.3g} ({low:.3g} to {high:.3g})"


@style.styled()
def draw(arms: Sequence[Arm]) -> None:
    """Draw the loss at the end against the rate, a line for each batch."""
    losses = losses_of(arms)
    every: dict[int, dict[float, list[float]]] = {}
    for arm in arms:
        if arm.beta2 == "fixed" and math.isfinite(arm.loss):
            every.setdefault(arm.batch, {}).setdefault(arm.rate, []).append(arm.loss)
    figure = Figure(figsize=(style.width(), 3.6), layout="constrained")
    axes = figure.subplots()
    for index, (batch, by_rate) in enumerate(sorted(every.items())):
        look, rates = style.look(index, len(every)), sorted(by_rate)
        means, deviations = zip(*(spread(by_rate[rate]) for rate in rates), strict=True)
        axes.errorbar(rates, means, yerr=deviations, label=f"{batch}", **look)
        over_seeds = {r: statistics.fmean(of.values()) for r, of in losses["fixed", batch].items()}
        axes.axvline(best_rate(over_seeds), color=look["color"], linewidth=0.7, linestyle=":")
    least = min(statistics.fmean(of) for by_rate in every.values() for of in by_rate.values())
    axes.set(xscale="log", xlabel="learning rate", ylabel="held-out loss at the end")
    axes.set_ylim(least - 0.05, least + 1.2)
    axes.grid(axis="y")
    figure.legend(loc="outside right upper", title="global batch")
    figure.suptitle("Loss after 15,872 samples; dotted: the parabola’s best rate")
    style.save(figure, HERE, "rates", ("png",))


if __name__ == "__main__":
    main()
