"""What an arm costs: peak memory by category, and time of an optimizer step, against N."""

import statistics
from collections.abc import Mapping, Sequence

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from gaccum_exp.report.compare.comparison import Comparison
from gaccum_exp.report.compare.row import ComparisonRow
from gaccum_exp.report.figures.panels import Panel, Sheet, panels_of, subject, thinned
from gaccum_exp.report.text.wording import byte_unit, say_list, say_ratio, say_scaled, time_unit
from gaccum_exp.tracking.records import RunRecord

# category, colour, hatch: told apart in greyscale by brightness and by hatch
CATEGORIES = (
    ("parameters", "#22577a", ""),
    ("gradients", "#57a0c7", "////"),
    ("optimizer_state", "#bfdcec", "...."),
    ("activations", "#f4a259", "\\\\\\\\"),
    ("temporaries", "#f2efe6", "xxxx"),
    ("inputs", "#7fb285", "++++"),
)
# what stands beside the tracked tensors, named as what it is
_BESIDE = {
    "memory/resident_set_bytes": "Resident set of the process, libraries and data included",
    "memory/allocator_requested_bytes": "Peak of what tensors asked the allocator for",
    "memory/allocator_allocated_bytes": "the same in whole blocks, with workspace",
    "memory/allocator_reserved_bytes": "taken from the device, fragments and what is kept included",
}
# where the peak was, how the total is marked
_PHASES = {"forward/backward": "o", "optimizer step": "s"}
_UNKNOWN_PHASE = "D"
_TIME_BARS = {"reference": ("#5f7f95", "////"), "candidate": ("#b9cbd6", "")}
_BAR_WIDTH = 0.72
_MOST_UPRIGHT_LABELS = 9
_MOST_BARS = 48
"""Side by side; a figure is half a metre wide then."""
_TICK_ROLES = {"reference": "ref.", "stand-in": "stand-in", "stored reference": "stored"}


def draw_memory(comparison: Comparison, runs: Mapping[str, RunRecord]) -> Figure:
    """Draw peak memory against N, stacked by category, the total marked by where the peak is.

    Of repetitions the one with the largest peak is drawn.
    """
    panels, left_out = thinned(panels_of(comparison), _MOST_BARS)
    peaks = [row.peak_bytes for row in comparison.shown if row.peak_bytes is not None]
    unit_bytes, unit = byte_unit(max(peaks, default=1))
    sources = sorted({row.memory_source for row in comparison.shown if row.memory_source})
    source = f" ({say_list(sources)})" if sources else ""
    repeated = _repeated(panels)
    sheet = Sheet(
        f"Peak memory{source}: {subject(list(runs.values()), comparison.shown)}"
        + ("; the largest of repeated runs" if repeated else ""),
        panels,
        level_heights=(3.0,),
        panel_width=_panel_width(panels),
        legend=_memory_legend(comparison, runs),
        notes=(*left_out, *_memory_notes(comparison, runs)),
    )
    for panel, axes in zip(panels, sheet.axes[0], strict=True):
        for position, steps in enumerate(panel.steps):
            known = [row for row in panel.at(steps) if row.peak_bytes is not None]
            if not known:
                _say_missing(axes, position, panel.at(steps))
                continue
            row = max(known, key=lambda row: (row.peak_bytes or 0, row.run_id))
            _stack(axes, position, row, runs[row.run_id], unit_bytes)
            _annotate(axes, position, (row.peak_bytes or 0) / unit_bytes, row.peak_ratio, panel)
        _label_steps_axis(axes, panel)
    _finish(sheet.axes[0], f"peak memory in {unit}", max(peaks, default=0) / unit_bytes, panels)
    return sheet.figure


