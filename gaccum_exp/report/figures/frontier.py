"""Draw what N buys and what it costs: peak memory, measured and predicted, and step time, against N.

The same axes show a plan, which has predictions alone, and a budget to be kept.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gaccum_exp.memory.plan import MemoryPlan, knee, size
from gaccum_exp.report.arm_limit import MOST_ARMS, spread
from gaccum_exp.report.compare.comparison import Comparison
from gaccum_exp.report.figures.cost_bars import LOOKS
from gaccum_exp.report.figures.cost_data import CostCurve, frontier_rows
from gaccum_exp.report.figures.panels import subject
from gaccum_exp.report.text.wording import byte_unit, time_unit
from gaccum_exp.tracking.records import RunRecord

_COLORS = ("#22577a", "#d1495b", "#2e8b57", "#8a5a9e", "#b07d2b", "#4d4d4d")
_MARKERS = ("o", "s", "^", "D", "v", "P")
_TICK_RATIO = 1.4
_N = "N, micro-batches per window"


def draw_frontier(comparison: Comparison, runs: Mapping[str, RunRecord]) -> Figure | None:
    """Draw memory and time against N, a curve for each setting; None where no peak was predicted."""
    curves = frontier_rows(comparison)
    if not any(curve.predicted_bytes for curve in curves):
        return None
    source = next((row.memory_source for row in comparison.shown if row.memory_source), "tracker")
    figure = Figure(figsize=(7.5, 6.8), layout="constrained")
    memory, time = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    figure.suptitle(f"What N saves and costs: {subject(comparison, runs)}", fontsize=11)
    _draw_memory(memory, curves, f"peak memory ({source})")
    times = [s for curve in curves for s in curve.step_s.values()]
    unit_s, unit = time_unit(max(times, default=1.0))
    for index, curve in enumerate(curves):
        time.plot(
            list(curve.step_s), [s / unit_s for s in curve.step_s.values()],
            linestyle="-", marker=_MARKERS[index], color=_COLORS[index], **_markers(curve.step_s),
        )  # fmt: skip
    time.set_ylim(0, 1.15 * max(times, default=1.0) / unit_s)
    apart = any(row.other_command for row in comparison.rows)
    time.set_ylabel(f"time of a step in {unit}{', by several commands' * apart}", fontsize=9)
    _finish(figure, time, curves, [memory])
    return figure


def draw_plan(plan: MemoryPlan) -> Figure:
    """Draw a plan: the predicted peak against N, its knee and the budget."""
    how = "extrapolated" if plan.extrapolated_from else "predicted"
    curve = CostCurve("", {}, {row.accum_steps: float(row.peak.bytes) for row in plan.rows}, {})
    figure = Figure(figsize=(7.5, 6.8), layout="constrained")
    axes, shares = figure.subplots(2, 1, height_ratios=(3, 2))
    figure.suptitle(
        f"Peak memory of a window of {plan.global_batch_size} samples, {how} for {plan.device}",
        fontsize=11,
    )
    unit_bytes = _draw_memory(axes, [curve], "peak memory")
    if plan.budget_bytes is not None:
        _draw_budget(axes, plan.budget_bytes, unit_bytes)
    if plan.chosen_steps is not None:
        peak = plan.row(plan.chosen_steps).peak.bytes / unit_bytes
        axes.plot(
            plan.chosen_steps, peak, "o", markersize=12, markerfacecolor="none",
            markeredgecolor="black", label=f"the smallest that fits: N = {plan.chosen_steps}",
        )  # fmt: skip
    places, bottom = range(len(plan.rows)), [0.0] * len(plan.rows)
    for name, (color, hatch) in LOOKS.items():
        heights = [row.peak.parts[name] / row.peak.bytes for row in plan.rows]
        shares.bar(
            places, heights, bottom=bottom, color=color, hatch=hatch, edgecolor="black",
            linewidth=0.5, label=name.replace("_", " "),
        )  # fmt: skip
        bottom = [b + h for b, h in zip(bottom, heights, strict=True)]
    shares.set_xticks(places, [str(row.accum_steps) for row in plan.rows], fontsize=8)
    shares.set_xlabel(_N, fontsize=9)
    shares.set_ylim(0, 1)
    shares.set_ylabel("share of the peak", fontsize=9)
    _finish(figure, axes, [curve], [axes, shares])
    return figure


def _draw_budget(axes: Axes, budget_bytes: int, unit_bytes: float) -> None:
    """Draw the budget, or say that it is outside: an axis that holds it may flatten the peaks."""
    height, (low, high) = budget_bytes / unit_bytes, axes.get_ylim()
    if low < height <= 2 * high:
        axes.set_ylim(low, max(high, 1.1 * height))
        axes.axhline(height, color="black", linestyle="-.", linewidth=1)
        place, text = (1.0, height), f"budget {size(budget_bytes)}"
    else:
        place = (1.0, high if height > high else low)
        text = f"budget {size(budget_bytes)}, {'above' if height > high else 'below'} what is shown"
    under = (-4, -12) if place[1] == high else (-4, 3)
    axes.annotate(
        text, place, xycoords=("axes fraction", "data"), xytext=under, textcoords="offset points",
        ha="right", fontsize=8,
    )  # fmt: skip


def _draw_memory(axes: Axes, curves: Sequence[CostCurve], label: str) -> float:
    """Draw the peaks, a star where they stop shrinking; return the unit in bytes."""
    every = [b for c in curves for b in (*c.measured_bytes.values(), *c.predicted_bytes.values())]
    unit_bytes, unit = byte_unit(max(every, default=1))
    for index, curve in enumerate(curves):
        color = _COLORS[index]
        for kind, peaks, look in (
            ("measured", curve.measured_bytes, {"linestyle": "-", "marker": _MARKERS[index]}),
            ("predicted", curve.predicted_bytes, {"linestyle": "--", "marker": "x", "markersize": 9}),
        ):
            if peaks:
                label_of = f"{curve.label}, {kind}" if curve.label else kind
                heights = [b / unit_bytes for b in peaks.values()]
                axes.plot(list(peaks), heights, color=color, label=label_of, **look, **_markers(peaks))
        peaks = curve.measured_bytes or curve.predicted_bytes
        if peaks and (n := knee(peaks)) != max(peaks):
            axes.plot(
                n, peaks[n] / unit_bytes, "*", markersize=16, color=color, markeredgecolor="black",
                label=f"shrinks no further from N = {n} on",
            )  # fmt: skip
    if max(every, default=1) > 8 * min(every, default=1):
        axes.set_yscale("log", base=2)
        axes.yaxis.set_major_formatter("{x:g}")
    else:
        axes.set_ylim(0, 1.1 * max(every, default=1) / unit_bytes)
    axes.set_ylabel(f"{label} in {unit}", fontsize=9)
    return unit_bytes


def _markers(values: Mapping[int, float]) -> dict[str, Any]:
    # Of too many N as many are marked as can be told apart.
    marked = spread(list(values), MOST_ARMS)
    return {"markevery": [place for place, n in enumerate(values) if n in marked]}


def _finish(figure: Figure, axes: Axes, curves: Sequence[CostCurve], named: Sequence[Axes]) -> None:
    """Put the N below the axes, and what is drawn in the named ones into a legend."""
    every = sorted({n for curve in curves for n in (*curve.measured_bytes, *curve.predicted_bytes)})
    axes.set_xscale("log", base=2)
    # Labels that would touch are left out.
    labelled = [every[0]]
    for n in every:
        if n >= _TICK_RATIO * labelled[-1]:
            labelled.append(n)
    axes.set_xticks(labelled, [str(n) for n in labelled])
    axes.minorticks_off()
    axes.set_xlabel(_N, fontsize=9)
    handles = [handle for each in named for handle in each.get_legend_handles_labels()[0]]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, fontsize=8, frameon=False)
