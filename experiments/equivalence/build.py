"""Rebuild this study: `python experiments/equivalence/build.py` (about three minutes on two cores)."""

import sys
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator

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
MEASURES = {"max_loss_gap": "largest loss gap", "weight_distance": "weight distance"}
REDUCTIONS = ("global_mean", "sum", "mean")
GLOBAL_BATCH = 32
DRAWN = HERE / "drawn.csv"


def main() -> None:
    """Run the arms, average over seeds, write table and figure."""
    if asked_to_draw(DRAWN):
        draw(kept_cells(DRAWN, str, int))
        return
    rows, seconds = run_study("equivalence")
    cells = average(rows)
    keep_cells(DRAWN, ("reduction", "steps"), cells)
    draw(cells)
    write_results(HERE / "README.md", f"{table(cells)}\n\n{provenance(seconds)}")


def average(rows: list[dict[str, str]]) -> Cells:
    """Return mean and standard deviation over seeds, by reduction and N."""
    cells: Cells = {}
    for reduction in REDUCTIONS:
        for steps in sorted({int(row["accum_steps"]) for row in rows}):
            arms = [r for r in rows if r["reduction"] == reduction and int(r["accum_steps"]) == steps]
            assert arms, f"no arm with N = {steps} under {reduction}"
            columns = (*MEASURES, "eval_accuracy")
            cells[reduction, steps] = {c: spread(float(r[c]) for r in arms) for c in columns}
    return cells


def table(cells: Cells) -> str:
    """Return the Markdown table, mean ± standard deviation over seeds."""
    lines = [
        "| reduction | N | largest loss gap | weight distance | eval accuracy |",
        "|---|---|---|---|---|",
    ]
    for (reduction, steps), cell in cells.items():
        gap, distance, accuracy = (cell[c] for c in (*MEASURES, "eval_accuracy"))
        lines.append(
            f"| {reduction} | {steps} | {gap[0]:.1e} ± {gap[1]:.0e} | {distance[0]:.1e} ± "
            f"{distance[1]:.0e} | {accuracy[0]:.4f} ± {accuracy[1]:.4f} |"
        )
    return "\n".join(lines)


@style.styled()
def draw(cells: Cells) -> None:
    """Draw both measures by N; the reference itself has neither and is left out.

    Whether N divides the batch decides, so no line leads from one N to the next.
    """
    every = sorted({n for _, n in cells if n > 1})
    figure = Figure(figsize=(style.width(), 3.1), layout="constrained")
    for axes, (column, label) in zip(figure.subplots(1, 2), MEASURES.items(), strict=True):
        for place, n in enumerate(every):
            if GLOBAL_BATCH % n:
                axes.axvspan(place - 0.5, place + 0.5, color=style.GREY, alpha=0.25, linewidth=0)
        for index, reduction in enumerate(REDUCTIONS):
            points = [cells[reduction, n][column] for n in every]
            means, deviations = zip(*points, strict=True)
            places = [place + 0.22 * (index - 1) for place in range(len(every))]
            look = style.look(index, len(REDUCTIONS)) | {"linestyle": ""}
            axes.errorbar(places, means, yerr=log_bars(means, deviations), label=reduction, **look)
        axes.set(xlabel="N, micro-batches per optimizer step", ylabel=label, yscale="log")
        axes.set_xlim(-0.5, len(every) - 0.5)
        axes.set_xticks(range(len(every)), [str(n) for n in every])
        axes.yaxis.set_major_locator(FixedLocator([10.0**k for k in range(-7, 1)]))
        axes.grid(axis="y")
    shade = Patch(color=style.GREY, alpha=0.25, label=f"N does not divide {GLOBAL_BATCH}")
    handles = [*axes.get_legend_handles_labels()[0], shade]
    figure.legend(handles=handles, loc="outside lower center", ncols=4)
    figure.suptitle(f"CNN on digits, global batch {GLOBAL_BATCH}, mean ± std over 3 seeds")
    style.save(figure, HERE, "equivalence", ("png",))


if __name__ == "__main__":
    main()
