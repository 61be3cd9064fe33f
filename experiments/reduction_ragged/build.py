"""Rebuild this study: `python experiments/reduction_ragged/build.py` (about 20 minutes on two cores)."""

import re
import sys
from pathlib import Path

from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from experiments.notebook import (
    Cells,
    asked_to_draw,
    keep_cells,
    kept_cells,
    log_bars,
    provenance,
    run_study,
    spread,
    write_results,
)
from gaccum_exp.report.figures import style

HERE = Path(__file__).resolve().parent
REDUCTIONS = ("mean", "global_mean", "sum")
DRAWN = HERE / "drawn.csv"
PUBLISHED = {(2, 0.54): 1.7e-2, (2, 1.15): 2.7e-2, (8, 0.54): 4.6e-2, (8, 1.15): 8.5e-2}
PUBLISHED |= {(64, 0.54): 2.0e-1, (64, 1.15): 3.0e-1}
"""Relative gradient error of the mean of means, by N and CV of lengths: bigram model, 64 sequences."""
SMALLEST = {"error": 1e-17, "shift": 1e-8}
"""Where zero stands on a log axis; a shift below it is no more than the last bit of a float32 loss."""
SPREAD, COUPLED = ("data.length_cv", "data.coupling")

Row = dict[str, str]


def main() -> None:
    """Run both sweeps, average over seeds, write tables and figure."""
    if asked_to_draw(DRAWN):
        draw(kept_cells(DRAWN, str, float, int))
        return
    rows, seconds = run_study("reduction_ragged")
    cells = average(rows, "length_cv")
    keep_cells(DRAWN, ("reduction", "length_cv", "steps"), cells)
    coupled, more = run_study(
        "reduction_ragged",
        (f"{SPREAD}=1.15", f"{COUPLED}=0.0,1.0", "accum.steps=1,8", "accum.reduction=global_mean,mean"),
    )
    draw(cells)
    told = average(coupled, "coupling")
    parts = (table(cells), COUPLING, coupling_table(told), provenance(seconds + more))
    write_results(HERE / "README.md", "\n\n".join(parts))


COUPLING = (
    "Where short sequences are of another kind than long ones (`data.coupling=1`: they follow a second "
    "chain), at a spread of 1.15 and N = 8:"
)


def average(rows: list[Row], varied: str) -> Cells:
    """Return mean and standard deviation over seeds, by reduction, value of what is varied, and N."""
    losses = {row["run_id"]: float(row["eval_loss"]) for row in rows}
    found: dict[tuple[str, float, int], list[dict[str, float]]] = {}
    for row in rows:
        value = re.search(rf"{varied}=([\d.]+)", row["differs"])
        assert value is not None, row["differs"]
        measured = {
            "error": float(row["e64"]),
            "shift": float(row["eval_loss"]) - losses[row["reference_run_id"]],
            "loss": float(row["eval_loss"]),
        }
        key = row["reduction"], float(value[1]), int(row["accum_steps"])
        found.setdefault(key, []).append(measured)
    return {
        key: {name: spread(m[name] for m in measured) for name in measured[0]}
        for key, measured in sorted(found.items())
    }


def table(cells: Cells) -> str:
    """Return the Markdown table, mean ± standard deviation over seeds."""
    lines = [
        "| reduction | CV of lengths | N | gradient error (e64) | published | held-out loss "
        "| minus the reference's |",
        "|---|---|---|---|---|---|---|",
    ]
    for (reduction, cv, n), cell in cells.items():
        error, shift, loss = (cell[c] for c in ("error", "shift", "loss"))
        known = PUBLISHED.get((n, cv)) if reduction == "mean" else None
        lines.append(
            f"| {reduction} | {cv:g} | {n} | {error[0]:.1e} ± {error[1]:.0e} "
            f"| {'' if known is None else f'{known:.1e}'} | {loss[0]:.4f} ± {loss[1]:.4f} "
            f"| {shift[0]:+.1e} ± {shift[1]:.0e} |"
        )
    return "\n".join(lines)


def coupling_table(cells: Cells) -> str:
    """Return the second table: held-out loss with and without kinds of sequences."""
    lines = [
        "| coupling | reduction | N | gradient error (e64) | held-out loss | minus the reference's |",
        "|---|---|---|---|---|---|",
    ]
    for (reduction, coupling, n), cell in sorted(cells.items(), key=lambda item: item[0][1]):
        error, shift, loss = (cell[c] for c in ("error", "shift", "loss"))
        lines.append(
            f"| {coupling:g} | {reduction} | {n} | {error[0]:.1e} ± {error[1]:.0e} "
            f"| {loss[0]:.4f} ± {loss[1]:.4f} | {shift[0]:+.1e} ± {shift[1]:.0e} |"
        )
    return "\n".join(lines)


@style.styled()
def draw(cells: Cells) -> None:
    """Draw gradient error and the shift of the held-out loss against N, a column for each spread."""
    spreads = sorted({cv for _, cv, _ in cells})
    figure = Figure(figsize=(style.width(), 4.4), layout="constrained")
    grid = figure.subplots(2, len(spreads), sharex=True, sharey="row")
    for axes_of_cv, cv in zip(grid.T, spreads, strict=True):
        for axes, column in zip(axes_of_cv, ("error", "shift"), strict=True):
            for index, reduction in enumerate(REDUCTIONS):
                points = {n: cells[reduction, cv, n][column] for n in (2, 8, 64)}
                means = [max(abs(mean), SMALLEST[column]) for mean, _ in points.values()]
                bars = log_bars(means, [std for _, std in points.values()])
                places = [n * 1.12 ** (index - 1) for n in points]  # those that coincide stay apart
                look = style.look(index, len(REDUCTIONS))
                axes.errorbar(places, means, yerr=bars, label=reduction, **look)
            axes.set(xscale="log", yscale="log")
            axes.set_xticks([2, 8, 64], ["2", "8", "64"])
            axes.minorticks_off()
            axes.grid(axis="y")
        known = {n: error for (n, of), error in PUBLISHED.items() if of == cv}
        axes_of_cv[0].plot(list(known), list(known.values()), "kx", zorder=5, label="mean, published")
        axes_of_cv[0].set_title(f"lengths' CV {cv:g}")
        axes_of_cv[1].set_xlabel("N, micro-batches per step")
    grid[0, 0].set_ylabel("gradient error e64,\nfirst window")
    grid[1, 0].set_ylabel("|held-out loss − reference’s|\n(0 stands at 1e-8)")
    handles = grid[0, -1].get_legend_handles_labels()[0]
    figure.legend(handles=handles, loc="outside lower center", ncols=4)
    figure.suptitle("Sequences of unequal length, 64 per window, mean ± std over 3 seeds")
    style.save(figure, HERE, "reduction_ragged", ("png",))


if __name__ == "__main__":
    main()
