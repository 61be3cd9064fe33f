"""Rebuild this study: `python experiments/strategies/build.py` (about 15 minutes on two cores).

`results.csv` holds a row a training and grows by what is missing in it, so that the study can be stopped
and continued; delete it to measure again. `--short FOLDER` trains a few of them for a few steps, and
writes rows, table and figure there. `--draw` draws the rows again.
"""

import argparse
import copy
import gc
import itertools
import multiprocessing
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from experiments.notebook import (
    Quiet,
    append_row,
    asked_to_draw,
    composed,
    provenance,
    read_rows,
    spread,
    write_results,
)
from experiments.precision.build import distance, gradient
from gaccum_exp.arms import plan as planning
from gaccum_exp.core.losses.protocol import count
from gaccum_exp.memory.fake import settle
from gaccum_exp.report.figures import style
from gaccum_exp.tracking.sink import Point, Sink
from gaccum_exp.train.audits import audit
from gaccum_exp.train.build import build, load
from gaccum_exp.train.loop import hooks_of, train
from gaccum_exp.train.state import TrainState

HERE = Path(__file__).resolve().parent
STEPS, SEEDS = (1, 4, 16, 64), (0, 1, 2)
GLOBAL, MICRO = 64, 4
"""Samples of a window where that is fixed, and of a micro-batch where that is."""
SAMPLES, MARKS = 8192, 8
"""Of a training, and evaluations in it."""
BETAS, EPS = (0.9, 0.999), 1e-8
FIXED_GLOBAL, FIXED_MICRO, BUFFERS = "fixed global batch", "fixed micro-batch", "bfloat16 weights"
RATES = {
    FIXED_GLOBAL: (3e-4, 1e-3, 3e-3),
    FIXED_MICRO: (3e-5, 1e-4, 3e-4, 1e-3),
    BUFFERS: (3e-4, 1e-3, 3e-3),
}
IN_PLACE, ADAM_A, INVARIANT = "in_place", "adam_a", "batch_size_invariant_adam"
WAYS: dict[str, dict[str, tuple[str, ...]]] = {
    FIXED_GLOBAL: {
        "Adam": (f"strategy={IN_PLACE}",),
        "AdamA": (f"strategy={ADAM_A}",),
        "invariant, base N": (f"strategy={INVARIANT}", "strategy.base_steps=${accum.steps}"),
        "invariant, base 1": (f"strategy={INVARIANT}",),
    },
    FIXED_MICRO: {
        "invariant, base 1": (f"strategy={INVARIANT}",),
        "Adam": (f"strategy={IN_PLACE}",),
        "Adam, √ rule": (f"strategy={IN_PLACE}",),
    },
    BUFFERS: {
        "in bfloat16": (f"strategy={IN_PLACE}",),
        "compensated": ("strategy=compensated",),
        "in float32": ("accum.buffer_dtype=float32",),
    },
}
COLUMNS = (
    *("part", "way", "steps", "rate", "seed", "curve", "step_error", "adding_error"),
    *("peak_bytes", "predicted_bytes"),
)
Row = Mapping[str, str]


@dataclass(frozen=True)
class Scope:
    """What of the study is run."""

    steps: Sequence[int] = STEPS
    seeds: Sequence[int] = SEEDS
    rates: int | None = None
    """So many of each part's; None: all."""
    samples: int = SAMPLES

    def cells(self) -> Iterator[tuple[str, str, int, float, int]]:
        """Yield part, way, N, learning rate and seed of every training, the longest ones first."""
        for steps, part in itertools.product(sorted(self.steps, reverse=True), WAYS):
            middle = RATES[part][1:2] if self.rates == 1 else RATES[part]
            yield from (
                (part, way, steps, rate, seed)
                for way, rate, seed in itertools.product(WAYS[part], middle, self.seeds)
            )


SHORT = Scope(steps=(1, 4), seeds=(0,), rates=1, samples=256)


class Curve(Sink):
    """Keeps the held-out losses."""

    def __init__(self) -> None:
        super().__init__()
        self.losses: list[float] = []

    def send(self, points: list[Point]) -> None:
        """Keep them."""
        self.losses += [p.values["eval/loss"] for p in points if "eval/loss" in p.values]

    def describe(self, tags: Mapping[str, str]) -> None:
        """Keep none."""


