"""Rebuild this study: `python experiments/equivalence/build.py` (about three minutes on two cores)."""

import sys
from pathlib import Path

from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from experiments.notebook import provenance, run_study, spread, write_results

HERE = Path(__file__).resolve().parent
MEASURES = {"max_loss_gap": "largest loss gap", "weight_distance": "weight distance"}
STYLES = {"global_mean": ("o", "-"), "sum": ("^", ":"), "mean": ("s", "--")}

Cell = dict[str, tuple[float, float]]


def main() -> None:
    """Run the arms, average over seeds, write table and figure."""
    rows, seconds = run_study("equivalence")
    cells = average(rows)
    draw(cells, HERE / "equivalence.svg", HERE / "equivalence.png")
    figure = "![Loss gap and weight distance against N](equivalence.png)"
    write_results(HERE / "README.md", f"{table(cells)}\n\n{figure}\n\n{provenance(seconds)}")


def average(rows: list[dict[str, str]]) -> dict[tuple[str, int], Cell]:
    """Return mean and standard deviation over seeds, by reduction and N."""
    cells: dict[tuple[str, int], Cell] = {}
    for reduction in STYLES:
        for steps in sorted({int(row["accum_steps"]) for row in rows}):
            arms = [r for r in rows if r["reduction"] == reduction and int(r["accum_steps"]) == steps]
            assert arms, f"no arm with N = {steps} under {reduction}"
            columns = (*MEASURES, "eval_accuracy")
            cells[reduction, steps] = {c: spread(float(r[c]) for r in arms) for c in columns}
    return cells


def table(cells: dict[tuple[str, int], Cell]) -> str:
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


def draw(cells: dict[tuple[str, int], Cell], *paths: Path) -> None:
    """Draw both measures against N; the reference itself has neither and is left out."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    for axes, (column, label) in zip(figure.subplots(1, 2), MEASURES.items(), strict=True):
        for reduction, (marker, line) in STYLES.items():
            points = [(n, c[column]) for (r, n), c in cells.items() if r == reduction and n > 1]
            axes.errorbar(
                [n for n, _ in points],
                [mean for _, (mean, _) in points],
                # a lower bar that would reach zero has no place on a log axis
                yerr=[[min(s, 0.9 * m) for _, (m, s) in points], [s for _, (_, s) in points]],
                marker=marker,
                linestyle=line,
                capsize=3,
                markerfacecolor="white",
                label=reduction,
            )
        axes.set(xlabel="N, micro-batches per optimizer step", ylabel=label, yscale="log")
        axes.grid(axis="y", linewidth=0.4)
    axes.legend(frameon=False)
    figure.suptitle("CNN on digits, global batch 32 (1, 2, 4, 8 divide it), mean ± std over 3 seeds")
    for path in paths:
        figure.savefig(path, dpi=120, metadata={"Date": None} if path.suffix == ".svg" else None)


if __name__ == "__main__":
    main()
