"""Draw what N buys for what it costs: peak memory against the time of a step, planned beside measured.

A plan, which has no times, is drawn against N, with a budget to be kept.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullLocator

from gaccum_exp.memory.plan import MemoryPlan, knee, size
from gaccum_exp.report.arm_limit import MOST_ARMS, spread
from gaccum_exp.report.compare.comparison import Comparison
from gaccum_exp.report.figures import style
from gaccum_exp.report.figures.cost_bars import LOOKS
from gaccum_exp.report.figures.cost_data import CostCurve, frontier_rows
from gaccum_exp.report.figures.figure_layout import lay_out
from gaccum_exp.report.figures.panels import subject
from gaccum_exp.report.text.wording import byte_unit, time_unit
from gaccum_exp.tracking.records import RunRecord

_TICK_RATIO = 1.4
_LOGARITHMIC = 8.0
"""So many times as large as the least may the greatest value on a linear axis be."""
_PANEL_INCHES = 4.6


def draw_frontier(comparison: Comparison, runs: Mapping[str, RunRecord]) -> Figure | None:
    """Draw memory against time, a curve for each setting; None where no two N have both."""
    curves = frontier_rows(comparison)
    source = next((row.memory_source for row in comparison.shown if row.memory_source), "tracker")
    notes = ["Numbers are N, the micro-batches per optimizer step."]
    if any(curve.step_low_s for curve in curves):
        notes.append("Horizontal: the middle half of the timed windows.")
    if any(row.other_command for row in comparison.rows):
        notes.append("Times are of several commands, perhaps under different loads.")
    title = f"What N saves, and what that costs: {subject(comparison, runs)}"
    return draw_costs(curves, title, f"peak memory ({source})", (*notes, *comparison.reference_notes))


def draw_costs(
    curves: Sequence[CostCurve], title: str, label: str, notes: Sequence[str]
) -> Figure | None:
    """Draw peaks against step times as points named by N, what was planned as a ring around.

    Args:
        curves: one for each setting.
        title: of the figure.
        label: of the axis of memory, without its unit.
        notes: sentences.
    """
    curves = [curve for curve in curves if len(_both(curve)) > 1]
    if not curves:
        return None
    peaks = [
        of[n]
        for c in curves
        for of in (c.measured_bytes, c.predicted_bytes)
        for n in _both(c)
        if n in of
    ]
    times = [c.step_s[n] for c in curves for n in _both(c)]
    (unit_bytes, unit), (unit_s, unit_of_time) = byte_unit(max(peaks)), time_unit(max(times))
    looks = [style.look(i, len(curves)) | {"markersize": style.points(0.5)} for i in range(len(curves))]
    for look in looks:
        look["markerfacecolor"] = look["color"]
    ring: dict[str, Any] = {"linestyle": "", "marker": "o", "markerfacecolor": "none"}
    ring |= {"markersize": style.points(1.1), "markeredgewidth": style.points(0.1)}
    legend: list[Artist] = [
        Line2D([], [], label=f"{curve.label}, measured".lstrip(", "), **look)
        for curve, look in zip(curves, looks, strict=True)
    ]
    if any(curve.predicted_bytes for curve in curves):
        legend.append(Line2D([], [], color="black", label="planned", **ring))
    figure, ((axes,),) = lay_out(
        title, [""], (3.0,), style.scaled(2.4), legend, notes, style.scaled(_PANEL_INCHES)
    )
    for curve, look in zip(curves, looks, strict=True):
        # Where an N is missing the line is broken.
        at = [curve.step_s.get(n, math.nan) / unit_s for n in curve.every_n]
        held = [curve.measured_bytes.get(n, math.nan) / unit_bytes for n in curve.every_n]
        axes.plot(at, held, gid=curve.label, **look)
        for n in (n for n in _both(curve) if n in curve.step_low_s and n in curve.step_high_s):
            ends = curve.step_low_s[n] / unit_s, curve.step_high_s[n] / unit_s
            axes.hlines(curve.measured_bytes[n] / unit_bytes, *ends, color=look["color"])
        planned = {n: b / unit_bytes for n, b in curve.predicted_bytes.items() if n in curve.step_s}
        if planned:
            at = [curve.step_s[n] / unit_s for n in planned]
            axes.plot(
                at, list(planned.values()), color=look["color"], gid=f"planned {curve.label}", **ring
            )
    spread = [s for c in curves for of in (c.step_low_s, c.step_high_s) for s in of.values()]
    _scale(axes, [b / unit_bytes for b in peaks], [s / unit_s for s in (*times, *spread)])
    axes.set_ylabel(f"{label} in {unit}")
    axes.set_xlabel(f"time of an optimizer step in {unit_of_time}")
    axes.grid()
    _name_points(axes, curves, unit_bytes, unit_s)
    return figure


def _both(curve: CostCurve) -> list[int]:
    """Return the N whose peak and time are known."""
    return [n for n in curve.measured_bytes if n in curve.step_s]


def _scale(axes: Axes, peaks: Sequence[float], times: Sequence[float]) -> None:
    """Put an axis on a logarithmic scale where it spans much; else memory from zero, and time from where
    a small difference still looks small.
    """
    for axis, set_scale, set_limits, values in (
        (axes.yaxis, axes.set_yscale, axes.set_ylim, peaks),
        (axes.xaxis, axes.set_xscale, axes.set_xlim, times),
    ):
        low, high = min(values), max(values)
        if low > 0 and high > _LOGARITHMIC / 2 * low:
            set_scale("log")
            axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            axis.set_major_formatter("{x:g}")
            axis.set_minor_locator(NullLocator())
            set_limits(low / (high / low) ** 0.12, high * (high / low) ** 0.12)
        else:
            least = 0.0 if values is peaks else min(0.9 * low, 0.5 * high)
            set_limits(least, 1.12 * high or 1.0)


def _name_points(axes: Axes, curves: Sequence[CostCurve], unit_bytes: float, unit_s: float) -> None:
    """Write N beside its point, as far as one name does not stand on another.

    Of several curves the quickest has its names below, at the left, all others above, at the right.
    """
    taken: list[tuple[float, float]] = []
    apart = style.points(1.2) * axes.figure.dpi / 72
    quickest = min(range(len(curves)), key=lambda i: min(curves[i].step_s[n] for n in _both(curves[i])))
    for index, curve in enumerate(curves):
        side = -1 if len(curves) > 1 and index == quickest else 1
        known = _both(curve)
        for n in (known[0], known[-1], *known[1:-1]):
            point = curve.step_s[n] / unit_s, curve.measured_bytes[n] / unit_bytes
            # As before the layout moves the axes a little.
            x, y = axes.transData.transform(point) + side * apart / 2
            if all(abs(x - a) > 1.6 * apart or abs(y - b) >= 0.9 * apart for a, b in taken):
                taken.append((x, y))
                axes.annotate(
                    str(n), point, xytext=(side * style.points(0.6), side * style.points(0.5)),
                    textcoords="offset points", ha="left" if side > 0 else "right",
                    va="bottom" if side > 0 else "top", fontsize=style.points(0.9),
                    color=style.color(index, len(curves)),
                )  # fmt: skip


def draw_plan(plan: MemoryPlan) -> Figure:
    """Draw a plan: the predicted peak against N, its knee and the budget, and what it consists of."""
    how = "extrapolated" if plan.extrapolated_from else "predicted"
    peaks = {row.accum_steps: float(row.peak.bytes) for row in plan.rows}
    figure = Figure(figsize=(style.width(), 0.85 * style.width()), layout="constrained")
    axes, shares = figure.subplots(2, 1, height_ratios=(3, 2))
    figure.suptitle(
        f"Peak memory of a window of {plan.global_batch_size} samples, {how} for {plan.device}"
    )
    unit_bytes = _draw_peaks(axes, peaks)
    if plan.budget_bytes is not None:
        _draw_budget(axes, plan.budget_bytes, unit_bytes)
    if plan.chosen_steps is not None:
        peak = plan.row(plan.chosen_steps).peak.bytes / unit_bytes
        axes.plot(
            plan.chosen_steps, peak, "o", markersize=style.points(1.5), markerfacecolor="none",
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
    shares.set_xticks(places, [str(row.accum_steps) for row in plan.rows])
    shares.set_xlabel("N, micro-batches per window")
    shares.set_ylim(0, 1)
    shares.set_ylabel("share of the peak")
    axes.set_xscale("log", base=2)
    labelled = _far_enough(list(peaks))
    axes.set_xticks(labelled, [str(n) for n in labelled])
    axes.minorticks_off()
    handles = [handle for each in (axes, shares) for handle in each.get_legend_handles_labels()[0]]
    figure.legend(handles=handles, loc="outside lower center", ncols=max(1, round(style.width() / 2.4)))
    return figure


def _far_enough(every: Sequence[int]) -> list[int]:
    """Return the N whose labels do not touch on a logarithmic axis."""
    labelled = [every[0]]
    for n in every:
        if n >= _TICK_RATIO * labelled[-1]:
            labelled.append(n)
    return labelled


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
        ha="right",
    )  # fmt: skip


def _draw_peaks(axes: Axes, peaks: Mapping[int, float]) -> float:
    """Draw predicted peaks, a star where they stop shrinking; return the unit in bytes."""
    unit_bytes, unit = byte_unit(max(peaks.values(), default=1))
    # Of too many N as many are marked as can be told apart.
    marked = spread(list(peaks), MOST_ARMS)
    axes.plot(
        list(peaks), [b / unit_bytes for b in peaks.values()], label="predicted",
        markevery=[place for place, n in enumerate(peaks) if n in marked], **style.look(0, 1),
    )  # fmt: skip
    if (n := knee(peaks)) != max(peaks):
        axes.plot(
            n, peaks[n] / unit_bytes, "*", markersize=style.points(2), color=style.ACCENT,
            markeredgecolor="black", label=f"shrinks no further from N = {n} on",
        )  # fmt: skip
    if max(peaks.values(), default=1) > _LOGARITHMIC * min(peaks.values(), default=1):
        axes.set_yscale("log", base=2)
        axes.yaxis.set_major_formatter("{x:g}")
    else:
        axes.set_ylim(0, 1.1 * max(peaks.values(), default=1) / unit_bytes)
    axes.set_ylabel(f"peak memory in {unit}")
    axes.grid(axis="y")
    return unit_bytes