def main() -> None:
    """Train what is missing, on two processes; write rows, figure and page."""
    if asked_to_draw(HERE / "results.csv"):
        draw(read_rows(HERE / "results.csv"), HERE)
        return
    parser = argparse.ArgumentParser()
    parser.add_argument("--short", type=Path, metavar="FOLDER")
    short = parser.parse_args().short
    start_s = time.monotonic()
    if short is not None:
        print(study(SHORT, short, processes=1))
        print(answer(read_rows(short / "results.csv")))
        return
    markdown = study(Scope(), HERE, processes=2)
    told = provenance(time.monotonic() - start_s)
    said = answer(read_rows(HERE / "results.csv"))
    write_results(HERE / "README.md", f"{markdown}\n\n{told}", f"**Answer.**\n\n{said}")


def study(scope: Scope, folder: Path, processes: int) -> str:
    """Train what `results.csv` in a folder does not hold yet; draw, and return the tables."""
    folder.mkdir(parents=True, exist_ok=True)
    results = folder / "results.csv"
    done = {
        (row["part"], row["way"], int(row["steps"]), float(row["rate"]), int(row["seed"]))
        for row in read_rows(results)
    }
    missing = [cell for cell in scope.cells() if cell not in done]
    one = partial(trained, scope.samples)
    if processes == 1:
        settle()
        try:
            for row in map(one, missing):
                append_row(results, COLUMNS, row)
        finally:
            gc.unfreeze()
    else:
        spawn = multiprocessing.get_context("spawn")  # a forked child has torch's threads half
        with ProcessPoolExecutor(processes, mp_context=spawn, initializer=settle) as pool:
            for number, row in enumerate(pool.map(one, missing), 1):
                append_row(results, COLUMNS, row)
                print(f"{number} of {len(missing)}: {row['part']}, {row['way']}, N = {row['steps']}")
    rows = read_rows(results)
    draw(rows, folder)
    tables = losses(rows), invariance(rows), errors(rows), memory(rows)
    return "\n\n".join(tables)


def overrides(part: str, way: str, steps: int, rate: float, seed: int, samples: int) -> tuple[str, ...]:
    """Return the configuration of one training."""
    window = MICRO * steps if part == FIXED_MICRO else GLOBAL
    betas, eps = BETAS, EPS
    if way == "Adam, √ rule":  # of Malladi et al. 2022, with half-lives that are the same in samples
        rate, eps = rate * steps**0.5, EPS / steps**0.5
        betas = (BETAS[0] ** steps, BETAS[1] ** steps)
    pure = ("runtime.precision=bf16", "runtime.weight_dtype=same") if part == BUFFERS else ()
    return (
        *("model=mlp", "model.hidden=[128,128]", "data=digits", "optimizer=adamw"),
        *("runtime.device=cpu", "runtime.threads=1", "audit.at_start=false", *pure),
        *("accum.partial_window=carry", f"data.global_batch_size={window}", f"accum.steps={steps}"),
        *(f"train.steps={samples // window}", f"seed={seed}", f"optimizer.lr={rate}"),
        f"train.eval_every_steps={max(1, samples // window // MARKS)}",
        *(f"+optimizer.betas=[{betas[0]},{betas[1]}]", f"+optimizer.eps={eps}"),
        *WAYS[part][way],
    )


def trained(samples: int, cell: tuple[str, str, int, float, int]) -> dict[str, object]:
    """Train one cell; return its row."""
    part, way, steps, rate, seed = cell
    settings = composed(*overrides(*cell, samples))
    loaded = load(settings)
    state, sink = build(settings, loaded), Curve()
    adding = adding_error(state, WAYS[part][way]) if part == BUFFERS and steps > 1 else ""
    hooks, _ = hooks_of(state, sink, Quiet())  # type: ignore[arg-type]  # shown nowhere
    train(state, hooks)
    sink.deliver()
    error: object = ""
    if part == FIXED_GLOBAL and rate == RATES[part][1]:
        last = state.total_steps - 1
        found = audit(state, next(state.windows_from(last)), last)
        error = found.e64
    predicted = planning.predicted_peak(settings, loaded) if seed == 0 and steps > 1 else None
    return {
        "part": part, "way": way, "steps": steps, "rate": rate, "seed": seed,
        "curve": " ".join(f"{loss:.6f}" for loss in sink.losses),
        "step_error": error, "adding_error": adding,
        "peak_bytes": int(sink.last["memory/peak_bytes"]),
        "predicted_bytes": "" if predicted is None else predicted.bytes,
    }  # fmt: skip