def draw_step_time(comparison: Comparison, runs: Mapping[str, RunRecord]) -> Figure:
    """Draw the time of an optimizer step against N; of repetitions the median and each as a dot."""
    panels, left_out = thinned(panels_of(comparison), _MOST_BARS)
    times = [row.step_s for row in comparison.shown if row.step_s is not None]
    unit_s, unit = time_unit(max(times, default=1.0))
    machines = sorted({f"{row.device}, threads: {row.threads}" for row in comparison.shown})
    sheet = Sheet(
        f"Time of an optimizer step: {subject(list(runs.values()), comparison.shown)}; "
        f"on {say_list(machines) if len(machines) <= 2 else 'several machines'}",
        panels,
        level_heights=(2.6,),
        panel_width=_panel_width(panels),
        legend=_time_legend(panels),
        notes=(*left_out, "× is the ratio to the reference.", *comparison.reference_notes),
    )
    for panel, axes in zip(panels, sheet.axes[0], strict=True):
        for position, steps in enumerate(panel.steps):
            known = [row for row in panel.at(steps) if row.step_s is not None]
            if not known:
                _say_missing(axes, position, panel.at(steps))
                continue
            heights = [(row.step_s or 0.0) / unit_s for row in known]
            _draw_times(axes, position, heights, any(row.is_reference for row in known))
            ratios = [row.step_ratio for row in known if row.step_ratio is not None]
            ratio = statistics.median(ratios) if ratios else None
            _annotate(axes, position, max(heights), ratio, panel)
        _label_steps_axis(axes, panel)
    _finish(sheet.axes[0], f"step time in {unit}", max(times, default=0.0) / unit_s, panels)
    return sheet.figure


def split_of(run: RunRecord) -> dict[str, float]:
    """Return the run's peak by category in bytes; empty where it was not recorded."""
    recorded = {name: run.metrics.get(f"memory/{name}_bytes") for name, _, _ in CATEGORIES}
    return {name: value for name, value in recorded.items() if value is not None}


def _stack(axes: Axes, position: int, row: ComparisonRow, run: RunRecord, unit_bytes: float) -> None:
    split, bottom = split_of(run), 0.0
    for name, color, hatch in CATEGORIES:
        if name in split:
            height = split[name] / unit_bytes
            axes.bar(
                position,
                height,
                _BAR_WIDTH,
                bottom=bottom,
                color=color,
                hatch=hatch,
                edgecolor="black",
                linewidth=0.5,
                label=name,
            )
            bottom += height
    total = (row.peak_bytes or 0) / unit_bytes
    if not split:
        axes.bar(position, total, _BAR_WIDTH, color="white", edgecolor="black", linewidth=0.8)
    axes.plot(
        position,
        total,
        _PHASES.get(row.peak_phase or "", _UNKNOWN_PHASE),
        color="black",
        markerfacecolor="white",
        markersize=6,
        gid=row.run_id,
    )


def _draw_times(axes: Axes, position: int, heights: Sequence[float], is_reference: bool) -> None:
    color, hatch = _TIME_BARS["reference" if is_reference else "candidate"]
    axes.bar(
        position,
        statistics.median(heights),
        _BAR_WIDTH,
        color=color,
        hatch=hatch,
        edgecolor="black",
        linewidth=0.6,
    )
    if len(heights) > 1:
        axes.plot([position] * len(heights), heights, "o", color="black", markersize=3)


def _time_legend(panels: Sequence[Panel]) -> list[Artist]:
    legend: list[Artist] = [
        Patch(facecolor=color, hatch=hatch, edgecolor="black", label=label)
        for label, (color, hatch) in _TIME_BARS.items()
    ]
    if _repeated(panels):
        legend.append(_marker("o", "each of the repeated runs; the bar is their median", "black"))
    return legend


