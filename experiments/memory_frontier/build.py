"""Rebuild this study: `python experiments/memory_frontier/build.py` (about 20 minutes on two cores).

`results.csv` holds predicted and measured peaks of the models below and grows by what is missing in it,
so it can be stopped and continued; delete it to measure again. Then the sweep is run and the page
written. `h200.csv` is the same sweep's table from a GPU.
"""

import functools
import gc
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from experiments.memory_frontier.witness import allocated_peak, one_dnn
from experiments.notebook import (
    Cells,
    append_row,
    asked_to_draw,
    composed,
    keep_cells,
    kept_cells,
    provenance,
    read_rows,
    run_study,
    spread,
    write_results,
)
from gaccum_exp.arms import plan as planning
from gaccum_exp.memory.meter import Peak, TensorMeter
from gaccum_exp.memory.plan import size
from gaccum_exp.report.figures import style
from gaccum_exp.report.figures.cost_data import CostCurve
from gaccum_exp.report.figures.frontier import draw_costs
from gaccum_exp.train.build import build, load
from gaccum_exp.train.hooks import Hooks
from gaccum_exp.train.memory_meters import MeterPhases
from gaccum_exp.train.state import TrainState
from gaccum_exp.train.step import take_step

HERE = Path(__file__).resolve().parent
RESULTS, DRAWN, ON_GPU = HERE / "results.csv", HERE / "drawn.csv", HERE / "h200.csv"
KEPT = {"no": "everything kept", "yes": "activation checkpointing"}
STEPS = (1, 2, 4, 8)
WITNESSED = ("sgd", 1), ("adamw", 4)
"""Optimizer and N of the windows that the profiler watches as well."""
IMAGES = ("data=fake", "data.global_batch_size=16", "data.size=32", "data.eval_size=16")
VISION = ("resnet18", "resnet50", "mobilenet_v3_small", "convnext_tiny", "vit_b_16", "swin_t")
MODELS: dict[str, tuple[str, ...]] = {
    "mlp": ("model=mlp", "data=digits", "data.global_batch_size=256"),
    "cnn": ("model=cnn", "data=digits", "data.global_batch_size=256"),
    "gpt": (
        *("model=gpt", "data=text", "criterion=token_cross_entropy", "data.global_batch_size=16"),
    ),
    **{
        name: ("model=torchvision", f"model.name={name}", "data.image_size=96", *IMAGES)
        for name in VISION
    },
}  # fmt: skip
MODELS["vit_b_16"] = (*MODELS["vit_b_16"], "model.image_size=96")
OPTIMIZERS = {
    "sgd": ("optimizer=sgd",),
    "sgd, fused": ("optimizer=sgd", "+optimizer.fused=true"),
    "adamw": ("optimizer=adamw",),
    "adamw, fused": ("optimizer=adamw", "+optimizer.fused=true"),
}
COLUMNS = (
    *("model", "optimizer", "steps", "predicted_bytes", "tracked_bytes"),
    *("predicted_phase", "tracked_phase", "allocated_bytes", "allocated_with_one_dnn_bytes"),
)


def main() -> None:
    """Measure what is missing, run the sweep, write figure and page."""
    if asked_to_draw(DRAWN):
        draw(kept_cells(DRAWN, str, int))
        draw_gpu(read_rows(ON_GPU))
        return
    start = time.monotonic()
    for row in missing():
        append_row(RESULTS, COLUMNS, row)
    measured_s = time.monotonic() - start
    arms, seconds = run_study("memory_frontier")
    cells = {
        (kept, cell.steps): {
            "peak_bytes": (cell.peak_bytes, 0.0),
            "predicted_bytes": (cell.predicted_bytes, 0.0),
            "step_s": cell.step_s,
        }
        for kept, of_kept in curves(arms).items()
        for cell in of_kept
    }
    keep_cells(DRAWN, ("checkpointing", "steps"), cells)
    draw(cells)
    draw_gpu(read_rows(ON_GPU))
    told = provenance(seconds + measured_s)
    write_results(HERE / "README.md", "\n\n".join([frontier(arms), accuracy(read_rows(RESULTS)), told]))