def adding_error(state: TrainState, way: Sequence[str]) -> float:
    """Return how far the first window's gradient is from the float64 sum of its micro gradients."""
    how: dict[str, Any] = {"strategy": "compensated"} if "strategy=compensated" in way else {}
    if "accum.buffer_dtype=float32" in way:
        how["buffer_dtype"] = torch.float32
    model, window = copy.deepcopy(state.model), next(state.windows_from(0))
    total = sum(count(state.loss_fn, micro_batch) for micro_batch in window)
    exact = torch.zeros((), dtype=torch.float64)
    for micro_batch in window:
        exact = exact + gradient(model, state.loss_fn, [micro_batch], reduction="sum", sum_divisor=total)
    return distance(gradient(model, state.loss_fn, window, **how), exact)


def of_cell(rows: Sequence[Row], part: str, way: str, steps: int, rate: float) -> list[Row]:
    """Return a cell's rows, one a seed, in order."""
    found = [
        row
        for row in rows
        if (row["part"], row["way"]) == (part, way)
        and (int(row["steps"]), float(row["rate"])) == (steps, rate)
    ]
    return sorted(found, key=lambda row: int(row["seed"]))


def curve(row: Row) -> list[float]:
    """Return a training's held-out losses, the last one at its end."""
    return [float(loss) for loss in row["curve"].split()]


def steps_in(rows: Sequence[Row]) -> list[int]:
    """Return every N of the rows."""
    return sorted({int(row["steps"]) for row in rows})


def written(values: Sequence[float], form: str = ".3f") -> str:
    """Return mean ± sample standard deviation."""
    mean, deviation = spread(values)
    return f"{mean:{form}} ± {deviation:{form}}"


def answer(rows: Sequence[Row]) -> str:
    """Return what was found, in sentences, whichever way it came out."""
    every = steps_in(rows)
    most, rates = every[-1], [r for r in RATES[FIXED_MICRO] if of_cell(rows, FIXED_MICRO, "Adam", 1, r)]
    lines = []
    for way in WAYS[FIXED_MICRO]:
        within = [
            max((n for n in every if holds(rows, way, n, rate)), default=1)  # to N = 1 there is no gap
            for rate in rates
        ]
        said = ", ".join(f"N = {n} at rate {r:g}" for n, r in zip(within, rates, strict=True))
        lines.append(
            f"- Fixed micro-batch, {way}: curves stay within what seeds do to N = 1 up to {said}."
        )
    for way in WAYS[FIXED_GLOBAL]:
        middle = RATES[FIXED_GLOBAL][1]
        ends = [
            written([curve(row)[-1] for row in of_cell(rows, FIXED_GLOBAL, way, n, middle)])
            for n in (1, most)
        ]
        lines.append(
            f"- Fixed global batch, {way}: held-out loss {ends[0]} at N = 1, {ends[1]} at N = {most} "
            f"(rate {middle:g})."
        )
    held = {way: peak(of_cell(rows, FIXED_GLOBAL, way, most, middle)) for way in ("Adam", "AdamA")}
    lost = {
        way: spread(float(r["adding_error"]) for r in of_cell(rows, BUFFERS, way, most, middle))[0]
        for way in WAYS[BUFFERS]
    }
    sizes = {way: peak(of_cell(rows, BUFFERS, way, most, middle)) for way in WAYS[BUFFERS]}
    return "\n".join(
        [
            *lines,
            f"- AdamA holds {held['AdamA'] / held['Adam']:.2f} of what Adam holds at N = {most}.",
            f"- Compensated bfloat16 sums lose {lost['compensated']:.1e} at N = {most} in "
            f"{sizes['compensated'] / 2**10:.0f} KiB, float32 buffers {lost['in float32']:.1e} in "
            f"{sizes['in float32'] / 2**10:.0f} KiB, bfloat16 alone {lost['in bfloat16']:.1e} in "
            f"{sizes['in bfloat16'] / 2**10:.0f} KiB.",
        ]
    )


