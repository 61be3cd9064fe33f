"""Rebuild this study: `python experiments/padding/build.py` (about 5 minutes on two cores)."""

import sys
from pathlib import Path

from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from experiments.notebook import (
    Cells,
    asked_to_draw,
    keep_cells,
    kept_cells,
    provenance,
    run_study,
    spread,
    write_results,
)
from gaccum_exp.report.figures import style

HERE = Path(__file__).resolve().parent
PADDINGS = {
    "to the longest of all": "padding=max_length, sort_by_length=False",
    "to the window's parts": "padding=longest, sort_by_length=False",
    "and sorted by length": "padding=longest, sort_by_length=True",
}
DRAWN = HERE / "drawn.csv"


def main() -> None:
    """Run the arms, compare each with the fully padded one of its N and seed, write table and figure."""
    if asked_to_draw(DRAWN):
        draw(kept_cells(DRAWN, str, int))
        return
    rows, seconds = run_study("padding")
    cells = average(rows)
    keep_cells(DRAWN, ("padding", "steps"), cells)
    draw(cells)
    write_results(HERE / "README.md", f"{table(cells)}\n\n{provenance(seconds)}")


def average(rows: list[dict[str, str]]) -> Cells:
    """Return mean and standard deviation over seeds of memory, time and loss, and their ratios."""
    by_arm = {}
    for row in rows:
        said = dict(part.split("=") for part in row["differs"].split(", "))
        padding = f"padding={said['padding']}, sort_by_length={said['sort_by_length']}"
        by_arm[padding, int(row["accum_steps"]), said["seed"]] = row
    seeds = sorted({seed for _, _, seed in by_arm})
    cells: Cells = {}
    for label, padding in PADDINGS.items():
        for steps in sorted({n for _, n, _ in by_arm}):
            arms = [by_arm[padding, steps, seed] for seed in seeds]
            full = [by_arm[PADDINGS["to the longest of all"], steps, seed] for seed in seeds]
            one_pass = [by_arm[padding, 1, seed] for seed in seeds]

            def ratio(column: str, arms: list = arms, full: list = full) -> tuple[float, float]:
                return spread(
                    float(a[column]) / float(f[column]) for a, f in zip(arms, full, strict=True)
                )

            cells[label, steps] = {
                "mib": spread(float(a["peak_bytes"]) / 2**20 for a in arms),
                "memory": ratio("peak_bytes"),
                "ms": spread(float(a["step_s"]) * 1e3 for a in arms),
                "time": ratio("step_s"),
                "tokens": spread(float(a["tokens_per_s"]) for a in arms),
                "gap": spread(
                    abs(float(a["train_loss"]) - float(o["train_loss"]))
                    for a, o in zip(arms, one_pass, strict=True)
                ),
            }
    return cells


def table(cells: Cells) -> str:
    """Return the Markdown table, mean ± standard deviation over seeds."""
    lines = [
        "| micro-batches padded | N | peak MiB | × | step ms | × | tokens per s "
        "| last loss − one pass's |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (label, steps), cell in cells.items():
        lines.append(
            f"| {label} | {steps} | {cell['mib'][0]:.1f} ± {cell['mib'][1]:.1f} "
            f"| {cell['memory'][0]:.2f} | {cell['ms'][0]:.0f} ± {cell['ms'][1]:.0f} "
            f"| {cell['time'][0]:.2f} ± {cell['time'][1]:.2f} | {cell['tokens'][0]:.0f} "
            f"| {cell['gap'][0]:.0e} |"
        )
    return "\n".join(lines)


@style.styled()
def draw(cells: Cells) -> None:
    """Draw peak memory and step time against N."""
    every = sorted({n for _, n in cells})
    figure = Figure(figsize=(style.width(), 2.9), layout="constrained")
    for axes, (column, label) in zip(
        figure.subplots(1, 2), (("mib", "peak memory in MiB"), ("ms", "step time in ms")), strict=True
    ):
        for index, padding in enumerate(PADDINGS):
            points = [cells[padding, n][column] for n in every]
            means, deviations = zip(*points, strict=True)
            places = [n * 1.06 ** (index - 1) for n in every]  # those that coincide stay apart
            look = style.look(index, len(PADDINGS))
            axes.errorbar(places, means, yerr=deviations, label=padding, **look)
        axes.set(xscale="log", xlabel="N, micro-batches per optimizer step", ylabel=label)
        axes.set_xticks(every, [str(n) for n in every])
        axes.minorticks_off()
        axes.set_ylim(bottom=0)
        axes.grid(axis="y")
    handles = axes.get_legend_handles_labels()[0]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, title="micro-batches padded")
    figure.suptitle("32 sequences with a length CV of 1.15, mean ± std over 3 seeds")
    style.save(figure, HERE, "padding", ("png",))


if __name__ == "__main__":
    main()