def missing() -> Iterator[dict[str, Any]]:
    """Yield the rows that `results.csv` does not hold yet."""
    done = {(row["model"], row["optimizer"], int(row["steps"])) for row in read_rows(RESULTS)}
    for model, of_model in MODELS.items():
        for optimizer, of_optimizer in OPTIMIZERS.items():
            for steps in STEPS:
                if (model, optimizer, steps) not in done:
                    call = (*of_model, *of_optimizer, f"accum.steps={steps}")
                    named = {"model": model, "optimizer": optimizer, "steps": steps}
                    yield named | judge(call, (optimizer, steps))


def judge(overrides: tuple[str, ...], kind: tuple[str, int]) -> dict[str, Any]:
    """Predict a window's peak, measure it, and let the profiler watch it."""
    settings = composed(*overrides, "runtime.device=cpu", "train.steps=4")
    loaded = load(settings)
    predicted = planning.predicted_peak(settings, loaded)
    assert predicted is not None
    experiment = build(settings, loaded)
    windows = experiment.windows_from(0)
    take_step(experiment, next(windows))  # makes the optimizer's state
    measured, held = tracked(experiment, next(windows))
    row: dict[str, Any] = {
        "predicted_bytes": predicted.bytes, "tracked_bytes": measured.bytes,
        "predicted_phase": predicted.phase, "tracked_phase": measured.phase,
    }  # fmt: skip
    if kind in WITNESSED:
        for key, enabled in (("allocated_bytes", False), ("allocated_with_one_dnn_bytes", True)):
            window = next(windows)  # what is there before the step is no part of it
            experiment.optimizer.zero_grad()
            with one_dnn(enabled):
                row[key] = held + allocated_peak(functools.partial(step_alike, experiment, window))
    gc.collect()
    print(overrides, row, flush=True)
    return row


def tracked(experiment: TrainState, window: Any) -> tuple[Peak, int]:
    """Return the tracked peak of a window, and what was held before it."""
    experiment.optimizer.zero_grad()
    follower = TensorMeter(experiment.modules, experiment.optimizer, experiment.device)
    before = follower.held_bytes
    with follower:
        watched = replace(experiment, loss_fn=follower.loss_fn(experiment.loss_fn), global_step=1)
        take_step(watched, window, Hooks([MeterPhases(follower)]))
    peak = follower.peak()
    assert peak is not None
    return peak, before


def step_alike(experiment: TrainState, window: Any) -> None:
    """Take a step that copies its micro-batches as a tracked one does, and is not tracked."""
    follower = TensorMeter(experiment.modules, experiment.optimizer, experiment.device)
    take_step(replace(experiment, loss_fn=follower.loss_fn(experiment.loss_fn), global_step=2), window)