def holds(rows: Sequence[Row], way: str, steps: int, rate: float) -> bool:
    """Whether curves at this N, and at all smaller ones, differ from N = 1 by less than seeds do."""
    ones = of_cell(rows, FIXED_MICRO, way, 1, rate)
    return all(
        spread(gap(row, one) for row, one in zip(cell, ones, strict=True))[0] <= of_seeds(ones)
        for n in steps_in(rows)
        if n <= steps
        for cell in [of_cell(rows, FIXED_MICRO, way, n, rate)]
    )


def of_seeds(cell: Sequence[Row]) -> float:
    """Return the largest sample standard deviation over seeds along a cell's curves."""
    return max(spread(at)[1] for at in zip(*map(curve, cell), strict=True))


def peak(cell: Sequence[Row]) -> int:
    """Return the most that a cell's trainings hold."""
    return max(int(row["peak_bytes"]) for row in cell)


def losses(rows: Sequence[Row]) -> str:
    """Return the held-out losses at the end."""
    every = steps_in(rows)
    lines = [
        "### Held-out loss after the same samples",
        "",
        f"| | way | rate | {' | '.join(f'N = {n}' for n in every)} |",
        f"|---|---|---|{'---|' * len(every)}",
    ]
    for part, ways in WAYS.items():
        for way, rate in itertools.product(ways, RATES[part]):
            cells = [of_cell(rows, part, way, n, rate) for n in every]
            if all(cells):
                ends = [written([curve(row)[-1] for row in cell]) for cell in cells]
                lines.append(f"| {part} | {way} | {rate:g} | {' | '.join(ends)} |")
    return "\n".join(lines)


def invariance(rows: Sequence[Row]) -> str:
    """Return how far curves at a fixed micro-batch are from that of N = 1."""
    every = steps_in(rows)[1:]
    lines = [
        "### Curves at a fixed micro-batch: the largest gap to N = 1 of the same seed",
        "",
        f"| way | rate | {' | '.join(f'N = {n}' for n in every)} | spread over seeds at N = 1 |",
        f"|---|---|{'---|' * len(every)}---|",
    ]
    for way, rate in itertools.product(WAYS[FIXED_MICRO], RATES[FIXED_MICRO]):
        ones = of_cell(rows, FIXED_MICRO, way, 1, rate)
        if not ones:
            continue
        gaps = [
            written([gap(row, one) for row, one in zip(cell, ones, strict=True)])
            for cell in (of_cell(rows, FIXED_MICRO, way, n, rate) for n in every)
        ]
        lines.append(f"| {way} | {rate:g} | {' | '.join(gaps)} | {of_seeds(ones):.3f} |")
    return "\n".join(lines)


def gap(row: Row, other: Row) -> float:
    """Return the largest difference of two curves at the same samples."""
    return max(abs(a - b) for a, b in zip(curve(row), curve(other), strict=True))


def errors(rows: Sequence[Row]) -> str:
    """Return how far steps are from the large batch's, and what adding up loses."""
    every = steps_in(rows)
    lines = [
        "### Error",
        "",
        f"| of | way | {' | '.join(f'N = {n}' for n in every)} |",
        f"|---|---|{'---|' * len(every)}",
    ]
    for part, column, what in (
        (FIXED_GLOBAL, "step_error", "step (of Adam: gradient) to the large batch's, in float64"),
        (BUFFERS, "adding_error", "adding up, to the float64 sum"),
    ):
        for way in WAYS[part]:
            cells = [of_cell(rows, part, way, n, RATES[part][1]) for n in every]
            said = [
                written([float(row[column]) for row in cell], ".1e")
                if all(row[column] for row in cell)
                else ""
                for cell in cells
            ]
            lines.append(f"| {what} | {way} | {' | '.join(said)} |")
    return "\n".join(lines)


