"""Rebuild this study: `python experiments/reduction_ragged/build.py` (about 20 minutes on two cores)."""

import re
import sys
from pathlib import Path

from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from experiments.notebook import provenance, run_study, spread, write_results

HERE = Path(__file__).resolve().parent
REDUCTIONS = {"mean": "-", "global_mean": "--", "sum": ":"}
MARKERS = ("o", "s", "^")
PUBLISHED = {(2, 0.54): 1.7e-2, (2, 1.15): 2.7e-2, (8, 0.54): 4.6e-2, (8, 1.15): 8.5e-2}
PUBLISHED |= {(64, 0.54): 2.0e-1, (64, 1.15): 3.0e-1}
"""Relative gradient error of the mean of means, by N and CV of lengths: bigram model, 64 sequences."""
SMALLEST = {"error": 1e-17, "shift": 1e-8}
"""Where zero stands on a log axis; a shift below it is no more than the last bit of a float32 loss."""
SPREAD, COUPLED = ("data.length_cv", "data.coupling")

Row = dict[str, str]
Cell = dict[str, tuple[float, float]]


def main() -> None:
    """Run both sweeps, average over seeds, write tables and figure."""
    rows, seconds = run_study("reduction_ragged")
    cells = average(rows, "length_cv")
    coupled, more = run_study(
        "reduction_ragged",
        (f"{SPREAD}=1.15", f"{COUPLED}=0.0,1.0", "accum.steps=1,8", "accum.reduction=global_mean,mean"),
    )
    draw(cells, HERE / "reduction_ragged.png")
    figure = "![Gradient error and held-out loss against N](reduction_ragged.png)"
    told = average(coupled, "coupling")
    parts = (table(cells), figure, COUPLING, coupling_table(told), provenance(seconds + more))
    write_results(HERE / "README.md", "\n\n".join(parts))


COUPLING = (
    "Where short sequences are of another kind than long ones (`data.coupling=1`: they follow a second "
    "chain), at a spread of 1.15 and N = 8:"
)


def average(rows: list[Row], varied: str) -> dict[tuple[str, float, int], Cell]:
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


def table(cells: dict[tuple[str, float, int], Cell]) -> str:
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


def coupling_table(cells: dict[tuple[str, float, int], Cell]) -> str:
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


def draw(cells: dict[tuple[str, float, int], Cell], path: Path) -> None:
    """Draw gradient error and the shift of the held-out loss against N."""
    figure = Figure(figsize=(10, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    spreads = sorted({cv for _, cv, _ in cells})
    for reduction, line in REDUCTIONS.items():
        for cv, marker in zip(spreads, MARKERS, strict=True):
            points = {n: c for (r, v, n), c in cells.items() if (r, v) == (reduction, cv) and n > 1}
            style = {
                "linestyle": line,
                "marker": marker,
                "color": str(0.65 - 0.3 * spreads.index(cv)),
                "markerfacecolor": "white",
                "capsize": 3,
                "label": f"{reduction}, CV {cv:g}",
            }
            for axes, column in ((left, "error"), (right, "shift")):
                means = [max(abs(c[column][0]), SMALLEST[column]) for c in points.values()]
                bars = [c[column][1] for c in points.values()]
                lower = [min(b, 0.9 * m) for m, b in zip(means, bars, strict=True)]
                axes.errorbar(list(points), means, yerr=[lower, bars], **style)
    for cv, marker in ((0.54, "x"), (1.15, "+")):
        known = {n: error for (n, of), error in PUBLISHED.items() if of == cv}
        left.plot(list(known), list(known.values()), marker, color="black", label=f"published, CV {cv}")
    for axes, label in (
        (left, "gradient error e64, first window"),
        (right, "|held-out loss − reference's|"),
    ):
        axes.set(xscale="log", yscale="log", xlabel="N, micro-batches per optimizer step", ylabel=label)
        axes.set_xticks([2, 8, 64], ["2", "8", "64"])
        axes.minorticks_off()
        axes.grid(axis="y", linewidth=0.3)
    figure.legend(*left.get_legend_handles_labels(), loc="outside right", frameon=False, fontsize=8)
    figure.suptitle("Sequences of unequal length, 64 per window, mean ± std over 3 seeds")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