def frontier(arms: list[dict[str, str]]) -> str:
    """Return what every arm held and took."""
    lines = [
        "### The frontier",
        "",
        "| checkpointing | N | micro-batch | measured | predicted | where | step in ms | × one pass |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for kept, cells in curves(arms).items():
        for cell in cells:
            mean_s, deviation_s = cell.step_s
            written = (
                *(kept, str(cell.steps), str(cell.micro_batch_size), size(cell.peak_bytes)),
                *(
                    f"{cell.predicted_bytes - cell.peak_bytes:+d} bytes",
                    cell.phase,
                    f"{1e3 * mean_s:.0f} ± {1e3 * deviation_s:.0f}",
                ),
                f"{mean_s / cells[0].step_s[0]:.2f}",
            )
            lines.append(f"| {' | '.join(written)} |")
    return "\n".join(lines)


class Cell(NamedTuple):
    """The arms of one N, which differ in the seed alone."""

    steps: int
    micro_batch_size: int
    peak_bytes: int
    """The largest, as the predicted one."""
    predicted_bytes: int
    phase: str
    step_s: tuple[float, float]
    """Mean and sample standard deviation over seeds."""


def curves(arms: list[dict[str, str]]) -> dict[str, list[Cell]]:
    """Return the cells without and with checkpointing, by N."""
    found: dict[str, list[Cell]] = {}
    for word, value in (("no", "False"), ("yes", "True")):
        mine = [row for row in arms if f"activation_checkpointing={value}" in row["differs"]]
        for steps in sorted({int(row["steps"]) for row in mine}):
            rows = [row for row in mine if int(row["steps"]) == steps]
            cell = Cell(
                steps,
                int(rows[0]["micro_batch_size"]),
                max(int(row["peak_bytes"]) for row in rows),
                max(int(row["predicted_peak_bytes"]) for row in rows),
                " and ".join(sorted({row["peak_phase"] for row in rows})),
                spread(float(row["step_s"]) for row in rows),
            )
            found.setdefault(word, []).append(cell)
    return found


def accuracy(rows: list[dict[str, str]]) -> str:
    """Return how far predictions and the profiler are from what the tracker measures."""
    lines = [
        "### Predicted against measured",
        "",
        "| model | worst prediction | at | phases alike | profiler, oneDNN off | profiler, oneDNN on |",
        "|---|---|---|---|---|---|",
    ]
    for model in MODELS:
        mine = [row for row in rows if row["model"] == model]
        worst = max(mine, key=lambda row: abs(missed(row)))
        alike = sum(row["predicted_phase"] == row["tracked_phase"] for row in mine)
        cells = (
            *(model, f"{missed(worst):+d} bytes", named(worst), f"{alike} of {len(mine)}"),
            *(furthest(mine, "allocated_bytes"), furthest(mine, "allocated_with_one_dnn_bytes")),
        )
        lines.append(f"| {' | '.join(cells)} |")
    worst = max(rows, key=lambda row: abs(off(row, "predicted_bytes")))
    exact = sum(row["predicted_bytes"] == row["tracked_bytes"] for row in rows)
    lines += [
        "",
        f"{len(rows)} windows: {exact} predicted to the byte, the worst off by "
        f"{abs(missed(worst))} bytes, "
        f"{abs(off(worst, 'predicted_bytes')):.1e} of its peak ({worst['model']}, {named(worst)}).",
    ]
    return "\n".join(lines)


def named(row: dict[str, str]) -> str:
    """Return what else than its model a row is of."""
    return f"{row['optimizer']}, N = {row['steps']}"


def missed(row: dict[str, str]) -> int:
    """Return predicted minus tracked bytes."""
    return int(row["predicted_bytes"]) - int(row["tracked_bytes"])


def off(row: dict[str, str], key: str) -> float:
    """Return how far a number is from the tracked peak, relative to it."""
    return int(row[key]) / int(row["tracked_bytes"]) - 1


def furthest(rows: Iterable[dict[str, str]], key: str) -> str:
    """Return the largest difference of what the profiler saw."""
    return f"{max((off(row, key) for row in rows if row[key]), key=abs):+.2%}"


@style.styled()
def draw(cells: Cells) -> None:
    """Draw measured and predicted peaks against step times."""
    shown = []
    for kept, label in KEPT.items():
        mine = {n: cell for (word, n), cell in cells.items() if word == kept}
        times = {n: cell["step_s"] for n, cell in mine.items()}
        shown.append(
            CostCurve(
                label,
                {n: cell["peak_bytes"][0] for n, cell in mine.items()},
                {n: cell["predicted_bytes"][0] for n, cell in mine.items()},
                {n: mean for n, (mean, _) in times.items()},
                tuple(mine),
                {n: mean - std for n, (mean, std) in times.items()},
                {n: mean + std for n, (mean, std) in times.items()},
            )
        )
    figure = draw_costs(
        shown, "ResNet-18, AdamW, 64 images of 64 × 64 a window", "peak memory",
        ("Numbers are N, the micro-batches per optimizer step. Horizontal: ± std over 3 seeds.",),
    )  # fmt: skip
    assert figure is not None
    style.save(figure, HERE, "memory_frontier", ("png",))


@style.styled()
def draw_gpu(rows: list[dict[str, str]], told: int = 4) -> None:
    """Draw the same of a GPU; the title says what N = `told` came to with everything kept."""
    shown = []
    for kept, label in KEPT.items():
        mine = {
            int(row["steps"]): row
            for row in rows
            if f"activation_checkpointing={kept == 'yes'}" in row["differs"]
        }
        costs = ({n: float(row[c]) for n, row in mine.items()} for c in
                 ("peak_bytes", "predicted_peak_bytes", "step_s"))  # fmt: skip
        shown.append(CostCurve(label, *costs, tuple(mine)))
    plain = shown[0]
    memory, time_s = (of[told] / of[1] for of in (plain.measured_bytes, plain.step_s))
    figure = draw_costs(
        shown,
        f"N = {told} holds {memory:.2f} of the memory for {time_s:.2f} of the time: ResNet-50 on an "
        "NVIDIA H200, 256 images of 224 × 224 a window",
        "peak memory",
        ("Numbers are N, the micro-batches per optimizer step. One run each.",),
    )
    assert figure is not None
    style.save(figure, HERE, "h200", ("png",))


if __name__ == "__main__":
    main()