def _memory_legend(comparison: Comparison, runs: Mapping[str, RunRecord]) -> list[Artist]:
    rows = [row for row in comparison.shown if row.peak_bytes is not None]
    drawn = {name for row in rows for name in split_of(runs[row.run_id])}
    legend: list[Artist] = [
        Patch(facecolor=color, hatch=hatch, edgecolor="black", label=name.replace("_", " "))
        for name, color, hatch in CATEGORIES
        if name in drawn
    ]
    phases = {row.peak_phase if row.peak_phase in _PHASES else None for row in rows}
    for phase, marker in _PHASES.items():
        if phase in phases:
            legend.append(_marker(marker, f"total, peak in {phase}"))
    if None in phases:
        legend.append(_marker(_UNKNOWN_PHASE, "total"))
    return legend


def _memory_notes(comparison: Comparison, runs: Mapping[str, RunRecord]) -> tuple[str, ...]:
    said = ["× is the ratio of totals to the reference's."]
    if any(row.memory_source == "allocator" for row in comparison.shown):
        said.append("Totals are the allocator's, the categories the tracker's: they may differ.")
    shown = [runs[row.run_id].metrics for row in comparison.shown]
    for key, words in _BESIDE.items():
        sizes = [metrics[key] for metrics in shown if key in metrics]
        if sizes:
            unit_bytes, unit = byte_unit(max(sizes))
            least, most = say_scaled(min(sizes), unit_bytes), say_scaled(max(sizes), unit_bytes)
            said.append(f"{words}: {least if least == most else f'{least} to {most}'} {unit}.")
    return (*said, *comparison.reference_notes)


def _marker(marker: str, label: str, face: str = "white") -> Line2D:
    return Line2D([], [], linestyle="", marker=marker, label=label, color="black", markerfacecolor=face)


def _repeated(panels: Sequence[Panel]) -> bool:
    return any(len(panel.at(steps)) > 1 for panel in panels for steps in panel.steps)


def _panel_width(panels: Sequence[Panel]) -> float:
    most = max(len(panel.steps) for panel in panels)
    return max(7.0 if len(panels) == 1 else 3.4, 0.34 * most + 0.8)


def _is_crowded(panel: Panel) -> bool:
    return len(panel.steps) > _MOST_UPRIGHT_LABELS


def _annotate(axes: Axes, position: int, height: float, ratio: float | None, panel: Panel) -> None:
    if ratio is None:
        return
    axes.annotate(
        f"{say_ratio(ratio)} ×",
        (position, height),
        xytext=(0, 7),
        textcoords="offset points",
        ha="center",
        va="bottom",
        fontsize=8,
        rotation=90 if _is_crowded(panel) else 0,
    )


def _say_missing(axes: Axes, position: int, rows: Sequence[ComparisonRow]) -> None:
    unfinished = [row.status for row in rows if not row.finished]
    words = unfinished[0] if unfinished else "not recorded"
    axes.text(
        position,
        0.03,
        words,
        transform=axes.get_xaxis_transform(),
        rotation=90,
        ha="center",
        va="bottom",
        fontsize=8,
    )


def _label_steps_axis(axes: Axes, panel: Panel) -> None:
    labels = []
    for steps in panel.steps:
        roles = [row.role for row in panel.at(steps) if row.is_reference]
        labels.append("\n".join([str(steps), *(_TICK_ROLES[role] for role in roles[:1])]))
    axes.set_xticks(range(len(labels)), labels, fontsize=8)
    axes.set_xlim(-0.8, max(len(labels), 3) - 0.2)
    axes.set_xlabel("N, micro-batches per optimizer step", fontsize=9)


def _finish(all_axes: Sequence[Axes], label: str, highest: float, panels: Sequence[Panel]) -> None:
    """Start the axes at zero and leave room for the ratios above the bars."""
    room = 1.3 if any(_is_crowded(panel) for panel in panels) else 1.18
    all_axes[0].set_ylim(0, highest * room or 1.0)
    all_axes[0].set_ylabel(label, fontsize=9)
    for axes in all_axes:
        axes.set_axisbelow(True)
        axes.grid(axis="y", linewidth=0.4, alpha=0.5)
