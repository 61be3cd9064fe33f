"""Rebuild this study: `python experiments/precision/build.py` (about 8 minutes on two cores)."""

import copy
import re
import sys
import time
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from experiments.notebook import (
    Cells,
    asked_to_draw,
    composed,
    keep_cells,
    kept_cells,
    provenance,
    run_study,
    spread,
    write_results,
)
from gaccum_exp import accumulate_gradients
from gaccum_exp.core.losses.protocol import count
from gaccum_exp.report.figures import style
from gaccum_exp.train.build import build
from gaccum_exp.train.state import TrainState

HERE = Path(__file__).resolve().parent
STEPS = (1, 2, 8, 32, 64)
SEEDS = (0, 1, 2)
BUFFERS = {"same": "in bfloat16", "float32": "in float32"}
DRAWN = HERE / "drawn.csv"
PUBLISHED = {2: 2.3e-3, 8: 3.2e-3, 64: 7.7e-3}
"""Relative gradient error of a bfloat16 buffer by N: bigram model, 64 sequences."""


def main() -> None:
    """Measure gradients, run the arms, write table and figure."""
    if asked_to_draw(DRAWN):
        draw(kept_cells(DRAWN, str, int))
        return
    rows, seconds = run_study("precision")
    start = time.monotonic()
    cells = trained(rows)
    for (buffer, steps), errors in measured().items():
        cells[buffer, steps] |= errors
    keep_cells(DRAWN, ("buffer", "steps"), cells)
    draw(cells)
    told = provenance(seconds + time.monotonic() - start)
    write_results(HERE / "README.md", f"{table(cells)}\n\n{told}")


def trained(rows: list[dict[str, str]]) -> Cells:
    """Return held-out loss and peak memory of the arms, over seeds."""
    found: dict[tuple[str, int], list[dict[str, str]]] = {}
    for row in rows:
        buffer = re.search(r"buffer_dtype=(\w+)", row["differs"])
        assert buffer is not None, row["differs"]
        found.setdefault((buffer[1], int(row["accum_steps"])), []).append(row)
    return {
        key: {
            "loss": spread(float(row["eval_loss"]) for row in arms),
            "mib": spread(float(row["peak_bytes"]) / 2**20 for row in arms),
        }
        for key, arms in found.items()
    }


def measured() -> Cells:
    """Return the errors of the first window's gradient at the initial weights, over seeds."""
    found: dict[tuple[str, int], list[tuple[float, float]]] = {}
    for seed in SEEDS:
        for steps in STEPS:
            chosen = "experiment=precision", f"seed={seed}", f"accum.steps={steps}"
            experiment = build(composed(*chosen, "runtime.device=cpu"))
            window = next(experiment.windows_from(0))
            for buffer, errors in gradient_errors(experiment, window).items():
                found.setdefault((buffer, steps), []).append(errors)
    return {
        key: {
            "buffer_error": spread(of_buffer for of_buffer, _ in errors),
            "error": spread(of_all for _, of_all in errors),
        }
        for key, errors in found.items()
    }


def gradient_errors(experiment: TrainState, window: list) -> dict[str, tuple[float, float]]:
    """Return, for each buffer, how far its gradient is from the exact sum and from float64.

    The exact sum adds the same bfloat16 micro gradients up in float64; the other reference is the
    gradient of the same weights computed in float64 throughout.
    """
    model, loss_fn = experiment.model, experiment.loss_fn
    total = sum(count(loss_fn, micro_batch) for micro_batch in window)
    exact_sum = torch.zeros((), dtype=torch.float64)
    for micro_batch in window:
        exact_sum = exact_sum + gradient(
            model, loss_fn, [micro_batch], reduction="sum", sum_divisor=total
        )
    exact = gradient(copy.deepcopy(model).double(), loss_fn, window)
    found = {}
    for buffer, dtype in (("same", None), ("float32", torch.float32)):
        got = gradient(model, loss_fn, window, buffer_dtype=dtype)
        found[buffer] = distance(got, exact_sum), distance(got, exact)
    return found


def gradient(model: nn.Module, loss_fn, window: list, **how) -> Tensor:
    """Return the accumulated gradient in float64, flat."""
    model.zero_grad()
    accumulate_gradients(model, loss_fn, window, **how)
    return torch.cat([p.grad.double().flatten() for p in model.parameters()])


def distance(got: Tensor, exact: Tensor) -> float:
    """Return the relative distance."""
    return float((got - exact).norm() / exact.norm())


def table(cells: Cells) -> str:
    """Return the Markdown table, mean ± standard deviation over seeds."""
    lines = [
        "| added up in | N | lost in adding up | published | gradient error, all in all "
        "| held-out loss | peak MiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for buffer in BUFFERS:
        for steps in STEPS:
            cell = cells[buffer, steps]
            of_buffer, error, loss, mib = (cell[c] for c in ("buffer_error", "error", "loss", "mib"))
            known = PUBLISHED.get(steps) if buffer == "same" else None
            lines.append(
                f"| {'bfloat16' if buffer == 'same' else buffer} | {steps} "
                f"| {of_buffer[0]:.1e} ± {of_buffer[1]:.0e} "
                f"| {'' if known is None else f'{known:.1e}'} | {error[0]:.1e} ± {error[1]:.0e} "
                f"| {loss[0]:.4f} ± {loss[1]:.4f} | {mib[0]:.2f} |"
            )
    return "\n".join(lines)


@style.styled()
def draw(cells: Cells) -> None:
    """Draw what adding up loses, and the whole error, against N."""
    figure = Figure(figsize=(style.width(), 3.0), layout="constrained")
    panels = {"buffer_error": "lost in adding up", "error": "gradient error against float64"}
    handles = []
    for axes, (column, label) in zip(figure.subplots(1, 2, sharey=True), panels.items(), strict=True):
        for index, (buffer, named) in enumerate(BUFFERS.items()):
            # One micro-batch loses nothing in adding up, and zero has no place on a log axis.
            points = {n: c for n in STEPS if (c := cells[buffer, n][column])[0] > 0}
            means, deviations = zip(*points.values(), strict=True)
            axes.errorbar(list(points), means, yerr=deviations, label=named, **style.look(index, 2))
        if column == "buffer_error":
            axes.plot(
                *zip(*PUBLISHED.items(), strict=True), "kx", zorder=5, label="in bfloat16, published"
            )
            handles = axes.get_legend_handles_labels()[0]
        axes.set(xscale="log", yscale="log", xlabel="N, micro-batches per optimizer step", title=label)
        axes.set_xticks(STEPS, [str(n) for n in STEPS])
        axes.set_yticks([1e-3, 2e-3, 5e-3, 1e-2], ["0.001", "0.002", "0.005", "0.01"])
        axes.minorticks_off()
        axes.grid(axis="y")
    figure.legend(handles=handles, loc="outside lower center", ncols=3)
    figure.suptitle("bfloat16 weights, 64 sequences per window, mean ± std over 3 seeds")
    style.save(figure, HERE, "precision", ("png",))


if __name__ == "__main__":
    main()