def memory(rows: Sequence[Row]) -> str:
    """Return the tracked peaks, and how far predictions are off."""
    every = steps_in(rows)
    lines = [
        "### Peak memory of a window in KiB, tracked",
        "",
        f"| | way | {' | '.join(f'N = {n}' for n in every)} | prediction off by at most |",
        f"|---|---|{'---|' * len(every)}---|",
    ]
    for part, ways in WAYS.items():
        for way in ways:
            cells = [of_cell(rows, part, way, n, RATES[part][1]) for n in every]
            peaks = [f"{peak(cell) / 2**10:.0f}" for cell in cells]
            off = max(
                abs(int(row["predicted_bytes"]) - int(row["peak_bytes"]))
                for cell in cells
                for row in cell
                if row["predicted_bytes"]
            )
            lines.append(f"| {part} | {way} | {' | '.join(peaks)} | {off} bytes |")
    return "\n".join(lines)


@style.styled()
def draw(rows: Sequence[Row], folder: Path) -> None:
    """Draw losses at both fixed batches, memory, and what adding up loses."""
    figure = Figure(figsize=(style.width(), 5.6), layout="constrained")
    (ends, micro), (held, lost) = figure.subplots(2, 2)
    every = steps_in(rows)

    def against_n(axes: Any, part: str, of: Any, low: int = 1) -> None:
        for index, way in enumerate(WAYS[part]):
            cells = {n: of_cell(rows, part, way, n, RATES[part][1]) for n in every if n >= low}
            means, deviations = zip(*(spread(map(of, cell)) for cell in cells.values()), strict=True)
            places = [n * 1.05 ** (index - 1) for n in cells]  # those that coincide stay apart
            axes.errorbar(places, means, deviations, label=way, **style.look(index, len(WAYS[part])))
        axes.set_xscale("log", base=2)
        axes.set_xticks(every, [str(n) for n in every])
        axes.set_xlabel("N, micro-batches per optimizer step")
        axes.legend()
        axes.grid(axis="y")

    against_n(ends, FIXED_GLOBAL, lambda row: curve(row)[-1])
    ends.set_title(f"held-out loss, windows of {GLOBAL}, rate {RATES[FIXED_GLOBAL][1]:g}")
    ends.set_yscale("log")
    ends.set_yticks([0.02, 0.05, 0.1, 0.2, 0.5], ["0.02", "0.05", "0.1", "0.2", "0.5"])
    ends.minorticks_off()
    draw_curves(micro, rows)
    against_n(held, FIXED_GLOBAL, lambda row: int(row["peak_bytes"]) / 2**10)
    held.set_ylim(0, 1.06 * held.get_ylim()[1])
    held.set_title(f"peak memory in KiB, windows of {GLOBAL}")
    against_n(lost, BUFFERS, lambda row: float(row["adding_error"]), low=2)
    lost.set_yscale("log")
    lost.set_yticks([0.002, 0.005], ["0.002", "0.005"])
    lost.minorticks_off()
    lost.set_title("bfloat16 weights: relative error of adding up")
    figure.suptitle("Two-layer perceptron, AdamW, mean ± std over seeds")
    style.save(figure, folder, "strategies", ("png",))


def draw_curves(axes: Any, rows: Sequence[Row]) -> None:
    """Draw the curves at a fixed micro-batch: those of one way are to lie on each other."""
    every, rate = steps_in(rows), RATES[FIXED_MICRO][1]
    ways = {"invariant, base 1": "-", "Adam, √ rule": ":"}
    for way, line in ways.items():
        for index, n in enumerate(every):
            curves = map(curve, of_cell(rows, FIXED_MICRO, way, n, rate))
            means = [spread(at)[0] for at in zip(*curves, strict=True)]
            look = style.look(index, len(every)) | {"linestyle": line}
            axes.plot(range(1, len(means) + 1), means, **look)
    named = [
        Line2D([], [], label=f"N = {n}", **style.look(index, len(every)) | {"linestyle": ""})
        for index, n in enumerate(every)
    ]
    named += [Line2D([], [], label=way, color="black", linestyle=line) for way, line in ways.items()]
    axes.set(yscale="log", xlabel="evaluations, at equal counts of samples")
    axes.set_yticks([0.2, 0.5, 1, 2], ["0.2", "0.5", "1", "2"])
    axes.minorticks_off()
    axes.set_title(f"held-out loss, micro-batches of {MICRO}, rate {rate:g}")
    axes.legend(handles=named, ncols=2, loc="lower left", columnspacing=0.8, handlelength=2)
    axes.grid(axis="y")


if __name__ == "__main__":
    main()
